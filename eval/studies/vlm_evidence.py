"""Trains vision-language models with known evidence in minutes, and scores each method on them.

A photo has 64 x 64 pixels, or 8 x 8 image tokens. It shows four objects of 2 x 2 tokens in distinct
colours, each with a texture. The question names two colours; the answer says what these objects
look like:

    <s> <image> x 64 red blue ?          red dots and blue checks </s>

A texture can be known only from its object's 4 tokens (chance 4 / 64), a colour is copied from the
question, and "and" needs neither. The models are LLaVAs: a CLIP tower of width 64, a Llama of three
layers.

    python -m xattn.eval.studies vlm --output runs/vlm
    xattn caption runs/vlm/A/photos/000.png --vlm runs/vlm/A --prompt "red blue ?"

Each run's folder holds a model and its processor in the format of transformers, which ``load_vlm``
opens, together with photos and the truth about them (``truth.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import kept_values, reported
from xattn.eval.studies.small_training import minimize, single_thread
from xattn.vlm.explain import explain_tokens
from xattn.vlm.explainers.base import create_token_explainer, exclusive_use, list_token_explainers
from xattn.vlm.explainers.outcomes import OutcomesTrainer
from xattn.vlm.loading import load_vlm

SIDE, CELL, GRID = 64, 16, 8  # sides of a photo and an object in pixels, and of a photo in tokens
LOOKS = (1, 4)  # positions of the answer's words that say what an object looks like
COLOURS = {
    "red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.15), "pink": (0.95, 0.35, 0.85), "cyan": (0.15, 0.85, 0.9),
}  # fmt: skip
TEXTURES = ("rows", "columns", "slants", "checks", "dots", "solid")
# Further rows: a method, its options, and the score that it explains.
VARIANTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "attention, first layer": ("attention", {"layers": (0,)}, "log_prob"),
    "attention, last layer": ("attention", {"layers": (-1,)}, "log_prob"),
    "generic_relevance of the logit": ("generic_relevance", {}, "logit"),
    "gradcam of the logit": ("gradcam", {}, "logit"),
    "localization_heads, one head": ("localization_heads", {"heads": 1}, "log_prob"),
    "occlusion of one token": ("occlusion", {"size": 1}, "log_prob"),
}
CONTROLLED = ("attention", "integrated_gradients", "occlusion")
AND = 2  # position of the word "and", which says nothing about the image
WORDS = (*LOOKS, AND)
SCORES = ("pointing", "energy", "deletion", "insertion", "masks", "F1-IoU")
MASKS = 32  # held-out masks per photo
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class Run:
    """The data of one model and its training."""

    prior: float = 0.0
    """How often a colour has its own fixed texture, so that a guess is often right."""
    tied: bool = False
    """Whether the word embeddings also serve as the rows of the output layer."""
    local: bool = False
    """Whether each image token sees only its own patch, as the tower does not mix patches."""
    seed: int = 0
    steps: int = 500


RUNS = {
    "A": Run(),
    "B": Run(tied=True),
    "C": Run(seed=1),
    "local": Run(local=True),
    "prior": Run(prior=0.8),
}


class Scenes(NamedTuple):
    """``photos`` (n, 64, 64, 3), bytes; for the two objects in the question, ``colours`` (n, 2) and
    ``looks`` (n, 2) by number, and ``cells`` (n, 2), their places on the 4 x 4 grid, row by row."""

    photos: Tensor
    colours: NDArray[np.int64]
    looks: NDArray[np.int64]
    cells: NDArray[np.int64]

    def evidence(self, i: int, k: int) -> NDArray[np.bool_]:
        """The image tokens (8, 8) that show object ``k`` of photo ``i``."""
        y, x = divmod(int(self.cells[i, k]), GRID // 2)
        found = np.zeros((GRID, GRID), bool)
        found[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = True
        return found

    def question(self, i: int) -> str:
        a, b = (list(COLOURS)[c] for c in self.colours[i])
        return f"{a} {b} ?"


@cache
def textures() -> NDArray[np.float64]:
    """The textures, (6, 16, 16) in [0, 1], in the order of ``TEXTURES``."""
    y, x = np.mgrid[:CELL, :CELL]
    stripes = y // 2 % 2, x // 2 % 2, (x + y) // 2 % 2
    dots = (x % 4 < 2) & (y % 4 < 2)
    return np.stack([*stripes, (stripes[0] + stripes[1]) % 2, dots, 0 * x + 1]).astype(float)


def scenes(run: Run, count: int, seed: int) -> Scenes:
    """Draw photos with four objects each, two of which the question names."""
    rng = np.random.default_rng(seed)
    photos = np.full((count, SIDE, SIDE, 3), 0.5)
    n = GRID // 2
    cells = rng.permuted(np.tile(np.arange(n * n), (count, 1)), axis=1)[:, :4]
    colours = rng.permuted(np.tile(np.arange(6), (count, 1)), axis=1)[:, :4]
    looks = rng.integers(0, len(TEXTURES), (count, 4))
    looks = np.where(rng.random((count, 4)) < run.prior, colours, looks)
    table = np.array(list(COLOURS.values()))
    for i in range(count):
        for cell, colour, look in zip(cells[i], colours[i], looks[i], strict=True):
            y, x = CELL * (cell // n), CELL * (cell % n)
            shade = rng.uniform(0.8, 1) * (0.25 + 0.75 * textures()[look])
            photos[i, y : y + CELL, x : x + CELL] = shade[..., None] * table[colour]
    photos += rng.normal(0, 0.08, photos.shape)
    of_bytes = torch.from_numpy((photos.clip(0, 1) * 255).round().astype(np.uint8))
    return Scenes(of_bytes, colours[:, :2], looks[:, :2], cells[:, :2])


def all_words() -> list[str]:
    """The vocabulary, by token id."""
    return [*SPECIAL.values(), "<image>", "?", "and", *COLOURS, *TEXTURES]


def sequences(found: Scenes) -> Tensor:
    """The tokens of each photo's question and answer, (n, 1 + 64 + 3 + 6)."""
    number = {word: i for i, word in enumerate(all_words())}
    prompt = [number["<s>"]] + [number["<image>"]] * GRID**2
    colour, look = number["red"], number[TEXTURES[0]]
    rows = [
        [*prompt, a, b, number["?"], a, s, number["and"], b, t, number["</s>"]]
        for (a, b), (s, t) in zip(found.colours + colour, found.looks + look, strict=True)
    ]
    return torch.tensor(rows)


def processor_of() -> Any:
    """A processor with one token per word, which scales photos of 64 x 64 pixels to [-1, 1]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(all_words())}
    words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(
            size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}, **SPECIAL
        ),
        patch_size=SIDE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def untrained(run: Run) -> Any:
    """A LLaVA with random weights of the run's seed."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    ids = {f"{name}_id": all_words().index(token) for name, token in SPECIAL.items()}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    tower = {
        "num_hidden_layers": 1 if run.local else 2,
        "image_size": SIDE,
        "patch_size": SIDE // GRID,
    }
    words = {"num_hidden_layers": 3, "vocab_size": len(all_words()), "max_position_embeddings": 128}
    torch.manual_seed(run.seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **sizes, **tower},
            text_config={
                "model_type": "llama",
                **sizes,
                **words,
                **ids,
                "tie_word_embeddings": run.tied,
            },
            image_token_index=all_words().index("<image>"),
            vision_feature_layer=-2 if run.local else -1,
            tie_word_embeddings=run.tied,
        )
    )


def normalised(photos: Tensor) -> Tensor:
    """Photos as the processor passes them on: (n, 3, 64, 64) in [-1, 1]."""
    return photos.permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(run: Run, split: Split, batch: int = 32) -> tuple[Any, float]:
    """A trained model, and the CPU seconds of its training."""
    model = untrained(run)

    def losses() -> Iterator[Tensor]:
        for step in range(run.steps):
            seen = split.fit(scenes(run, batch, seed=1_000_000 * (run.seed + 1) + step))
            ids = sequences(seen)
            logits = model(ids, pixel_values=normalised(seen.photos)).logits[:, -7:-1]
            yield F.cross_entropy(logits.flatten(0, 1), ids[:, -6:].flatten())

    seconds = minimize(model, losses(), run.steps, 1e-3, 0.01, rise=0.2, max_norm=1)
    return model, seconds


@torch.no_grad()
def accuracy(model: Any, found: Scenes) -> float:
    """The share of looks that the model predicts as the most likely word."""
    ids = sequences(found)
    logits = model(ids, pixel_values=normalised(found.photos)).logits[:, -7:-1]
    return float((logits.argmax(2) == ids[:, -6:])[:, LOOKS].double().mean())


def write(folder: Path, name: str, run: Run, photos: int, tests: int) -> dict[str, Any]:
    """Train a model and save it in ``folder`` together with photos, unless it is already there.

    Returns:
        The settings of the run; ``right``, the share of test looks that it predicts; CPU
        ``seconds`` of training; and for each photo in ``photos/`` the question, the answer, and the
        image tokens that show the two objects.
    """

    def measure() -> dict[str, Any]:
        split = Split(f"{name},")
        model, seconds = trained(run, split)
        shown = split.score(scenes(run, photos, seed=7))
        share = accuracy(model, split.score(scenes(run, tests, seed=8)))
        model.save_pretrained(folder)
        processor_of().save_pretrained(folder)
        (folder / "photos").mkdir(exist_ok=True)
        truth = []
        for i, pixels in enumerate(shown.photos):
            file = f"{i:03}.png"
            Image.fromarray(pixels.numpy()).save(folder / "photos" / file)
            evidence = [shown.evidence(i, k).ravel().nonzero()[0].tolist() for k in (0, 1)]
            ids = sequences(shown)[i, -6:-1]
            answer = " ".join(all_words()[t] for t in ids)
            truth.append(
                {
                    "photo": file,
                    "question": shown.question(i),
                    "answer": answer,
                    "evidence": evidence,
                }
            )
        return {
            "run": asdict(run), "right": share, "seconds": seconds, "photos": truth,
            "parameters": sum(p.numel() for p in model.parameters()), "split": split.record(),
        }  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        found: dict[str, Any] = kept_values(folder / "truth.json", measure)
    if found["run"] != json.loads(json.dumps(asdict(run))):
        raise ValueError(f"output: {folder} holds another run; choose a new folder")
    return found


# ---------------------------------------------------------------------- what methods say


def pointing_and_energy(
    of: NDArray[np.floating], evidence: NDArray[np.bool_]
) -> tuple[float, float]:
    """Whether a map's largest value is in the evidence (or the share that is, among equals), and
    the share of its positive values there."""
    positive = of.clip(0)
    share = float(positive[evidence].sum() / (positive.sum() or 1))
    return float(evidence[of == of.max()].mean()), share


def f1_iou(
    objects: Sequence[NDArray[np.floating]],
    evidence: Sequence[NDArray[np.bool_]],
    function: NDArray[np.floating],
) -> float:
    """F1-IoU of TAM (Li et al., 2025) for one answer: the maps of object words should be bright
    only on their evidence, that of the function word nowhere.

    Obj-IoU is the mean IoU, at the photo's size, between the evidence and objects' maps above their
    Otsu thresholds. Func-IoU is the share of the function word's map below the mean threshold. The
    result is their harmonic mean. Maps are bytes: positive values relative to the largest in the
    answer.
    """
    from skimage.filters import threshold_otsu

    largest = max(float(of.max()) for of in (*objects, function)) or 1.0

    def in_bytes(of: NDArray[np.floating]) -> NDArray[np.uint8]:
        bright = torch.from_numpy(255 * of.clip(0) / max(largest, 1e-30))[None, None].double()
        fine = F.interpolate(bright, (SIDE, SIDE), mode="bilinear")[0, 0]
        return fine.numpy().astype(np.uint8)  # type: ignore[no-any-return]

    levels, overlaps = [], []
    for of, true in zip(map(in_bytes, objects), evidence, strict=True):
        levels.append(float(threshold_otsu(of)) if np.ptp(of) else 0.0)
        shown, true = of > levels[-1], true.repeat(SIDE // GRID, 0).repeat(SIDE // GRID, 1)
        overlaps.append((shown & true).sum() / (shown | true).sum())
    dark = float((in_bytes(function) < np.mean(levels)).mean())
    whole = float(np.mean(overlaps))
    return 2 * whole * dark / (whole + dark) if whole + dark else 0.0


class Masked:
    """Measures what a word loses while image tokens are replaced by their mean: a sixteenth at a
    time in a map's order, and under random masks of objects' size, which no explainer has seen."""

    def __init__(self, vlm: Any, photo: Image.Image, question: str, answer: str, seed: int) -> None:
        self.vlm, inputs = vlm, vlm.inputs([photo], question)
        self.ids = torch.tensor(vlm.tokenizer(answer, add_special_tokens=False)["input_ids"])
        self.forced, self.entered = vlm.forced(inputs, self.ids), vlm.entered(inputs)
        blocks = np.random.default_rng([9, seed]).random((MASKS, GRID // 2, GRID // 2)) < 0.5
        self.masks = blocks.repeat(2, 1).repeat(2, 2).reshape(MASKS, -1)
        self.outcomes = self.log_probs(self.masks)

    @torch.no_grad()
    def log_probs(self, hidden: NDArray[np.bool_]) -> NDArray[np.floating]:
        """(M, T): log probabilities of the answer's tokens while masks (M, n) hide image tokens."""
        f = self.entered.features
        filled = torch.where(torch.from_numpy(hidden)[:, :, None], f.mean(0), f)
        found = self.vlm.logits(self.forced, self.entered, filled).log_softmax(2)
        return found[:, range(len(self.ids)), self.ids].numpy()  # type: ignore[no-any-return]

    def __call__(self, of: NDArray[np.floating], word: int) -> tuple[float, float, float]:
        """Deletion, insertion and correlation of a map.

        Deletion is the mean probability of the word while the map's best tokens are hidden, lower
        is better; insertion, the same while the others are hidden, higher is better. The
        correlation is between the map's sum over the tokens that a mask hides and what the word
        loses by it.
        """
        rank = (-of).ravel().argsort(kind="stable").argsort(kind="stable")
        gone = rank < np.linspace(0, of.size, 17)[:, None]
        p = np.exp(self.log_probs(np.concatenate([gone, ~gone]))[:, word]).reshape(2, -1)
        sums = self.masks @ of.ravel().astype(float)
        related = np.corrcoef(sums, -self.outcomes[:, word])[0, 1] if np.ptp(sums) else 0.0
        deleted, inserted = np.trapezoid(p, dx=1 / 16).tolist()
        return deleted, inserted, float(related)


def controls(i: int, word: int) -> dict[str, NDArray[np.float64]]:
    """Maps that do not depend on the model: noise, closeness to the middle, and a constant."""
    y, x = np.mgrid[:GRID, :GRID] - (GRID - 1) / 2
    noise = np.random.default_rng([i, word]).random((GRID, GRID))
    return {"random": noise, "centre": GRID - np.hypot(y, x), "all ones": np.ones((GRID, GRID))}


def true_cells(cells: Sequence[int]) -> NDArray[np.bool_]:
    """(8, 8): the image tokens that show an object."""
    found = np.zeros((GRID, GRID), bool)
    found.flat[cells] = True
    return found


def conversation(folder: Path, truth: Mapping[str, Any]) -> tuple[Path, str, str]:
    """A photo's path, the question about it, and the correct answer."""
    return folder / "photos" / truth["photo"], truth["question"], truth["answer"]


def trained_head(vlm: Any, run: Run, split: Split, photos: int) -> Any:
    """The explainer that reads attention rows, trained on masks of other photos."""
    trainer = OutcomesTrainer()
    seen = split.fit(scenes(run, photos, seed=9))
    answers = sequences(seen)[:, -6:-1]
    for i, pixels in enumerate(seen.photos):
        text = " ".join(all_words()[t] for t in answers[i])
        explain_tokens(pixels.numpy(), vlm, seen.question(i), text, trainer, words=list(LOOKS))
    return trainer.fit()


def with_random_words(vlm: Any, folder: Path, run: Run) -> Any:
    """The same tower with an untrained language model: its maps show what needs no training."""
    model = type(vlm.model).from_pretrained(folder).eval()
    fresh = untrained(replace(run, seed=run.seed + 100))
    model.model.language_model.load_state_dict(fresh.model.language_model.state_dict())
    model.lm_head.load_state_dict(fresh.lm_head.state_dict())
    return load_vlm(model, vlm.processor)


def scored(
    folder: Path, name: str, found: Mapping[str, Any], methods: Sequence[str]
) -> dict[str, Any]:
    """By method, the scores of each look in each photo; by kind of word, loss without the image."""
    vlm, split = load_vlm(folder), Split(f"{name},")
    run = Run(**found["run"])
    rows: dict[str, list[tuple[float, ...]]] = {}
    lost: dict[str, list[float]] = {"look": [], "colour": [], "and": []}
    variants = {k: v for k, v in VARIANTS.items() if v[0] in methods}
    untaught = with_random_words(vlm, folder, run)
    plain = [m for m in CONTROLLED if m in methods]
    if "outcomes" in methods:
        head = trained_head(vlm, run, split, 2 * len(found["photos"]))
    for i in split.score(range(len(found["photos"]))):
        truth = found["photos"][i]
        about = conversation(folder, truth)
        (answer,) = explain_tokens(about[0], vlm, *about[1:], [*methods])
        for kind, numbers in (("look", LOOKS), ("colour", (0, 3)), ("and", (AND,))):
            lost[kind] += [float(answer.lost[n]) for n in numbers]
        others = {}
        for label, (method, options, score) in variants.items():
            one = create_token_explainer(method, **options)
            (others[label],) = explain_tokens(about[0], vlm, *about[1:], one, [*WORDS], score=score)
        (random,) = explain_tokens(about[0], untaught, *about[1:], plain, [*WORDS])
        another = found["photos"][(i + 1) % len(found["photos"])]["photo"]
        (misled,) = explain_tokens(folder / "photos" / another, vlm, *about[1:], plain, [*WORDS])
        if "outcomes" in methods:
            heads = {"trained": head, "trained, whole rows": replace(head, above_mean=False)}
            for label, own in heads.items():
                (others[f"outcomes, {label}"],) = explain_tokens(
                    about[0], vlm, *about[1:], own, [*WORDS]
                )
        explained: dict[int, dict[str, NDArray[Any]]] = {}
        for word in WORDS:
            maps = {m: answer.of(word, m).explanations[0].map for m in methods}
            maps |= {label: own[word].map for label, own in others.items()}
            for m in plain:
                maps[f"{m}, random weights"] = random.of(word, m).explanations[0].map
                maps[f"{m}, another photo"] = misled.of(word, m).explanations[0].map
            maps["map of the word before"] = answer.of(word - 1, methods[0]).explanations[0].map
            explained[word] = dict(sorted(maps.items())) | controls(i, word)
        evidence = [true_cells(cells) for cells in truth["evidence"]]
        with exclusive_use(vlm), Image.open(about[0]) as opened:
            masked = Masked(vlm, opened.convert("RGB"), *about[1:], seed=i)
            for label, function in explained[AND].items():
                looks = [explained[word][label] for word in LOOKS]
                whole = f1_iou(looks, evidence, function)
                rows.setdefault(label, []).extend(
                    (*pointing_and_energy(of, true), *masked(of, word), whole)
                    for word, of, true in zip(LOOKS, looks, evidence, strict=True)
                )
    return {"methods": [*methods], "rows": rows, "lost": lost}


def report(found: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the report: what runs learned, which words need the image, and a row per method."""
    runs = list(found)
    losses = 'nats lost: texture | colour | "and"'
    yield f"| run | parameters | seconds | texture accuracy | {losses} | classified correctly |"
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: |"
    for name in runs:
        lost = values[name]["lost"]
        rest = np.array(lost["colour"] + lost["and"])
        marked = f"{np.mean(np.array(lost['look']) >= 0.1):.0%} / {np.mean(rest < 0.1):.0%}"
        cells = [name, f"{found[name]['parameters']:,}", f"{found[name]['seconds']:.0f}"]
        cells += [
            f"{found[name]['right']:.3f}",
            *(f"{np.mean(x):.2f}" for x in lost.values()),
            marked,
        ]
        yield f"| {' | '.join(cells)} |"
    heads = " | ".join(f"{name} | mean" for name in SCORES[1:])
    yield f"\n| method | pointing {' / '.join(runs)} | mean | {heads} |"
    yield f"| :-- |{' --: |' * 2 * len(SCORES)}"
    for method in values[runs[0]]["rows"]:
        means = np.array([np.mean(values[name]["rows"][method], 0) for name in runs]).T
        cells = [
            c for of in means for c in (" / ".join(f"{v:.2f}" for v in of), f"{of.mean():.2f}")
        ]
        yield f"| {method} | {' | '.join(cells)} |"


def study(
    output: OutputAt = "runs/study-vlm",
    runs: Sequence[str] = ("A", "B", "C", "local"),
    methods: Sequence[str] = (),
    photos: int = 32,
    quick: Quick = False,
) -> Iterator[str]:
    """Train the missing models, score every method, write report.md, and yield its lines.

    Args:
        runs: any of A, B (tied embeddings), C (another seed), local, prior.
        methods: token explainers; by default, all registered ones.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown:
        raise ValueError(f"runs: got {unknown[0]!r}; choose from {', '.join(RUNS)}")
    every = ["attention", "occlusion"] if quick else list_token_explainers()
    output, methods = Path(output), list(methods) or every
    found, values = {}, {}
    for name in runs:
        run = replace(RUNS[name], steps=2) if quick else RUNS[name]
        photos, tests = (2, 4) if quick else (photos, 500)
        with single_thread():
            found[name] = write(output / name, name, run, photos, tests)
            file = output / f"{name}-scores.json"
            measure = partial(scored, output / name, name, found[name], methods)
            values[name] = kept_values(file, measure)
        if values[name]["methods"] != methods:
            raise ValueError(f"methods: {file} has others; delete it, to measure again")
    table = [
        {"run": name, "method": method, "look": i}
        | {key: round(value, 3) for key, value in zip(SCORES, scores, strict=True)}
        for name in runs
        for method, rows in values[name]["rows"].items()
        for i, scores in enumerate(rows)
    ]
    yield from reported(output, [*report(found, values)], {"values": table})

"""Vision-language models whose evidence is known, trained in minutes.

A photo of 64 x 64 pixels, 8 x 8 image tokens, shows four objects of 2 x 2 tokens in distinct colours, each
with a texture. The question names two colours; the answer says what these objects look like:

    <s> <image> x 64 red blue ?          red dots and blue checks </s>

A texture can be known from its object's 4 tokens alone (chance 4 / 64), a colour is copied from the
question, "and" needs neither. The models are LLaVAs: a CLIP tower of width 64, a Llama of three layers.

    python -m xattn.eval.studies vlm --output runs/vlm

Each run's folder is a model as transformers saves it, with its processor; beside it are photos, and what is
true of them (``truth.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import load_digits
from xattn.eval.studies.kept import kept_values, reported
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.small_training import minimize, single_thread

SIDE, CELL, GRID = 64, 16, 8  # pixels of a photo and of an object, tokens of a side
LOOKS = (1, 4)  # words of the answer that say what an object looks like
COLOURS = {
    "red": (0.9, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.15), "pink": (0.95, 0.35, 0.85), "cyan": (0.15, 0.85, 0.9),
}  # fmt: skip
TEXTURES = ("rows", "columns", "slants", "checks", "dots", "solid")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Run:
    """What one model is trained on, and how."""

    looks: tuple[str, ...] = TEXTURES
    """The words for what an object looks like: textures, or the names of digits."""
    prior: float = 0.0
    """How often a colour has the texture of its number, instead of any: then a guess is often right."""
    tied: bool = False
    """Whether the embeddings of words are also the rows of the head."""
    local: bool = False
    """Whether image tokens are patches alone, from a tower in which none sees another."""
    seed: int = 0
    steps: int = 500


RUNS = {
    "A": Run(),
    "B": Run(tied=True),
    "C": Run(seed=1),
    "local": Run(local=True, steps=300),
    "digits": Run(looks=COUNTS, steps=1000),
    "prior": Run(prior=0.8),
}


class Scenes(NamedTuple):
    """``photos`` (n, 64, 64, 3), bytes; of the two objects that are asked for: ``colours`` (n, 2) and
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
    """(6, 1, 16, 16) in [0, 1], by the names of ``TEXTURES``."""
    y, x = np.mgrid[:CELL, :CELL]
    stripes = y // 2 % 2, x // 2 % 2, (x + y) // 2 % 2
    dots = (x % 4 < 2) & (y % 4 < 2)
    return np.stack([*stripes, (stripes[0] + stripes[1]) % 2, dots, 0 * x + 1]).astype(float)[
        :, None
    ]


@cache
def _digits(held_out: bool) -> tuple[NDArray[np.float64], ...]:
    """Of each digit its images, (m, 16, 16) in [0, 1]."""
    found = load_digits()[held_out]
    large = found.images[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2).double().numpy()
    return tuple(large[found.labels.numpy() == d] for d in range(10))


def scenes(run: Run, count: int, seed: int, held_out: bool = False) -> Scenes:
    """Photos with four objects each, two of which are asked for."""
    rng = np.random.default_rng(seed)
    patterns = textures() if run.looks == TEXTURES else _digits(held_out)
    photos = np.full((count, SIDE, SIDE, 3), 0.5)
    n = GRID // 2
    cells = rng.permuted(np.tile(np.arange(n * n), (count, 1)), axis=1)[:, :4]
    colours = rng.permuted(np.tile(np.arange(6), (count, 1)), axis=1)[:, :4]
    looks = rng.integers(0, len(run.looks), (count, 4))
    looks = np.where(rng.random((count, 4)) < run.prior, colours, looks)
    table = np.array(list(COLOURS.values()))
    for i in range(count):
        for cell, colour, look in zip(cells[i], colours[i], looks[i], strict=True):
            y, x = CELL * (cell // n), CELL * (cell % n)
            pattern = patterns[look][rng.integers(len(patterns[look]))]
            shade = rng.uniform(0.8, 1) * (0.25 + 0.75 * pattern)
            photos[i, y : y + CELL, x : x + CELL] = shade[..., None] * table[colour]
    photos += rng.normal(0, 0.08, photos.shape)
    of_bytes = torch.from_numpy((photos.clip(0, 1) * 255).round().astype(np.uint8))
    return Scenes(of_bytes, colours[:, :2], looks[:, :2], cells[:, :2])


def words_of(run: Run) -> list[str]:
    """The vocabulary, by token id."""
    return [*SPECIAL.values(), "<image>", "?", "and", *COLOURS, *run.looks]


def sequences(run: Run, found: Scenes) -> Tensor:
    """Question and answer of each photo, (n, 1 + 64 + 3 + 6)."""
    number = {word: i for i, word in enumerate(words_of(run))}
    prompt = [number["<s>"]] + [number["<image>"]] * GRID**2
    colour, look = number["red"], number[run.looks[0]]
    rows = [
        [*prompt, a, b, number["?"], a, s, number["and"], b, t, number["</s>"]]
        for (a, b), (s, t) in zip(found.colours + colour, found.looks + look, strict=True)
    ]
    return torch.tensor(rows)


def processor_of(run: Run) -> Any:
    """One token a word, and photos of 64 x 64 pixels as they are, in [-1, 1]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words_of(run))}
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

    ids = {f"{name}_id": words_of(run).index(token) for name, token in SPECIAL.items()}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    tower = {
        "num_hidden_layers": 1 if run.local else 2,
        "image_size": SIDE,
        "patch_size": SIDE // GRID,
    }
    words = {
        "num_hidden_layers": 3,
        "vocab_size": len(words_of(run)),
        "max_position_embeddings": 128,
    }
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
            image_token_index=words_of(run).index("<image>"),
            vision_feature_layer=-2 if run.local else -1,
            tie_word_embeddings=run.tied,
        )
    )


def normalised(photos: Tensor) -> Tensor:
    """What the processor makes of photos: (n, 3, 64, 64) in [-1, 1]."""
    return photos.permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(run: Run, split: Split, batch: int = 32) -> tuple[Any, float]:
    """A model that answers, and the CPU seconds that it took."""
    model = untrained(run)

    def losses() -> Iterator[Tensor]:
        for step in range(run.steps):
            seen = split.fit(scenes(run, batch, seed=1_000_000 * (run.seed + 1) + step))
            ids = sequences(run, seen)
            logits = model(ids, pixel_values=normalised(seen.photos)).logits[:, -7:-1]
            yield F.cross_entropy(logits.flatten(0, 1), ids[:, -6:].flatten())

    seconds = minimize(model, losses(), run.steps, 1e-3, 0.01, rise=0.2, max_norm=1)
    return model, seconds


@torch.no_grad()
def right(model: Any, run: Run, found: Scenes) -> float:
    """Share of the looks that are the likeliest word."""
    ids = sequences(run, found)
    logits = model(ids, pixel_values=normalised(found.photos)).logits[:, -7:-1]
    return float((logits.argmax(2) == ids[:, -6:])[:, LOOKS].double().mean())


def write(folder: Path, name: str, run: Run, photos: int, tests: int) -> dict[str, Any]:
    """Train a model and keep it in ``folder`` with photos, unless it is there.

    Returns:
        What the run is; ``right``, the share of test looks that it tells; CPU ``seconds`` of training; and
        of each photo in ``photos/`` its question, answer, and the image tokens that show the two objects.
    """

    def measure() -> dict[str, Any]:
        split = Split(f"{name},")
        model, seconds = trained(run, split)
        shown = split.score(scenes(run, photos, seed=7, held_out=True))
        share = right(model, run, split.score(scenes(run, tests, seed=8, held_out=True)))
        model.save_pretrained(folder)
        processor_of(run).save_pretrained(folder)
        (folder / "photos").mkdir(exist_ok=True)
        truth = []
        for i, pixels in enumerate(shown.photos):
            file = f"{i:03}.png"
            Image.fromarray(pixels.numpy()).save(folder / "photos" / file)
            evidence = [shown.evidence(i, k).ravel().nonzero()[0].tolist() for k in (0, 1)]
            ids = sequences(run, shown)[i, -6:-1]
            answer = " ".join(words_of(run)[t] for t in ids)
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


def lines_of(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the runs learned."""
    yield "| run | parameters | seconds | looks right |"
    yield "| :-- | --: | --: | --: |"
    for name, of in found.items():
        cells = [name, f"{of['parameters']:,}", f"{of['seconds']:.0f}", f"{of['right']:.3f}"]
        yield f"| {' | '.join(cells)} |"


def study(
    output: OutputAt = "runs/study-vlm",
    runs: Sequence[str] = ("A", "B", "C", "local"),
    photos: int = 32,
    quick: Quick = False,
) -> Iterator[str]:
    """Train what is not there yet, write report.md, and give its lines.

    Args:
        runs: of A, B (tied embeddings), C (another seed), local, digits, prior.
        photos: how many are kept beside each model.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown:
        raise ValueError(f"runs: got {unknown[0]!r}; choose from {', '.join(RUNS)}")
    output, found = Path(output), {}
    for name in runs:
        run = replace(RUNS[name], steps=2) if quick else RUNS[name]
        with single_thread():
            found[name] = write(
                output / name, name, run, 2 if quick else photos, 4 if quick else 500
            )
    rows = [
        {"run": n, "parameters": f["parameters"], "seconds": f["seconds"], "right": f["right"]}
        for n, f in found.items()
    ]
    yield from reported(output, [*lines_of(found)], {"values": rows})

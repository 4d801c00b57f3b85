"""Settings of the studies: plain dataclasses, importable without torch, read by the CLI as they are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from xattn.config import AttentionTraining

Attention = Literal["additive", "dot"]
LengthTask = Literal["recall", "regression"]


@dataclass(frozen=True)
class TextStudyConfig:
    """What is trained, and how often."""

    methods: tuple[AttentionTraining, ...] = ("none", "random", "at", "iat", "iat_released")
    """none is the vanilla model, which the others are compared with."""
    attention: tuple[Attention, ...] = ("additive",)
    """Scores v . tanh(W h + b), or w . h / sqrt(width of h)."""
    seeds: int = 10
    """Runs of each method with its chosen epsilon and weight: seeds 0, 1, ..."""
    epsilons: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Norms of the perturbation to choose from."""
    weights: tuple[float, ...] = (0.5, 1.0)
    """Of the loss at the perturbed scores beside the clean loss, to choose from."""
    grid_seeds: int = 2
    """Runs of each epsilon and weight that the choice is made from."""
    monitor: Literal["auc", "f1"] = "auc"
    """Held-out score that chooses the epoch, epsilon and weight."""
    epochs: int = 8
    """Passes over the training sentences at most; the held-out tenth chooses the best."""
    patience: int = 2
    """Stop after this many epochs without improvement; 0 trains all epochs."""
    batch_size: int = 32
    """Sentences a step."""
    lr: float = 1e-3
    """Of Adam with AMSGrad."""
    embedding: int = 100
    """Width of the word vectors, which are trained."""
    width: int = 64
    """Hidden units of the BiLSTM in each direction."""
    vectors: Path | None = None
    """Word vectors to start from, a text file as fastText or GloVe write it; random ones by default."""

    def __post_init__(self) -> None:
        for name in ("seeds", "grid_seeds", "epochs", "batch_size", "embedding", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")
        if self.grid_seeds > self.seeds:
            raise ValueError(
                f"grid_seeds: got {self.grid_seeds}; give at most seeds = {self.seeds}"
            )
        if self.patience < 0:
            raise ValueError(f"patience: got {self.patience}; give 0 or more")
        _check_methods(self.methods)
        if not self.epsilons or min(self.epsilons) <= 0:
            raise ValueError(f"epsilons: got {self.epsilons}; give positive norms")
        if not self.weights or min(self.weights) <= 0:
            raise ValueError(f"weights: got {self.weights}; give positive weights")
        if self.monitor not in ("auc", "f1"):
            raise ValueError(f"monitor: got {self.monitor!r}; choose 'auc' or 'f1'")


@dataclass(frozen=True)
class ImageStudyConfig:
    """What is trained and tested on photos."""

    backbones: tuple[str, ...] = ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
    """timm models with package weights."""
    heads: tuple[str, ...] = ("efficient_probe", "memetector", "abmilp")
    """Attentive heads that learn their scores."""
    methods: tuple[AttentionTraining, ...] = ("none", "random", "at", "iat", "iat_released")
    """none is plain training, which the others are compared with."""
    strength: float = 0.3
    """Root mean square change of a token's score: epsilon / sqrt(tokens)."""
    noise: float = 0.1
    """Standard deviation of the noise on pixels in [0, 1]."""
    folds: int = 5
    """Parts of the photos; each is tested once, with a seed of its own."""
    input_size: int = 224
    """Side of the model's input in pixels."""

    def __post_init__(self) -> None:
        _check_methods(self.methods)
        for name in ("strength", "noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")


@dataclass(frozen=True)
class PartStudyConfig:
    """What heads are trained on: each share of web photos with each share of text on them."""

    backbone: str = "vit_small_patch14_dinov2"
    """A timm model."""
    input_size: int = 224
    """Side of the model's input in pixels."""
    head: str = "memetector"
    """An attentive head that learns its scores."""
    hidden: tuple[int, ...] = (256, 128)
    """Widths of memetector's MLP; published, for 10,000 memes: 2048 1024."""
    p_conc: tuple[float, ...] = (1 / 3, 1.0)
    """Shares of web photos in the regular class, the rest are crops of the macros; 1 is without crops."""
    p_txt: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Shares of the web photos that carry text."""
    worn: bool = True
    """Macros were made smaller and compressed more, web photos were not."""
    folds: int = 5
    """Parts of the photos; each is tested once, by heads of a seed of its own."""
    seed: int = 0
    """Of macros, folds, training and the photos of a limit."""
    limit: int | None = None
    """Use only so many photos, spread over their folders."""

    def __post_init__(self) -> None:
        shares = (*self.p_conc, *self.p_txt)
        if 1.0 not in self.p_conc or not self.p_txt or not all(0 <= p <= 1 for p in shares):
            raise ValueError(
                f"p_conc, p_txt: got {self.p_conc} and {self.p_txt}; give shares in [0, 1], and 1 "
                f"among p_conc"
            )
        if self.folds < 2:
            raise ValueError(f"folds: got {self.folds}; give 2 or more")

    @property
    def images(self) -> str:
        """Folder of the macros, the photos with text and the crops."""
        return "worn" if self.worn else "same"

    @property
    def features(self) -> str:
        """Folder of the features, in which each choice of taps has a folder of its own."""
        return f"features-{self.backbone}-{self.input_size}-{self.images}"

    @property
    def name(self) -> str:
        """Of the results."""
        return f"{self.backbone}-{self.input_size}-{self.head}-{self.images}"


class SizePlan(NamedTuple):
    """What the swap study measures at one size: photos by part, and rounds of timing."""

    counts: dict[str, int]
    rounds: int


@dataclass(frozen=True)
class SwapStudyConfig:
    """How many photos and rounds at each size; networks are distilled at the first."""

    sizes: tuple[int, ...] = (224, 448, 896)
    """Pixels a side; a ViT's positions are resized."""
    photos: tuple[int, ...] = (500, 100, 16)
    """Photos at each size: accuracy and cosines."""
    maps: tuple[int, ...] = (100, 16, 2)
    """Photos whose maps are compared with the trained network's."""
    fidelity: tuple[int, ...] = (24, 0, 0)
    """Photos whose maps are scored: AD, IC, ADD, insertion, deletion, ROAD."""
    rounds: tuple[int, ...] = (9, 5, 3)
    """Rounds of timing, whose median counts."""
    explainer: str = "generic_relevance"
    """Whose maps are compared and scored, as NAME:option=value,..."""
    steps: int = 20
    """Of insertion and deletion."""
    epochs: int = 2
    """Passes over half of the photos in which each layer of a mechanism that needs training learns."""
    finetune_epochs: int = 2
    """Passes afterwards that train low-rank updates around it, too; 0 leaves them out."""
    block: int = 25
    """Photos that are measured before anything is written."""
    seed: int = 0
    """Of the order of the photos, and of training."""
    workers: int = 2
    """Loader processes of training."""

    def __post_init__(self) -> None:
        for name in ("photos", "maps", "fidelity", "rounds"):
            given = getattr(self, name)
            if len(given) != len(self.sizes) or min(given, default=0) < 0:
                raise ValueError(
                    f"{name}: got {given}; give a number of 0 or more for each of the sizes "
                    f"{self.sizes}"
                )
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or min(self.sizes) < 1:
            raise ValueError(f"sizes: got {self.sizes}; give each size once")
        for name in ("steps", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 1")
        if self.epochs + self.finetune_epochs < 1 or min(self.epochs, self.finetune_epochs) < 0:
            raise ValueError(
                f"epochs, finetune_epochs: got {self.epochs}, {self.finetune_epochs}; give 1 or more "
                f"together"
            )

    def plan(self, size: int) -> SizePlan:
        """What is measured at one of the sizes."""
        at = self.sizes.index(size)
        counts = {"quality": self.photos[at], "maps": self.maps[at], "fidelity": self.fidelity[at]}
        return SizePlan(counts, self.rounds[at])


@dataclass(frozen=True)
class PositionStudyConfig:
    """What the study of positions trains, on how many photos, and at which sizes it tests."""

    encodings: tuple[str, ...] = (
        "absolute",
        "none",
        "axial",
        "axial:span=14",
        "liere:init_std=0",
        "comrope:form=ap,init_std=0",
        "comrope:form=ld,init_std=0",
    )
    """"absolute", the network's own positions; "none"; or rotations, as NAME:option=value,..."""
    size: int = 224
    """Pixels a side in training."""
    sizes: tuple[int, ...] = (112, 160, 224, 336, 448)
    """Pixels a side in tests."""
    photos: int = 500
    """How many photos, drawn by the seed; every other one is trained on, the rest are tested."""
    keep_absolute: bool = False
    """Rotate beside the network's own positions, not in their place."""
    epochs: int = 6
    """Passes over the photos to train on, the same for every encoding."""
    batch_size: int = 16
    """Photos a step."""
    lr: float = 1e-4
    """Of AdamW, for the network's weights; rises for a twentieth of the steps, then half a cosine to 0."""
    rotation_lr: float = 1e-2
    """Of what a rotation learns."""
    weight_decay: float = 0.01
    """Of the network's matrices."""
    seed: int = 0
    """Of photos, order, flips and jitter."""

    def __post_init__(self) -> None:
        if not self.encodings or len(set(self.encodings)) < len(self.encodings):
            raise ValueError(f"encodings: got {self.encodings}; give each once")
        if not self.sizes or min(*self.sizes, self.size) < 1:
            raise ValueError(f"sizes, size: got {self.sizes}, {self.size}; give numbers of pixels")
        for name, least in (("photos", 2), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {least}")
        for name in ("lr", "rotation_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: got {self.weight_decay}; give at least 0")

    def quick(self) -> PositionStudyConfig:
        """A few photos and steps, to see that all runs: no figure of it means anything."""
        sizes = (self.size // 2, self.size)
        return replace(self, photos=min(self.photos, 16), epochs=1, batch_size=4, sizes=sizes)


@dataclass(frozen=True)
class DepthStudyConfig:
    """Which blocks are converted, and how long they are trained."""

    attention: str = "hedgehog"
    """The mechanism, as NAME:option=value,...; it has to have parameters."""
    last: tuple[int, ...] = (3, 6, 9, 12)
    """Numbers of blocks, counted from the last."""
    photos: int = 500
    """How many photos, drawn by the seed."""
    folds: int = 2
    """Parts of the photos; a network for each learns from the other parts."""
    epochs: int = 6
    """Passes on the tokens of the trained network."""
    student_epochs: int = 3
    """Passes on the tokens of the converted network."""
    finetune_epochs: int = 6
    """Passes that train low-rank updates, too."""
    finetune_lr: float = 1e-3
    """Their peak learning rate."""
    heads: int = 32
    """Photos of a fold on which rows are compared head by head."""
    seed: int = 0
    """Of the order of the photos, and of training."""
    workers: int = 0
    """Loader processes of training."""

    def __post_init__(self) -> None:
        if not self.last or len(set(self.last)) < len(self.last) or min(self.last) < 1:
            raise ValueError(f"last: got {self.last}; give numbers of at least 1, each once")
        if self.folds < 2:
            raise ValueError(f"folds: got {self.folds}; give 2 or more")
        for name in ("photos", "finetune_epochs", "finetune_lr", "heads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")
        if min(self.epochs, self.student_epochs) < 0 or not self.epochs + self.student_epochs:
            raise ValueError(
                f"epochs, student_epochs: got {self.epochs}, {self.student_epochs}; give 1 or more "
                f"together"
            )


@dataclass(frozen=True)
class LengthStudyConfig:
    """What the length study trains, how long, and at which lengths it tests."""

    mechanisms: tuple[str, ...] = (
        "softmax",
        "flow",
        "hedgehog",
        "based",
        "lla",
        "lssar",
        "lssar:power=3",
        "nsa",
    )
    """Mechanisms with a causal form, as NAME:option=value,..."""
    tasks: tuple[LengthTask, ...] = ("recall", "regression")
    """Associative recall of many queries, and linear regression in context."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Tokens of the sequences that are tested."""
    longest: dict[str, int] = field(default_factory=lambda: {"lla": 4096})
    """The most tokens that a mechanism is tested at, by its name."""
    train_length: int = 256
    """Tokens of the sequences that are trained on."""
    steps: int = 300
    """Of training."""
    minutes: float = 2.0
    """Of processor time, after which a training ends before its last step; the report then says so."""
    batch_size: int = 8
    """Sequences a step."""
    learning_rates: tuple[float, ...] = (0.005, 0.02)
    """Peaks to choose from, for each mechanism and task, by other sequences and another seed."""
    seeds: int = 3
    """Networks of each mechanism and task."""
    width: int = 64
    """Channels."""
    heads: int = 1
    """Heads of attention."""
    pairs: int = 16
    """Of keys and values in a sequence as long as in training."""
    test_tokens: int = 32768
    """Tokens of all sequences of a test, at least."""
    least_sequences: int = 4
    """The fewest sequences of a test."""

    def __post_init__(self) -> None:
        for name in ("mechanisms", "tasks", "lengths", "learning_rates"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: got {given}; give each once")
        if set(self.tasks) - set(get_args(LengthTask)):
            raise ValueError(
                f"tasks: got {', '.join(self.tasks)}; choose from {', '.join(get_args(LengthTask))}"
            )
        for length in (self.train_length, *self.lengths):
            if length < 4 or length % 2:
                raise ValueError(
                    f"lengths, train_length: got {length}; give even numbers of 4 or more"
                )
        for name in ("steps", "batch_size", "seeds", "width", "heads", "pairs", "test_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 1")
        if self.least_sequences < 1:
            raise ValueError(f"least_sequences: got {self.least_sequences}; give at least 1")
        if not all(0 < x < float("inf") for x in (self.minutes, *self.learning_rates)):
            raise ValueError(
                f"minutes, learning_rates: got {self.minutes}, {self.learning_rates}; give positive "
                f"numbers"
            )

    def sequences(self, length: int) -> int:
        """How many are tested at a length."""
        return max(self.least_sequences, -(-self.test_tokens // length))

    def quick(self) -> LengthStudyConfig:
        """A few steps on short sequences, to see that all runs: no figure of it means anything."""
        return replace(
            self, lengths=(32, 64), train_length=32, steps=4, batch_size=2, seeds=1,
            learning_rates=self.learning_rates[:1], width=16, pairs=2, test_tokens=64,
            least_sequences=2,
        )  # fmt: skip


@dataclass(frozen=True)
class DialStudyConfig:
    """Which blocks get the localist dial, how far it is turned, and on how many photos."""

    betas: tuple[float, ...] = (0.0, 4.0, 16.0, 64.0)
    """Turns of the dial; 0, as trained, is always measured."""
    last: int = 3
    """How many of the last blocks get it; all blocks are measured beside them."""
    steered: int = 6
    """How many of the last blocks are steered to a quadrant."""
    steer_beta: float = 2.0
    """How strongly."""
    photos: int = 100
    """How many photos, drawn by the seed."""
    variance: float = 0.7
    """Of a recruited region of keys, as a share of the keys' own."""
    draws: int = 50
    """Drawn sets of points that regions are recruited for."""
    batch_size: int = 10
    """Photos a pass."""
    seed: int = 0
    """Of the photos."""

    def __post_init__(self) -> None:
        if not self.betas or not all(0 <= b < float("inf") for b in (*self.betas, self.steer_beta)):
            raise ValueError(
                f"betas, steer_beta: got {self.betas}, {self.steer_beta}; give numbers of 0 or more"
            )
        if not 0 < self.variance < float("inf"):
            raise ValueError(f"variance: got {self.variance}; give a positive share")
        for name in ("last", "steered", "photos", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 1")

    def quick(self) -> DialStudyConfig:
        """A few photos and draws, to see that all runs: no figure of it means anything."""
        return replace(self, betas=(0.0, 16.0), photos=min(self.photos, 4), draws=5)


def _check_methods(methods: tuple[str, ...]) -> None:
    if set(methods) - set(get_args(AttentionTraining)) or "none" not in methods:
        raise ValueError(
            f"methods: got {', '.join(methods)}; give 'none', which the others are compared with, and "
            f"choose from {', '.join(get_args(AttentionTraining))}"
        )

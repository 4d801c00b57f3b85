"""Settings of training: plain dataclasses without torch; the CLI takes its options and help from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from xattn.runtime.names import did_you_mean
from xattn.runtime.option_checks import Belongs, Not

# Defaults by recipe. "published" is T-TAME's for ImageNet (arXiv 2403.04523); "small" was tuned for the
# classifier fusion on a few hundred photos, see docs/results/held-out-classes.md; "outcomes" trains on a
# table of masked photos, see docs/design.md#training.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "epochs": 8,
        "batch_size": 32,
        "optimizer": "sgd",
        "lr": 1e-3,
        "weight_decay": 5e-4,
        "class_mode": "batch",
        "area": 2.0,
        "objective": "masking",
    },
    "small": {
        "epochs": 14,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.01,
        "class_mode": "own",
        "area": 1.0,
        "objective": "masking",
    },
    "outcomes": {
        "epochs": 30,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.01,
        "class_mode": "own",
        "area": 0.0,
        "objective": "outcomes",
    },
}


# "published" is efficient probing's (arXiv 2506.10178), which has 4,096 photos a step; "small" is for a few
# hundred photos. LARS, whose steps are small relative to the weights, would need far more epochs there.
PROBE_RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "epochs": 90,
        "warmup": 10,
        "batch_size": 256,
        "optimizer": "lars",
        "lr": 0.1,
        "weight_decay": 0.0,
    },
    "small": {
        "epochs": 60,
        "warmup": 5,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.01,
    },
}


# A setting that is left out is None until the recipe fills it in, and never afterwards.
Optimizer = Literal["sgd", "adamw"]
ClassMode = Literal["batch", "own", "top"]
Objective = Literal["masking", "outcomes"]
ProbeOptimizer = Literal["lars", "adamw"]
# The package's own methods of xattn.training.attention_training.
AttentionTraining = Literal["none", "random", "at", "iat", "iat_released", "vat", "ivat"]
if TYPE_CHECKING:
    Int: TypeAlias = int
    Float: TypeAlias = float
    OptimizerName: TypeAlias = Optimizer
    ClassModeName: TypeAlias = ClassMode
    ObjectiveName: TypeAlias = Objective
    ProbeOptimizerName: TypeAlias = ProbeOptimizer
else:
    Int, Float, OptimizerName, ClassModeName, ObjectiveName, ProbeOptimizerName = (
        t | None for t in (int, float, Optimizer, ClassMode, Objective, ProbeOptimizer)
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained on photos; settings that are left out come from the recipe.

    "published" is T-TAME's, for ImageNet; "small" is for a few hundred photos; "outcomes" trains on what
    the network answers for masked photos.
    """

    belongs: ClassVar = (
        Belongs("crops", "masks", "others", objective="outcomes"),
        Belongs("class_mode", "cross_entropy", "area", "variation", "augment", objective="masking"),
    )

    recipe: Literal["published", "small", "outcomes"] = "published"
    """Source of all settings that are not given."""
    objective: ObjectiveName = None  # type: ignore[assignment]
    """What is learned: masks that keep the prediction (masking; published, small), or maps that explain the
    outcomes of a table of masks (outcomes)."""
    epochs: Int = None  # type: ignore[assignment]
    """Passes over the data (published 8, small 14, outcomes 30)."""
    batch_size: Int = None  # type: ignore[assignment]
    """Images a step, per process (published 32, small 16, outcomes 32)."""
    optimizer: OptimizerName = None  # type: ignore[assignment]
    """SGD with Nesterov momentum, cycled by OneCycle between .95 and .85 (published), or AdamW (small,
    outcomes)."""
    lr: Float = None  # type: ignore[assignment]
    """Peak learning rate of the OneCycle schedule (published 1e-3, small 3e-4, outcomes 2e-3)."""
    weight_decay: Float = None  # type: ignore[assignment]
    """Weight decay of all tensors except biases (published 5e-4, small and outcomes 0.01)."""
    class_mode: ClassModeName = None  # type: ignore[assignment]
    """Classes whose maps enter the area and variation terms: the batch's (published), each image's own
    (small), or each image's most probable (top)."""
    cross_entropy: float = 1.5
    """Weight of the cross-entropy on the masked image."""
    area: Float = None  # type: ignore[assignment]
    """Weight of mean((A + 0.0005)^0.3) (published 2, small 1)."""
    variation: float = 0.01
    """Weight of the variation term, a sum over space."""
    crops: int = 1
    """Crops of each photo in the table of outcomes: the model's own, then random ones."""
    masks: int = 16
    """Masks of each crop in the table, half of them the complements of the others."""
    others: int = 2
    """Further classes of each photo whose outcomes are learned, drawn from its twelve most probable."""
    augment: bool = True
    """Random crop and flip; without it, the centre crop."""
    workers: int = 2
    """Number of data loader processes."""
    seed: int = 0
    """Seed of the order of images and of augmentation, pure functions of (seed, epoch, index)."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    checkpoint_every: int = 50
    """Steps between checkpoints; there is also one after every epoch."""
    max_pixels: int = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        _fill_in(self, RECIPES)
        _check_positive(self, "epochs", "batch_size", "checkpoint_every", "max_pixels", "lr")
        _check_positive(self, "crops", "masks")
        _check_seed(self.seed)
        for name in ("workers", "others"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; give 0 or more")
        _check_choices(
            self,
            optimizer=("sgd", "adamw"),
            class_mode=("batch", "own", "top"),
            objective=("masking", "outcomes"),
            precision=("no", "fp16", "bf16"),
        )


@dataclass(frozen=True)
class ProbeConfig:
    """How a head is trained as a classifier on cached features; settings left out come from the recipe."""

    belongs: ClassVar = (Belongs("epsilon", "attention_weight", attention=Not("none")),)

    recipe: Literal["published", "small"] = "published"
    """Source of all settings that are not given."""
    epochs: Int = None  # type: ignore[assignment]
    """Largest number of passes over the photos (published 90, small 60)."""
    warmup: Int = None  # type: ignore[assignment]
    """Epochs in which the learning rate rises before it falls as a cosine (published 10, small 5; not more
    than half of the epochs unless given)."""
    batch_size: Int = None  # type: ignore[assignment]
    """Photos a step, per process (published 256, small 32)."""
    optimizer: ProbeOptimizerName = None  # type: ignore[assignment]
    """LARS with momentum .9 (published), or AdamW (small)."""
    lr: Float = None  # type: ignore[assignment]
    """Peak learning rate (published 0.1, small 1e-3); LARS scales it by photos a step / 256."""
    weight_decay: Float = None  # type: ignore[assignment]
    """Weight decay of tensors with two axes or more (published 0, small 0.01)."""
    patience: int = 20
    """Training stops after this many epochs without a better validation; 0 trains all epochs."""
    monitor: Literal["loss", "accuracy"] = "loss"
    """Validation figure by which the best epoch is chosen, whose weights are kept."""
    attention: str = "none"
    """Adversarial training on attention scores, a method of xattn list: random, at, iat, vat, ivat, ...;
    iat_released is what the authors' program computes as iat."""
    epsilon: float = 1.0
    """Norm of the change of the scores, for each query."""
    attention_weight: float = 1.0
    """Weight of the loss at the changed scores."""
    seed: int = 0
    """Seed of order, views and noise, pure functions of (seed, epoch or step)."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is also one at the end."""

    def __post_init__(self) -> None:
        free = self.warmup is None
        _fill_in(self, PROBE_RECIPES)
        _check_positive(self, "epochs", "batch_size", "checkpoint_every", "lr")
        _check_seed(self.seed)
        if free:
            object.__setattr__(self, "warmup", min(self.warmup, self.epochs // 2))
        for name in ("warmup", "patience", "weight_decay", "attention_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; give 0 or more")
        if self.warmup > self.epochs:
            raise ValueError(f"warmup: got {self.warmup} of {self.epochs} epochs; give fewer")
        if self.attention != "none":
            _check_positive(self, "epsilon")
        _check_choices(
            self,
            optimizer=("lars", "adamw"),
            monitor=("loss", "accuracy"),
            precision=("no", "fp16", "bf16"),
        )


@dataclass(frozen=True)
class DistillConfig:
    """How a mechanism is trained to attend as the softmax that it replaces; no labels are read."""

    belongs: ClassVar = (
        Belongs("finetune_epochs", "finetune_lr", finetune=Not("none")),
        Belongs("rank", finetune="lora"),
        Belongs("lr", epochs=Not(0)),
        Belongs("student_lr", student_epochs=Not(0)),
    )

    epochs: int = 4
    """Passes over the photos in which each layer learns for itself, all of them side by side; 0, as for
    a mechanism without parameters, leaves this part out."""
    student_epochs: int = 0
    """Passes afterwards in which each layer learns on the tokens that reach it in the converted network,
    with the errors of the layers before it."""
    batch_size: int = 8
    """Photos a step, per process."""
    lr: float = 1e-2
    """Peak learning rate of the mechanism's parameters (AdamW, half a cosine after a short rise)."""
    student_lr: float = 1e-3
    """The same for the tokens of the converted network."""
    weight_decay: float = 0.0
    """Weight decay of tensors with two axes or more."""
    rows: int = 64
    """Rows of attention in each head that are compared with the softmax's by their KL divergence; 0
    leaves them out."""
    outputs: float = 1.0
    """Weight of the squared error of a layer's attention output, relative to the output."""
    finetune: Literal["none", "lora", "all"] = "none"
    """What is trained afterwards against the network's own logits: nothing, low-rank updates of qkv and
    proj in the converted layers, or the whole network; the mechanism's parameters are, too."""
    finetune_epochs: int = 2
    """Passes over the photos of that training."""
    finetune_lr: float = 1e-4
    """Its peak learning rate."""
    rank: int = 8
    """Rank of the low-rank updates."""
    measured: int = 256
    """At most so many photos show how close the network is, before and after."""
    augment: bool = True
    """Random crop and flip; without it, the centre crop."""
    workers: int = 2
    """Number of data loader processes."""
    seed: int = 0
    """Seed of order, augmentation and sampled rows, pure functions of (seed, epoch, index) or step."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    checkpoint_every: int = 50
    """Steps between checkpoints; there is also one after every epoch."""
    max_pixels: int = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        names = (
            "batch_size",
            "lr",
            "student_lr",
            "finetune_epochs",
            "finetune_lr",
            "rank",
            "measured",
        )
        _check_positive(self, *names, "checkpoint_every", "max_pixels")
        _check_seed(self.seed)
        for name in ("epochs", "student_epochs", "weight_decay", "rows", "outputs", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; give 0 or more")
        if not self.all_epochs:
            raise ValueError("epochs: got 0 without student_epochs or finetune; give at least 1")
        if not self.rows and not self.outputs:
            raise ValueError("rows, outputs: got 0 and 0; give at least one of them a weight")
        _check_choices(self, finetune=("none", "lora", "all"), precision=("no", "fp16", "bf16"))

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """Epochs and peak learning rate of each part: on the trained network's tokens, on the converted
        one's, and on logits."""
        tuned = 0 if self.finetune == "none" else self.finetune_epochs
        return (
            (self.epochs, self.lr),
            (self.student_epochs, self.student_lr),
            (tuned, self.finetune_lr),
        )

    @property
    def all_epochs(self) -> int:
        """Passes over the photos in all."""
        return sum(epochs for epochs, _ in self.parts)


@dataclass(frozen=True)
class PruneConfig:
    """How heads of a ViT are pruned, and what is left is trained; no labels are read."""

    belongs: ClassVar = (
        Belongs("scored", method="heads"),
        Belongs("hidden", "entropy", "routed", method="shrp"),
        Belongs("lr", "tokens", "logits", "mirrored", epochs=Not(0)),
    )

    method: Literal["heads", "shrp"] = "heads"
    """Keep the best heads of each block (heads); or one head and a small MLP in place of the rest of the
    block, chosen by a router that is trained first (shrp)."""
    keep: int = 1
    """Heads that stay in each block; shrp keeps one."""
    hidden: int = 0
    """Width of the MLP behind the head of shrp; 0 stands for twice the model's width."""
    scored: int = 64
    """Photos on which heads are compared (heads)."""
    epochs: Int = None  # type: ignore[assignment]
    """Passes over the photos (heads 2, shrp 5); 0 leaves the heads that stay as they are (heads)."""
    batch_size: int = 32
    """Photos a step."""
    lr: Float = None  # type: ignore[assignment]
    """Peak learning rate of the pruned blocks (AdamW, half a cosine after a short rise; heads 1e-4, shrp
    1e-3); routers learn ten times as fast."""
    tokens: float = 1.0
    """Weight of the squared error of the last tokens, relative to the tokens."""
    logits: float = 1.0
    """Weight of the divergence of the logits."""
    entropy: float = 0.3
    """Weight of the entropy of a router's usage (shrp)."""
    routed: float = 0.3
    """Share of the steps in which a router chooses the head of each photo (shrp); afterwards it is the head
    that was used most."""
    mirrored: bool = False
    """Learn from mirrored photos, too, which are kept in memory beside the others."""
    workers: int = 0
    """Number of data loader processes."""
    seed: int = 0
    """Seed of routers, order and mirroring."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    checkpoint_every: int = 50
    """Steps between checkpoints; there is also one at the end."""
    max_pixels: int = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        _check_choices(self, method=("heads", "shrp"), precision=("no", "fp16", "bf16"))
        heads = self.method == "heads"
        for name, value in (("epochs", 2 if heads else 5), ("lr", 1e-4 if heads else 1e-3)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_positive(
            self, "keep", "scored", "batch_size", "lr", "checkpoint_every", "max_pixels"
        )
        _check_seed(self.seed)
        for name in ("hidden", "epochs", "tokens", "logits", "entropy", "workers"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; give 0 or more")
        if not 0 < self.routed < 1:
            raise ValueError(
                f"routed: got {self.routed}; give a share of the steps between 0 and 1"
            )
        if not heads and self.keep != 1:
            raise ValueError(f"keep: got {self.keep}; shrp keeps a single head, give 1")
        if not heads and not self.epochs:
            raise ValueError("epochs: got 0; shrp trains what it puts in, give at least 1")
        if not self.tokens and not self.logits:
            raise ValueError("tokens, logits: got 0 and 0; give at least one of them a weight")


def _fill_in(config: Any, recipes: dict[str, dict[str, Any]]) -> None:
    """Fill in the settings that were left out, from the recipe."""
    if config.recipe not in recipes:
        raise ValueError(f"recipe: got {config.recipe!r}; choose one of {', '.join(recipes)}")
    for name, value in recipes[config.recipe].items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            what = "learning rate" if name == "lr" else "number"
            raise ValueError(f"{name}: got {value}; give a positive {what}")


def _check_seed(seed: int) -> None:
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed: got {seed}; give a signed 64-bit integer")


def _check_choices(config: Any, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}; choose one of {', '.join(allowed)}"
            )


# ---------------------------------------------------------------------- published settings


@dataclass(frozen=True)
class Preset:
    """A timm ``backbone`` with its ``taps``, and a ``head`` with its ``options``, as T-TAME published them:

        xattn train IMAGENET/train --preset ttame-resnet50 --output runs/resnet50

    trains eight epochs over ImageNet, batches of 32, SGD with OneCycle, the exact C x C branches and one
    free row for each class.
    """

    backbone: str
    taps: tuple[str, ...]
    mask_policy: str
    head: str = "ttame"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the head: the paper's fusion and its exact branches."""
        return {"fusion": "per_class", "branch_rank": None, "mask_policy": self.mask_policy}


PRESETS = {
    # VGG: the outputs of the last three max-pools; timm's intermediates lie before them.
    "ttame-vgg16": Preset(
        "vgg16", ("stage.2.pool", "stage.3.pool", "stage.4.pool"), "raw_normalize"
    ),
    "ttame-resnet50": Preset("resnet50", ("stage.2", "stage.3", "stage.4"), "raw_normalize"),
    "ttame-vit-b16": Preset(
        "vit_base_patch16_224", ("norm1.9", "norm1.10", "norm1.11"), "normalized"
    ),
}


def preset(name: str) -> Preset:
    """The preset called ``name``; a ``ValueError`` lists similar names if there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset: unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]

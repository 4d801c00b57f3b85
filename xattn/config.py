"""Training settings: plain dataclasses that do not import torch; the CLI builds its options from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from xattn.runtime.names import did_you_mean
from xattn.runtime.option_checks import (
    AnyExcept,
    AppliesIf,
    Condition,
    Count,
    NotNegative,
    Whole,
    check_fields,
)

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
        "objective": "mask",
    },
    "small": {
        "epochs": 14,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.01,
        "class_mode": "own",
        "area": 1.0,
        "objective": "mask",
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


# "published" is efficient probing's (arXiv 2506.10178), which uses batches of 4,096 photos; "small" is for
# a few hundred photos. LARS takes small steps relative to the weights and would need far more epochs there.
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


# A setting that was not given is None only until the recipe fills it in.
Precision = Literal["no", "fp16", "bf16"]
Fill = Literal["black", "blur", "mean", "drop"]
ON_PHOTOS, GAMES = ["mask", "rank", "select"], ["shapley", "labels", "greedy"]
# The methods of xattn.training.attention_training that ship with the package.
AttentionTraining = Literal["none", "random", "at", "iat", "iat_released", "vat", "ivat"]
Rate = Annotated[float, Condition(lambda x: x > 0, "a positive learning rate")]
Seed = Annotated[int, Condition(lambda n: -(1 << 63) <= n < 1 << 63, "a signed 64-bit integer")]
Part = Annotated[float, Condition(lambda x: 0 < x < 1, "a share of the steps between 0 and 1")]


@dataclass(frozen=True)
class TrainConfig:
    """Settings for training a head on photos; those not given are taken from the recipe.

    "published" has T-TAME's settings for ImageNet, "small" suits a few hundred photos, and "outcomes"
    trains on the network's outputs for masked photos.

    Example:
        >>> from xattn import TrainConfig
        >>> TrainConfig(recipe="small", epochs=3).epochs
        3
    """

    option_rules: ClassVar = (
        AppliesIf("crops", "masks", "others", "fill", objective_name=AnyExcept(*ON_PHOTOS)),
        AppliesIf("cells", objective_name=GAMES),
        AppliesIf("sizes", objective_name="outcomes"),
        AppliesIf("augment", objective_name=ON_PHOTOS),
        AppliesIf("class_mode", "cross_entropy", "area", "variation", objective_name="mask"),
    )

    recipe: Literal["published", "small", "outcomes"] = "published"
    """Recipe for all settings that are not given."""
    objective: str = None  # type: ignore[assignment]
    """What is learned: a name in xattn list objectives, with options as in shapley:link=log_odds: mask
    (published, small), outcomes, shapley, labels, select, rank or greedy."""
    epochs: Count = None  # type: ignore[assignment]
    """Passes over the data (published 8, small 14, outcomes 30)."""
    batch_size: Count = None  # type: ignore[assignment]
    """Images per step and process (published 32, small 16, outcomes 32)."""
    optimizer: Literal["sgd", "adamw"] = None  # type: ignore[assignment]
    """SGD with Nesterov momentum, cycled by OneCycle between .95 and .85 (published), or AdamW (small,
    outcomes)."""
    lr: Rate = None  # type: ignore[assignment]
    """Peak learning rate of the OneCycle schedule (published 1e-3, small 3e-4, outcomes 2e-3)."""
    weight_decay: NotNegative = None  # type: ignore[assignment]
    """Weight decay of all tensors except biases (published 5e-4, small and outcomes 0.01)."""
    class_mode: Literal["batch", "own", "top"] = None  # type: ignore[assignment]
    """Classes whose maps enter the area and variation terms: the batch's (published), each image's own
    (small), or each image's most probable (top)."""
    cross_entropy: float = 1.5
    """Weight of the cross-entropy on the masked image."""
    area: float = None  # type: ignore[assignment]
    """Weight of mean((A + 0.0005)^0.3) (published 2, small 1)."""
    variation: float = 0.01
    """Weight of the variation term, a sum over space."""
    crops: Count = 1
    """Crops of each photo in the table of outcomes: the evaluation crop, then random ones."""
    masks: Count = 16
    """Masks of each crop in the table, half of them the complements of the others."""
    others: Whole = 2
    """Additional classes per photo whose outcomes are learned, drawn from its twelve most probable."""
    fill: Fill | None = None
    """What removed parts of a photo show in the table: by default black, the blurred photo and its mean
    colour in turn, for games black; drop removes patches from the sequence of a class-token ViT."""
    sizes: Literal["even", "shapley", "curve", "half"] | None = None
    """How much masks keep: .2 to .8 (even), sizes weighted as in Shapley values (shapley), .02 to .15 and
    the rest (curve), or each cell with probability 1/2 (half)."""
    cells: Count | None = None
    """Cells per side in a game; by default 7, or the network's patches if patches are dropped."""
    augment: bool = True
    """Random crop and flip; without it, the centre crop."""
    workers: Whole = 2
    """Number of data loader processes."""
    seed: Seed = 0
    """Seed of the order of images and of augmentation, pure functions of (seed, epoch, index)."""
    precision: Precision = "no"
    """Mixed precision."""
    checkpoint_every: Count = 50
    """Steps between checkpoints; there is also one after every epoch."""
    max_pixels: Count = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        _fill_in(self, RECIPES)
        check_fields(self)

    @property
    def objective_name(self) -> str:
        """The objective without its options."""
        return (self.objective or "").partition(":")[0]


@dataclass(frozen=True)
class ProbeConfig:
    """Settings for training a head as a classifier on cached features; those not given are taken from the
    recipe.

    Example:
        >>> from xattn import ProbeConfig
        >>> ProbeConfig(recipe="small", epochs=5).epochs
        5
    """

    option_rules: ClassVar = (
        AppliesIf("epsilon", "attention_weight", attention=AnyExcept("none")),
    )

    recipe: Literal["published", "small"] = "published"
    """Recipe for all settings that are not given."""
    epochs: Count = None  # type: ignore[assignment]
    """Maximum number of passes over the photos (published 90, small 60)."""
    warmup: Whole = None  # type: ignore[assignment]
    """Epochs in which the learning rate rises before its cosine decay (published 10, small 5; by default at
    most half of the epochs)."""
    batch_size: Count = None  # type: ignore[assignment]
    """Photos per step and process (published 256, small 32)."""
    optimizer: Literal["lars", "adamw"] = None  # type: ignore[assignment]
    """LARS with momentum .9 (published), or AdamW (small)."""
    lr: Rate = None  # type: ignore[assignment]
    """Peak learning rate (published 0.1, small 1e-3); LARS scales it by photos per step / 256."""
    weight_decay: NotNegative = None  # type: ignore[assignment]
    """Weight decay of tensors with two axes or more (published 0, small 0.01)."""
    patience: Whole = 20
    """Training stops after this many epochs without a better validation result; 0 trains all epochs."""
    monitor: Literal["loss", "accuracy"] = "loss"
    """Validation metric that selects the best epoch, whose weights are kept."""
    attention: str = "none"
    """Adversarial training on attention scores, a method of xattn list: random, at, iat, vat, ivat, ...;
    iat_released is iat as computed by the authors' code."""
    epsilon: float = 1.0
    """Norm of the change of the scores, for each query."""
    attention_weight: NotNegative = 1.0
    """Weight of the loss at the changed scores."""
    seed: Seed = 0
    """Seed of order, views and noise, pure functions of (seed, epoch or step)."""
    precision: Precision = "no"
    """Mixed precision."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; there is also one at the end."""

    def __post_init__(self) -> None:
        free = self.warmup is None
        _fill_in(self, PROBE_RECIPES)
        check_fields(self)
        if free:
            object.__setattr__(self, "warmup", min(self.warmup, self.epochs // 2))
        if self.warmup > self.epochs:
            raise ValueError(f"warmup: got {self.warmup} of {self.epochs} epochs; give fewer")
        if self.attention != "none" and self.epsilon <= 0:
            raise ValueError(f"epsilon: got {self.epsilon}; give a positive number")


@dataclass(frozen=True)
class DistillConfig:
    """Settings for training a mechanism to attend like the softmax that it replaces; no labels are used.

    Example:
        >>> from xattn import DistillConfig
        >>> DistillConfig(epochs=2, lr=1e-3).epochs
        2
    """

    option_rules: ClassVar = (
        AppliesIf("finetune_epochs", "finetune_lr", finetune=AnyExcept("none")),
        AppliesIf("rank", finetune="lora"),
        AppliesIf("lr", epochs=AnyExcept(0)),
        AppliesIf("student_lr", student_epochs=AnyExcept(0)),
    )

    epochs: Whole = 4
    """Passes over the photos in which all layers learn side by side, each by itself; 0, as for a mechanism
    without parameters, skips this part."""
    student_epochs: Whole = 0
    """Passes afterwards in which each layer learns on the tokens that reach it in the converted network,
    including the errors of earlier layers."""
    batch_size: Count = 8
    """Photos per step and process."""
    lr: Rate = 1e-2
    """Peak learning rate of the mechanism's parameters (AdamW, half a cosine after a short rise)."""
    student_lr: Rate = 1e-3
    """Peak learning rate for the tokens of the converted network."""
    weight_decay: NotNegative = 0.0
    """Weight decay of tensors with two axes or more."""
    rows: Whole = 64
    """Rows of attention per head that are compared with the softmax's rows by KL divergence; 0 skips
    this comparison."""
    outputs: NotNegative = 1.0
    """Weight of the squared error of a layer's attention output, relative to the output."""
    finetune: Literal["none", "lora", "all"] = "none"
    """What is trained afterwards against the network's own logits, in addition to the mechanism: nothing,
    low-rank updates of qkv and proj in the converted layers, or the whole network."""
    finetune_epochs: Count = 2
    """Passes over the photos in that training."""
    finetune_lr: Rate = 1e-4
    """Peak learning rate of that training."""
    rank: Count = 8
    """Rank of the low-rank updates."""
    measured: Count = 256
    """Maximum number of photos used to measure how close the network is, before and after."""
    augment: bool = True
    """Random crop and flip; without it, the centre crop."""
    workers: Whole = 2
    """Number of data loader processes."""
    seed: Seed = 0
    """Seed of order, augmentation and sampled rows, pure functions of (seed, epoch, index) or step."""
    precision: Precision = "no"
    """Mixed precision."""
    checkpoint_every: Count = 50
    """Steps between checkpoints; there is also one after every epoch."""
    max_pixels: Count = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.all_epochs:
            raise ValueError("epochs: got 0 without student_epochs or finetune; give at least 1")
        if not self.rows and not self.outputs:
            raise ValueError("rows, outputs: got 0 and 0; give at least one of them a weight")

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """Epochs and peak learning rate of each part of the training: on the original network's tokens, on
        the converted network's tokens, and on logits."""
        tuned = 0 if self.finetune == "none" else self.finetune_epochs
        return (
            (self.epochs, self.lr),
            (self.student_epochs, self.student_lr),
            (tuned, self.finetune_lr),
        )

    @property
    def all_epochs(self) -> int:
        """Total number of passes over the photos."""
        return sum(epochs for epochs, _ in self.parts)


@dataclass(frozen=True)
class PruneConfig:
    """Settings for pruning heads of a ViT and training the rest; no labels are used.

    Example:
        >>> from xattn import PruneConfig
        >>> PruneConfig(method="heads", keep=2).keep
        2
    """

    option_rules: ClassVar = (
        AppliesIf("scored", method="heads"),
        AppliesIf("hidden", "entropy", "routed", method="shrp"),
        AppliesIf("lr", "tokens", "logits", "mirrored", epochs=AnyExcept(0)),
    )

    method: Literal["heads", "shrp"] = "heads"
    """Keep the best heads of each block (heads); or one head and a small MLP in place of the rest of the
    block, chosen by a router that is trained first (shrp)."""
    keep: Count = 1
    """Heads to keep in each block; shrp keeps one."""
    hidden: Whole = 0
    """Width of the MLP after the head of shrp; 0 means twice the model's width."""
    scored: Count = 64
    """Photos on which heads are compared (heads)."""
    epochs: Whole = None  # type: ignore[assignment]
    """Passes over the photos (heads 2, shrp 5); 0 does not train the remaining heads (heads)."""
    batch_size: Count = 32
    """Photos per step."""
    lr: Rate = None  # type: ignore[assignment]
    """Peak learning rate of the pruned blocks (AdamW, half a cosine after a short rise; heads 1e-4, shrp
    1e-3); routers learn ten times as fast."""
    tokens: NotNegative = 1.0
    """Weight of the squared error of the last tokens, relative to the tokens."""
    logits: NotNegative = 1.0
    """Weight of the divergence of the logits."""
    entropy: NotNegative = 0.3
    """Weight of the entropy of a router's usage (shrp)."""
    routed: Part = 0.3
    """Share of the steps in which a router chooses the head for each photo (shrp); afterwards the most used
    head is fixed."""
    mirrored: bool = False
    """Also learn from mirrored photos, which are kept in memory beside the others."""
    workers: Whole = 0
    """Number of data loader processes."""
    seed: Seed = 0
    """Seed of routers, order and mirroring."""
    precision: Precision = "no"
    """Mixed precision."""
    checkpoint_every: Count = 50
    """Steps between checkpoints; there is also one at the end."""
    max_pixels: Count = 40_000_000
    """Photos with more pixels are skipped as possible decompression bombs."""

    def __post_init__(self) -> None:
        heads = self.method == "heads"
        for name, value in (("epochs", 2 if heads else 5), ("lr", 1e-4 if heads else 1e-3)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_fields(self)
        if not heads and self.keep != 1:
            raise ValueError(f"keep: got {self.keep}; shrp keeps a single head, give 1")
        if not heads and not self.epochs:
            raise ValueError(
                "epochs: got 0; shrp has to train the MLPs that it adds; give at least 1"
            )
        if not self.tokens and not self.logits:
            raise ValueError("tokens, logits: got 0 and 0; give at least one of them a weight")


def _fill_in(config: Any, recipes: dict[str, dict[str, Any]]) -> None:
    """Fill in settings that were not given from the recipe."""
    if config.recipe not in recipes:
        raise ValueError(f"recipe: got {config.recipe!r}; choose one of {', '.join(recipes)}")
    for name, value in recipes[config.recipe].items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


# ---------------------------------------------------------------------- published settings


@dataclass(frozen=True)
class Preset:
    """A timm ``backbone`` with its ``taps``, and a ``head`` with its ``options``, as T-TAME published them:

        xattn train IMAGENET/train --preset ttame-resnet50 --output runs/resnet50

    trains eight epochs on ImageNet with batches of 32, SGD with OneCycle, the exact C x C branches and one
    freely learned row for each class.
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
    # For VGG, the outputs of the last three max-pools; timm's intermediates precede the pooling.
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

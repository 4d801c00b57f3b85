"""Per-class heads on coarse groups, with a linear probe on a frozen encoder.

    python -m xattn.eval.studies coarse-groups PHOTOS --backbone vit_small_patch14_dinov2

``PHOTOS`` has one folder per class and ``classes.json``, ``{folder: {"group": name or null}}``; photos
without a group are left out. A linear probe classifies the groups. ``ttame`` heads with
``fusion="per_class"`` are trained on the same four fifths of the photos as the probe, and scored on
the other fifth beside Grad-CAM and the sanity rows. ``--only 0 1 2 3 4`` holds out each fifth in turn,
with its own probe and heads, and merges the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from xattn.backbone import Backbone, load_backbone
from xattn.config import TrainConfig
from xattn.eval.evaluation.results import Results
from xattn.eval.evaluation.split import Split
from xattn.eval.report.results_files import write_csv, write_json
from xattn.eval.report.text_tables import format_table
from xattn.eval.studies.class_folds import format_differences, merge, train_and_score
from xattn.heads import parse_options
from xattn.photos.images import list_images, load_image
from xattn.photos.view import prepare
from xattn.runtime import strict_json
from xattn.training.labelled import FOLDS, stratified_folds


def photos_by_group(folder: Path) -> dict[Path, str]:
    """The group of every photo whose folder has a group in ``classes.json``."""
    table = strict_json.read(folder / "classes.json", "data", "correct it")
    groups = {path: table[path.parent.name]["group"] for path in list_images(folder)}
    return {path: group for path, group in groups.items() if group is not None}


@torch.inference_mode()
def pooled_features(backbone: Backbone, paths: Sequence[Path], batch_size: int = 16) -> Tensor:
    """(n, C): the input of the classifier of ``backbone``, for the evaluation crop of every photo."""
    model: Any = backbone.model
    parts = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        images = torch.stack([prepare(load_image(p), backbone.preprocessing)[0] for p in batch])
        x = backbone.normalize(images.to(backbone.device))
        final = model.forward_features(x)
        parts.append(model.forward_head(final, pre_logits=True).cpu())
    return torch.cat(parts)


def fit_probe(features: Tensor, labels: Tensor, classes: int, decay: float = 0.01) -> nn.Linear:
    """Multinomial logistic regression on features (n, C), labels (n,): an ``nn.Linear`` (C -> K).

    Minimises cross-entropy + decay |W|^2 on standardised features by L-BFGS; the standardisation is
    folded into the weights.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.t() + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    layer = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(weight / std)
        layer.bias.copy_(bias - layer.weight @ mean)
    return layer


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Train and score per-class heads on coarse groups."""

    data: tyro.conf.Positional[Path]
    """A folder with one folder of images per class, and classes.json."""
    output: Path = Path("runs/groups")  # Folder for runs and results.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    only: tuple[int, ...] = (0,)  # Which fifths of the photos to hold out, in turn.
    variants: tuple[str, ...] = ("mask_policy=raw_normalize",)
    """Each entry gives one head: an option of ttame as name=value, such as branch_rank=null."""
    explainers: tuple[str, ...] = ("gradcam",)  # Methods to compare with.
    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster for CNNs on CPUs."""


def compare_on_groups(args: Groups, progress: bool = True) -> tuple[Results, str]:
    """Train probes and heads and score them; return the results and a line about the probes."""
    group_of = photos_by_group(args.data)
    paths, groups = list(group_of), list(group_of.values())
    names = sorted(set(groups))
    labels = torch.tensor([names.index(group) for group in groups])
    heads: dict[str, tuple[str, dict[str, Any]]] = {
        f"ttame {variant}": ("ttame", {"fusion": "per_class", **parse_options([variant])})
        for variant in args.variants
    }
    encoder = load_backbone(args.backbone, args.weights)
    features = pooled_features(encoder, paths)
    model: Any = encoder.model
    model.reset_classifier(len(names))
    model.preprocessing = encoder.preprocessing
    folds = stratified_folds(groups, seed=args.train.seed)
    parts, right = [], []
    for k in args.only:
        held_out = folds[k]
        seen = sorted(set(range(len(paths))) - set(held_out))
        split = Split("coarse groups", paths)
        probe = fit_probe(features[split.fit(seen)], labels[seen], len(names))
        right += (probe(features[split.score(held_out)]).argmax(1) == labels[held_out]).tolist()
        model.get_classifier().load_state_dict(probe.state_dict())
        backbone = load_backbone(model, class_names=names)
        if args.channels_last:
            backbone.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        part = train_and_score(
            backbone,
            [paths[i] for i in seen],
            [paths[i] for i in held_out],
            args.train,
            args.output / f"fold-{k}",
            heads=heads,
            explainers=args.explainers,
            progress=progress,
            split=split,
        )
        parts.append(part)
    largest = max(groups.count(name) for name in names)
    about = (
        f"{len(names)} groups: {', '.join(f'{n} {groups.count(n)}' for n in names)}. Probe: accuracy "
        f"{sum(right) / len(right):.3f} on the {len(right)} photos held out (the largest group alone "
        f"{largest / len(groups):.3f})."
    )
    return merge(parts), about


def study(args: Groups) -> Iterator[str]:
    """Run the parts that are not finished yet, and yield the lines of the report."""
    results, about = compare_on_groups(args)
    if len(args.only) == FOLDS:
        write_json(results, args.output / "results.json")
        write_csv(results, args.output / "results.csv")
        results.to_csv(args.output / "values.csv", per_image=True)
    text = [about, format_table(results, "markdown")]
    rows = [f"ttame {variant}" for variant in args.variants]
    pairs = [(row, reference) for row in rows for reference in args.explainers]
    pairs += [(rows[0], other) for other in rows[1:]]
    for row, reference in pairs:
        text.append(format_differences(results.compare(row, reference), row, reference))
    yield "\n\n".join(text)

"""What swapping the attention of a trained ViT changes: accuracy, maps, time and memory.

    python -m xattn.eval.studies swap photos/ --labels classes.json -b vit_tiny_patch16_224 --weights FILE

All networks share the weights and see the same photos; the first row is the model as it was
trained. The registry calls a mechanism training-free only if it keeps most of the accuracy.
Mechanisms that need training have a second row, distilled on photos that it is not tested on.
Positions are resized to larger sizes. A mechanism's entry in the registry says which rows it has.
The output folder keeps all finished results.

Three controls convert a network as a mechanism does: attention to random blocks, to the exact best
keys, and to all keys alike. The first two are not in the registry, since nobody should use them.
They read at most 48 patches for each query, like most mechanisms at their defaults; all queries
read the prefix tokens, which see all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from xattn.attention.base import Entry, Mechanism, with_entry
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.controls import Uniform
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import pattern_operator
from xattn.attention.operators.pooled_blocks import pooled_blocks
from xattn.attention.selection import Blocks
from xattn.backbone import load_conversion
from xattn.config import DistillConfig
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt
from xattn.eval.studies.study_photos import labelled_photos
from xattn.eval.studies.swap.measuring import Measuring, Networks, SwapStudyConfig
from xattn.eval.studies.swap.report import photo_values, table_lines, write
from xattn.eval.studies.swap.rows import AS_TRAINED, Swap, all_swaps, with_trained
from xattn.runtime.files import check_folder, write_rows


class RandomBlocks(Mechanism):
    """Attends to a query's own tile of patches and, in each head, to random others: shows what a
    choice of tiles is worth.

    Args:
        block: side of a tile; ``selected``: tiles that a query's tile reads, including its own.
    """

    def __init__(
        self, dim: int, num_heads: int, block: int = 4, selected: int = 3, *, backend: str = "auto"
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.block, self.selected = block, selected
        self.seed = int(torch.randint(2**31, (), device="cpu"))  # differs from layer to layer

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.grid is not None
        blocks = pooled_blocks(
            inputs.grid, self.block, self.block, self.block, inputs.prefix, device=inputs.q.device
        )
        count = blocks.count
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(1, self.num_heads, count, count, generator=generator, device="cpu")
        score.diagonal(dim1=2, dim2=3).fill_(2.0)
        index = score.topk(min(self.selected, count), -1).indices.int().to(inputs.q.device)
        pattern = blocks.pattern(Blocks(index, blocks.q_block, blocks.k_block))
        return pattern_operator(inputs, pattern, backend=self.backend)


class ExactTopK(Mechanism):
    """Attends to the ``keys`` patches with the highest scores, found by computing all: the best
    that any choice can reach."""

    def __init__(self, dim: int, num_heads: int, keys: int = 48, *, backend: str = "auto") -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.keys = keys

    def operator(self, inputs: Inputs) -> Operator:
        q, k, prefix = inputs.q, inputs.k, inputs.prefix
        with torch.no_grad():
            scores = q[:, :, prefix:] @ k[:, :, prefix:].transpose(-2, -1)
            least = scores.topk(min(self.keys, scores.shape[-1]), -1).values[..., -1:]
            mask = torch.zeros_like(scores).masked_fill_(scores < least, -torch.inf)
            mask = F.pad(mask, (prefix, 0, prefix, 0))
        return SoftmaxOperator(q, k, inputs.scale, mask, backend=self.backend, every_row=True)


with_entry(RandomBlocks, Entry("random blocks", "a control", "N s B D", grid=(2,)))
with_entry(ExactTopK, Entry("exact top-k", "a control", "N^2 D"))
CONTROLS = (RandomBlocks, ExactTopK, Uniform)


DEFAULTS = SwapStudyConfig()


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    output: OutputAt = "runs/study-swap",
    config: SwapStudyConfig = DEFAULTS,
    swaps: tyro.conf.Suppress[tyro.conf.Fixed[Sequence[Swap] | None]] = None,
    *,
    distilled: Sequence[Path] = (),
    only: Sequence[str] = (),
    only_sizes: Sequence[int] = (),
    progress: bool = True,
) -> Iterator[str]:
    """Measure the rows that are not finished yet, write the report, and yield its lines.

    Args:
        backbone: a trained ViT; it is not changed.
        data: photos, see :func:`xattn.explaining.naming.named_photos`.
        labels: their classes, see :func:`xattn.photos.labels.true_classes`.
        output: folder for finished values, trained networks and the report. The same command
        resumes there.
        distilled: folders of conversions of this network, used instead of training them.
        only: measure only these rows, by mechanism or label; ``only_sizes``: only at these sizes.
            The report shows all finished results.
    """
    output = Path(output)
    photos = labelled_photos(backbone, data, labels, config.seed)[: max(config.photos)]
    networks = Networks(
        backbone, config.sizes[0], photos, _training(config), output / "trained", progress
    )
    depth = networks.depth
    for folder in distilled:
        load_conversion(folder, networks.dense(config.sizes[0]))
    swaps = all_swaps() if swaps is None else swaps
    rows = [AS_TRAINED, *with_trained(swaps, distilled), *(Swap(control) for control in CONTROLS)]
    wanted = _wanted(rows, only, depth)
    unknown = sorted(set(only_sizes) - set(config.sizes))
    if unknown:
        raise ValueError(f"only_sizes: got {unknown[0]}; choose among {config.sizes}")
    check_folder(output)
    measuring = Measuring(networks, rows, wanted, config, output, progress)
    tables = {
        size: measuring.at(size, not only_sizes or size in only_sizes) for size in config.sizes
    }
    heading = (
        f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(photos)} photos; maps of "
        f"{config.explainer}"
    )
    files = write(tables, measuring.rows, depth, heading, backbone.name, output)
    names = [photo.name for photo in photos]
    for size, table in tables.items():
        if values := photo_values(table, measuring.rows, names, depth):
            files.append(write_rows(output / f"values-{size}.csv", values))
    yield from (heading, "", *table_lines(tables, measuring.rows, depth))
    yield f"\nreport: {', '.join(str(file) for file in files)}"


def _training(config: SwapStudyConfig) -> DistillConfig:
    """The training settings of every network that the study distills."""
    return DistillConfig(
        epochs=config.epochs, finetune="lora" if config.finetune_epochs else "none",
        finetune_epochs=max(1, config.finetune_epochs), measured=8, workers=config.workers,
        seed=config.seed,
    )  # fmt: skip


def _wanted(rows: Sequence[Swap], only: Collection[str], depth: int) -> set[str]:
    """The keys of the rows that ``only`` names, or of all if it is empty."""
    for name in only:
        if not any(name in (row.mechanism, row.label) for row in rows):
            known = ", ".join(dict.fromkeys(row.mechanism for row in rows))
            raise ValueError(f"only: got {name!r}; choose a label or one of {known}")
    return {
        row.key(depth)
        for row in rows
        if not only or row.mechanism in only or row.label in only or row == AS_TRAINED
    }

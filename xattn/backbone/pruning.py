"""ViTs with fewer heads: each pruned layer keeps some of its heads ("heads"), or only one head, followed
by an MLP ("shrp").

    heads    x <- x + b + sum_{h kept} W_O^h o_h(LN x),    and the MLP of the block is unchanged
    shrp     x <- x + E(o_j(LN x)),    E(o) = W_2 GELU(W_1 LN(o)),    instead of W_O and the MLP

o_h is the output of head h, softmax(q_h k_h^T / sqrt(d)) v_h. Rows of ``qkv`` and columns of W_O are cut
out, so a layer becomes smaller and faster. It is still a timm layer, so its attention can be recorded,
converted and explained as before. Michel et al. (arXiv 1905.10650) showed that many heads can be removed;
"shrp" is SHRP (arXiv 2512.20635), with equations taken from its abstract.
:func:`xattn.training.pruning_run.prune` chooses the heads and trains the parts that remain.

A pruned network is a folder with ``model.safetensors`` and ``prune.json``, which records what was cut, the
original network, the SHA-256 of the tensors, and what was measured. ``load_backbone(name, weights=folder)``
builds the unpruned model, slices it as recorded, and loads the tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.model.convert import chosen_layers, conversion, run_one_image
from xattn.attention.model.spec import format_layers, parse_layers
from xattn.backbone.taps import PRE_NORM_BLOCKS
from xattn.blocks.routing_usage import Choice, HeadRouter
from xattn.photos.preprocessing import LARGEST_SIDE
from xattn.runtime import strict_json
from xattn.runtime.copies import shared_copy
from xattn.runtime.files import accepted_by, atomic_folder, dump_json, dump_tensors
from xattn.runtime.version import __version__

WEIGHTS_FILE, PRUNED_FILE = "model.safetensors", "prune.json"
METHODS = ("heads", "shrp")
FORMAT = 1
WIDEST = 65_536  # largest hidden width of E
_AGAIN = "run xattn prune again"
Model = TypeVar("Model", bound=nn.Module)


class Pruning(NamedTuple):
    """What is cut: ``kept`` maps a block's number to its remaining heads; ``hidden`` is the width of E
    (for shrp)."""

    method: str
    kept: Mapping[int, tuple[int, ...]]
    hidden: int = 0

    @property
    def layers(self) -> list[int]:
        return sorted(self.kept)

    def __str__(self) -> str:
        heads = "; ".join(f"{i}: {', '.join(map(str, self.kept[i]))}" for i in self.layers)
        return f"{self.method} in blocks {format_layers(self.layers)}, heads kept {heads}"

    def record(self) -> dict[str, Any]:
        """Return the values as JSON values."""
        kept = {str(i): list(self.kept[i]) for i in self.layers}
        return {
            "method": self.method,
            "layers": format_layers(self.layers),
            "kept": kept,
            "hidden": self.hidden,
        }

    @classmethod
    def of_record(cls, record: Any) -> Pruning:
        """Invert :meth:`record`; raise a ``ValueError`` if ``record`` is invalid."""
        try:
            method, kept, hidden = record["method"], record["kept"], record["hidden"]
            layers = parse_layers(record["layers"])
            made = {i: tuple(kept[str(i)]) for i in layers}
        except (KeyError, TypeError, AttributeError):
            raise ValueError("it lacks method, layers, kept or hidden") from None
        numbers = [hidden, *(head for heads in made.values() for head in heads)]
        known = method in METHODS and len(kept) == len(made)
        if not known or any(type(n) is not int for n in numbers) or not 0 <= hidden <= WIDEST:
            raise ValueError(f"its method is {method!r}, with heads {kept!r} and hidden {hidden!r}")
        return cls(method, made, hidden)


# ---------------------------------------------------------------------- slicing


def pruned(model: Model, pruning: Pruning) -> Model:
    """Create a pruned copy of a timm ViT that shares every tensor that is not cut; ``model`` is unchanged.

    Raises:
        ValueError: if heads or blocks do not exist, or if the model cannot be pruned, see
            :func:`check_prunable`.
    """
    copied = shared_copy(model)
    prune_in_place(copied, pruning)
    return copied


def prune_in_place(model: nn.Module, pruning: Pruning) -> None:
    """Prune ``model`` as :func:`pruned` does, without a copy. E has new parameters, and its W_2 is zero."""
    layers = check_prunable(model, pruning.layers)
    for i in layers:
        check_kept(pruning, i, heads_of(model, i))
    blocks: Any = model.blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i in layers:
            kept = pruning.kept[i]
            if pruning.method == "heads":
                keep_heads(blocks[i].attn, kept)
            else:
                blocks[i] = SingleHeadBlock.of(blocks[i], kept[0], pruning.hidden)
    mark_pruned(model, pruning)
    try:
        run_one_image(model)
    except (RuntimeError, AssertionError) as error:
        kind = type(blocks[layers[0]].attn).__name__
        raise ValueError(
            f"backbone: block {layers[0]}'s attention ({kind}) does not run with fewer heads "
            f"({' '.join(str(error).split())[:120]}); choose a ViT whose layers are timm's Attention"
        ) from error


def mark_pruned(model: nn.Module, pruning: Pruning) -> None:
    """Record in ``model`` what was cut from it; see :func:`pruning_of`."""
    vars(model)["pruning"] = pruning


def pruning_of(model: nn.Module) -> Pruning | None:
    """Return what was cut from ``model``; None if nothing was."""
    found = vars(model).get("pruning")
    return found if isinstance(found, Pruning) else None


def heads_of(model: nn.Module, layer: int) -> int:
    """Return the number of heads of a block."""
    blocks: Any = model.blocks
    return int(blocks[layer].attn.num_heads)


def keep_heads(attention: Any, kept: Sequence[int]) -> None:
    """Slice a timm attention layer to the heads ``kept``, in the given order."""
    heads, width = int(attention.num_heads), int(attention.head_dim)
    columns = torch.cat([torch.arange(h * width, (h + 1) * width, device="cpu") for h in kept])
    rows = torch.cat([columns + part * heads * width for part in range(3)])
    attention.qkv = _sliced(attention.qkv, rows, 0)
    if isinstance(attention.proj, nn.Linear):
        attention.proj = _sliced(attention.proj, columns, 1)
    attention.num_heads, attention.attn_dim = len(kept), len(columns)


def _sliced(linear: nn.Linear, index: Tensor, axis: int) -> nn.Linear:
    weight, bias = linear.weight.detach(), linear.bias
    index = index.to(weight.device)
    weight = weight.index_select(axis, index)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, linear.weight.requires_grad)
    if bias is not None:
        cut = bias.detach()[index] if axis == 0 else bias.detach().clone()
        made.bias = nn.Parameter(cut, bias.requires_grad)
    return made.train(linear.training)


# ---------------------------------------------------------------------- single-head blocks


class Expander(nn.Module):
    """E(o) = W_2 GELU(W_1 LN(o)): (..., d) -> (..., C); W_2 and its bias start at zero."""

    def __init__(self, head_dim: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.fc1 = nn.Linear(head_dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, o: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(o))))


class SingleHeadBlock(nn.Module):
    """x -> x + E(o(LN x)), made of ``norm1`` and an ``attn`` with one head whose ``proj`` is E."""

    def __init__(self, norm1: nn.Module, attn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = norm1, attn

    @classmethod
    def of(cls, block: Any, head: int, hidden: int) -> SingleHeadBlock:
        """Build the block from the norm and one head of a transformer block, with a new E."""
        weight = block.attn.qkv.weight
        attn = copy.deepcopy(block.attn)
        attn.proj = Expander(int(attn.head_dim), hidden, weight.shape[1]).to(weight)
        keep_heads(attn, [head])
        return cls(copy.deepcopy(block.norm1), attn).train(block.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.attn(self.norm1(x), *args, **kwargs)


class _ChosenHead(nn.Module):
    """A replacement for W_O: E of the output of one head, chosen per image, times the head's gate."""

    def __init__(self, heads: int, expander: Expander) -> None:
        super().__init__()
        self.heads, self.expander = heads, expander
        self.choice: Choice | None = None

    def forward(self, o: Tensor) -> Tensor:
        assert self.choice is not None
        chosen = self.choice.chosen[:, None, None, None]
        head = o.unflatten(-1, (self.heads, -1)).take_along_dim(chosen, 2).squeeze(2)
        return self.choice.gate[:, None, None] * self.expander(head)


class RoutedBlock(nn.Module):
    """x -> x + g E(o_j*(LN x)), where a router chooses j* for each image; SHRP trains it before pruning.

    ``choice`` holds the heads chosen in the last pass. If there is only one head, or the router always
    chooses the same head, this block computes the same as the result of :meth:`pruned`.
    """

    def __init__(self, block: Any, hidden: int) -> None:
        super().__init__()
        weight = block.attn.qkv.weight
        dim, heads = int(weight.shape[1]), int(block.attn.num_heads)
        self.norm1, self.attn = copy.deepcopy(block.norm1), copy.deepcopy(block.attn)
        expander = Expander(int(self.attn.head_dim), hidden, dim)
        self.attn.proj = _ChosenHead(heads, expander).to(weight)
        self.router = HeadRouter(dim, heads, decay=0.9).to(weight)

    @property
    def choice(self) -> Choice:
        found = self.attn.proj.choice
        assert found is not None
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = self.norm1(x)
        self.attn.proj.choice = self.router(tokens)
        return x + self.attn(tokens, *args, **kwargs)

    def pruned(self, head: int) -> SingleHeadBlock:
        """Return the block with only ``head``, with separate tensors."""
        proj = self.attn.proj
        proj.choice = None
        attn = copy.deepcopy(self.attn)
        attn.proj = copy.deepcopy(proj.expander)
        keep_heads(attn, [head])
        return SingleHeadBlock(copy.deepcopy(self.norm1), attn)


# ---------------------------------------------------------------------- what can be pruned


def check_prunable(model: nn.Module, layers: Iterable[int] | str | None) -> list[int]:
    """Return the numbers of the blocks ``layers`` in ascending order; by default only the last block.

    Raises:
        ValueError: if the model is not a timm ViT with pre-norm blocks and a ``qkv`` layer (the message
            names the layer), if a number does not exist, or if the model is already converted or pruned.
    """
    blocks = getattr(model, "blocks", None)
    kind = type(model).__name__
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise ValueError(
            f"backbone: {kind} has no list of blocks with attention; choose a timm ViT"
        )
    without = [b for b in blocks if not isinstance(getattr(b, "attn", None), nn.Module)]
    if without:
        raise ValueError(
            f"backbone: a block of {kind} ({type(without[0]).__name__}) has no attention 'attn'; choose a "
            f"ViT such as vit_tiny_patch16_224"
        )
    if pruning_of(model) is not None:
        raise ValueError("backbone: it is already pruned; prune the network from which it was cut")
    if conversion(model) is not None:
        raise ValueError(
            "backbone: its attention is converted; leave out mechanism, and convert it afterwards"
        )
    numbers = [len(blocks) - 1] if layers is None else layers
    found = [int(path.split(".")[1]) for path in chosen_layers(model, numbers)]
    for i in found:
        _check_block(blocks[i], i)
    return found


def _check_block(block: Any, i: int) -> None:
    kind, attention = type(block).__name__, block.attn
    if kind not in PRE_NORM_BLOCKS or not hasattr(block, "norm1"):
        raise ValueError(
            f"backbone: block {i} ({kind}) does not normalise its input before attention; choose a "
            f"pre-norm ViT such as vit_tiny_patch16_224"
        )
    name, qkv = f"blocks.{i}.attn ({type(attention).__name__})", getattr(attention, "qkv", None)
    width = getattr(attention, "num_heads", 0) * getattr(attention, "head_dim", 0)
    if not isinstance(qkv, nn.Linear) or qkv.out_features != 3 * width:
        raise ValueError(
            f"backbone: {name} has no layer 'qkv' of three parts for its heads; choose a ViT such as "
            f"vit_tiny_patch16_224"
        )
    parts = {part: getattr(attention, part, None) for part in ("gate", "norm")}
    own = [part for part, layer in parts.items() if not isinstance(layer, nn.Identity | None)]
    biased = getattr(attention, "q_bias", None) is not None
    if own or biased or getattr(getattr(attention, "proj", None), "in_features", 0) != width:
        why = f"'{own[0]}'" if own else "biases or a projection of another form"
        raise ValueError(
            f"backbone: {name} has {why} across its heads, which cannot be sliced; choose a ViT such as "
            f"vit_tiny_patch16_224"
        )


def check_kept(pruning: Pruning, layer: int, heads: int) -> None:
    """Raise a ``ValueError`` unless the heads to keep exist, differ and, for shrp, are a single head."""
    kept = pruning.kept[layer]
    if not kept or len(set(kept)) != len(kept) or not all(0 <= h < heads for h in kept):
        raise ValueError(
            f"keep: got heads {list(kept)} in block {layer}; give different heads from 0 to {heads - 1}"
        )
    if pruning.method == "shrp" and len(kept) > 1:
        raise ValueError(f"keep: got {len(kept)}; shrp keeps a single head, so give 1")


def check_keep(keep: int, heads: int, where: str) -> None:
    """Raise a ``ValueError`` unless it is possible to keep ``keep`` of ``heads`` heads."""
    if not 1 <= keep <= heads:
        raise ValueError(f"keep: got {keep} for {where} of {heads} heads; give 1 to {heads}")


# ---------------------------------------------------------------------- folders


@dataclass(frozen=True)
class PrunedFolder:
    """The content of ``prune.json``; ``preprocessing`` has the form of a timm ``pretrained_cfg``."""

    folder: Path
    pruning: Pruning
    name: str
    source_sha256: str
    sha256: str
    num_classes: int
    preprocessing: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE

    def check_backbone(self, name: str, num_classes: int | None) -> None:
        """Raise a ``ValueError`` if the network has another name or another number of classes."""
        if name.partition(".")[0] != self.name.partition(".")[0]:
            raise ValueError(
                f"weights: {self.folder} was pruned from {self.name}, not {name}; give -b {self.name}"
            )
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"num_classes: got {num_classes}, but {self.folder} has {self.num_classes} classes; leave "
                f"it out"
            )


def pruned_folder(weights: Any) -> Path | None:
    """Return the folder of a pruned network if ``weights`` is the folder or its weight file; else None."""
    if not isinstance(weights, str | Path):
        return None
    path = Path(weights).expanduser()
    folder = path.parent if path.name == WEIGHTS_FILE else path
    return folder if (folder / PRUNED_FILE).is_file() else None


def read_pruned(folder: str | Path) -> PrunedFolder:
    """Read ``prune.json``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    file = Path(folder) / PRUNED_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"weights: {folder} holds no {PRUNED_FILE}; give the folder that xattn prune wrote"
        )
    record = strict_json.read(file, "weights", _AGAIN)
    try:
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        name, source = (record["backbone"][key] for key in ("name", "sha256"))
        found = PrunedFolder(
            folder=Path(folder),
            pruning=Pruning.of_record(record["pruning"]),
            name=name,
            source_sha256=source,
            sha256=record["sha256"],
            num_classes=record["num_classes"],
            preprocessing=dict(record["preprocessing"]),
            results=record.get("results", {}),
        )
        _check_form(found)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"weights: {file} is not the record of a pruned network ({reason}); {_AGAIN}"
        ) from None
    return found


def _check_form(found: PrunedFolder) -> None:
    """Raise a ``ValueError`` unless all values have the right type."""
    texts, count = (found.name, found.source_sha256, found.sha256), found.num_classes
    if not all(isinstance(t, str) for t in texts) or type(count) is not int or count < 0:
        raise ValueError("its names, hashes or classes have the wrong type")
    shown = found.preprocessing
    sides, colours = shown["input_size"], [*shown["mean"], *shown["std"], shown["crop_pct"]]
    if len(sides) != 3 or not all(type(n) is int and 1 <= n <= LARGEST_SIDE for n in sides):
        raise ValueError(f"its input_size is {sides!r}")
    named = isinstance(shown["interpolation"], str) and isinstance(shown["crop_mode"], str)
    if not named or not all(type(x) in (int, float) for x in colours):
        raise ValueError(f"its preprocessing is {shown!r}")


def save_pruned(folder: str | Path, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write the tensors of a pruned network, and its ``record`` for :func:`read_pruned`.

    If this fails, no partial folder is left.

    Raises:
        ValueError: if ``folder`` exists and holds something else.
        OSError: if ``folder`` cannot be written.
    """
    with atomic_folder(folder, (WEIGHTS_FILE, PRUNED_FILE), accepted_by(read_pruned)) as temporary:
        dump_tensors(temporary / WEIGHTS_FILE, state)
        dump_json(temporary / PRUNED_FILE, {"format": FORMAT, "xattn": __version__, **record})
    return Path(folder)

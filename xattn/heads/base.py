"""Base class of all explanation heads, with their interface, their registry and their files on disk.

A head reads the taps of a frozen backbone and returns raw class scores; it never changes the
backbone. On disk, a head is a folder (or hub repository) with ``model.safetensors``, the head's own
tensors, and ``config.json``: head, options, backbone name and the SHA-256 of the backbone's weights, which
binds a saved head to its backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn.attention.model.spec import Conversion, describe, how_to_convert
from xattn.backbone import Backbone, Taps
from xattn.heads.mixer import Mixer, create_mixer
from xattn.registry import Registry, make_adopter, with_checked_name
from xattn.runtime import strict_json
from xattn.runtime.devices import Movable
from xattn.runtime.files import accepted_by, atomic_folder, dump_json, dump_tensors
from xattn.runtime.head_files import CONFIG_FILE, WEIGHTS_FILE, local_head
from xattn.runtime.memory import raise_on_out_of_memory
from xattn.runtime.option_checks import check
from xattn.runtime.version import __version__

TRAINED = "--mechanism FOLDER (what xattn distill wrote)"


def check_backbone(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise a ``ValueError`` with advice unless ``backbone`` is the one on which the head ``name`` was
    trained.

    Args:
        wanted: ``"backbone"`` of the head's config.
    """
    _check_conversion(name, wanted, backbone)
    _check_normalization(name, wanted, backbone)
    if wanted["sha256"] != backbone.fingerprint:
        raise ValueError(
            f"head: {name} was trained on {wanted.get('name')} with weights sha256 "
            f"{wanted['sha256']}, but the backbone {backbone.name} has {backbone.fingerprint}; "
            f"load the backbone it was trained on{_how_to_get_weights(wanted, backbone)}"
        )
    if wanted.get("task", backbone.task) != backbone.task:
        raise ValueError(
            f"head: {name} was trained for task={wanted['task']!r}, but the backbone has "
            f"task={backbone.task!r}; load the backbone with task={wanted['task']!r}"
        )


def tapped(name: str, backbone: Backbone, taps: Sequence[str]) -> Backbone:
    """``backbone`` with the ``taps`` that the head ``name`` reads, sharing the same model.

    Raises:
        ValueError: the backbone does not have these taps.
    """
    if tuple(taps) == backbone.taps:
        return backbone
    if backbone.adapter:
        raise ValueError(
            f"head: {name} reads the taps {list(taps)}, but the backbone provides "
            f"{list(backbone.taps)}; load the backbone with taps={list(taps)}"
        )
    return backbone.with_taps(taps)


def _check_conversion(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise unless the backbone is converted in the same way as the head's backbone was."""
    theirs, own = wanted.get("conversion"), backbone.conversion_record().get("conversion")
    if theirs == own:
        return
    try:
        made = [Conversion.of_record(record) for record in theirs or ()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"head: the config of {name} is damaged ({error})") from None
    how = TRAINED if "conversion_sha256" in wanted else how_to_convert(made) if made else ""
    remedy = f"load the backbone with {how}" if made else "leave out --mechanism"
    raise ValueError(
        f"head: {name} was trained with {describe(made) or 'the attention of the model itself'}, "
        f"but the backbone has {describe(backbone.conversion or ()) or 'its own'}; {remedy}"
    )


def _check_normalization(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise unless the backbone's mean and std match those that the head was trained with."""
    theirs = wanted.get("preprocessing") or {}
    own = backbone.preprocessing_record().get("preprocessing", {})
    if not isinstance(theirs, dict):
        raise ValueError(f"head: the config of {name} is damaged (its preprocessing is {theirs!r})")
    for key in ("mean", "std"):
        if theirs.get(key) == own.get(key):
            continue
        if key not in theirs:
            raise ValueError(
                f"head: {name} was trained with the model's own {key}, but the backbone has "
                f"{own[key]}; leave out {key}= (--{key})"
            )
        raise ValueError(
            f"head: {name} was trained with {key}={theirs[key]}, but the backbone has "
            f"{list(getattr(backbone.preprocessing, key))}; load it with that (--{key})"
        )


def _how_to_get_weights(wanted: Mapping[str, Any], backbone: Backbone) -> str:
    """The rest of the advice: whether the head's mechanism, if any, was trained."""
    if backbone.conversion is None:
        return ""
    if "conversion_sha256" in wanted:
        return f", with {TRAINED}"
    if "conversion_sha256" in backbone.conversion_record():
        return f", with {how_to_convert(backbone.conversion)}"
    return ", such as --mechanism FOLDER of xattn distill"


MaskPolicy = Literal["raw_normalize", "renormalize", "normalized", "feature"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Frozen(nn.Module):
    """A module whose buffers are constant weights, so that its state need not be saved and restored."""


class Head(
    Movable,
    PyTorchModelHubMixin,
    library_name="xattn",
    tags=["explainability", "image-classification"],
    license="apache-2.0",
):
    """Base class of all heads. ``head(taps, class_index=None) -> scores``.

    Args:
        taps: :class:`~xattn.backbone.Taps` of the head's backbone.
        class_index: None for all K classes; an int, a LongTensor (B,) (one class per sample) or
            (B, M) / (1, M) (several).

    Returns:
        Raw (pre-sigmoid) scores (B, K or 1 or M, r, r'); :meth:`mask` turns them into (0, 1).

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("ttame", net)
        >>> taps = net(torch.rand(2, 3, 64, 64))
        >>> head(taps).shape, head(taps, torch.tensor([3, 7])).shape
        (torch.Size([2, 1000, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    name: ClassVar[str]
    is_classifier: ClassVar[bool] = False  # True: the head computes its own logits
    clips: ClassVar[bool] = False  # True: it also reads maps (B, C, t, h, w) of clips and volumes
    reads_statistics: ClassVar[bool] = False  # True: training begins with calibrate
    own_passes: ClassVar[int] = 0  # passes per map beside the backbone's, as of a second network
    learning_rates: ClassVar[Mapping[str, float]] = {}  # parameter -> factor of the usual rate
    options: dict[str, Any]
    mask_policy: MaskPolicy
    backbone_name: str
    backbone_fingerprint: str
    summary: dict[str, Any]

    def __init__(self, backbone: Backbone, options: dict[str, Any]) -> None:
        super().__init__()
        if backbone.task == "regression" and not self.is_classifier:
            raise ValueError(
                f"backbone: {backbone.name} returns numbers, but heads are trained on classes; use an "
                f"explainer that needs no head, such as 'gradcam' or 'rise'"
            )
        self.options = options
        self.backbone_name = backbone.name
        self.backbone_fingerprint = backbone.fingerprint
        self.backbone_taps = list(backbone.taps)
        self.backbone_task = backbone.task
        self.backbone_changes = {
            **backbone.conversion_record(),
            **backbone.preprocessing_record(),
        }
        self.num_classes = backbone.num_classes
        self.summary = {}
        self.mask_policy = options.get("mask_policy", "raw_normalize")
        check("mask_policy", self.mask_policy, MaskPolicy)
        if self.mask_policy == "feature":
            backbone.require_pooled_tap()
        self.mixer: Mixer | None = None
        self.explain_with = options.get("explain_with", "scores")

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        raise NotImplementedError

    def add_mixer(
        self,
        backbone: Backbone,
        name: str | None,
        depth: int,
        options: Mapping[str, Any] | None,
        prefix: int = 0,
    ) -> None:
        """Put a :class:`~xattn.heads.mixer.Mixer` before the head and list it in config.json, unless
        ``name`` is None.

        Raises:
            ValueError: the mixer does not fit the last tap with ``prefix`` tokens before its patches, or
                there are options but no name.
        """
        if name is None:
            for option, value in (
                ("mixer_depth", depth != 1 and depth),
                ("mixer_options", options),
            ):
                if value:
                    raise ValueError(
                        f"{option}: got {value!r} without a mixer; choose one, such as mixer='softmax'"
                    )
            return
        self.mixer = create_mixer(name, depth, options, backbone, prefix)
        self.options.update(mixer=name, mixer_depth=depth, mixer_options=dict(options or {}))

    def tapped(self, backbone: Backbone) -> Backbone:
        """``backbone`` with the taps that the head reads; see :func:`tapped`."""
        return tapped(self.name, backbone, self.backbone_taps)

    def check_taps(self, taps: Taps) -> None:
        """Raise a ``ValueError`` unless there are as many ``taps`` as the head reads."""
        if len(taps.maps) != len(self.backbone_taps):
            raise ValueError(
                f"taps: got {len(taps.maps)}, but head {self.name!r} reads {self.backbone_taps}; give "
                f"those of head.tapped(backbone)(images)"
            )

    def mixed(self, taps: Taps) -> Taps:
        """``taps`` with the last map replaced by the output of the head's mixer."""
        if self.mixer is None:
            return taps
        last = taps.maps[-1]
        grid = (int(last.shape[2]), int(last.shape[3]))
        x = self.mixer(last.flatten(2).transpose(1, 2), grid)
        return taps._replace(maps=(*taps.maps[:-1], x.transpose(1, 2).unflatten(2, grid)))

    def calibrate(self, batches: Iterable[Taps]) -> None:
        """Compute statistics of the photos' taps before training; most heads do not need any."""

    def auxiliary_loss(self) -> Tensor | float:
        """The losses that the mixer's mechanisms added in the last call; 0 if there are none or they
        were already returned."""
        return 0.0 if self.mixer is None else self.mixer.take_losses()

    def mask(self, scores: Tensor) -> Tensor:
        """The mask in (0, 1) with which images are multiplied in training: sigmoid(scores)."""
        return scores.sigmoid()

    def explanation(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        """The maps that the head shows: its scores or, with ``explain_with="mask"``, the mask."""
        with frozen_statistics(self):
            scores = self(taps, class_index)
        return self.mask(scores) if self.explain_with == "mask" else scores

    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "format": 1,
            "xattn": __version__,
            "head": self.name,
            "options": self.options,
            "backbone": {
                "name": self.backbone_name,
                "sha256": self.backbone_fingerprint,
                "taps": self.backbone_taps,
                "num_classes": self.num_classes,
                "task": self.backbone_task,
                **self.backbone_changes,
            },
            "training": self.summary,
        }

    def _save_pretrained(self, save_directory: Path, dtype: torch.dtype | None = None) -> None:
        state = self.state_dict()
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        dump_tensors(save_directory / WEIGHTS_FILE, state)
        dump_json(save_directory / CONFIG_FILE, self.config())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, backbone: Backbone, **options: Any) -> Head:  # type: ignore[override]
        if Path(model_id).is_dir():
            return _read_head(Path(model_id), backbone)
        return _read_head(_download(model_id, options), backbone)


def _download(repository: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    hub = {k: options[k] for k in names if k in options}
    files = [
        Path(hf_hub_download(repo_id=repository, filename=f, **hub))
        for f in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    return files[0].parent


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Context manager in which BatchNorm layers of ``module`` do not update their running statistics; in
    training mode they still use the batch's statistics. It also works as a decorator."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    layers = [layer for layer in layers if layer.training]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@dataclass(frozen=True)
class HeadEntry:
    """The registry's entry for a head.

    Example:
        >>> from xattn.heads.base import HEADS
        >>> HEADS.entry("ttame").recipe
        'small'
    """

    name: str
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options that are tested for every head; the first are small."""
    recipe: str = "small"
    """The training recipe for a few hundred photos."""
    taps: Callable[[int], list[str]] | None = None
    """``taps(depth)`` returns the taps of a ViT that the head reads instead of the backbone's; with None
    it reads the backbone's."""


def register_head(name: str, **about: Any) -> Callable[[type[Head]], type[Head]]:
    """Class decorator: register a head for :func:`create_head` under ``name``, and check its options
    against the annotations of its constructor, see :mod:`xattn.runtime.option_checks`.

    Args:
        about: values of further fields of :class:`HeadEntry`.

    Example:
        >>> from xattn import register_head
        >>> from xattn.heads.base import HEADS
        >>> from xattn.heads.maps.ttame import TTame
        >>> @register_head("ttame_again")
        ... class MyTTame(TTame):
        ...     pass
        >>> "ttame_again" in HEADS.names()
        True
    """
    return HEADS.register(HeadEntry(name, **about))


HEADS: Registry[Head, HeadEntry] = Registry(
    "xattn.heads",
    base=Head,
    homes=("xattn.heads.maps", "xattn.heads.probing", "xattn.heads"),
    argument="head",
    noun="head",
    given=("backbone", "options", "pooled", "reads_prefix"),
    adopt=make_adopter(Head, register_head),
    mark=with_checked_name,
)


list_heads = HEADS.names
head_class = HEADS.get
head_entry = HEADS.entry


def head_options(name: str) -> tuple[str, ...]:
    """The options of a head; raises the same errors as :func:`head_class`.

    Example:
        >>> from xattn.heads import head_options
        >>> head_options("efficient_probe")[:3]
        ('queries', 'reduction', 'prefix')
    """
    return HEADS.options(name) or ()


def create_head(name: str, backbone: Backbone, /, **options: Any) -> Head:
    """Create an untrained head for ``backbone``.

    Raises:
        ValueError: the name is unknown (the message lists near matches), the head has no such option, or
            the network classifies clips and the head reads only maps of photos.

    Example:
        >>> import xattn
        >>> from xattn import create_head
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = create_head("efficient_probe", net, queries=8, class_names=["cat", "dog"])
        >>> head.num_classes
        2
    """
    own = HEADS.entry(name).taps
    if backbone.reads_clips and not HEADS.get(name).clips:
        raise ValueError(
            f"backbone: {backbone.name} reads clips, but the head {name!r} reads maps of photos; train "
            f"the head 'evidence', or use 'gradcam' or 'occlusion'"
        )
    if own is not None and backbone.is_vit:
        backbone = tapped(name, backbone, own(backbone.depth))
    with torch.device("cpu"):  # ignores torch's default device
        head = _construct(name, backbone, options)
    return head.to(backbone.device)


def _construct(name: str, backbone: Backbone, options: Mapping[str, Any]) -> Head:
    too_large = ValueError(
        f"options: not enough memory for {name} with {dict(options)}; give smaller values"
    )
    try:
        with raise_on_out_of_memory(too_large):
            return HEADS.create(name, backbone, **options)
    except TypeError as error:
        raise ValueError(f"head: {name} refuses {dict(options)} ({error})") from error


# The arguments of create_head and create_explainer themselves.
_OWN_ARGUMENTS = ("self", "name", "backbone", "head", "seed", "max_forward_batch")


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse options written as ``name=value`` with JSON values. Values that are not JSON become strings, so
    ``read=mean`` needs no quotes; ``norm=no`` is a string, too, which the head rejects.

    Example:
        >>> from xattn.heads import parse_options
        >>> parse_options(["queries=8", "norm=false", "form=linear"])
        {'queries': 8, 'norm': False, 'form': 'linear'}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key.isidentifier():
            raise ValueError(f"options: got {pair!r}; write name=value")
        if key in _OWN_ARGUMENTS:
            raise ValueError(
                f"options: got {pair!r}; {key} is not an option of a head or an explainer"
            )
        try:
            options[key] = strict_json.parse(value, nan=True)
        except ValueError:
            options[key] = value
    return options


def save_head(
    head: Head, folder: str | Path, summary: dict[str, Any] | None = None, dtype: str | None = None
) -> Path:
    """Write ``head`` to ``folder`` (``model.safetensors`` and ``config.json``); if an error occurs,
    neither file is written.

    Args:
        summary: facts about its training to record in the config.
        dtype: ``"float16"`` or ``"bfloat16"`` stores the weights in half precision.

    Raises:
        ValueError: ``folder`` exists and does not hold a head. OSError: it cannot be written.

    Example:
        >>> import tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn import create_head, save_head
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = create_head("gap", net)
        >>> folder = save_head(head, Path(tempfile.mkdtemp()) / "head")
        >>> sorted(path.name for path in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    if summary is not None:
        head.summary = summary
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; choose one of {', '.join(DTYPES)}")
    with atomic_folder(folder, (WEIGHTS_FILE, CONFIG_FILE), accepted_by(read_config)) as temporary:
        head._save_pretrained(temporary, None if dtype is None else DTYPES[dtype])
    return Path(folder)


def load_head(source: str | Path, backbone: Backbone, **hub_options: Any) -> Head:
    """Load a head from a folder, a shipped head's name (``xattn list``) or a hub repository.

    Raises:
        ValueError: the head belongs to another backbone (the message gives both hashes), or its files are
            damaged. FileNotFoundError: ``source`` holds no head.

    Example:
        >>> import tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn import create_head, load_head, save_head
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = create_head("gap", net, classes=5)
        >>> folder = save_head(head, Path(tempfile.mkdtemp()) / "head")
        >>> load_head(folder, net).num_classes
        5
    """
    return _read_head(head_folder(source, **hub_options), backbone)


def head_folder(source: str | Path, **hub_options: Any) -> Path:
    """The folder with the head's files: ``source`` itself or a head inside it, the folder of a shipped
    head, or the cached folder of a hub repository, which is downloaded if necessary. Arguments and errors
    are those of :func:`load_head`.

    Example:
        >>> import tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn import create_head, save_head
        >>> from xattn.heads import head_folder
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = create_head("gap", net)
        >>> folder = save_head(head, Path(tempfile.mkdtemp()) / "head")
        >>> head_folder(folder) == folder
        True
    """
    folder = local_head(source)
    if folder is not None:
        return folder
    try:
        return _download(str(source), hub_options)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"head: {source} is not a local folder and could not be fetched from the hub "
            f"({type(error).__name__}); check the name or the connection"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a head's folder.

    Example:
        >>> import tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn import create_head, save_head
        >>> from xattn.heads import read_config
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = create_head("gap", net)
        >>> folder = save_head(head, Path(tempfile.mkdtemp()) / "head")
        >>> config = read_config(folder)
        >>> config["head"], config["backbone"]["name"]
        ('gap', 'test_resnet')
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"head: {folder} holds no {CONFIG_FILE}; give a folder that save_head wrote"
        )
    try:
        config = strict_json.parse(path.read_bytes(), nan=True)
        config["format"], config["head"], config["options"], config["backbone"]["sha256"]
        for key, kind in (("head", str), ("options", dict), ("backbone", dict)):
            if not isinstance(config[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        taps = config["backbone"].get("taps", [])
        if not isinstance(taps, list) or not all(isinstance(tap, str) for tap in taps):
            raise TypeError("its taps are not a list of str")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"head: {path} is damaged ({type(error).__name__}: {error}); save the head again"
        ) from None
    return config


def _read_head(folder: Path, backbone: Backbone) -> Head:
    from xattn.backbone.weights import load_weight_file

    config = read_config(folder)
    check_backbone(folder.name, config["backbone"], backbone)
    backbone = tapped(folder.name, backbone, config["backbone"].get("taps", backbone.taps))
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"head: {folder} holds no {WEIGHTS_FILE}; save the head again")
    try:
        state = load_weight_file(weights)
    except ValueError as error:
        raise ValueError(str(error).replace("weights", "head", 1)) from None
    _check_shapes(config, backbone, state, weights)
    head = create_head(config["head"], backbone, **config["options"])
    head.load_state_dict(state, strict=True)
    head.summary = config.get("training", {})
    return head.eval()


def _check_shapes(
    config: Mapping[str, Any], backbone: Backbone, state: Mapping[str, Tensor], weights: Path
) -> None:
    """Raise unless ``state`` has the tensors of the head in ``config``. This builds the head without
    allocating its tensors: a config may ask for far more memory than its file holds."""
    try:
        with torch.device("meta"):
            empty = _construct(config["head"], backbone, config["options"])
        empty.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # other names or shapes, or sizes that overflow
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"head: {weights} does not fit its config ({reason}); save the head again"
        ) from None


def seeded_head(name: str, backbone: Backbone, seed: int, /, **options: Any) -> Head:
    """Create a head as :func:`~xattn.heads.base.create_head` does, initialised from ``seed``; the
    caller's random generator is not affected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_head(name, backbone, **options)

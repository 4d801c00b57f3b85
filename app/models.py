"""Loads the viewer's models, each of which is loaded once, shared by all sessions and used by one at a
time.

A model is requested by a name and never by a path. It is a timm model with weights from an installed
package or the hub, the model with which ``xattn app`` was started, or a ``.safetensors`` file in the root,
given by its id from :func:`weight_files`.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.backbone import sha256
from xattn.cli import detections
from xattn.cli.model import BackboneArgs, device_name
from xattn.runtime.files import Signature
from xattn.runtime.memory import raise_on_out_of_memory
from xattn.runtime.names import reason

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head

KEPT = 3  # largest number of models in memory; the least recently used one is removed first
_TURN = threading.RLock()


class ModelError(ValueError):
    """Raised if a model is not available or is not the model that made a pack; users see the message."""


@contextmanager
def model_lock() -> Iterator[None]:
    """Context manager that holds a lock, which is needed for each use of a model.

    Two passes at the same time are slower than two passes one after the other, even with different models.
    In addition, the viewer's hooks on a model must not affect another thread.
    """
    with _TURN:
        yield


@contextmanager
def exclusive_pass(what: str) -> Iterator[None]:
    """Like :func:`model_lock`, but if memory runs out, a ``ValueError`` is raised whose message contains
    ``what``, such as "to read the attention"."""
    full = ValueError(
        f"There is not enough memory {what}; close other models, or start the viewer with a smaller "
        "--input-size."
    )
    with raise_on_out_of_memory(full), model_lock():
        yield


# ---------------------------------------------------------------------- backbones


def backbones() -> list[str]:
    """The names of models to choose from: the model with which the viewer was started, and the models in
    installed packages.

    Any other timm model can also be used; its weights are downloaded from the hub.
    """
    from xattn.backbone.weights import list_package_weights

    own = _own()
    names = [] if own is None else [_label(own)]
    names += [record.name for record in list_package_weights() if record.installed]
    return list(dict.fromkeys(names))


def backbone(
    name: str,
    weights: str = "auto",
    taps: str | tuple[str, ...] | list[str] | None = None,
    input_size: int | tuple[int, int] | None = None,
) -> Backbone:
    """A frozen classifier, which is loaded only once; see also :func:`xattn.backbone.load_backbone`.

    Args:
        name: one of :func:`backbones`, or another timm model.
        weights: "auto" (those of the model with which the viewer was started, of a package, or of the hub),
            "package", "timm", or an id from :func:`weight_files`.

    Raises:
        ModelError: the model or its weights do not exist, or there is no connection or not enough memory.
    """
    return _load(_arguments(name, weights, taps, input_size))


def backbone_of(pack: Any) -> Backbone:
    """The network whose predictions are explained by the maps of ``pack``, a
    :class:`xattn.packs.reader.Pack`.

    Raises:
        ModelError: the pack does not identify its network, the network is missing, or its weights have
            changed.
    """
    record = _record(pack)
    name, wanted = record["name"], record["sha256"]
    others, problems = [], []
    for arguments in _candidates(record):
        try:
            loaded = _load(arguments)
            size = tuple(record.get("input_size") or loaded.preprocessing.input_size)
            if loaded.preprocessing.input_size != size:
                loaded = _load(replace(arguments, input_size=size))  # type: ignore[arg-type]
        except ModelError as error:
            problems.append(str(error))
            continue
        if loaded.fingerprint == wanted:
            return loaded
        others.append(loaded.fingerprint[:12])
    if others:
        raise ModelError(
            f"The maps of this pack explain {name} with weights sha256 {wanted[:12]}; the available "
            f"weights are {', '.join(others)}. Start the viewer with the model that made the pack: "
            f"xattn app {_command_options(record)}"
        )
    if problems:
        raise ModelError(
            f"The maps of this pack explain {name}. If its weights are in a file, start the viewer with "
            f"this file: xattn app {_command_options(record)}. The first attempt failed: {problems[0]}"
        )
    raise ModelError(
        f"The maps of this pack explain {name}, whose head is no longer in the root; "
        f"put the head's folder back."
    )


def vlm() -> Any:
    """The vision-language model (:class:`xattn.vlm.model.VLM`) with which the viewer was started.

    Raises:
        ModelError: it cannot be loaded.
    """
    from xattn.app import state

    return _started_with(state.settings().vlm, lambda name: _loaded_vlm(name, _device()))


def detector() -> Any:
    """The detector (:class:`xattn.detection.Detector`) with which the viewer was started.

    Raises:
        ModelError: it cannot be loaded.
    """
    from xattn.app import state

    own = _own() or BackboneArgs()
    return _started_with(state.settings().detector, lambda name: _loaded_detector(name, own))


def _started_with(name: str | None, load: Callable[[str], Any]) -> Any:
    name = str(name)
    with raise_on_out_of_memory(ModelError(f"There is not enough memory for {name}.")):
        try:
            return load(name)
        except (ValueError, OSError) as error:
            raise ModelError(reason(error)) from error


def check_model_made_pack(pack: Any, loaded: Any) -> None:
    """Check that ``pack`` was made with the model ``loaded``.

    Raises:
        ModelError: the pack was made with other weights, or does not identify its model.
    """
    record = _record(pack)
    if loaded.fingerprint != record["sha256"]:
        raise ModelError(
            f"The maps of this pack explain {record['name']} with weights sha256 "
            f"{record['sha256'][:12]}, but the viewer was started with {loaded.name}, "
            f"{loaded.fingerprint[:12]}; start it with the model that made the pack."
        )


def weight_files() -> dict[str, Path]:
    """The ``.safetensors`` files of complete networks in the root and its subfolders, by id.

    For a pruned network, the path is that of its folder. Files of heads, maps and cached rows are not
    included.
    """
    from xattn.app import state
    from xattn.backbone.pruning import pruned_folder
    from xattn.packs.format import is_pack_file
    from xattn.training.cache import SHARD

    root = state.settings().local_root.resolve()
    found = {}
    for path in sorted(p for depth in range(3) for p in root.glob("*/" * depth + "*.safetensors")):
        part = is_pack_file(path.name) or SHARD.fullmatch(path.name)
        alone = not part and not (path.parent / "config.json").exists()
        if alone and path.is_file() and path.resolve().is_relative_to(root):
            name = path.relative_to(root).as_posix()
            found[hashlib.sha256(name.encode()).hexdigest()[:12]] = pruned_folder(path) or path
    return found


def _own() -> BackboneArgs | None:
    """The model with which the viewer was started."""
    from xattn.app import state

    return state.settings().model


def _label(own: BackboneArgs) -> str:
    if own.probe is None:
        return own.backbone
    folder = Path(own.probe)
    return f"{own.backbone} + {folder.parent.name if folder.name == 'head' else folder.name}"


def _arguments(name: str, weights: str, taps: Any, input_size: Any) -> BackboneArgs:
    own = _own()
    chosen = (taps,) if isinstance(taps, str) else tuple(taps or ())
    if own is not None and name == _label(own) and weights == "auto":
        return replace(own, taps=chosen or own.taps, input_size=input_size or own.input_size)
    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", name):
        raise ModelError(f"There is no model {name!r}; give the name of a timm model.")
    if weights not in ("auto", "package", "timm"):
        files = weight_files()
        if weights not in files:
            raise ModelError("These weights are no longer in the root; choose others.")
        weights = str(files[weights])
    return BackboneArgs(
        backbone=name, weights=weights, taps=chosen, input_size=input_size, device=_device()
    )


def _device() -> str:
    own = _own()
    return "auto" if own is None else own.device


def _load(arguments: BackboneArgs) -> Backbone:
    """Load the model for ``arguments``; models that differ only in their taps share weights."""
    name, taps = arguments.backbone, arguments.taps
    full = ModelError(f"There is not enough memory for {name}; choose a smaller model.")
    with raise_on_out_of_memory(full):
        try:
            if arguments.probe is not None or name.startswith("torchvision/"):
                return _loaded(arguments, *_stamps(arguments))
            loaded = _loaded(replace(arguments, taps=()), *_stamps(arguments))
            if not taps or tuple(taps) == loaded.taps:
                return loaded
            short = taps[0] if len(taps) == 1 and taps[0] in ("norm1", "block", "stage") else taps
            with model_lock():
                return loaded.with_taps(short)
        except (ValueError, OSError) as error:
            raise ModelError(reason(error)) from error


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _loaded(arguments: BackboneArgs, *stamps: Any) -> Any:
    loaded = arguments.load()
    loaded.fingerprint  # noqa: B018 - computes the hash before another thread can use the model
    return loaded


@st.cache_resource(max_entries=1, show_spinner=False)
def _loaded_detector(name: str, arguments: BackboneArgs) -> Any:
    loaded = detections.load(name, arguments)
    loaded.fingerprint  # noqa: B018 - see _loaded
    return loaded


@st.cache_resource(max_entries=1, show_spinner=False)
def _loaded_vlm(name: str, device: str) -> Any:
    from xattn.vlm.loading import load_vlm

    return load_vlm(name, device=device_name(device))


def _stamps(arguments: BackboneArgs) -> Iterator[tuple[Signature, ...]]:
    """The signatures of all files that belong to a model, see :func:`_stamp`."""
    return map(_stamp, (arguments.weights, arguments.probe, arguments.mechanism))


def _stamp(path: str | Path | None) -> tuple[Signature, ...]:
    """The stat signatures of a weight file, or of the files of a head or a trained conversion.

    If they change, the model must be loaded again. There are no signatures if ``path`` is None.
    """
    if path is None:
        return ()
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
    return tuple(Signature.of(f.stat()) for f in files if f.is_file())


# ---------------------------------------------------------------------- the model of a pack


def _record(pack: Any) -> dict[str, Any]:
    """The record of the network that the first map of a pack explains, with keys such as "name" and
    "sha256".

    Raises:
        ModelError: the pack has no maps, or does not identify the network.
    """
    if not pack.counts[0]:
        raise ModelError("This pack contains no maps, so its model is unknown.")
    provenance = pack.provenance(pack.first_entry)
    try:
        checked = dict(provenance["protocol"]["backbone"])
        if not isinstance(checked["name"], str) or not isinstance(checked["sha256"], str):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ModelError(
            "This pack does not record which model its maps explain; make it again with xattn explain."
        ) from None
    return checked


def _candidates(record: dict[str, Any]) -> Iterator[BackboneArgs]:
    """Yield the arguments of models that may match ``record``, most likely first."""
    from xattn.app import state
    from xattn.heads import read_config

    own = _own()
    name, _, head = record["name"].partition(" + ")
    taps = tuple(record.get("taps") or ())
    attention = _attention(record)
    if attention:  # the name also includes the mechanism
        name = name.partition(" (")[0]
    prepared = _preprocessing(record)
    own = None if own is None else replace(own, **prepared)
    if own is not None and own.backbone == name and bool(own.probe) == bool(head):
        yield replace(own, taps=taps or own.taps)
        if attention or own.mechanism:
            yield replace(own, taps=taps or own.taps, **(attention or _NOT_CONVERTED))
    plain = BackboneArgs(backbone=name, taps=taps, device=_device(), **attention, **prepared)
    if not head:
        yield plain
        return
    if own is not None and own.backbone == name and own.probe is None:
        plain = replace(
            own, taps=taps, **(attention or _NOT_CONVERTED)
        )  # its weights may come from a file
    whole = record["name"].partition(" + ")[0]
    for found in state.library().heads():
        try:
            config = read_config(found.folder)
        except (ValueError, OSError):
            continue  # the files of an unrelated head may be damaged
        if config["head"] == head and config["backbone"].get("name") == whole:
            yield replace(plain, probe=str(found.folder))


def _command_options(record: dict[str, Any]) -> str:
    """The command-line options that load the network of ``record`` without its head."""
    name, attention = record["name"].partition(" + ")[0], _attention(record)
    if attention:
        name = name.partition(" (")[0]
    plain = f"--backbone {name} --weights FILE"
    for option, value in _preprocessing(record).items():
        if value:
            values = " ".join(map(str, value)) if isinstance(value, tuple) else value
            plain += f" --{option.replace('_', '-')} {values}"
    if "conversion_sha256" in record:
        return f"{plain} --mechanism FOLDER (the folder that xattn distill wrote)"
    return " ".join([plain, *(f"--{option} {value}" for option, value in attention.items())])


_NOT_CONVERTED: dict[str, Any] = {"mechanism": None, "layers": None}


def _preprocessing(record: dict[str, Any]) -> dict[str, Any]:
    """The command-line options for preprocessing settings in ``record`` that differ from the defaults."""
    changed = record.get("preprocessing")
    changed = changed if isinstance(changed, dict) else {}

    def numbers(key: str) -> tuple[float, ...]:
        values = changed.get(key)
        values = values if isinstance(values, list) else []
        return tuple(v for v in values if isinstance(v, int | float))

    return {
        "mean": numbers("mean"),
        "std": numbers("std"),
        "crop_pct": changed.get("crop_pct"),
        "interpolation": changed.get("interpolation"),
    }


def _attention(record: dict[str, Any]) -> dict[str, Any]:
    """The command-line options for the attention mechanism in ``record``; empty if nothing was converted.

    The options allow only one mechanism, so the result is also empty for a network with several.
    """
    from xattn.attention.model.spec import Conversion, format_layers, format_mechanism

    try:
        made = [Conversion.of_record(one) for one in record.get("conversion") or ()]
    except (ValueError, TypeError):
        return {}
    if len(made) != 1:
        return {}
    name, layers, options = made[0]
    return {"mechanism": format_mechanism(name, options), "layers": format_layers(layers)}


# ---------------------------------------------------------------------- heads and explainers


def heads(name: str) -> dict[str, str]:
    """The titles of the trained heads for the backbone ``name``, by id.

    These are heads in the root and heads that come with xattn. They are found by the name of the backbone
    in their config, so nothing is loaded; :func:`with_head` checks the weights.
    """
    from xattn.heads import read_config

    found = {}
    for key, (title, folder) in _head_folders().items():
        try:
            config = read_config(folder)
        except (ValueError, OSError):
            continue
        if config["backbone"].get("name") == name:
            found[key] = f"{title} ({config['head']})"
    return found


def _head_folders() -> dict[str, tuple[str, Path]]:
    """The title and folder of each head that is in the root or comes with xattn, by id."""
    from xattn.app import state
    from xattn.runtime.head_files import shipped_heads

    found = {key: (key, folder) for key, folder in shipped_heads().items()}
    return found | {item.id: (item.name, item.folder) for item in state.library().heads()}


def network(name: str, weights: str, key: str | None) -> tuple[Backbone, Head | None]:
    """The backbone ``name`` and its head ``key``.

    If ``key`` is None, the head is the backbone's classifier if this is a probed head, and None otherwise.

    Raises:
        ModelError: see :func:`backbone` and :func:`with_head`.
    """
    if key is not None:
        return with_head(name, key, weights)
    loaded = backbone(name, weights)
    return loaded, getattr(loaded, "probe", None)


def with_head(name: str, key: str, weights: str = "auto") -> tuple[Backbone, Head]:
    """The backbone ``name`` and its head ``key`` from :func:`heads`.

    A head from ``xattn probe`` also becomes the classifier of the backbone. Both are loaded only once; if
    the files of the head change, they are loaded again.

    Raises:
        ModelError: there is no such head, or it belongs to other weights.
    """
    from xattn.heads import AttentiveHead, head_class, read_config

    folders = _head_folders()
    if key not in folders:
        raise ModelError("This head is no longer in the root; choose another.")
    _, folder = folders[key]
    try:
        config = read_config(folder)
        taps = config["backbone"].get("taps")
        if issubclass(head_class(config["head"]), AttentiveHead):
            arguments = _arguments(name, weights, taps, None)
            probed = _load(replace(arguments, probe=str(folder)))
            return probed, probed.probe  # type: ignore[return-value]
        loaded = backbone(name, weights, taps)
        made_for = f"{loaded.fingerprint}/{loaded.taps}/{loaded.task}"
        return loaded, _loaded_head(folder, _stamp(folder), made_for, loaded)
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error


@st.cache_resource(max_entries=KEPT, show_spinner=False)
def _loaded_head(folder: Path, stamp: Any, made_for: str, _backbone: Backbone) -> Any:
    from xattn.heads import load_head

    return load_head(folder, _backbone).to(_backbone.device)


def explainers(loaded: Backbone, head: Head | None = None) -> tuple[dict[str, int], dict[str, str]]:
    """The explainers that this backbone supports, with their numbers of forward passes per image; and the
    other explainers, with the reasons why they are not supported."""
    key = "" if head is None else f"{head.name}/{sha256(head)}"
    return _explainers(f"{loaded.fingerprint}/{loaded.taps}/{key}", loaded, head)


@st.cache_data(max_entries=32, show_spinner=False)
def _explainers(
    key: str, _loaded: Backbone, _head: Head | None
) -> tuple[dict[str, int], dict[str, str]]:
    from xattn.explainers import create_explainer, list_explainers

    allowed, refused = {}, {}
    with model_lock():
        for name in list_explainers():
            try:
                allowed[name] = create_explainer(name, _loaded, _head).total_forwards or 1
            except ValueError as error:
                refused[name] = str(error)
    return allowed, refused

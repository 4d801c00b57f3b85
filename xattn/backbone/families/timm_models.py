"""Create a timm model from its name, with weights from the hub, a package, a file, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from xattn.runtime.names import did_you_mean

SOURCES = ("hf-hub:", "local-dir:")  # prefixes of models that timm has saved with their config
WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


def create_timm_model(
    name: str, weights: str | Path | None, size: tuple[int, int] | None, num_classes: int | None
) -> nn.Module:
    """Create a timm model whose ``pretrained_cfg`` fits its weights; arguments as in ``load_backbone``."""
    import timm

    _check_name(name)
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if size is not None and _takes_img_size(name):
        options["img_size"] = size
    if weights is None:
        return timm.create_model(name, pretrained=False, **options)
    if weights == "timm":
        return _from_hub(name, options)
    if weights == "package":
        return _from_package(name, size, options)
    from xattn.backbone.pruning import pruned_folder

    folder = pruned_folder(weights)
    if folder is not None:
        return _from_pruned(name, folder, options)
    return _from_file(name, weights, options)


def _check_name(name: str) -> None:
    """Raise a ``ValueError`` unless timm has the model ``name`` or, for a saved model, ``name`` is
    well-formed."""
    import timm

    source = next((s for s in SOURCES if name.startswith(s)), None)
    if source is None and Path(name).suffix in WEIGHT_FILES:
        raise ValueError(
            f"backbone: {name} is a weight file; give the name of the architecture, and the file as its "
            f"weights: load_backbone('resnet50', weights={name!r}), or -b resnet50 --weights {name}"
        )
    if source is None:
        if not timm.is_model(name):
            known = timm.list_models()
            hint = did_you_mean(name.split(".")[0], known, 'see xattn list --filter "*"', most=5)
            if "/" in name:
                hint = f"a model of transformers is transformers:{name}"
            raise ValueError(f"backbone: timm has no model {name!r}; {hint}")
    elif source == "local-dir:" and not (Path(name.removeprefix(source)) / "config.json").is_file():
        raise ValueError(
            f"backbone: {name.removeprefix(source)} holds no config.json; give the folder that "
            f"timm.models.save_for_hf wrote"
        )
    elif source == "hf-hub:" and name.removeprefix(source).count("/") != 1:
        raise ValueError(f"backbone: got {name!r}; write hf-hub:OWNER/MODEL")


def _config(name: str) -> Mapping[str, Any]:
    """Return timm's configuration for the weights ``name``; for a saved model, read its ``config.json``."""
    import timm
    from timm.models import load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    source, _, place = name.partition(":")
    if not place:
        config = timm.get_pretrained_cfg(name)
        return {} if config is None else config.to_dict()
    with _explaining(name):
        read = load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
        return dict(read(place)[0])


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turn timm's errors in reading weights or a config into an ``OSError`` with advice."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if name.startswith("local-dir:"):
            raise OSError(
                f"backbone: {name} could not be loaded ({reason}); give a folder that "
                f"timm.models.save_for_hf wrote"
            ) from error
        raise OSError(
            f"weights='timm': the weights of {name} could not be loaded from the hub ({reason}); give "
            f"a local file or weights='package'"
        ) from error


def _takes_img_size(name: str) -> bool:
    """Return whether the architecture takes ``img_size``: ViTs do, CNNs do not."""
    return bool(_config(name).get("fixed_input_size"))


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    with _explaining(name):
        return timm.create_model(name, pretrained=True, **options)


def _from_package(name: str, size: tuple[int, int] | None, options: dict[str, Any]) -> nn.Module:
    import timm

    from xattn.backbone.weights import package_weights

    architecture, package_options, state, overrides, count = package_weights(name, size)
    if options.get("num_classes") not in (None, count):
        raise ValueError(
            f"num_classes: got {options['num_classes']}, but the package's weights for {name} have "
            f"{count} classes; leave it out"
        )
    model: Any = timm.create_model(architecture, pretrained=False, **{**options, **package_options})
    model.load_state_dict(state, strict=True)
    model.pretrained_cfg = {**model.pretrained_cfg, **(overrides or {})}
    return model


def _from_file(name: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    """Create a model with weights from a file, and with the file's number of classes unless ``options``
    gives another."""
    import timm

    from xattn.backbone.weights import class_count, load_into, load_weight_file, part_of

    whole = load_weight_file(weights)
    key = _config(name).get("classifier")
    count = class_count(whole, key) if isinstance(key, str) else None
    if count is not None:
        options = {"num_classes": count, **options}
    model = timm.create_model(name, pretrained=False, **options)
    state = part_of(whole, model.state_dict().keys(), weights)
    refusal = (
        f"weights: {weights} does not fit {name} ({{reason}}); give a file for this architecture"
    )
    try:
        load_into(model, state, refusal)
    except ValueError:
        # A ViT's file may hold the positions for its own size, which are resized afterwards.
        own = options.pop("img_size", None)
        if own is None or not hasattr(model, "set_input_size"):
            raise
        model = timm.create_model(name, pretrained=False, **options)
        load_into(model, state, refusal)
        model.set_input_size(img_size=own)  # type: ignore[operator]
    return model


def _from_pruned(name: str, folder: Path, options: dict[str, Any]) -> nn.Module:
    """Create the unpruned model, slice it as the ``xattn prune`` folder records, and load the weights."""
    import timm

    from xattn.backbone.fingerprint import state_sha256
    from xattn.backbone.pruning import prune_in_place, read_pruned
    from xattn.backbone.weights import load_weight_file

    saved = read_pruned(folder)
    saved.check_backbone(name, options.get("num_classes"))
    state = load_weight_file(saved.weights)
    if (found := state_sha256(state)) != saved.sha256:
        raise ValueError(
            f"weights: {folder} was changed or damaged after it was written (its sha256 is {found}, but "
            f"its record has {saved.sha256}); run xattn prune again"
        )
    own: dict[str, Any] = {"num_classes": saved.num_classes}
    if _takes_img_size(name):
        own["img_size"] = saved.preprocessing["input_size"][1:]
    model: Any = timm.create_model(name, pretrained=False, **own)
    try:
        prune_in_place(model, saved.pruning)
        model.load_state_dict(state, strict=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"weights: {folder} does not fit {name} ({reason}); run xattn prune again"
        ) from None
    size = options.get("img_size")
    if size is not None and list(size) != list(own["img_size"]):
        model.set_input_size(img_size=size)
    model.pretrained_cfg = {**model.pretrained_cfg, **saved.preprocessing}
    return model

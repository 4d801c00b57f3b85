"""Whether a saved head belongs to a backbone, by what its config says of the one it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xattn.attention.conversion import Conversion, describe, how_to_convert
from xattn.backbone import Backbone

TRAINED = "--mechanism FOLDER (what xattn distill wrote)"


def check_backbone(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise a ``ValueError`` with the remedy unless ``backbone`` is what the head ``name`` was trained on.

    Args:
        wanted: ``"backbone"`` of the head's config.
    """
    _check_conversion(name, wanted, backbone)
    _check_normalization(name, wanted, backbone)
    if wanted["sha256"] != backbone.fingerprint:
        raise ValueError(
            f"head: {name} was trained on {wanted.get('name')} with weights sha256 "
            f"{wanted['sha256']}, the backbone {backbone.name} has {backbone.fingerprint}; "
            f"load the backbone it was trained on{_how_to_get_weights(wanted, backbone)}"
        )
    if tuple(wanted.get("taps", backbone.taps)) != backbone.taps:
        raise ValueError(
            f"head: {name} reads the taps {wanted['taps']}, the backbone gives "
            f"{list(backbone.taps)}; load the backbone with taps={wanted['taps']}"
        )
    if wanted.get("task", backbone.task) != backbone.task:
        raise ValueError(
            f"head: {name} was trained for task={wanted['task']!r}, the backbone has "
            f"task={backbone.task!r}; load the backbone with task={wanted['task']!r}"
        )


def _check_conversion(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise unless the backbone is converted as the head's was."""
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
        f"the backbone has {describe(backbone.conversion or ()) or 'its own'}; {remedy}"
    )


def _check_normalization(name: str, wanted: Mapping[str, Any], backbone: Backbone) -> None:
    """Raise unless the backbone's mean and std are its own, or others, as those of the head's were."""
    theirs = wanted.get("preprocessing") or {}
    own = backbone.preprocessing_record().get("preprocessing", {})
    if not isinstance(theirs, dict):
        raise ValueError(f"head: the config of {name} is damaged (its preprocessing is {theirs!r})")
    for key in ("mean", "std"):
        if theirs.get(key) == own.get(key):
            continue
        if key not in theirs:
            raise ValueError(
                f"head: {name} was trained with the model's own {key}, the backbone has "
                f"{own[key]}; leave out {key}= (--{key})"
            )
        raise ValueError(
            f"head: {name} was trained with {key}={theirs[key]}, the backbone has "
            f"{list(getattr(backbone.preprocessing, key))}; load it with that (--{key})"
        )


def _how_to_get_weights(wanted: Mapping[str, Any], backbone: Backbone) -> str:
    """The rest of a remedy: whether the head's mechanism was trained, if it has one."""
    if backbone.conversion is None:
        return ""
    if "conversion_sha256" in wanted:
        return f", with {TRAINED}"
    if "conversion_sha256" in backbone.conversion_record():
        return f", with {how_to_convert(backbone.conversion)}"
    return ", such as --mechanism FOLDER of xattn distill"

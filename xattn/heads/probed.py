"""A frozen network with a trained head as its classifier, which every explainer and metric can use.

    logits = head(tokens of the backbone),   fingerprint = SHA-256 of both weights

A :class:`Probed` is a :class:`~xattn.backbone.Backbone`, so every explainer and metric works on the
head's classes; the head itself explains them through its exact class maps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, nn

from xattn.backbone import Backbone, Preprocessing, Taps, sha256
from xattn.backbone.fingerprint import hash_inputs, is_unchanged, network_sha256
from xattn.heads.attentive import AttentiveHead


class Probed(Backbone):
    """``probed(images) -> Taps`` whose logits are those of ``probe``, the trained head.

    ``encoder_fingerprint`` is the hash of the weights that the head was trained on; ``tap_point`` is
    an identity through which the last map passes to the head.
    """

    probe: AttentiveHead

    def __init__(self, backbone: Backbone, head: AttentiveHead) -> None:
        taps = None if backbone.adapter else backbone.taps
        super().__init__(backbone.model, backbone.name, backbone.preprocessing, taps)
        self.name = f"{backbone.name} + {head.name}"
        self.encoder_fingerprint = backbone.fingerprint
        self.probe = head.to(backbone.device).eval().requires_grad_(False)
        vars(self).update(task="multiclass", num_classes=head.num_classes)
        names = head.class_names or [f"class {i}" for i in range(head.num_classes)]
        self.class_names = list(names)
        self.pools_linearly = False
        self.tap_point = nn.Identity()
        self._fingerprint, self._hashed = self._hash(backbone.fingerprint), hash_inputs(self.model)

    def with_preprocessing(self, preprocessing: Preprocessing) -> Probed:
        taps = None if self.adapter else self.taps
        name = self.name.removesuffix(f" + {self.probe.name}")
        encoder = Backbone(self.model, name, preprocessing, taps)
        own = self.preprocessing
        if (preprocessing.mean, preprocessing.std) == (own.mean, own.std):
            encoder._fingerprint = self.encoder_fingerprint
            encoder._hashed = self._hashed
        return Probed(encoder, self.probe)

    def with_taps(self, taps: str | Sequence[str]) -> Backbone:
        raise ValueError(
            f"taps: got {taps!r}, but the head of {self.name} reads {list(self.taps)}; tap the backbone, "
            f"then train a head on that"
        )

    def with_converted(self, model: nn.Module) -> Backbone:
        raise ValueError(
            f"backbone: the head of {self.name} was trained on it as it is; convert the backbone, then "
            f"train a head on that"
        )

    @property
    def has_classes(self) -> bool:
        return True

    def forward_normalized(self, x: Tensor) -> Taps:
        with self._passing(x):
            taps = super().forward_normalized(x)
            taps = taps._replace(maps=(*taps.maps[:-1], self.tap_point(taps.maps[-1])))
            logits = self.probe.predict(self.probe.attend(self.probe.tokens(taps)))
        return taps._replace(logits=logits)

    def logits_normalized(self, x: Tensor) -> Tensor:
        return self.forward_normalized(x).logits

    @property
    def cam_layer(self) -> nn.Module | None:
        """``tap_point`` if the network's own layer for CAM methods does not lead to the head."""
        kind, _, index = self.taps[-1].partition(".")
        last_block = self.is_vit and kind == "block" and int(index) == self.depth - 1
        return None if kind == "head" or last_block else self.tap_point

    @property
    def has_pooled_tap(self) -> bool:
        """Whether the head reads only the map that the network itself would pool."""
        return super().has_pooled_tap and self.probe.num_taps == 1

    def head_logits(self, final: Tensor) -> Tensor:
        self.require_pooled_tap()
        empty = final.new_empty(len(final), 0)
        return self.probe.predict(self.probe.attend(self.probe.tokens(Taps(empty, (final,)))))

    def _classifier(self) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None or not is_unchanged(self.model, self._hashed):
            network = network_sha256(self.model, self.preprocessing)
            self._fingerprint, self._hashed = self._hash(network), hash_inputs(self.model)
        return self._fingerprint

    def _hash(self, encoder: str) -> str:
        both = f"{encoder}/{self.probe.name}/{sha256(self.probe)}"
        return hashlib.sha256(both.encode()).hexdigest()


def probed(backbone: Backbone, head: AttentiveHead) -> Probed:
    """``backbone`` with ``head`` as its classifier; both are shared, not copied, and frozen.

    Raises:
        ValueError: ``head`` is not a classifier, or belongs to another backbone or other taps.
    """
    if not isinstance(head, AttentiveHead):
        raise ValueError(f"head: {head.name!r} is not a classifier; give a head of 'xattn probe'")
    theirs = head.backbone_fingerprint, head.backbone_taps
    own = backbone.fingerprint, list(backbone.taps)
    if theirs != own:
        raise ValueError(
            f"head: {head.name!r} reads weights sha256 {theirs[0]} and the taps {theirs[1]}, but the "
            f"backbone {backbone.name} has {own[0]} and {own[1]}; load a matching pair"
        )
    return Probed(backbone, head)

"""The networks of the swap study: the trained one at each size, and its converted copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xattn.backbone import Backbone, converted, load_conversion, resized
from xattn.backbone.conversion import WEIGHTS_FILE
from xattn.config import DistillConfig
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.kept import kept_record
from xattn.eval.studies.study_photos import Photo
from xattn.eval.studies.swap.rows import AS_TRAINED, Swap
from xattn.runtime.files import file_sha256
from xattn.training.distilling import CONVERSION_FOLDER, distill
from xattn.training.run_folder import RUN_FILE

# settings of training that change no result, and those that were added later and are not used here
UNTOLD = ("workers", "checkpoint_every", "student_epochs", "student_lr")


class Unavailable(ValueError):
    """A row that cannot be measured at a size, and why."""


class Networks:
    """Networks by row, size and fold, made when they are asked for.

    Args:
        backbone: the trained ViT; ``size``: pixels a side at which networks are distilled.
        photos: all; the study's own network of fold k learns from those whose number is not k modulo 2.
        folder: where trained conversions are kept.

    Raises:
        ValueError: a backbone without blocks, or a single photo.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int,
        photos: Sequence[Photo],
        config: DistillConfig,
        folder: Path,
        progress: bool = True,
    ) -> None:
        blocks: Any = getattr(backbone.model, "blocks", None)
        if blocks is None:
            raise ValueError(f"backbone: {backbone.name} has no blocks; choose a ViT")
        if len(photos) < 2:
            raise ValueError(
                f"photos: got {len(photos)}; give at least 2, half of them to train on"
            )
        self.backbone, self.size, self.photos = backbone, size, photos
        self.config, self.folder, self.progress = config, folder, progress
        self.depth = len(blocks)
        self._made: dict[Any, Backbone] = {}
        self._splits: dict[tuple[str, int], Split] = {}

    def split(self, swap: Swap, fold: int) -> Split:
        """What the network of a row was trained and scored on."""
        key = swap.key(self.depth), fold
        return self._splits.setdefault(key, Split(f"swap, {swap.label}"))

    def dense(self, size: int, positions: str = "resize") -> Backbone:
        """The network with its own attention for images of ``size``."""
        key = size, positions
        if key not in self._made:
            self._made[key] = resized(self.backbone, size, positions)
        return self._made[key]

    def of(self, swap: Swap, size: int, fold: int = 0) -> Backbone:
        """The network of a row.

        Raises:
            Unavailable: the mechanism, or what was trained, does not fit that size.
        """
        key = swap.key(self.depth), size, fold
        if key not in self._made:
            folder = self.trained(swap, fold) if swap.trained else None
            try:
                network = self.dense(size, swap.positions)
                if folder is not None:
                    network = load_conversion(folder, self.dense(self.size), network)
                elif swap != AS_TRAINED:
                    blocks = swap.blocks(self.depth)
                    network = converted(network, swap.name, blocks, dict(swap.options))
            except ValueError as error:
                raise Unavailable(str(error)) from error
            self._made[key] = network
        return self._made[key]

    def forget(self) -> None:
        """Drop the networks, as when another size is measured."""
        self._made.clear()

    def record(self, swap: Swap, size: int) -> dict[str, Any]:
        """What the networks of a row depend on; none needs to be made for it."""
        found = {
            "backbone": self.backbone.fingerprint,
            "size": size,
            **swap.record(self.depth),
        }
        if swap.trained is True:
            found["trained"] = [self._training(fold) for fold in range(swap.folds)]
        elif swap.trained:
            found["trained"] = file_sha256(Path(swap.trained) / WEIGHTS_FILE)
        return found

    def trained(self, swap: Swap, fold: int) -> Path:
        """The folder of the conversion of a trained row; trained now if it is not there yet.

        Raises:
            ValueError: the study's folder holds one of other settings.
        """
        if swap.trained is not True:
            return Path(swap.trained)
        folder = self.folder / swap.key(self.depth) / f"fold-{fold}"
        dense, blocks = self.dense(self.size), swap.blocks(self.depth)
        record = {"backbone": dense.fingerprint, **swap.record(self.depth)}
        kept_record(folder / "record.json", {**record, **self._training(fold)})
        run = folder / "run"
        photos = [p.path for p in self.split(swap, fold).fit(self._training_photos(fold))]
        if not (run / CONVERSION_FOLDER / WEIGHTS_FILE).is_file():
            distill(
                dense, swap.mechanism, blocks, dict(swap.options),
                data=photos, validation=photos[: self.config.measured], config=self.config,
                output=run, resume=(run / RUN_FILE).is_file(), progress=self.progress,
            )  # fmt: skip
        return run / CONVERSION_FOLDER

    def _training(self, fold: int) -> dict[str, Any]:
        """What a conversion that the study trains depends on."""
        config = {k: v for k, v in asdict(self.config).items() if k not in UNTOLD}
        photos = {p.name: p.sha256 for p in self._training_photos(fold)}
        return {"size": self.size, "config": config, "photos": photos}

    def _training_photos(self, fold: int) -> list[Photo]:
        return [photo for i, photo in enumerate(self.photos) if i % 2 != fold]

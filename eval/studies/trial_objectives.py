"""Trials whose loss reads more than a table of outcomes: empty photos, T-TAME's objective, or a teacher.

    L = L_outcomes + weight x efficiency,    L = L_outcomes + weight x L_T-TAME,    L = 1 - corr(S, teacher)

The first two are added to the loss of outcomes, the third replaces it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.studies.outcome_losses import Distilled, Efficiency
from xattn.eval.studies.trial_training import Trial, TrialRun, trained
from xattn.explainers import Explainer, create_explainer
from xattn.heads.evidence import standardised
from xattn.photos.sources import open_photos
from xattn.runtime.files import atomic_file
from xattn.training.data import TrainImages
from xattn.training.objective import objective
from xattn.training.outcome_fitting import OutcomePlaces, OutcomesJob
from xattn.training.outcome_masks import CELLS, FILLS, background
from xattn.training.run import Run
from xattn.training.tap_store import Place


def with_efficiency(trial: Trial, run: TrialRun) -> Explainer:
    """A head whose loss has the efficiency term, ``weight`` times."""
    terms = Efficiency(empty_logits(run.backbone, trial.chosen(run)), trial.options["weight"])
    return trial.explainer(run, trained(trial, run, run.folder / "run", terms=terms))


def empty_logits(backbone: Backbone, photos: Sequence[Path]) -> dict[str, Tensor]:
    """The logits (F, K) of what lies behind the masks of each photo, by its name."""
    found, dtype = {}, next(backbone.parameters()).dtype
    for name, image in readable(backbone, photos):
        behind = torch.stack([background(image, fill) for fill in FILLS])
        # With gradients, as passes without them may be compiled anew for each batch size.
        found[name] = backbone.logits(behind.to(backbone.device, dtype)).detach().float().cpu()
    return found


def readable(backbone: Backbone, photos: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The names of the photos that can be read, with their evaluation crops (3, H, W)."""
    opened = open_photos(photos)
    images = TrainImages(opened, backbone.preprocessing, 0, augment=False)
    for i in range(len(opened)):
        image = images[0, i][1]
        if image is not None:
            yield opened.name(i), image


def joint(trial: Trial, run: TrialRun) -> Explainer:
    """A head whose loss has T-TAME's objective on ``photos`` of each batch, ``weight`` times."""

    def job(*arguments: Any) -> OutcomesJob:
        return JointJob(*arguments, weight=trial.options["weight"], count=trial.options["photos"])

    return trial.explainer(run, trained(trial, run, run.folder / "run", job=job))


class JointJob(OutcomesJob):
    """Outcomes, and T-TAME's objective (recipe "small") on the first ``count`` photos of each batch,
    ``weight`` times."""

    def __init__(self, *arguments: Any, weight: float, count: int) -> None:
        super().__init__(*arguments)
        backbone, photos, _, _, config, *_ = arguments
        if config.crops > 1:
            raise ValueError(
                f"crops: got {config.crops}; T-TAME's part sees the model's own crop, give 1"
            )
        self.weight, self.count, self.masking = weight, count, TrainConfig("small")
        self.images = TrainImages(photos, backbone.preprocessing, config.seed, augment=False)
        self._kept: dict[int, Tensor] = {}

    def losses(
        self, run: Run[Any], backbone: Backbone, places: list[Place], batch: OutcomePlaces
    ) -> dict[str, Tensor]:
        """As :meth:`OutcomesJob.losses`, with ``masking``, T-TAME's loss."""
        terms = super().losses(run, backbone, places, batch)
        images = torch.stack([self._image(self.numbers[i]) for _, i in places[: self.count]])
        with run.forward(batch.share):
            found = objective(
                run.head, backbone, images.to(backbone.device), self.masking, run.head.mask_policy
            )
        return {**terms, "loss": terms["loss"] + self.weight * found.loss, "masking": found.loss}

    def _image(self, number: int) -> Tensor:
        """The evaluation crop of a photo, kept in bytes."""
        if number not in self._kept:
            image = self.images[0, number][1]
            if image is None:
                raise OSError("data: an image that could be read before no longer can")
            self._kept[number] = (image * 255).round().to(torch.uint8)
        return self._kept[number].float() / 255


def distilled(trial: Trial, run: TrialRun) -> Explainer:
    """A head that learns the mean map of the explainers in ``options``, by correlation."""
    terms = Distilled(teacher_maps(run, trial.chosen(run), trial.options))
    return trial.explainer(run, trained(trial, run, run.folder / "run", terms=terms))


def teacher_maps(
    run: TrialRun, photos: Sequence[Path], methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The mean (28, 28) of the standardised maps of ``methods`` (name -> options) of each photo's most
    probable class, by its name. Each is kept in a file, and read where it is there."""
    explainers = [
        create_explainer(name, run.backbone, max_forward_batch=run.max_forward_batch, **options)
        for name, options in methods.items()
    ]
    text = json.dumps([run.backbone.fingerprint, methods], sort_keys=True)
    about = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = run.tables / f"{run.backbone.name}-maps-{'+'.join(methods)}-{about}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    images = readable(run.backbone, photos)
    for name, image in tqdm(images, "teacher maps", len(photos), disable=not run.progress):
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        place = folder / f"{digest[:32]}.npy"
        if not place.is_file():
            maps = _mean_map(run.backbone, explainers, image[None]).numpy()
            with atomic_file(place) as temporary, temporary.open("wb") as stream:
                np.save(stream, maps)
        found[name] = torch.from_numpy(np.load(place))
    return found


def _mean_map(backbone: Backbone, explainers: Sequence[Explainer], image: Tensor) -> Tensor:
    target = backbone.logits(image.to(backbone.device)).argmax(1).cpu()
    maps = [explainer.attribute(image, target).float().cpu() for explainer in explainers]
    cells = [standardised(F.adaptive_avg_pool2d(found, CELLS)) for found in maps]
    return torch.stack(cells).mean(0)[0, 0]

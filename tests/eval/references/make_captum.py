"""Infidelity and max-sensitivity by Captum, with fixed perturbations -> captum.json."""

from typing import Any

import cases
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

result: dict[str, Any] = {}
for name, build in cases.CASES.items():
    case = build()
    batch = len(case.images)

    def in_turn(perturbations: Tensor) -> Tensor:
        """(n, B or 1, 3, H, W) -> the order of ``repeat_interleave``: (B n, 3, H, W)."""
        n = len(perturbations)
        return perturbations.expand(n, batch, -1, -1, -1).transpose(0, 1).flatten(0, 1)  # noqa: B023

    removed = in_turn(case.removals())
    shift = in_turn(case.shifts())
    attributions = case.grey.expand_as(case.images) / 3  # a third of the map for each channel
    rows: dict[str, Any] = {}
    for setting in ("probability", "logit"):

        def forward(x: Tensor, setting: str = setting) -> Tensor:
            logits = case.f(x)  # noqa: B023
            return logits.softmax(1) if setting == "probability" else logits

        for normalize in (False, True):
            rows[f"infidelity, {setting}, normalize={normalize}"] = infidelity(
                forward,
                lambda x: (removed, x - removed),  # noqa: B023
                case.images,
                attributions,
                target=case.targets,
                n_perturb_samples=len(removed) // batch,
                normalize=normalize,
            )

    def explain(x: Tensor | tuple[Tensor], target: Tensor) -> tuple[Tensor]:
        # Captum hands over a tuple the first time, and iterates over what comes back.
        x = x[0] if isinstance(x, tuple) else x
        return (cases.saliency(case.f, x, target),)  # noqa: B023

    rows["sensitivity_max"] = sensitivity_max(
        explain,
        case.images,
        lambda x: x + shift,  # noqa: B023
        n_perturb_samples=len(shift) // batch,
        target=case.targets,
    )
    result[name] = rows
cases.save("captum", ["captum"], result)

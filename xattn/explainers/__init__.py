"""Explainers: anything with Captum's ``attribute(inputs, target)``, created by name."""

from xattn.explainers.base import (
    Explainer,
    create_explainer,
    explainer_class,
    list_explainers,
    preserve_state,
    register_explainer,
)
from xattn.explainers.baselines import Centre, Ones, Random
from xattn.explainers.cam import Cam
from xattn.explainers.gradcam import GradCam
from xattn.explainers.head import HeadExplainer

__all__ = [
    "Cam",
    "Centre",
    "Explainer",
    "GradCam",
    "HeadExplainer",
    "Ones",
    "Random",
    "create_explainer",
    "explainer_class",
    "list_explainers",
    "preserve_state",
    "register_explainer",
]

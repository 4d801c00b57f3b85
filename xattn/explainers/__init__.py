"""Explainers: anything with Captum's ``attribute(inputs, target)``, created by name."""

from xattn.explainers.attention import AttentionExplainer
from xattn.explainers.attn_lrp import AttnLrp
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
from xattn.explainers.generic_relevance import GenericRelevance
from xattn.explainers.gradcam import GradCam
from xattn.explainers.head import HeadExplainer
from xattn.explainers.raw_attention import ColumnMass, RawAttention
from xattn.explainers.rollout import Rollout

__all__ = [
    "AttentionExplainer",
    "AttnLrp",
    "Cam",
    "Centre",
    "ColumnMass",
    "Explainer",
    "GenericRelevance",
    "GradCam",
    "HeadExplainer",
    "Ones",
    "Random",
    "RawAttention",
    "Rollout",
    "create_explainer",
    "explainer_class",
    "list_explainers",
    "preserve_state",
    "register_explainer",
]

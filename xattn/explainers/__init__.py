"""Explainers: anything with Captum's ``attribute(inputs, target)``, created by name."""

from xattn.explainers.ablationcam import AblationCam
from xattn.explainers.attention import AttentionExplainer
from xattn.explainers.attn_lrp import AttnLrp
from xattn.explainers.base import (
    Explainer,
    ExplainerEntry,
    create_explainer,
    explainer_class,
    explainer_entry,
    list_explainers,
    preserve_state,
)
from xattn.explainers.baselines import Centre, Ones, Random
from xattn.explainers.cam import Cam
from xattn.explainers.eigencam import EigenCam, EigenGradCam
from xattn.explainers.fullgrad import FullGrad
from xattn.explainers.gates import Gates
from xattn.explainers.generic_relevance import GenericRelevance
from xattn.explainers.grad_eclip import GradEclip
from xattn.explainers.gradcam import GradCam, GradCamPlusPlus, HiResCam, LayerCam, XGradCam
from xattn.explainers.gradients import GuidedBackprop, InputXGradient, Saliency
from xattn.explainers.head import HeadExplainer
from xattn.explainers.integrated_gradients import GradientShap, IntegratedGradients, SmoothGrad
from xattn.explainers.kernel_shap import KernelShap
from xattn.explainers.legrad import LeGrad
from xattn.explainers.libragrad import LibraGrad
from xattn.explainers.lime import Lime
from xattn.explainers.lrp import Lrp
from xattn.explainers.masked_passes import PerturbationExplainer
from xattn.explainers.occlusion import Occlusion
from xattn.explainers.own import as_explainer, register_explainer
from xattn.explainers.raw_attention import ColumnMass, RawAttention
from xattn.explainers.rise import Rise
from xattn.explainers.rollout import Rollout
from xattn.explainers.scorecam import ScoreCam

__all__ = [
    "AblationCam",
    "AttentionExplainer",
    "AttnLrp",
    "Cam",
    "Centre",
    "ColumnMass",
    "EigenCam",
    "EigenGradCam",
    "Explainer",
    "ExplainerEntry",
    "FullGrad",
    "Gates",
    "GenericRelevance",
    "GradCam",
    "GradCamPlusPlus",
    "GradEclip",
    "GradientShap",
    "GuidedBackprop",
    "HeadExplainer",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerCam",
    "LeGrad",
    "LibraGrad",
    "Lime",
    "Lrp",
    "Occlusion",
    "Ones",
    "PerturbationExplainer",
    "Random",
    "RawAttention",
    "Rise",
    "Rollout",
    "Saliency",
    "ScoreCam",
    "SmoothGrad",
    "XGradCam",
    "as_explainer",
    "create_explainer",
    "explainer_class",
    "explainer_entry",
    "list_explainers",
    "preserve_state",
    "register_explainer",
]

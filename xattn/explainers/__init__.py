"""Explainers: anything with Captum's ``attribute(inputs, target)``, created by name."""

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
from xattn.explainers.cams.ablationcam import AblationCam
from xattn.explainers.cams.cam import Cam
from xattn.explainers.cams.eigencam import EigenCam, EigenGradCam
from xattn.explainers.cams.fullgrad import FullGrad
from xattn.explainers.cams.gradcam import GradCam, GradCamPlusPlus, HiResCam, LayerCam, XGradCam
from xattn.explainers.cams.scorecam import ScoreCam
from xattn.explainers.gates import Gates
from xattn.explainers.gradients import GuidedBackprop, InputXGradient, Saliency
from xattn.explainers.head import HeadExplainer
from xattn.explainers.integrated_gradients import GradientShap, IntegratedGradients, SmoothGrad
from xattn.explainers.masking.kernel_shap import KernelShap
from xattn.explainers.masking.lime import Lime
from xattn.explainers.masking.masked_passes import PerturbationExplainer
from xattn.explainers.masking.occlusion import Occlusion
from xattn.explainers.masking.rise import Rise
from xattn.explainers.own import as_explainer, register_explainer
from xattn.explainers.relevance.attention import AttentionExplainer
from xattn.explainers.relevance.attn_lrp import AttnLrp
from xattn.explainers.relevance.generic_relevance import GenericRelevance
from xattn.explainers.relevance.grad_eclip import GradEclip
from xattn.explainers.relevance.legrad import LeGrad
from xattn.explainers.relevance.libragrad import LibraGrad
from xattn.explainers.relevance.lrp import Lrp
from xattn.explainers.relevance.raw_attention import ColumnMass, RawAttention
from xattn.explainers.relevance.rollout import Rollout

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

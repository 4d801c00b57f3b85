"""Plain words for what packs and tables call by a key: a title and a sentence for each method and metric.

They stand here and not on the classes, since the viewer shows them without loading a network's library.
A key that is not listed, such as a head's name or a metric of your own, is its own title.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """A title, and one sentence without its full stop; a metric's may have ``{kept}`` or ``{removed}``,
    which part of the photo that is at the metric's level."""

    title: str
    about: str


METHODS = {
    "ablationcam": Words(
        "Ablation-CAM", "Adds the channels up by how much the score falls without each"
    ),
    "attn_lrp": Words("AttnLRP", "Hands the score back through a transformer, layer by layer"),
    "cam": Words("CAM", "Adds the last channels up by the classifier's own weights"),
    "centre": Words(
        "Centre", "A blur around the middle of the photo: no explanation, but a control"
    ),
    "column_mass": Words("Attention received", "How much all patches attend to each patch"),
    "eigencam": Words(
        "Eigen-CAM", "The strongest common pattern of the channels, whatever the class"
    ),
    "eigengradcam": Words(
        "Eigen-Grad-CAM",
        "The strongest common pattern of the channels, weighted by their gradients",
    ),
    "fullgrad": Words("FullGrad", "Adds up what the pixels and each layer's biases give the score"),
    "gates": Words(
        "Attention gates", "Where a segmentation network's gates let the signal through"
    ),
    "generic_relevance": Words(
        "Generic relevance", "Attention of all layers, weighted by its gradients for the class"
    ),
    "grad_eclip": Words("Grad-ECLIP", "Values of the patches, weighted by gradients and attention"),
    "gradcam": Words("Grad-CAM", "Adds the channels up by the mean of their gradients"),
    "gradcam_plusplus": Words(
        "Grad-CAM++", "Grad-CAM that counts several objects of one class alike"
    ),
    "gradient_shap": Words(
        "GradientSHAP", "Gradients on the way from random photos to this one, times the difference"
    ),
    "guided_backprop": Words(
        "Guided backprop", "Gradients of which only positive ones pass each layer"
    ),
    "head": Words("Explanation head", "Maps of a head that was trained to explain this network"),
    "hirescam": Words("HiResCAM", "Grad-CAM whose weights are not averaged over the photo"),
    "input_x_gradient": Words(
        "Input × gradient", "The pixels, times how much the score depends on them"
    ),
    "integrated_gradients": Words(
        "Integrated gradients", "Gradients summed on the way from a blank photo to this one"
    ),
    "kernel_shap": Words("KernelSHAP", "Each superpixel's fair share of the confidence, estimated"),
    "layercam": Words(
        "LayerCAM", "Grad-CAM with a weight for each place, so that earlier layers can be read"
    ),
    "legrad": Words("LeGrad", "How the score depends on the attention of all layers"),
    "libragrad": Words(
        "LibraGrad", "Gradients of a transformer whose parts were brought into balance"
    ),
    "lime": Words(
        "LIME", "A simple model of how the confidence depends on which superpixels are seen"
    ),
    "lrp": Words("LRP", "Hands the score back to the pixels, layer by layer"),
    "occlusion": Words("Occlusion", "How much the confidence falls when a window hides each place"),
    "ones": Words("All ones", "Keeps the whole photo: no explanation, but a control"),
    "random": Words("Random", "Noise: no explanation, but a control"),
    "raw_attention": Words("Raw attention", "What the class token attends to in one layer"),
    "rise": Words("RISE", "The mean of random masks, weighted by the confidence that each leaves"),
    "rollout": Words(
        "Attention rollout", "Attention followed through all layers, whatever the class"
    ),
    "saliency": Words(
        "Saliency", "How much the score depends on each pixel, without its direction"
    ),
    "scorecam": Words(
        "Score-CAM", "Adds the channels up by the confidence that each leaves as a mask"
    ),
    "smoothgrad": Words("SmoothGrad", "Saliency, averaged over noisy copies of the photo"),
    "xgradcam": Words(
        "XGrad-CAM", "Grad-CAM that averages each channel's gradients where the channel is active"
    ),
}
CONTROLS = {  # prefixes of rows that a method has to beat
    "qk_randomized_": Words(
        "{method}, random attention", "The method where the network's attention was made random"
    ),
    "randomized_": Words("{method}, random weights", "The method on a network that knows nothing"),
    "static_": Words(
        "{method}, fixed attention", "The method where attention is the same on every photo"
    ),
}
_REPLACED = "pixels are replaced by what is around them"
METRICS = {
    "AD": Words("Average drop", "How much confidence is lost when {kept} is kept"),
    "IC": Words("Increase in confidence", "How often confidence rises when {kept} is kept"),
    "ADD": Words(
        "Average drop in deletion", "How much confidence is lost when {removed} is removed"
    ),
    "AG": Words("Average gain", "How much of the missing confidence is won when {kept} is kept"),
    "drop": Words("Drop", "How many points of confidence are lost when {kept} is kept"),
    "deletion": Words(
        "Deletion", "How much confidence is left while pixels are removed, the most important first"
    ),
    "insertion": Words(
        "Insertion", "How much confidence there is while pixels come back, the most important first"
    ),
    "ROAD-MoRF": Words(
        "ROAD, most important first",
        f"How much confidence is left when the most important {_REPLACED}",
    ),
    "ROAD-LeRF": Words(
        "ROAD, least important first",
        f"How much confidence is left when the least important {_REPLACED}",
    ),
    "ROAD": Words(
        "ROAD", "How much more confidence the most important pixels carry than the least important"
    ),
    "AOPC": Words(
        "Pixel flipping",
        "How much confidence is lost while patches are removed, the most important first",
    ),
    "IROF": Words(
        "Removal of superpixels",
        "How fast confidence falls while superpixels are removed, the most important first",
    ),
    "infidelity": Words(
        "Infidelity", "How badly the map foretells what a change of the photo does"
    ),
    "monotonicity": Words(
        "Monotonicity", "How well a patch's value in the map goes with its effect on the score"
    ),
    "Gini": Words("Concentration (Gini)", "How much the map concentrates on a few places"),
    "entropy": Words("Entropy", "How widely the map is spread over the photo"),
    "pointing": Words("Pointing game", "How often the map's highest point lies on the object"),
    "energy-pointing": Words("Share on the object", "How much of the map lies on the object"),
    "IoU": Words(
        "Overlap with the object", "How well the map's highest part covers the object alone"
    ),
    "coherency": Words("Coherency", "How alike the map stays when the photo is masked with it"),
    "complexity": Words("Extent", "How much of the photo the map marks"),
    "ADCC": Words("ADCC", "Average drop, coherency and extent in one number"),
    "max-sensitivity": Words(
        "Greatest change", "How much the map changes when the photo changes a little, at most"
    ),
    "randomization-Spearman": Words(
        "Likeness on random weights, by ranks",
        "How alike the map stays when the network forgets what it learned",
    ),
    "randomization-SSIM": Words(
        "Likeness on random weights, by structure",
        "How alike the map looks when the network forgets what it learned",
    ),
}


def method_title(name: str) -> str:
    """What a method is called in running text, such as "Grad-CAM++"; an unknown name as it is.

    >>> method_title("gradcam_plusplus"), method_title("randomized_gradcam"), method_title("my-head")
    ('Grad-CAM++', 'Grad-CAM, random weights', 'my-head')
    """
    return _method(name).title


def method_about(name: str) -> str:
    """What a method does, in one sentence; "" of an unknown name."""
    return _sentence(_method(name).about)


def _method(name: str) -> Words:
    if name in METHODS:
        return METHODS[name]
    for prefix, words in CONTROLS.items():
        own = name.removeprefix(prefix)
        if own != name:
            return words._replace(title=words.title.format(method=method_title(own)))
    return Words(name, "")


def metric_title(key: str) -> str:
    """What a column's metric is called, with its level; an unknown key as it is.

    >>> metric_title("AD@50"), metric_title("AD@15"), metric_title("Gini")
    ('Average drop, top half', 'Average drop, top 15 %', 'Concentration (Gini)')
    """
    name, _, level = key.partition("@")
    if name not in METRICS:
        return key
    return METRICS[name].title + (f", {_part(level)}" if level else "")


def metric_about(key: str, higher_is_better: bool | None = None) -> str:
    """What a column says, in one sentence, and which direction is better; "" of an unknown key.

    >>> metric_about("AD@50", False)
    'How much confidence is lost when only the top half is kept. Lower is better.'
    """
    name, _, level = key.partition("@")
    about = METRICS[name].about if name in METRICS else ""
    removed = f"the {_part(level)}" if level else "what the map marks"
    kept = f"only {removed}"
    if level == "100":  # pixels count as much as the map says
        kept = removed = "as much of each pixel as the map says"
    better = {True: "Higher is better.", False: "Lower is better.", None: ""}[higher_is_better]
    return f"{_sentence(about.format(kept=kept, removed=removed))} {better}".strip()


def named_metric(key: str) -> str:
    """A column's key with its title, for lists: "AD@50: average drop, top half"."""
    title = metric_title(key)
    if title == key:
        return key
    return f"{key}: {title if title[1:2].isupper() else title[0].lower() + title[1:]}"


def _part(level: str) -> str:
    return {"100": "whole map", "50": "top half"}.get(level, f"top {level} %")


def _sentence(about: str) -> str:
    return f"{about}." if about else ""

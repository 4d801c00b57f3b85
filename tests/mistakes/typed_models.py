"""Mistakes at the command line with a model of one's own."""

from mistakes.table import Typed

NET = "explain {photo} -b test_resnet --weights random --device cpu"

MISTAKES = [
    Typed(f"{NET} --mean 123.675 116.28 103.53", ("mean: ", "divide", "0.485")),
    Typed(f"{NET} --std 0", ("std: ", "over 0")),
    Typed(f"{NET} --crop-pct 224", ("crop: got 224", "0.875")),
    Typed(f"{NET} --interpolation biliner", ("interpolation: ", "did you mean bilinear")),
    Typed("explain {photo} -b local-dir:{folder}", ("backbone: ", "holds no config.json")),
    Typed(
        f"{NET} --explainers gradcam --options gradcam.layer=layr4",
        ("layer: ", "near matches: layer4"),
    ),
]

"""The COCO category of each ImageNet-1k class, where the match is clear.

A match is clear if a COCO annotator who sees a typical photo of the class would mark the whole object as
this category and as no other. Parts (car wheel, space bar), toys and pictures, rooms and shops, and
relatives for which COCO has no category (wolf, lion, bison, tricycle) are left out. So are classes that
annotators label differently from photo to photo (pickup, minibus, ambulance, tram, goblet, beer glass, bow
tie, desk, bagel). Some classes are included although their names differ: a toilet seat, whose photos show
toilets, a monitor (COCO's "tv"), a stove ("oven"), a cheeseburger ("sandwich"), penguins ("bird") and ships
("boat"). Homonyms are matched by what the photos show: kite (21) and crane (134) are birds, and the other
crane (517) has no category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
THINGS: tuple[str, ...] = tuple(name.strip() for name in _NAMES.split(","))
"""COCO's 80 thing categories in order. The index is the class number in YOLO files."""

_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
THING_IDS: dict[int, str] = dict(
    zip((i for i in range(1, 91) if i not in _UNUSED), THINGS, strict=True)
)
"""COCO's own category ids, as used in its panoptic masks."""

_IMAGENET = {
    "person": "981-983",
    "bicycle": "444 671",
    "car": "436 468 511 609 627 656 661 751 817",
    "motorcycle": "665 670",
    "airplane": "404 895",
    "bus": "779 874",
    "train": "466 547 565 705 820",
    "truck": "555 569 675 864 867",
    "boat": "472 484 510 554 576 625 628 780 814 871 914",
    "traffic light": "920",
    "parking meter": "704",
    "bench": "703",
    "bird": "7-24 80-100 127-146",
    "cat": "281-285",
    "dog": "151-268",
    "horse": "339",
    "sheep": "348 349",
    "cow": "345",
    "elephant": "101 385 386",
    "bear": "294-297",
    "zebra": "340",
    "backpack": "414",
    "umbrella": "879",
    "handbag": "748",
    "tie": "906",
    "skis": "795",
    "sports ball": "429 430 522 574 722 768 805 852 890",
    "tennis racket": "752",
    "bottle": "440 720 737 898 907",
    "cup": "504 968",
    "knife": "499",
    "spoon": "910",
    "bowl": "659 809",
    "banana": "954",
    "apple": "948",
    "sandwich": "933",
    "orange": "950",
    "broccoli": "937",
    "hot dog": "934",
    "pizza": "963",
    "chair": "423 559 765 857",
    "couch": "831",
    "potted plant": "738",
    "bed": "564",
    "dining table": "532",
    "toilet": "861",
    "tv": "664 782 851",
    "laptop": "620 681",
    "mouse": "673",
    "remote": "761",
    "keyboard": "508",
    "cell phone": "487",
    "microwave": "651",
    "oven": "827",
    "toaster": "859",
    "sink": "896",
    "refrigerator": "760",
    "book": "917",
    "clock": "409 530 892",
    "vase": "883",
    "teddy bear": "850",
    "hair drier": "589",
}


def _indices(text: str) -> list[int]:
    """Parse ``"7-9 12"`` to [7, 8, 9, 12]."""
    ends = (part.split("-") for part in text.split())
    return [i for pair in ends for i in range(int(pair[0]), int(pair[-1]) + 1)]


IMAGENET_TO_COCO: dict[int, str] = {
    index: name for name, text in _IMAGENET.items() for index in _indices(text)
}
"""ImageNet-1k class index -> COCO category."""


def model_classes(
    class_names: Sequence[str] | Mapping[int, str], categories: Sequence[str]
) -> dict[int, str]:
    """Return the category in ``categories`` for each class of a model. Classes without a category are left
    out.

    If the names are timm's names of ImageNet-1k, the classes are looked up in :data:`IMAGENET_TO_COCO`. All
    other classes are matched by name, ignoring case. A mapping may name only some of a model's classes, by
    index.
    """
    from timm.data import ImageNetInfo

    known = {category.casefold(): category for category in categories}
    info = ImageNetInfo("imagenet-1k")
    labels = [info.index_to_description(i, detailed=False) for i in range(info.num_classes())]
    if isinstance(class_names, Mapping):
        named = dict(class_names)
        is_imagenet = named.items() <= dict(enumerate(labels)).items()
    else:
        named = dict(enumerate(class_names))
        is_imagenet = list(class_names) == labels
    pairs = {i: IMAGENET_TO_COCO.get(i, "") for i in named} if is_imagenet else named
    return {i: known[name.casefold()] for i, name in pairs.items() if name.casefold() in known}

"""Mistakes in URLs of object stores."""

import xattn
from mistakes.table import Bench, Mistake
from xattn.packs.writer import save_pack
from xattn.photos.images import load_image


def explained(images, **options):
    return lambda b: xattn.explain(images, b.cnn, explainer="gradcam", **options)


def maps(b: Bench):
    return xattn.explain(b.images, b.cnn, explainer="centre")


MISTAKES = [
    Mistake(
        "a photo of a store that is not there",
        lambda b: load_image("memory://nothing/a.jpg"),
        ("image: no file memory://nothing/a.jpg", "check the URL"),
    ),
    Mistake(
        "a list of training photos with a URL of no store",
        lambda b: xattn.open_photos(["x3://bucket/a.jpg"]),
        ("images: got x3://bucket/a.jpg", "is not known"),
    ),
    Mistake(
        "a pack of a store that is not there",
        lambda b: xattn.load_pack("memory://nothing/pack"),
        ("pack: memory://nothing/pack/manifest.json is missing", "upload the pack again"),
    ),
    Mistake(
        "a pack saved to a store",
        lambda b: save_pack("memory://bucket/pack", maps(b)),
        ("output: got memory://bucket/pack", "local folder", "xattn explain --output"),
    ),
]

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
        "photos of a store that nobody knows",
        explained("x3://bucket/photos"),
        ("images: got x3://bucket/photos", "x3:// is not known", "give s3://, gs://, hf://"),
    ),
    Mistake(
        "a store without a bucket", explained("s3://"), ("images: ", "give s3://BUCKET/FOLDER")
    ),
    Mistake(
        "a folder of a store that is not there",
        explained("memory://nothing/here"),
        ("images: no file or folder memory://nothing/here", "give an image, a folder"),
    ),
    Mistake(
        "a photo of a store that is not there",
        lambda b: load_image("memory://nothing/a.jpg"),
        ("image: no file memory://nothing/a.jpg", "check the URL"),
    ),
    Mistake(
        "figures of a folder of a store that is not there",
        lambda b: xattn.evaluate(b.cnn, {"cam": "gradcam"}, "memory://nothing/here"),
        ("images: no file or folder memory://nothing/here",),
    ),
    Mistake(
        "a list of training photos with a URL of no store",
        lambda b: xattn.open_photos(["x3://bucket/a.jpg"]),
        ("images: got x3://bucket/a.jpg", "is not known"),
    ),
    Mistake(
        "labels of a store that are not there",
        lambda b: explained(b.photo, labels="memory://nothing/labels.csv")(b),
        ("labels: no file memory://nothing/labels.csv", ".json or .csv"),
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
    Mistake(
        "maps explained into a store",
        lambda b: explained(b.images, output="memory://bucket/pack")(b),
        ("output: got memory://bucket/pack", "local folder"),
    ),
    Mistake(
        "a head of a store",
        lambda b: xattn.load_head("s3://bucket/head", b.cnn),
        ("head: s3://bucket/head lies in a store", "copy the head's folder to disk"),
    ),
]

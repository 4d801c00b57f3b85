"""Mistakes in URLs of object stores at the command line."""

from mistakes.table import Typed

MISTAKES = [
    Typed("explain x3://bucket/photos", ("images: got x3://bucket/photos", "give s3://")),
    Typed("explain s3://", ("images: got s3://; give s3://BUCKET/FOLDER",)),
    Typed("explain memory://none/a.jpg", ("images: no file or folder memory://none/a.jpg",)),
    Typed("train memory://none/photos", ("images: no file or folder memory://none/photos",)),
    Typed("explain {photo} none.jpg s3://", ("images: got s3://; give",)),
    Typed(
        "explain memory://none/b.mp4", ("images: memory://none/b.mp4 is a clip in a store", "copy")
    ),
    Typed("explain memory://none/b.nii.gz", ("images: ", "is a volume in a store", "copy it")),
    Typed("explain {photo} --labels memory://none/a.csv", ("labels: no file memory://none/a.csv",)),
    Typed(
        "explain {photo} --heads s3://bucket/head", ("heads: ", "copy the head's folder to disk")
    ),
    Typed("explain {photo} --weights s3://bucket/w.pth", ("weights: ", "copy the file to disk")),
    Typed("explain {photo} --output x3://bucket/x", ("output: got x3://bucket/x", "give s3://")),
    Typed("explain {photo} --output hf://datasets/a/b", ("output: got hf://", "hf upload")),
    Typed("train {photo} --output s3://bucket/x", ("output: got s3://bucket/x, but xattn train",)),
    Typed("compare {photo} --output s3://bucket/x", ("output: got s3://", "give a local folder")),
    Typed("diff memory://none/a memory://none/b", ("packs: memory://none/a cannot be opened",)),
    Typed("app memory://none/runs", ("root: memory://none/runs is no folder; give the URL",)),
    Typed("app memory://none/runs --demo", ("demo: memory://none/runs is only read",)),
]

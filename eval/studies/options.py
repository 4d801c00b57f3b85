"""Options that studies share, as tyro reads them from the signature of a ``study`` function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from xattn.backbone import Backbone
from xattn.cli.model import BackboneArgs


def load_network(network: BackboneArgs) -> Backbone:
    """The classifier that these options of ``xattn explain`` select."""
    network.check()
    backbone: Backbone = network.load()
    return backbone


Network: TypeAlias = Annotated[Backbone, tyro.conf.arg(constructor=load_network, prefix_name=False)]
PhotosAt: TypeAlias = Annotated[
    str | Path,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PHOTOS", help="A folder of photos, or other input of xattn explain."),
]
LabelsAt: TypeAlias = Annotated[
    str | Path,
    tyro.conf.arg(
        help='"folders", whose names are the classes, or a .json or .csv file of the photos\' classes.'
    ),
]
ObjectsAt: TypeAlias = Annotated[
    Path,
    tyro.conf.arg(
        name="annotations", help="A folder with images/ and masks/ or boxes/ of COCO objects."
    ),
]
OutputAt: TypeAlias = Annotated[
    str | Path,
    tyro.conf.arg(
        help="Folder for finished parts, report.md and the values behind it; the same command "
        "resumes from there."
    ),
]
Quick: TypeAlias = Annotated[
    bool,
    tyro.conf.arg(help="A few samples and steps to check that all works; figures mean nothing."),
]

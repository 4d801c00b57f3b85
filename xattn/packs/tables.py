"""The entries and images of a pack as pandas tables; the only module of packs that needs pandas."""

from __future__ import annotations

import pandas as pd

from xattn.packs.manifest import ENTRY_TABLE, IMAGE_TABLE, Manifest


def entry_table(manifest: Manifest) -> pd.DataFrame:
    """One row an entry, by entry_id; see :attr:`xattn.packs.reader.Pack.entries`."""
    columns = manifest.entries
    index = pd.Index(columns["id"], dtype=object, name="entry_id")
    table = {key: pd.Series(columns[key], index, dtype=kind) for key, kind in ENTRY_TABLE.items()}
    for metric in manifest.metrics:
        table[metric.key] = pd.Series(manifest.measured[metric.key], index, dtype=float)
    return pd.DataFrame(table)


def image_table(manifest: Manifest) -> pd.DataFrame:
    """One row an image, by image_id; see :attr:`xattn.packs.reader.Pack.images`."""
    columns = manifest.images
    index = pd.Index(columns["image_id"], dtype=object, name="image_id")
    return pd.DataFrame(
        {key: pd.Series(columns[key], index, dtype=kind) for key, kind in IMAGE_TABLE.items()}
    )

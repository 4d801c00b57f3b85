"""One reader for both: ``load_pack`` for packs of one's own, ``Pack`` for packs from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn.packs.contained_files import PackError
from xattn.packs.explanation import Explanation
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import save_pack
from xattn.photos.view import View

VIEW = View("crop", (40, 50), (64, 80), (0, 8, 64, 64), (64, 64))
WITHOUT_PANDAS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pandas", "streamlit", "altair"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import xattn
from pathlib import Path
from xattn.packs.reader import Pack
found = xattn.load_pack(sys.argv[1])
pack = Pack(Path(sys.argv[1]))
for e in found:
    other = pack.explanation(e.id)
    assert (other.map == e.map).all() and other.facts == e.facts and other.metrics == e.metrics
    assert pack.photo(e.image_id).size == (50, 40) and pack.provenance(e.id)["method"] == e.method
assert "pandas" not in sys.modules
print(len(found))
"""


def make(image_id: str = "cat", **changes) -> Explanation:
    values = np.random.default_rng(0).random((7, 9))
    e = Explanation(
        values, 1, "tabby", 0.5, "cam", VIEW, image_id, {"explainer": "cam"}, f"{image_id}.jpg"
    )
    return replace(e, source=Image.new("RGB", (50, 40), "grey"), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    metrics = {"AD": {"higher_is_better": False, "formula": "a drop", "protocol_id": "p"}}
    found = [make(metrics={"AD": 0.5}), make("dog")]
    return save_pack(tmp_path / "pack", found, metrics=metrics)


def test_packs_are_read_without_pandas(folder):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PANDAS, str(folder)], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


def test_the_tables_have_the_values_of_the_explanations(folder):
    pytest.importorskip("pandas")
    pack = Pack(folder)
    assert list(pack.entry_ids) == list(pack.entries.index) == ["cat@1.cam", "dog@1.cam"]
    assert pack.entries["AD"].fillna(-1).tolist() == [0.5, -1]
    for e in load_pack(folder):
        row = pack.entries.loc[e.id]
        assert (row["min"], row["max"]) == (e.map.min(), e.map.max())
        assert pack.images.loc[e.image_id, "file_name"] == e.file_name


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "entries-00000.parquet",
        "maps-00000.safetensors",
        "thumbnails-00000.safetensors",
    ],
)
def test_only_a_pack_of_ones_own_may_have_links_that_lead_out(tmp_path, folder, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert [e.photo().size for e in load_pack(folder)] == [(50, 40)] * 2
    with pytest.raises(PackError, match="link that leads out"):
        Pack(folder)


def test_names_stay_as_written_in_a_pack_of_ones_own(tmp_path):
    name = "\u202egpj.exe"
    folder = save_pack(tmp_path / "pack", [make(file_name=name)])
    assert load_pack(folder)[0].file_name == name
    assert Pack(folder).explanation("cat@1.cam").file_name == "\ufffdgpj.exe"

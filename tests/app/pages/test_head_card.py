"""The card of a head is found by the hash of the head as it is loaded."""

import pytest
import torch

pytest.importorskip("pandas")


from xattn.app.library import Library
from xattn.app.pages.image.photo_tabs import head_card
from xattn.backbone import load_backbone, sha256
from xattn.heads import create_head, load_head, save_head


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_card_belongs_to_the_weights_that_made_a_map(tmp_path, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = load_backbone("test_vit", weights=None, input_size=80)
        folder = save_head(create_head("ttame", backbone), tmp_path / "head", dtype=dtype)
    (folder / "README.md").write_text("what this head is")
    record = {"name": "ttame", "sha256": sha256(load_head(folder, backbone))}
    library = Library(tmp_path)
    assert head_card(library, record) == "what this head is"
    assert head_card(library, {**record, "sha256": "0" * 64}) is None
    assert head_card(library, {**record, "name": "another"}) is None

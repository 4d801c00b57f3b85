"""Shared by the tests of triage: a small pack."""

import pytest


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    from synthetic_packs import small_pack
    from viewer_pages import only

    root = tmp_path_factory.mktemp("root")
    small_pack(root / "pack", 9)
    return only(root)

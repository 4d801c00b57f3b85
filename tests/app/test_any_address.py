"""Whatever an address says, its page opens or says in a sentence why not, and shows no file outside the
root."""

import pytest

pytest.importorskip("streamlit")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack

from xattn.app import main, state
from xattn.app.triage.selection import NAMES

SECRET = "outsiders"  # a method of the pack outside the root
SHOWN = ("gallery", "image", "mistakes", "photomap", "runs", "whatif")  # that show the open pack
PARAMETERS = sorted({
    *NAMES, "pack", "image", "view", "entry", "class", "minus", "against", "tab", "objects", "near",
    "style", "part", "scale", "colours", "opacity", "threshold", "cell", "table", "mistakes.method",
    "by", "by2", "other", "list", "method", "fill", "paint", "group", "projection", "colour", "maps",
})  # fmt: skip
KNOWN = [
    "photo-00001", "photo-00001@1.gradcam", "gradcam", "saliency", "all", "every", "1.2", "other.0",
    "0.other", "1", "-1", "0", "2", "1e999", "nan", "9" * 400, "Slices", "Groups", "Similar", "Outline",
    "Whole photo", "wrong", "moved", "now_wrong", "kept", "blur", "281", "label:1", "ROAD", "confidence",
    "sort=ROAD&right=wrong", "features", "UMAP", "PCA", "../../outside", "../outside/pack", "/etc/passwd",
    "..%2f..", "\x00", "\ud800".encode("utf-8", "replace").decode(), "<script>", "**x**", "",
]  # fmt: skip
ADDRESSES = st.dictionaries(
    st.sampled_from(PARAMETERS) | st.text(max_size=4),
    st.lists(st.sampled_from(KNOWN) | st.text(max_size=20), min_size=1, max_size=2),
    max_size=6,
)


def viewer():
    from xattn.app.main import main

    main()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with two packs; beside it a pack and a text that nobody may see."""
    folder = tmp_path_factory.mktemp("addresses")
    for name in ("first", "second"):
        small_pack(folder / "root" / name, 12, ("gradcam", "saliency"))
    small_pack(folder / "outside" / "pack", 2, (SECRET,))
    (folder / "outside" / "text").write_text(SECRET)
    return folder / "root"


@pytest.mark.parametrize("count", [2, pytest.param(340, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SHOWN)
def test_any_address_opens_its_page_or_is_a_sentence(root, monkeypatch, tmp_path, name, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))
    run = main._run
    monkeypatch.setattr(main, "_run", lambda _: run(name))  # AppTest opens the first page alone
    title = AppTest.from_function(viewer, default_timeout=600).run()
    assert not title.exception

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(address=ADDRESSES)
    def opens(address):
        page = AppTest.from_function(viewer, default_timeout=600)
        for parameter, values in address.items():
            page.query_params[parameter] = values
        page.run()
        assert not page.exception, page.exception
        assert SECRET not in repr(page)
        assert page.main.children  # something is there

    opens()

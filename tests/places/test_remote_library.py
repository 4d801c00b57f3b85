"""The viewer on a folder of an object store: what it lists, opens and refuses."""

import pytest
from object_stores import upload
from small_explanations import make

from xattn.app import remote_library, state
from xattn.app.live.run import LiveRun, Request, save_as
from xattn.app.remote_library import RemoteLibrary
from xattn.cli import main
from xattn.packs.contained_files import PackError
from xattn.packs.writer import save_pack
from xattn.runtime import stores
from xattn.runtime.stores import resolve_place


@pytest.fixture
def root(tmp_path, bucket):
    """The URL of a folder with a pack, a comparison, a damaged pack, and what is neither."""
    save_pack(tmp_path / "runs/cats", [make("cat", 3), make("dog", 4, seed=1)])
    save_pack(tmp_path / "runs/compared/pack", [make("owl", 3, seed=2)])
    (tmp_path / "runs/compared/leaderboard.json").write_text("{}")
    save_pack(tmp_path / "runs/broken", [make("cat")])
    (tmp_path / "runs/broken/manifest.json").write_text('{"format": "xattn-pack", "version": 1}')
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes/a.txt").write_text("a")
    return upload(tmp_path / "runs", f"{bucket}/runs")


@pytest.fixture(autouse=True)
def impatient_library(monkeypatch):
    monkeypatch.setattr(remote_library, "FRESH", 0.0)


def test_packs_and_comparisons_are_listed_and_opened(root):
    library = RemoteLibrary(resolve_place(root))
    infos = {info.name: info for info in library.packs()}
    assert list(infos) == ["broken", "cats", "compared"]
    assert infos["broken"].problem and infos["cats"].problem is None
    assert (infos["cats"].images, infos["cats"].entries, infos["cats"].methods) == (2, 2, ("head",))
    pack = library.open(infos["cats"].id)
    assert pack is library.open(infos["cats"].id) and pack.folder is None
    assert pack.explanation(pack.entry_ids[0]).map.shape == (7, 5)
    (comparison,) = library.comparisons()
    assert comparison.pack_id == infos["compared"].id
    assert library.read(comparison.id, "leaderboard.json") == b"{}"
    assert library.signature(comparison.id, "leaderboard.json").size == 2
    assert library.heads() == []
    for unknown in ("../cats", "cats", "s3://bucket", None):
        with pytest.raises(PackError, match="no such pack"):
            library.open(unknown)
    assert sorted(library.newest()) == sorted(info.id for info in infos.values())
    alone = RemoteLibrary(resolve_place(f"{root}/cats"))
    assert [info.name for info in alone.packs()] == ["cats"]


def test_a_pack_that_was_replaced_is_read_again(root, tmp_path):
    library = RemoteLibrary(resolve_place(root))
    pack_id = next(info.id for info in library.packs() if info.name == "cats")
    before = library.open(pack_id)
    upload(save_pack(tmp_path / "other", [make("fox", 3, seed=5)]), f"{root}/cats")
    assert list(library.open(pack_id).images.index) == ["fox"] and before.counts == (2, 2)


def test_a_store_that_stops_answering_is_named_in_the_list_and_its_packs_stay(
    root, impatient, monkeypatch
):
    library = RemoteLibrary(resolve_place(root))
    names = [info.name for info in library.packs()]

    monkeypatch.setattr(stores.StorePath, "_ask", cut)
    infos = library.packs()
    assert [info.name for info in infos] == [*names, root]
    assert "does not answer" in infos[-1].problem
    nothing = RemoteLibrary(resolve_place(root))
    assert [info.name for info in nothing.packs()] == [root]


def cut(*arguments):
    raise stores.StoreError("s3://bucket does not answer (the line is cut)")


def test_a_viewer_on_a_store_keeps_no_results(root, monkeypatch, tmp_path):
    monkeypatch.setattr(
        state, "_settings", state.Settings(root=resolve_place(root), training=False)
    )
    library = state.library()
    assert isinstance(library, RemoteLibrary)
    run = LiveRun(Request("test_resnet", ("cam",)), library)
    run.folder = save_pack(tmp_path / "live", [make("fox")])
    with pytest.raises(
        ValueError, match=r"^This viewer shows memory://.*, to which it cannot write\. To keep"
    ):
        save_as(run, "mine")
    live = library.open(library.add_scratch(run.folder))  # but they are shown
    assert list(live.images.index) == ["fox"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["memory://nothing/here"],
            "root: memory://nothing/here is not a folder; give the URL of a pack",
        ),
        (["memory://nothing/here", "--demo"], "demo: memory://nothing/here is read-only"),
        (["x3://bucket/runs"], "root: got x3://bucket/runs, whose store x3:// is not known"),
    ],
)
def test_a_root_that_cannot_be_shown_is_refused_before_the_server_starts(words, said, capsys):
    assert main(["app", *words, "--port", "0"]) == 2
    assert said in capsys.readouterr().err

"""Results written to an object store: whole or not at all, and nothing lost when that fails."""

import re
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from xattn.cli import main
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import save_pack
from xattn.runtime.stores import StorePath, resolve_place

MODEL = "-b test_resnet --weights random --device cpu --explainers cam".split()


@pytest.fixture
def explained(photos, monkeypatch, tmp_path):
    """``explained(url, ...)`` runs ``xattn explain`` with this output; temporary folders are the test's."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def run(output, *more):
        return main(["explain", str(photos / "a"), *MODEL, "--output", output, *more])

    return run


def names(url):
    place = resolve_place(url)
    return sorted(file.below(place) for file in place.files())


def test_a_pack_is_uploaded_with_its_manifest_last(
    s3_bucket, explained, tmp_path, capsys, monkeypatch
):
    url, order = f"{s3_bucket}/runs/x", []
    put = StorePath.put

    def noted(self, file):
        order.append(self.name)
        put(self, file)

    monkeypatch.setattr(StorePath, "put", noted)
    assert explained(url) == 0
    assert f"pack: {url}\n" in capsys.readouterr().out
    assert order[-1] == "manifest.json" and len(order) == len(names(url)) == 7
    assert len(Pack(resolve_place(url)).entries) == 2
    assert not list((tmp_path / "temporary").glob("xattn-*"))
    assert (resolve_place(url) / ".xattn-writing").info() is None


def test_earlier_results_stay_unless_they_are_to_be_replaced(bucket, explained, capsys, photos):
    url = f"{bucket}/runs/x"
    assert explained(url) == 0
    before = resolve_place(url).files()
    assert explained(url) == 2
    assert f"output: {url} already holds results; give another folder" in capsys.readouterr().err
    assert [f.mark for f in resolve_place(url).files()] == [f.mark for f in before]
    (photos / "a/1.jpg").rename(photos / "a/other.jpg")
    (resolve_place(url) / "README.md").write(b"notes")
    (resolve_place(url) / "entries-00007.parquet").write(b"of an earlier pack")
    assert explained(url, "--overwrite") == 0
    assert {e.image_id for e in load_pack(url)} == {"other.jpg", "deep/4.PNG"}
    assert "README.md" in names(url)
    assert not any("1.jpg" in name or "00007" in name for name in names(url))


def test_a_folder_with_other_things_is_refused(bucket, explained, capsys):
    url = f"{bucket}/notes"
    for name in ("a.txt", "manifest.json"):
        (resolve_place(url) / name).write(b'{"format": "of another program"}')
        assert explained(url, "--overwrite") == 2
        assert f"output: {url} is not empty and was not written by xattn" in capsys.readouterr().err
    assert names(url) == ["a.txt", "manifest.json"]
    assert explained(f"{url}/a.txt") == 2
    assert f"output: {url}/a.txt is a file; give a folder" in capsys.readouterr().err


def test_an_upload_that_fails_leaves_no_pack_and_names_the_local_one(
    explained, impatient, capsys, monkeypatch
):
    url, put = "memory://fails/runs/x", MemoryFileSystem.put_file

    def failing(self, local, path, **options):
        if path.endswith("maps-00000.safetensors"):
            raise ConnectionResetError("the line is cut")
        return put(self, local, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    assert explained(url) == 2
    said = capsys.readouterr().err
    assert f"output: {url} is incomplete, since memory://fails does not answer (the line is" in said
    kept = Path(re.search(r"the files are kept in (\S+?); copy", said)[1])
    assert len(load_pack(kept)) == 2 and "manifest.json" not in names(url)
    for _ in range(2):  # what stops before the upload leaves it as it is
        assert explained(url, "--classes", "no such class") == 2
        assert "class" in capsys.readouterr().err
    monkeypatch.undo()
    assert explained(url) == 0 and len(load_pack(url)) == 2  # what a failed upload left is taken


def test_work_that_stops_keeps_what_there_is(explained, monkeypatch, capsys):
    def stopped(*arguments, **options):
        save_pack(options["output"], load_pack("memory://kept/pack"))
        raise KeyboardInterrupt

    assert explained("memory://kept/pack") == 0
    capsys.readouterr()
    monkeypatch.setattr("xattn.explaining.photos.explain", stopped)
    assert explained("memory://kept/other") == 130
    said = capsys.readouterr().err
    above = Path(
        re.search(
            r"output: nothing was written to memory://kept/other; the files made so far are in (\S+)",
            said,
        )[1]
    )
    assert len(load_pack(above / "other")) == 2 and names("memory://kept/other") == []


def test_figures_are_uploaded_too_and_other_commands_say_that_they_write_to_disk(
    bucket, photos, capsys, explained
):
    words = [str(photos / "a"), *MODEL, "--no-sanity", "--output"]
    assert main(["evaluate", *words, f"{bucket}/figures"]) == 0
    assert f"results: {bucket}/figures/results.json" in capsys.readouterr().out
    assert names(f"{bucket}/figures") == ["results.csv", "results.images.csv", "results.json"]
    for command in ("train", "compare", "probe"):
        assert main([command, str(photos), "--output", f"{bucket}/figures"]) == 2
        line = f"output: got {bucket}/figures, but xattn {command} writes to disk while it runs; give a"
        assert line in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"^output: got memory://.*; write the pack to a local folder"
    ):
        save_pack(f"{bucket}/pack", [])
    assert explained("hf://datasets/me/pack") == 2
    assert "output: got hf://datasets/me/pack; write to a local folder" in capsys.readouterr().err

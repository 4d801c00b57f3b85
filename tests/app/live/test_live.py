"""Live explanations: jobs that no page owns, their queue, what is kept of them, and the page."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import picture
from viewer_pages import opened

from xattn.app import models, state
from xattn.app.library import Library
from xattn.app.live import clip_run, photo_run, queue
from xattn.app.live import run as run_module
from xattn.app.live.queue import LiveQueue
from xattn.app.live.run import LiveRun, Request, save_as
from xattn.app.live.uploads import Upload
from xattn.app.pages.live import controls, page
from xattn.app.pages.whatif import answer
from xattn.app.pictures import film
from xattn.cli.model import BackboneArgs
from xattn.explaining.photos import explain
from xattn.heads import create_head, save_head
from xattn.packs.contained_files import PackError

CNN = "test_efficientnet"
LONG = 600  # seconds, after which a job counts as hung


@pytest.fixture(scope="module", autouse=True)
def one_network():
    models._loaded.clear()
    yield
    models._loaded.clear()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    own = BackboneArgs(backbone=CNN, weights="random", device="cpu")
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path, model=own))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(controls, "_WANTED", set())
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    return found


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> LiveQueue:
    found = LiveQueue()
    monkeypatch.setattr(queue, "live_queue", lambda: found)
    return found


def png(number: int, size: tuple[int, int] = (128, 96)) -> bytes:
    stream = io.BytesIO()
    picture(number, size).save(stream, "PNG")
    return stream.getvalue()


def photos(count: int = 3) -> tuple[Upload, ...]:
    return tuple(Upload(f"photo {n}.png", png(n)) for n in range(count))


def run(jobs: LiveQueue, library: Library, **options) -> LiveRun:
    request = {"backbone": CNN, "explainers": ("gradcam",), "photos": photos(), **options}
    job = jobs.start(Request(**request), library)
    assert job.wait(LONG)
    return job


# ---------------------------------------------------------------------- photos


def test_maps_are_those_of_the_library(jobs, library):
    job = run(jobs, library, explainers=("gradcam", "layercam"), top=2)
    assert (job.status, job.done, job.total, job.problems) == ("done", 3, 3, [])
    pack = library.open(job.pack_id)
    loaded = models.backbone(CNN)
    for method in ("gradcam", "layercam"):
        images = [picture(n) for n in range(3)]
        expected = explain(images, loaded, explainer=method, top=2)
        found = pack.entries[pack.entries["method"] == method]
        assert list(found["target"]) == [e.target for e in expected]
        for entry_id, e in zip(found.index, expected, strict=True):
            np.testing.assert_allclose(pack.explanation(entry_id).map, e.map, atol=1e-6)
    assert list(pack.images["file_name"]) == ["photo 0.png", "photo 1.png", "photo 2.png"]


def test_the_page_what_if_finds_the_network_of_a_result(jobs, library):
    pack = library.open(run(jobs, library).pack_id)
    loaded = models.backbone_of(pack)
    seen = answer.read_photo(pack, str(pack.images.index[0]), loaded)
    own = pack.entries.iloc[0]
    # The pack holds the photo as a JPEG.
    assert float(seen.answer[int(own["target"])]) == pytest.approx(own["probability"], rel=0.05)


def test_the_pack_is_outside_the_root_and_in_no_list(jobs, library):
    job = run(jobs, library)
    assert not library.packs() and not list(library.root.iterdir())
    assert not job.folder.is_relative_to(library.root)


def test_a_photo_that_cannot_be_decoded_is_named_and_the_others_go_on(jobs, library):
    damaged = Upload("half.png", png(1)[:-300])
    job = run(jobs, library, photos=(photos(1)[0], damaged))
    assert job.status == "done" and [name for name, _ in job.problems] == ["half.png"]
    assert len(library.open(job.pack_id).images) == 1


def test_photos_of_one_name_are_told_apart(jobs, library):
    job = run(jobs, library, photos=(Upload("a.png", png(0)), Upload("A.PNG", png(1))))
    assert len(library.open(job.pack_id).images) == 2


def test_chosen_classes_are_explained(jobs, library):
    job = run(jobs, library, classes=(7, 3))
    assert set(library.open(job.pack_id).entries["target"]) == {3, 7}


def test_a_head_below_the_root_explains(jobs, library):
    head = create_head("ttame", models.backbone(CNN))
    save_head(head, library.root / "mine" / "head")
    (key,) = models.heads(CNN)
    job = run(jobs, library, explainers=("head",), head=key)
    assert set(library.open(job.pack_id).entries["method"]) == {"head"}


def test_a_method_that_fails_leaves_the_others(jobs, library, monkeypatch):
    real = photo_run.explain_batch

    def fails(batch, loaded, method, *rest):
        if method.name == "layercam":
            raise ValueError("map: the layercam map holds NaN")
        return real(batch, loaded, method, *rest)

    monkeypatch.setattr(photo_run, "explain_batch", fails)
    job = run(jobs, library, explainers=("layercam", "gradcam"))
    assert job.status == "done"
    assert job.problems == [("layercam", "map: the layercam map holds NaN")]
    assert set(library.open(job.pack_id).entries["method"]) == {"gradcam"}


def test_what_does_not_fit_is_a_message(jobs, library):
    job = run(jobs, library, explainers=("rollout",))
    assert job.status == "failed" and "self-attention" in job.message and job.pack_id is None
    assert "no model" in run(jobs, library, backbone="no/model").message


def test_too_little_memory_is_a_message(jobs, library, monkeypatch):
    def exhausted(*arguments):
        raise MemoryError("max_forward_batch: out of memory with one image; free memory")

    monkeypatch.setattr(photo_run, "explain_batch", exhausted)
    job = run(jobs, library)
    assert job.status == "failed" and "free memory" in job.message


def test_a_batch_that_was_halved_is_noted(jobs, library, monkeypatch):
    real = photo_run.explain_batch

    def halved(batch, loaded, method, *rest):
        method.max_forward_batch = 2
        return real(batch, loaded, method, *rest)

    monkeypatch.setattr(photo_run, "explain_batch", halved)
    job = run(jobs, library)
    assert job.status == "done"
    assert job.notes == ["Memory ran out: gradcam continued with 2 images per pass."]


def test_an_error_in_the_program_ends_its_job_alone(jobs, library, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(queue, "explain_photos", lambda *arguments: 1 / 0)
        assert "ZeroDivisionError" in run(jobs, library).message
    assert run(jobs, library).status == "done"


def test_the_bytes_of_uploads_are_let_go(jobs, library):
    job = run(jobs, library)
    assert [p.name for p in job.request.photos] == [p.name for p in photos()]
    assert not any(p.data for p in job.request.photos)


# ---------------------------------------------------------------------- stopping and the queue


def test_stop_ends_a_long_method_between_two_passes_and_leaves_the_model_as_it_was(jobs, library):
    loaded = models.backbone(CNN)
    hooks = len(loaded.head_point._forward_pre_hooks)
    job = jobs.start(Request(CNN, ("gradcam", "rise"), photos(2)), library)
    while not job.share and not job.wait(0.01):
        pass
    jobs.stop(job)
    assert job.wait(LONG) and job.status == "stopped" and "Stopped after" in job.message
    assert len(loaded.head_point._forward_pre_hooks) == hooks
    assert models._TURN.acquire(timeout=LONG)
    models._TURN.release()


def test_what_was_explained_before_a_stop_is_kept(jobs, library, monkeypatch):
    monkeypatch.setattr(photo_run, "BATCH", 1)
    real = photo_run._prepared
    monkeypatch.setattr(
        photo_run,
        "_prepared",
        lambda job, loaded, ids, start, size: (
            jobs.stop(job) if start == 1 else None,
            real(job, loaded, ids, start, size),
        )[1],
    )
    job = run(jobs, library)
    assert job.status == "stopped" and job.message == "Stopped after 1 of 3 photos."
    assert len(library.open(job.pack_id).images) == 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    """Jobs that wait at a gate instead of explaining."""
    opened = threading.Event()
    monkeypatch.setattr(queue, "explain_photos", lambda job, folder: opened.wait(LONG))
    yield opened
    opened.set()


def test_jobs_run_in_their_order_and_only_some_at_once(jobs, library, gate):
    started = [jobs.start(Request(CNN, ("gradcam",)), library) for _ in range(queue.RUNNING + 2)]
    assert [j.status for j in started] == ["running"] * queue.RUNNING + ["waiting"] * 2
    assert jobs.ahead(started[-1]) == 1
    jobs.stop(started[-2])
    assert started[-2].status == "stopped" and jobs.ahead(started[-1]) == 0
    gate.set()
    assert all(job.wait(LONG) for job in started) and started[-1].status == "done"


def test_too_many_jobs_are_refused_with_a_message(jobs, library, gate):
    for _ in range(queue.RUNNING + queue.WAITING):
        jobs.start(Request(CNN, ("gradcam",)), library)
    with pytest.raises(ValueError, match="try again"):
        jobs.start(Request(CNN, ("gradcam",)), library)


def test_a_job_is_found_by_its_token_alone_and_old_ones_are_forgotten(jobs, library, monkeypatch):
    monkeypatch.setattr(queue, "KEPT", 1)
    first = run(jobs, library)
    folder = first.folder
    assert jobs.get(first.id) is first
    assert jobs.get(None) is None and jobs.get("another") is None
    assert len(first.id) >= 20
    run(jobs, library)
    run(jobs, library)
    assert jobs.get(first.id) is None and not folder.exists()
    with pytest.raises(PackError, match="gone|no such"):
        library.open(first.pack_id)


# ---------------------------------------------------------------------- keeping


def test_a_kept_pack_has_the_same_maps_and_its_overlays(jobs, library):
    job = run(jobs, library)
    folder = save_as(job, " my photos ")
    assert folder == library.root / "my photos" and len(list(folder.glob("overlays/*"))) == 3
    (info,) = library.packs()
    kept, scratch = library.open(info.id), library.open(job.pack_id)
    for entry_id in scratch.entries.index:
        np.testing.assert_array_equal(
            kept.explanation(entry_id).map, scratch.explanation(entry_id).map
        )
    assert kept.images["predicted"].equals(scratch.images["predicted"])


def test_a_taken_name_is_refused_and_nothing_is_overwritten(jobs, library):
    job = run(jobs, library, photos=photos(1))
    (library.root / "mine").mkdir()
    (library.root / "mine" / "notes.txt").write_text("here")
    with pytest.raises(ValueError, match="already"):
        save_as(job, "mine")
    assert [p.name for p in (library.root / "mine").iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_no_half_pack_and_the_results_where_they_are(jobs, library, monkeypatch):
    job = run(jobs, library, photos=photos(1))

    def full(folder, *arguments):
        raise OSError(28, f"output: cannot write {folder} (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_pack", full)
        with pytest.raises(OSError, match="cannot write mine"):
            save_as(job, "mine")
    assert not list(library.root.iterdir())
    assert save_as(job, "mine").is_dir()


def test_results_that_could_not_be_written_are_written_on_request(jobs, library, monkeypatch):
    def full(folder, *arguments, **options):
        raise OSError(28, f"output: cannot write {folder}; choose a writable folder")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_pack", full)
        job = run(jobs, library)
    assert job.status == "failed" and "No space" in job.message
    assert "xattn-live" not in job.message and "choose" not in job.message, "what nobody can do"
    assert len(job.unsaved) == 3 and job.pack_id is None
    queue.retry_save(job)
    assert not job.unsaved and len(library.open(job.pack_id).entries) == 3


# ---------------------------------------------------------------------- clips


def clip(folder: Path, frames: int = 12) -> bytes:
    import cv2

    path = folder / "made.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (128, 96))
    for n in range(frames):
        writer.write(np.ascontiguousarray(np.asarray(picture(n))[:, :, ::-1]))
    writer.release()
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_clip_becomes_a_pack_whose_film_is_read_frame_by_frame(jobs, library, tmp_path):
    upload = Upload("walk.mp4", clip(tmp_path))
    job = run(jobs, library, photos=(), clip=upload, every=3)
    assert (job.status, job.done, job.total) == ("done", 4, 4)
    pack = library.open(job.pack_id)
    assert film.frames(pack) == [f"frame-{n:06d}" for n in (0, 3, 6, 9)]
    assert film.rate(pack) == pytest.approx(10 / 3, rel=0.01)
    shown = [Image.open(io.BytesIO(film.frame_bytes(pack, i, 128))) for i in range(4)]
    assert {image.size for image in shown} == {(128, 96)}
    pixels = [np.asarray(image).astype(int) for image in shown]
    assert min(np.abs(a - b).mean() for a, b in pairwise(pixels)) > 3
    # A frame is the same whichever was asked for before.
    film._CACHE = film.LRUCache(film.CACHE_BYTES)
    again = np.asarray(Image.open(io.BytesIO(film.frame_bytes(pack, 2, 128)))).astype(int)
    np.testing.assert_array_equal(again, pixels[2])
    with pytest.raises(PackError, match="0 to 3"):
        film.frame_bytes(pack, 4)
    kept = save_as(job, "walk")
    assert (kept / "overlay.mp4").is_file() and (job.folder / "overlay.mp4").is_file()
    assert not list(job.folder.parent.glob("clip*"))


def test_a_pack_of_photos_has_no_frames(jobs, library):
    pack = library.open(run(jobs, library, photos=photos(1)).pack_id)
    assert film.frames(pack) == []
    with pytest.raises(PackError, match="no film"):
        film.frame_bytes(pack, 0)


def test_a_clip_of_too_many_frames_says_which_to_explain(jobs, library, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_run, "MAX_FRAMES", 5)
    job = run(jobs, library, photos=(), clip=Upload("walk.mp4", clip(tmp_path)))
    assert job.status == "failed" and "to 3 or more" in job.message


def test_what_is_no_clip_is_a_message_by_its_name(jobs, library):
    job = run(jobs, library, photos=(), clip=Upload("walk.mp4", b"no clip at all"))
    assert job.status == "failed" and "/tmp" not in job.message
    assert "ffmpeg -i walk.mp4 walk-converted.mp4" in job.message


def test_a_stopped_clip_keeps_its_frames(jobs, library, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_run, "BATCH", 2)
    job = LiveRun(Request(CNN, ("gradcam",), clip=Upload("w.mp4", clip(tmp_path))), library)
    real = clip_run._check_length
    monkeypatch.setattr(
        clip_run,
        "_check_length",
        lambda j: (j.done >= 4 and j.stopping.set(), real(j))[1],
    )
    jobs._runs[job.id] = job
    with jobs._lock:
        jobs._next()
    assert job.wait(LONG) and job.status == "stopped"
    assert len(library.open(job.pack_id).images) == 4


# ---------------------------------------------------------------------- the page


def script() -> None:
    import streamlit as st

    from xattn.app import state
    from xattn.app.pages.live import page as live

    live.page(state.Context(state.library(), None, st.query_params.to_dict()))


def texts(page: AppTest) -> str:
    kinds = (page.markdown, page.caption, page.info, page.warning, page.error)
    return "\n".join(element.value for kind in kinds for element in kind)


def explain_button(page: AppTest):
    return next(b for b in page.button if b.label == "Explain")


def test_the_empty_page_says_what_to_do(library, jobs):
    page = opened(script)
    assert "Choose photos first" in texts(page) and "where a network looks" in texts(page)
    assert explain_button(page).disabled


def test_upload_explain_and_a_reload_that_finds_the_results(library, jobs):
    page = opened(script)
    page.file_uploader(key="photos").set_value(
        [
            ("cat.png", png(0), "image/png"),
            ("<b>half.png", png(1)[:40], "image/png"),
            ("dog.png", png(2), "image/png"),
        ]
    ).run()
    assert r"\<b\>half\.png" in texts(page) and not explain_button(page).disabled
    explain_button(page).click().run()
    (job,) = jobs._runs.values()
    assert job.wait(LONG)
    page.run()
    assert not page.exception and "**2 photos, 2 maps**" in texts(page)
    assert page.query_params["job"] == job.id
    assert "**2 photos, 2 maps**" in texts(opened(script, job=job.id))


def test_an_address_of_results_that_are_gone_says_so(library, jobs):
    assert "gone" in texts(opened(script, job="unknown"))


def test_a_running_job_is_shown_with_a_stop_and_not_started_twice(jobs, library, gate):
    job = jobs.start(Request(CNN, ("gradcam",), photos()), library)
    page = opened(script, job=job.id)
    assert "continues if you leave" in texts(page)
    assert explain_button(page).disabled
    next(b for b in page.button if b.label == "Stop").click().run()
    assert job.stopping.is_set()


def test_a_waiting_job_says_how_many_are_ahead(jobs, library, gate):
    started = [
        jobs.start(Request(CNN, ("gradcam",), photos()), library) for _ in range(queue.RUNNING + 2)
    ]
    opened(script, job=started[-1].id)
    assert "1 before this one" in explaining_text(started[-1])


def explaining_text(job: LiveRun) -> str:
    return page._progress_text(job)


def test_an_address_alone_loads_no_network_from_the_hub(library, jobs, monkeypatch):
    loading, asked = models._load, []

    def load(arguments):
        asked.append(arguments.backbone)
        return loading(arguments)

    monkeypatch.setattr(models, "_load", load)
    page = opened(script, model="resnet18")
    assert "resnet18" not in asked and any("come from the hub" in i.value for i in page.info)
    assert not page.exception and page.button(key="load")


def test_an_unknown_network_is_a_message(library, jobs):
    page = opened(script, model="no_such_network")
    page.selectbox(key="model").options.append("no_such_network")  # AppTest sends options only
    page.button(key="load").click().run()
    assert any("no\\_such\\_network" in e.value for e in page.error)
    assert opened(script, model="no_such_network").error  # it was asked for before


def test_results_are_kept_by_name_from_the_page(jobs, library):
    job = run(jobs, library, photos=photos(1))
    page = opened(script, job=job.id)
    page.text_input(key="keep_name").set_value("from the page").run()
    page.button(key="keep").click().run()
    assert not page.exception and (library.root / "from the page").is_dir()
    page.button(key="keep").click().run()
    assert any("already" in e.value for e in page.error)


def test_the_film_of_a_pack_is_shown_in_place_of_the_first_steps(jobs, library, tmp_path):
    job = run(jobs, library, photos=(), clip=Upload("w.mp4", clip(tmp_path)), every=4)
    page = opened(script, job=job.id, frame="nonsense")
    assert "3 frames, 3 maps" in texts(page)


def uploaded(page: AppTest, *files: tuple[str, bytes], key: str = "photos") -> AppTest:
    kind = "video/mp4" if key == "clip" else "image/png"
    return page.file_uploader(key=key).set_value([(n, d, kind) for n, d in files]).run()


def test_many_files_that_are_left_out_are_one_line_a_reason_and_a_list(library, jobs):
    files = [(f"p{n:02}.png", png(n, (8, 6))) for n in range(60)]
    page = uploaded(opened(script), ("empty.png", b""), *files)
    (warning,) = page.warning
    lines = warning.value.split("  \n")
    assert lines[0] == "30 left out:" and len(lines) == 3
    assert "p31\\.png, p32\\.png and 27 more" in lines[2] and "only 32 photos" in lines[2]
    (listed,) = page.expander[:1]
    assert listed.label == "All 30 left out" and "p59" in "".join(m.value for m in listed.markdown)


def test_reasons_beyond_the_first_are_counted_by_their_files() -> None:
    def several() -> None:
        from xattn.app.pages.live.photo_files import left_out

        left_out([(f"{n}.png", f"reason {min(n, 5)}") for n in range(8)], "left out")

    (warning,) = opened(several).warning
    assert warning.value.endswith("and 4 more for other reasons")


def test_a_few_files_that_are_left_out_need_no_list(library, jobs):
    page = uploaded(opened(script), ("a.png", b""), ("b.png", b"words"))
    assert len(page.warning[0].value.split("  \n")) == 3
    assert not any("left out" in e.label for e in page.expander)


def test_a_photo_of_extreme_shape_is_left_out_by_name(library, jobs):
    job = run(jobs, library, photos=(*photos(1), Upload("strip.png", png(0, (20_000, 1)))))
    assert job.status == "done" and [name for name, _ in job.problems] == ["strip.png"]
    page = opened(script, job=job.id)
    assert "**1 photo, 1 map**" in texts(page)
    (warning,) = [w.value for w in page.warning if "strip" in w.value]
    assert len(warning.split("  \n")) == 2 and "crop it" in warning


def test_a_map_of_one_value_is_named_beside_the_results(library, jobs, monkeypatch):
    real = photo_run.explain_batch

    def blank(*arguments):
        for n, e in enumerate(real(*arguments)):
            yield e if n else replace(e, map=np.zeros_like(e.map))

    monkeypatch.setattr(photo_run, "explain_batch", blank)
    page = opened(script, job=run(jobs, library).id)
    (warning,) = page.warning
    assert (
        r"by Grad\-CAM" in warning.value
        and r"on photo 0\.png has the same value everywhere" in warning.value
    )


def test_the_film_of_a_pack_is_not_taken_for_a_result(library, jobs, tmp_path, monkeypatch):
    job = run(jobs, library, photos=(), clip=Upload("old.mp4", clip(tmp_path)), every=4)
    monkeypatch.setattr(page, "_film_of", lambda pack: page.st.markdown(f"film of {pack.name}"))
    info = save_as(job, "old")
    monkeypatch.setattr(queue, "live_queue", LiveQueue)
    pack = library.open(library.packs()[0].id)
    assert info.name == pack.name

    def page_of_pack() -> None:
        import streamlit as st

        from xattn.app import state
        from xattn.app.pages.live import page as live

        library = state.library()
        pack = library.open(library.packs()[0].id)
        live.page(state.Context(library, pack, st.query_params.to_dict()))

    shown = texts(opened(page_of_pack, input="clip"))
    assert "An earlier film, of the pack old" in shown and "where a network looks" in shown


def test_results_of_another_clip_are_told_apart_from_the_chosen_one(library, jobs, tmp_path):
    data = clip(tmp_path)
    job = run(jobs, library, photos=(), clip=Upload("old.mp4", data), every=4)
    page = opened(script, job=job.id, input="clip")
    assert r"**old\.mp4: 3 frames, 3 maps**" in texts(page) and not page.info
    page.file_uploader(key="clip").set_value([("new.mp4", data, "video/mp4")]).run()
    assert r"results of old\.mp4" in page.info[0].value
    page.file_uploader(key="clip").set_value([("old.mp4", data, "video/mp4")]).run()
    assert not page.info
    page.file_uploader(key="clip").set_value([("old.mp4", data + b"0", "video/mp4")]).run()
    assert r"another file named old\.mp4" in page.info[0].value


def test_chosen_classes_are_those_of_the_chosen_network(library, jobs, tmp_path, monkeypatch):
    state_dict = models.backbone(CNN).model.state_dict()
    (tmp_path / "weights").mkdir()
    save_file(state_dict, str(tmp_path / "weights" / "w.safetensors"))
    own = BackboneArgs(
        backbone=CNN, weights=str(tmp_path / "weights" / "w.safetensors"), device="cpu"
    )
    monkeypatch.setattr(state, "_settings", state.Settings(root=library.root, model=own))
    loaded = models.backbone(CNN)
    for folder, names in (("birds", ["wren", "tit"]), ("fish", ["cod", "eel"])):
        head = create_head("gap", loaded, class_names=names)
        save_head(head, library.root / folder / "head")
    page = opened(script)

    def classes():
        return next(m for m in page.multiselect if m.label == "Classes")

    assert not page.error, page.error[0].value
    birds, fish = sorted(models.heads(CNN), key=lambda key: models.heads(CNN)[key])
    page.selectbox(key="head").set_value(birds).run()
    classes().set_value([1]).run()
    assert classes().options == ["wren", "tit"]
    page.selectbox(key="head").set_value(fish).run()
    assert classes().options == ["cod", "eel"] and classes().value == []

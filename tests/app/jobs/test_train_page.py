"""The train page: what it offers, starts, shows and says, by AppTest; a whole training in Chromium."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack
from test_jobs import begun, end_all, ended, finished, photos, stand_in, until
from viewer_pages import only, opened, served

from xattn.app import state
from xattn.app.demo import pack_job
from xattn.app.jobs import jobs as jobs_module
from xattn.app.jobs.job_files import Spec
from xattn.app.jobs.jobs import Jobs
from xattn.app.pages import demo_offer
from xattn.app.pages.train import job_view
from xattn.app.pages.train.page import PhotoFolder
from xattn.app.state import Settings

ONE_BAR = """
import signal, sys
print("  3%|#| 3/100 [00:01<00:09, 1step/s]", end="\\r", file=sys.stderr, flush=True)
signal.pause()
"""
SPEC = Spec("train", "photos", heads=("ttame",), epochs=5)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """Jobs of a root with photos, which run a stand-in for the command line."""
    stand_in(tmp_path, monkeypatch)
    for name in ("photos/wren", "photos/tit"):
        photos(tmp_path / "data" / name)
    (tmp_path / "root").mkdir()
    settings = Settings(root=tmp_path / "root", data=tmp_path / "data")
    monkeypatch.setattr(state, "_settings", settings)
    found = Jobs(settings.root, settings.data)
    yield found
    end_all(found)


def script() -> None:
    import streamlit as st

    from xattn.app import state
    from xattn.app.pages.train import page as train

    train.page(state.Context(state.library(), None, st.query_params.to_dict()))


def welcome() -> None:
    from xattn.app.pages import demo_offer

    demo_offer.show_offer()


def open_train(**params: str) -> AppTest:
    return opened(script, **params)


def texts(page: AppTest) -> str:
    kinds = ("markdown", "caption", "code", "info", "warning", "error", "header", "subheader")
    return "\n".join(str(e.value) for kind in kinds for e in getattr(page, kind))


def button(page: AppTest, label: str) -> Any:
    return next(b for b in page.button if b.label == label)


def labels_of_choices(page: AppTest) -> list[str]:
    return [group.proto.label for group in page.get("button_group")]


def choose_photos(page: AppTest, name: str) -> None:
    page.selectbox(key="data").set_value(PhotoFolder(name, 0, (), ()).id).run()
    assert page.query_params["data"] != name  # an id, not a path


def test_the_form_has_sensible_defaults_and_starts_a_job(jobs: Jobs) -> None:
    page = open_train()
    assert page.selectbox(key="head").value == "evidence"
    choose_photos(page, "photos")
    button(page, "Start training").click().run()
    assert not page.exception and not page.error
    (job,) = jobs.all()
    assert job.id == "photos-evidence" and job.spec.recipe == "outcomes"
    assert job.spec.data == "photos" and job.spec.epochs is None
    assert page.query_params["job"] == "photos-evidence"
    assert "photos-evidence" in page.header[0].value.replace("\\", "")


def test_a_second_start_is_refused_in_words(jobs: Jobs) -> None:
    page = open_train()
    jobs.start(Spec("train", "photos", heads=("ttame",)), "other")  # in another tab
    button(page, "Start training").click().run()
    assert not page.exception
    assert "other" in texts(page) and len(jobs.all()) == 1


def test_a_job_is_shown_by_its_address_with_its_losses(jobs: Jobs) -> None:
    finished(jobs, SPEC, "mine")
    page = open_train(job="mine")
    shown = texts(page)
    assert "step 5, epoch 3" in shown and "--head" in shown
    assert page.get("vega_lite_chart") or page.get("arrow_vega_lite_chart")
    assert "Stop" not in (labels := [b.label for b in page.button]) and "Resume" not in labels


def test_a_running_job_stops_and_resumes_by_buttons(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",)), "mine")
    begun(jobs, "mine")
    page = open_train(job="mine")
    button(page, "Stop").click().run()
    ended(jobs, "mine")
    page.run()
    assert "Resume continues from there" in texts(page)
    button(page, "Resume").click().run()
    assert jobs.get("mine").alive and not page.exception


def test_failed_and_killed_jobs_say_what_happened(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=13), "failed")
    ended(jobs, "failed")
    assert "the loss is not finite" in texts(open_train(job="failed"))
    jobs.start(Spec("train", "photos", heads=("ttame",)), "killed")
    begun(jobs, "killed")
    jobs.stop("killed", at_once=True)
    ended(jobs, "killed")
    page = open_train(job="killed")
    assert "ended from outside" in texts(page) and button(page, "Resume")


@pytest.mark.parametrize("job", ["gone", "../../etc", "<b>x</b>", "a" * 300, "*x*"])
def test_an_unknown_job_is_a_message(jobs: Jobs, job: str) -> None:
    page = open_train(job=job)
    assert "There is no" in page.warning[0].value
    assert "<b>" not in page.warning[0].value.replace("\\<b\\>", "")
    assert button(page, "Start training")


def test_classifier_heads_take_folders_as_labels(jobs: Jobs) -> None:
    page = open_train(kind="probe")
    choose_photos(page, "photos")
    page.multiselect(key="heads").set_value(["gap"]).run()
    button(page, "Start training").click().run()
    (job,) = jobs.all()
    assert job.spec.kind == "probe" and job.spec.heads == ("gap",) and job.spec.labels == ""


def test_the_maps_of_each_head_are_shown_the_last_one_first(jobs: Jobs) -> None:
    finished(jobs, Spec("probe", "photos", heads=("gap", "abmilp", "cait"), epochs=5), "mine")
    assert "Maps of" not in texts(open_train(job="mine"))
    small_pack(jobs.root / "mine" / "gap" / "sample", 2, ("step 0", "step 3"))
    page = open_train(job="mine")
    assert "Maps of 2 photos" in texts(page) and "Head" not in labels_of_choices(page)
    small_pack(jobs.root / "mine" / "abmilp" / "sample", 4, ("step 0", "step 3"))
    page = open_train(job="mine")
    assert labels_of_choices(page) == ["Head", "Colour scale"]
    heads = page.get("button_group")[0]
    assert heads.value == "abmilp" and "Maps of 4 photos" in texts(page)
    small_pack(jobs.root / "mine" / "cait" / "sample", 2, ("step 9",))  # resumed without a step 0
    resumed = texts(open_train(job="mine"))
    assert "at step 9, the last checkpoint" in resumed and "before training" not in resumed
    heads.set_value("gap").run()
    assert not page.exception and "Maps of 2 photos" in texts(page)


def test_photos_without_labels_train_no_classifier(jobs: Jobs) -> None:
    page = open_train(kind="probe")
    choose_photos(page, "photos/tit")
    assert button(page, "Start training").disabled and "no labels" in texts(page)


def test_no_photos_says_what_to_do(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_settings", Settings(root=jobs.root))
    shown = texts(open_train())
    assert "No photos here yet" in shown and "--data" in shown


def test_training_is_off_where_everybody_gets_in(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_settings", Settings(root=jobs.root, training=False))
    page = open_train()
    assert "--no-token" in page.info[0].value and not page.button


def test_a_full_disk_is_a_message(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "job: cannot write (No space left on device); free some space")

    page = open_train()
    monkeypatch.setattr(jobs_module, "write_json", full)
    button(page, "Start training").click().run()
    assert not page.exception and "No space left" in texts(page) and not jobs.all()


# ---------------------------------------------------------------------- the demo pack


def test_the_first_run_offers_the_demo(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_job, "missing", lambda: None)
    page = opened(welcome)
    button(page, "Make the demo pack").click().run()
    assert not page.exception and not page.error
    assert demo_offer.demo_job(jobs) is not None
    assert "Making the demo pack" in texts(page)
    page = opened(welcome)  # another tab
    assert "Making the demo pack" in texts(page) and len(jobs.all()) == 1


def test_a_demo_that_lacks_packages_says_what_to_install(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_job, "missing", lambda: 'pip install -e ".[demo]"')
    page = opened(welcome)
    assert "pip install" in texts(page) and not page.button
    with pytest.raises(ValueError, match="pip install"):
        demo_offer.make_demo()


def test_the_demo_is_a_comparison_of_photos_that_are_there(tmp_path: Path) -> None:
    if pack_job.missing():
        pytest.skip("the demo's packages are not installed")
    pack_job.prepare(tmp_path)
    listed = (tmp_path / pack_job.PHOTOS).read_text().splitlines()
    assert len(listed) >= pack_job.LIMIT and all(Path(path).is_file() for path in listed)
    line = pack_job.arguments(tmp_path / "demo", tmp_path)
    assert line[0] == "compare" and str(tmp_path / pack_job.PHOTOS) in line


# ---------------------------------------------------------------------- in the browser


@pytest.mark.slow
def test_a_training_survives_reload_and_restart_in_the_browser(
    tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    root = tmp_path / "root"
    photos(root / "photos", 6)
    arguments = ("--weights", "random", "--device", "cpu")
    with served(root, *arguments, log=tmp_path / "log") as address:
        page = open_page(f"{address}/train?head=ttame", replaced=True)
        page.get_by_text("Start training").click()
        page.get_by_text("before training").first.wait_for()
        assert "job=photos-ttame" in page.url
        page.reload()
        page.locator(".st-key-stop button").first.click()
        page.get_by_text("Resume continues from there").wait_for()
        page.close()
    with served(root, *arguments, log=tmp_path / "log2") as address:
        page = open_page(f"{address}/train?job=photos-ttame", replaced=True)
        page.locator(".st-key-resume button").first.click()
        page.get_by_text("the last checkpoint").wait_for()
        page.close()
    jobs = Jobs(root)
    assert jobs.get("photos-ttame").state != "killed"  # the server has ended, the job has not
    jobs.stop("photos-ttame")
    assert ended(jobs, "photos-ttame").state in ("stopped", "finished")
    assert json.loads((root / "photos-ttame" / "run.json").read_text())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.jsonl", '{"step": 1, "epoch": "x", "loss": "y"}\n{"step": 2, "loss": [1]}\n'),
        ("log.jsonl", '{"step": 1, "epoch": 0, "loss": 1}\n{"step": 2, "loss": 1}\n'),
        ("gap/log.jsonl", '{"step": 1, "epoch": null}\n'),
        ("results.csv", "a,b\n1"),
        ("results.csv", "head,accuracy,accuracy_lo,accuracy_hi,ece,parameters,photos\nx,a,b,,,,"),
        ("results.csv", "\x00\x00"),
        ("results.csv", ""),
    ],
)
def test_damaged_results_of_a_job_are_a_message(jobs: Jobs, name: str, text: str) -> None:
    probe = "gap" in name or name.endswith("csv")
    spec = Spec("probe", "photos", heads=("gap",), epochs=2) if probe else SPEC
    job = finished(jobs, spec, "mine")
    (job.output / "gap").mkdir(exist_ok=True)
    (job.output / name).write_text(text)
    if probe:
        small_pack(job.output / "gap" / "sample", 2, ("step 0", "step 3"))
    page = open_train(job="mine")
    assert "mine" in texts(page)
    assert not probe or "Maps of 2 photos" in texts(page)
    assert [e.label for e in page.expander][-1] == "The same on the command line"


def test_results_behind_a_link_are_not_shown(jobs: Jobs, tmp_path: Path) -> None:
    job = finished(jobs, Spec("probe", "photos", heads=("gap",), epochs=2), "mine")
    secret = "head,accuracy,accuracy_lo,accuracy_hi,ece,parameters,photos\nsecret,1,1,1,1,1,1"
    (tmp_path / "secret.csv").write_text(secret)
    (job.output / "results.csv").symlink_to(tmp_path / "secret.csv")
    assert not open_train(job="mine").dataframe


def results(*accuracies: tuple[str, float]) -> str:
    header = "head,accuracy,accuracy_lo,accuracy_hi,ece,parameters,photos\n"
    return header + "".join(f"{name},{value},0,1,0.1,10,20\n" for name, value in accuracies)


def line_of_use(page: AppTest) -> str:
    (line,) = [c.value for c in page.code if c.value.startswith("xattn explain")]
    return line


def test_the_best_head_is_the_one_to_use_or_the_one_that_is_looked_at(jobs: Jobs) -> None:
    heads = ("gap", "abmilp", "cait")
    job = finished(jobs, Spec("probe", "photos", "test_vit", heads=heads, epochs=2), "mine")
    (job.output / "results.csv").write_text(results(("gap", 0.6), ("abmilp", 0.9), ("cait", 0.7)))
    page = open_train(job="mine")
    assert "mine/abmilp/head" in line_of_use(page) and "the most accurate" in texts(page)
    assert "--backbone test_vit" in line_of_use(page)
    for head in heads:
        small_pack(job.output / head / "sample", 2, ("step 0", "step 3"))
    page = open_train(job="mine")
    control = page.get("button_group")[0]
    assert control.value == "abmilp" and "mine/abmilp/head" in line_of_use(page)
    control.set_value("cait").run()
    assert "mine/cait/head" in line_of_use(page) and "the most accurate" not in texts(page)


def test_maps_of_before_and_after_are_on_one_scale_unless_each_is_asked_for(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    drawn = job_view.overlay_url
    monkeypatch.setattr(
        job_view,
        "overlay_url",
        lambda pack, entry, look: (looks.append(look), drawn(pack, entry, look))[1],
    )
    job = finished(jobs, SPEC, "mine")
    small_pack(job.output / "sample", 2, ("step 0", "step 3"))
    page = open_train(job="mine")
    entries = only(job.output).entries
    (limits,) = {(look.scale, look.limits) for look in looks}
    assert limits == ("shared", (entries["min"].min(), entries["max"].max()))
    looks.clear()
    page.get("button_group")[-1].set_value("Each map").run()
    assert {look.scale for look in looks} == {"map"}


def test_labels_are_those_of_the_chosen_folder(jobs: Jobs) -> None:
    for folder in ("photos", "other"):
        for name in ("cod", "eel", "pike") if folder == "other" else ():
            photos(jobs.data / folder / name)
        (jobs.data / folder / "labels.csv").write_text("")
    page = open_train(kind="probe")

    def labels() -> Any:
        return next(box for box in page.selectbox if box.label == "Labels")

    choose_photos(page, "photos")
    labels().set_value("labels.csv").run()
    choose_photos(page, "other")
    assert labels().value == "" and labels().options[0] == "The 3 folders: cod, eel, pike"


def test_the_demo_says_how_long_it_takes(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Path(jobs_module.RUNNER[1])
    runner.write_text(ONE_BAR)
    monkeypatch.setattr(pack_job, "missing", lambda: None)
    page = opened(welcome)
    button(page, "Make the demo pack").click().run()
    until(lambda: jobs.progress("demo") is not None, lambda: jobs.tail("demo"))
    (bar,) = opened(welcome).get("progress")
    assert "maps measured, about 00:09 left" in bar.proto.text

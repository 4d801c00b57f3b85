"""The table of jobs on the page Train: its rows, losses of several in one chart, and what follows a job."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
from fake_jobs import fake_job
from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack
from test_jobs import photos
from viewer_pages import choose_option, opened, served

from xattn.app import state
from xattn.app.jobs.job_files import Spec
from xattn.app.jobs.jobs import Jobs
from xattn.app.pages.train.page import PhotoFolder
from xattn.app.state import Settings

TRAIN = Spec("train", "photos", heads=("ttame",))
PROBE = Spec("probe", "photos", heads=("gap", "abmilp"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three jobs that have ended: finished, stopped half-way, and a finished probe."""
    root = tmp_path / "root"
    fake_job(root, "first", TRAIN, (4.0, 2.0, 1.0, 0.5), started=1e9)
    fake_job(root, "second", TRAIN, (3.0, 3.0), code=130, started=1e9 + 60)
    output = fake_job(root, "heads", PROBE, started=1e9 + 120)
    header = "head,accuracy,accuracy_lo,accuracy_hi,ece,parameters,photos\n"
    (output / "results.csv").write_text(f"{header}gap,0.6,0,1,0,1,5\nabmilp,0.9,0,1,0,1,5\n")
    monkeypatch.setattr(state, "_settings", Settings(root=root, data=tmp_path / "data"))
    return root


def script() -> None:
    import streamlit as st

    from xattn.app import state
    from xattn.app.pages.train import page as train

    train.page(state.Context(state.library(), None, st.query_params.to_dict()))


def open_train(**params: Any) -> AppTest:
    return opened(script, **params)


def rows(page: AppTest) -> dict[str, Any]:
    (found,) = [e for e in page.get("bidi_component") if "jobs" in e.proto.json]
    return {row["id"]: row for row in json.loads(found.proto.json)["jobs"]}


def button(page: AppTest, label: str) -> Any:
    return next(b for b in page.button if b.label == label)


def test_a_row_says_what_a_job_did_and_how_well(root: Path) -> None:
    found = rows(open_train())
    assert list(found) == ["heads", "second", "first"], "the latest first"
    assert found["first"]["best"] == "loss 0.75" and found["first"]["share"] == 1
    assert found["first"]["state"] == "finished" and found["first"]["took"] == "75 s"
    assert found["second"]["state"] == "stopped" and found["second"]["done"] == "2 of 4"
    assert found["second"]["share"] == 0.5
    assert found["heads"]["best"] == "accuracy 90.0%, abmilp"
    assert found["heads"]["what"].startswith("classifier heads gap, abmilp on ")


def test_losses_of_several_stand_in_one_chart(root: Path) -> None:
    assert not open_train().get("vega_lite_chart")
    page = open_train(**{"with": ["first", "second", "gone", "../x"]})
    (chart,) = page.get("vega_lite_chart")
    assert {row["chosen"] for row in rows(page).values()} == {True, False}
    assert "Losses of 2 runs" in page.markdown[0].value
    assert "first" in str(chart.proto) and "second" in str(chart.proto)


def test_a_job_is_renamed_with_its_address(root: Path) -> None:
    page = open_train(job="first")
    page.text_input(key="new name of first").set_value("heads").run()
    button(page, "Rename").click().run()
    assert "taken" in page.error[0].value and (root / "first").is_dir()
    page.text_input(key="new name of first").set_value("third").run()
    button(page, "Rename").click().run()
    assert not page.exception and page.query_params["job"] in ("third", ["third"])
    assert "third" in rows(page) and "first" not in rows(page)


def test_a_job_is_deleted_after_a_second_question(root: Path) -> None:
    small_pack(root / "first" / "sample", 2, ("step 0",))
    page = open_train(job="first")
    assert not [b for b in page.button if b.label == "Delete for good"]
    page.session_state["delete first"] = True
    page.run()
    (asked,) = [m.value for m in page.markdown if "cannot be undone" in m.value]
    assert "first/sample" in asked.replace("\\", "") and (root / "first").is_dir()
    button(page, "Delete for good").click().run()
    assert not page.exception and "first" not in rows(page)
    assert not (root / "first").exists() and "job" not in page.query_params


def test_mistakes_are_those_of_a_labelled_pack_or_of_a_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[Any] = []
    monkeypatch.setattr(state, "go", lambda page, **params: went.append((page, params)))
    page = open_train(job="first")
    button(page, "See its mistakes").click().run()
    (line,) = [c.value for c in page.code if "--classes predicted,label" in c.value]
    assert f"--heads {root / 'first' / 'head'}" in line and not went
    assert line.endswith(
        f"--labels folders --classes predicted,label --output {root}/first/mistakes"
    )
    small_pack(root / "first" / "mistakes", 3, ("head",))
    button(page, "See its mistakes").click().run()
    (pack,) = state.library().packs()
    assert went == [("mistakes", {"pack": pack.id})]
    button(page, "Compare methods on its held-out photos").click().run()
    assert went[1:] == [("runs", {"pack": pack.id})]


def test_both_steps_of_the_sample_open_in_two_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[Any] = []
    monkeypatch.setattr(state, "go", lambda page, **params: went.append((page, params)))
    small_pack(root / "first" / "sample", 2, ("step 0", "step 3"))
    button(open_train(job="first"), "Both steps in Two runs").click().run()
    (pack,) = state.library().packs()
    both = {"pack": pack.id, "other": pack.id, "by": "step 0", "by2": "step 3"}
    assert went == [("runs", both)]


def test_a_head_that_is_there_opens_in_live(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert button(open_train(job="first"), "Try it in Live").disabled
    head = root / "first" / "head"
    head.mkdir()
    for name in ("config.json", "model.safetensors"):
        (head / name).write_text("{}")
    went: list[Any] = []
    monkeypatch.setattr(state, "go", lambda page, **params: went.append((page, params)))
    (info,) = state.library().heads()
    button(open_train(job="first"), "Try it in Live").click().run()
    assert went == [("live", {"model": None, "head": info.id})]


def test_the_table_in_the_browser(root: Path, open_page: Callable[..., Any]) -> None:
    """Two are compared; one is opened, leads to its mistakes, is renamed and deleted; then the labels of a
    new one are those of the chosen folder."""
    small_pack(root / "first" / "mistakes", 6, ("head",))
    data = root.parent / "data"
    for name in ("birds/wren", "birds/tit", "fish/cod", "fish/eel"):
        photos(data / name)
    options = ("--data", str(data), "--weights", "random", "--device", "cpu")
    with served(root, *options, log=root.parent / "log") as address:
        page = open_page(f"{address}/train", "narrow", "dark")
        page.get_by_role("checkbox", name="Compare the losses of first").check()
        page.wait_for_url(re.compile("with=first"))
        page.get_by_role("checkbox", name="Compare the losses of second").check()
        page.get_by_text("Losses of 2 runs").wait_for()
        wide = page.get_by_test_id("stMain").evaluate("e => e.scrollWidth - e.clientWidth")
        assert wide <= 0
        page.locator(".jobs a", has_text="first").click()
        page.wait_for_url(re.compile("job=first"))
        page.get_by_role("button", name="See its mistakes").click()
        page.locator(".matrix .wrong").first.wait_for()
        page.go_back()
        page.wait_for_url(re.compile("job=first"))
        page.get_by_role("button", name="Rename").click()
        page.get_by_label("New name").fill("third")
        page.keyboard.press("Enter")
        page.locator(".st-key-rename button").click()
        page.wait_for_url(re.compile("job=third"))
        page.get_by_role("heading", name="third").wait_for()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_text("It cannot be undone.").wait_for()
        page.get_by_role("button", name="Delete for good").click()
        page.get_by_role("heading", name="Start a new one").wait_for()
        assert sorted(job.id for job in Jobs(root).all()) == ["heads", "second"]
        page.goto(f"{address}/train?kind=probe&data={PhotoFolder('birds', 0, (), ()).id}")
        shows = "text => [...document.querySelectorAll('input')].some(i => i.value === text)"
        page.wait_for_function(shows, arg="The 2 folders: tit, wren")
        box = page.locator("[data-testid=stSelectbox] input").first
        choose_option(page, box, "fish · 8 photos")
        page.wait_for_function(shows, arg="The 2 folders: cod, eel")
        page.close()

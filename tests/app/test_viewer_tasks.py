"""``tests/viewer_tasks.py``: each task can be done in the clicks that it may take."""

from contextlib import nullcontext

import pytest

pytest.importorskip("streamlit")

import viewer_tasks


@pytest.mark.slow
def test_tasks_take_no_more_clicks_than_wanted(browser, monkeypatch):
    monkeypatch.setattr(viewer_tasks, "browser", lambda: nullcontext(browser))
    cells = [line.split("|") for line in viewer_tasks.tasks(1)][2:]
    assert [cell[1].strip() for cell in cells] == [task.title for task in viewer_tasks.TASKS]
    assert all(int(cell[2]) <= int(cell[3]) for cell in cells), cells

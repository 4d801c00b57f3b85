"""Which counts: the address that a click was sent with, or what was chosen since."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest

from xattn.app.navigation import address


def script() -> None:
    from xattn.app.navigation import address

    address.selectbox("Network", ["one", "two", "three"], "model")
    address.multiselect("Methods", ["a", "b", "c"], "method")
    address.segmented("Input", ["photos", "clip"], "input")


@pytest.fixture
def app() -> AppTest:
    return AppTest.from_function(script).run()


def sent_with(app: AppTest, **params: str) -> None:
    app.query_params.clear()
    for name, value in params.items():
        app.query_params[name] = value


def chosen(app: AppTest) -> tuple[object, object]:
    return app.selectbox[0].value, app.multiselect[0].value


def test_choices_that_follow_one_another_fast_all_stay(app: AppTest) -> None:
    app.selectbox[0].set_value("two").run()
    sent_with(app)  # the browser knows nothing yet
    app.multiselect[0].set_value(["a"]).run()
    sent_with(app, model="two")  # it knows the first choice
    app.multiselect[0].set_value(["a", "b"]).run()
    assert chosen(app) == ("two", ["a", "b"])
    assert app.query_params == {"model": "two", "method": ["a", "b"]}


def test_another_address_wins(app: AppTest) -> None:
    app.selectbox[0].set_value("two").run()
    sent_with(app, model="three", method="c")
    app.run()
    assert chosen(app) == ("three", ["c"])


def test_an_earlier_address_wins_where_the_person_went_back(app, monkeypatch) -> None:
    app.selectbox[0].set_value("two").run()
    sent_with(app)
    monkeypatch.setattr(address, "back", lambda: True)
    app.run()
    assert app.selectbox[0].value == "one" and not app.query_params


def test_a_run_that_ends_early_leaves_the_address_to_the_next_one() -> None:
    app = AppTest.from_function(interrupted).run()
    assert app.session_state["seen"] == [True]
    app.run()
    app.run()
    assert app.session_state["seen"] == [True, True, False]


def interrupted() -> None:
    """A page that follows an address at its second run only."""
    import streamlit as st

    from xattn.app.navigation import address

    seen = st.session_state.setdefault("seen", [])
    seen.append(address.is_new("here", {"layer": "5"}))
    if len(seen) == 2:
        address.record_address("here", {"layer": "5"})


def test_what_is_no_option_is_passed_over(app: AppTest) -> None:
    sent_with(app, model="four", method="z", input="<b>")
    app.run()
    assert not app.exception
    assert chosen(app) == ("one", []) and not app.query_params

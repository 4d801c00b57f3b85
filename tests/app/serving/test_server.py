"""``xattn app``: what it prints, what it refuses, and the page that it starts with."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
from served_viewer import free_port
from viewer_pages import served

from xattn.app.pages import first_run
from xattn.app.serving import guard, server
from xattn.app.serving.server import Address, bind, check_installed, url
from xattn.cli import main


def run(*arguments: str) -> int:
    return main(["app", *arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("xattn: error: "), lines
    return lines[0]


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(str(tmp_path), "--port", str(port)) == 2
    line = one_line(capsys)
    assert str(port) in line and "--port" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "port"),
        (["--host", "not a host"], "host"),
        (["--host", "203.0.113.7", "--no-token"], "host"),
        (["--data", "nowhere"], "data"),
        (["--upload-mb", "0"], "upload_mb"),
        (["--allow-frame", "wiki.example.org"], "allow_frame"),
        (["--host", "0.0.0.0", "--allow-frame", "https://wiki.example.org"], "allow_frame"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(tmp_path), *arguments) == 2
    captured = capsys.readouterr().err
    assert "xattn: error: " in captured and named in captured and "Traceback" not in captured


@pytest.mark.parametrize(
    ("arguments", "token", "training"),
    [
        ([], None, True),
        (["--host", "0.0.0.0"], None, True),  # which makes a token
        (["--no-token"], None, False),
        (["--allow-host", "viewer.example.org"], None, False),
        (["--allow-host", "viewer.example.org"], "a" * 20, True),
        (["--no-token", "--allow-frame", "https://wiki.example.org"], None, False),
    ],
)
def test_whoever_gets_in_without_a_token_cannot_train(
    arguments: list[str],
    token: str | None,
    training: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(server, "serve", lambda settings, *_: seen.append(settings.training))
    monkeypatch.delenv("XATTN_APP_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("XATTN_APP_TOKEN", token)
    assert run(str(tmp_path), *arguments) == 0
    assert seen == [training]


def test_a_file_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pack.zip").write_text("")
    assert run(str(tmp_path / "pack.zip")) == 2
    assert "name a folder" in one_line(capsys)


@pytest.mark.parametrize("missing", ["streamlit", "altair", "pandas"])
def test_a_missing_package_names_what_to_install(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    assert run(str(tmp_path)) == 2
    line = one_line(capsys)
    assert missing in line and 'run: pip install "xattn[app]"' in line


def test_an_old_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.sys, "version_info", (3, 10, 12))
    assert run(str(tmp_path)) == 2
    assert "3.11" in one_line(capsys)


def test_this_python_and_streamlit_suffice() -> None:
    check_installed()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.0.2", False), ("viewer", False)),
    ],
)
def test_only_this_machine_reaches_loopback(host: str, loopback: bool) -> None:
    assert Address(host).loopback is loopback


def test_port_0_takes_any_free_one() -> None:
    with bind(Address(port=0)) as listener:
        assert listener.getsockname()[1] > 0
    assert url("::1", 8501) == "http://[::1]:8501" and url("0.0.0.0", 1) == "http://127.0.0.1:1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_all_addresses_are_those_of_ipv4_too() -> None:
    with bind(Address("::", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=60).close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_quietly_and_the_root_need_not_exist(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xattn", "app", str(tmp_path / "none"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert re.match(r"xattn app: http://127\.0\.0\.1:\d+ ", process.stdout.readline())
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and not out and "Traceback" not in err, err
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------- the start page


def test_the_start_page_is_streamlits_with_our_title() -> None:
    html = guard.start_page()
    assert "<title>xattn</title>" in html and "<title>Streamlit" not in html
    assert '<div id="root">' in html and 'type="module"' in html
    assert "service-desc" not in html


def test_the_policy_names_each_inline_script_and_no_other_server() -> None:
    policy = guard.policy()
    assert policy.count("'sha256-") >= 2
    assert "unsafe-eval" not in policy and "http" not in policy and "*" not in policy
    script = next(p for p in policy.split("; ") if p.startswith("script-src"))
    assert "unsafe-inline" not in script


def test_a_page_of_another_site_shows_it_in_a_frame_only_if_it_is_named(
    tmp_path: Path, browser: Any
) -> None:
    port = free_port()
    named, other = f"http://localhost:{port}", f"http://127.0.0.1:{port}"
    pages = tmp_path / "pages"
    pages.mkdir()
    command = [sys.executable, "-m", "http.server", str(port), "--directory", str(pages)]
    site = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with served(tmp_path / "root", "--allow-frame", named, log=tmp_path / "log") as address:
            (pages / "index.html").write_text(f'<iframe src="{address}" width=800 height=800>')
            page = browser.new_page()
            page.goto(named)
            inside = page.frame_locator("iframe")
            inside.get_by_role("heading", name=first_run.AIM).wait_for(timeout=300_000)
            refused: list[str] = []
            page.on("console", lambda message: refused.append(message.text))
            page.goto(other)
            page.wait_for_timeout(500)
            assert any("frame-ancestors" in text for text in refused)
            page.close()
    finally:
        site.terminate()
        site.wait()


def test_a_phone_tells_the_page_where_its_corners_are() -> None:
    assert "viewport-fit=cover" in guard.start_page()


def test_a_page_opened_by_its_address_says_nothing_on_the_console(
    tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    """A page below / would first ask for /live/_stcore/health; and no policy is broken."""
    with served(tmp_path, log=tmp_path / "log") as address:
        page = open_page(f"{address}/gallery?view=error%3D%22")  # the gallery has two addresses
        page.get_by_role("heading", name=first_run.AIM).wait_for()
        assert page.url == f"{address}/?view=error%3D%22"
        assert not page.get_by_text("Page not found").count()
        for name in ("", "live", "train"):
            page.goto(f"{address}/{name}")
            page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")
            assert page.title().endswith("xattn")
        page.close()  # before the server goes, which the page would report

"""What browsers send to the viewer, and the files of jobs beside it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, parse_qsl

from fuzz.engine import target
from fuzz.labels import nasty_json
from fuzz.packs import pack_files
from fuzz.states import edited, put
from xattn.app.attention import view as attention_view
from xattn.app.jobs.job_files import EXIT, JOB, PROCESS, Spec
from xattn.app.jobs.jobs import Jobs
from xattn.app.library import JOBS, Library
from xattn.app.serving import routes
from xattn.app.serving.guard import Guard
from xattn.app.triage import selection
from xattn.app.triage.maps_table import Choices, Measure

HOST = b"localhost:8501"


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------- addresses

CHOICES = Choices(
    methods=("gradcam", "random"),
    measures={"confidence": Measure("confidence", "Confidence", 0.1, 0.9), "AD@50": Measure("AD@50", "AD@50", 0, 100)},
    labels={"1": "dog", "cat": "cat"}, predicted={"1": "dog"}, judged=True, several=True, controls=frozenset({"random"}),
)  # fmt: skip
_NASTY_QUERIES = [
    b"", b"&&&", b"=", b"%", b"%ff%fe", b"page=" + b"9" * 5000, b"page=1e999", b"page=nan", b"page=-1", b"page=0.5", b"page=\xef\xbc\x91", b"size=0",
    b"low=nan&high=inf", b"low=9&high=1", b"measure=&low=1", b"label=" + b"x" * 100_000, b"label=%ED%A0%80", b"q=%00", b"q=" + b"a " * 5000, b"method[]=x",
    b"view=" + b"view%3D" * 1000, b"method=all&method=nothing", b"sort=label_name", b"measure=__class__", b"&".join([b"label=1"] * 5000),
]  # fmt: skip


@target(
    "gallery address",
    "query",
    valid=lambda: [b"method=random&maps=every&sort=AD@50&order=desc&size=36&page=3&q=dog&label=1&label=cat&right=wrong", b"measure=confidence&low=.2&high=.8&show=photo"],
    nasty=lambda: _NASTY_QUERIES,
    kind="text",
    says="$",
)  # fmt: skip
def gallery_address(folder: Path) -> None:
    text = text_of(folder / "query")
    view, messages = selection.parse(parse_qs(text[:100_000], keep_blank_values=True), CHOICES)
    assert view.page >= 1 and all(isinstance(message, str) for message in messages)
    again = selection.from_text(selection.to_text(view, CHOICES), CHOICES)
    assert selection.from_text(selection.to_text(again, CHOICES), CHOICES) == again
    selection.from_text(text, CHOICES)


class _Reading(SimpleNamespace):
    layers, grid, prefix = 12, (14, 14), ("class token",)

    def heads(self, layer: int) -> int:
        return 3


@target(
    "attention address",
    "query",
    valid=lambda: [b"mechanism=gna&size=7&layer=3&head=2&patch=3,5&depth=4&scale=root", b"mechanism=localist&size=64&target=2", b"layer=11&head=mean&patch=class-token"],
    nasty=lambda: [*_NASTY_QUERIES, b"layer=12", b"layer=-1", b"head=3", b"patch=0,0", b"patch=15,1", "patch=１,２".encode(), b"patch=1,1,1", b"size=-1&mechanism=gna", b"mechanism=localist&target=4", b"size=999999"],
    kind="text",
    says="$",
)  # fmt: skip
def attention_address(folder: Path) -> None:
    params = dict(parse_qsl(text_of(folder / "query")[:100_000], keep_blank_values=True))
    reading: Any = _Reading()
    for grid in (reading.grid, None, (1, 1)):
        choice, _ = attention_view.choice_of(params, grid)
    view, _ = attention_view.view_of(params, attention_view.default_view(reading, choice), reading)
    assert 0 <= attention_view.token_of(view.patch, reading) < 197
    assert 0 <= view.layer < 12 and 0 <= view.depth < 12


@functools.cache
def _library() -> Library:
    root = Path(tempfile.mkdtemp(prefix="xattn-fuzz-"))
    put({f"pack/{name}": data for name, data in pack_files().items()}, root)
    return Library(root)


def _picture_queries() -> list[bytes]:
    pack = _library().packs()[0].id
    return [f"pack={pack}&image=photo-00000&side=240&entry=photo-00000@0.gradcam&opacity=.3&threshold=.1&scale=shared&cmap=viridis&low=0&high=1".encode(),
            f"pack={pack}&entry=photo-00001@1.gradcam&minus=photo-00001@1.random&image=photo-00001".encode()]  # fmt: skip


@target(
    "picture address",
    "query",
    _picture_queries,
    lambda: [*_NASTY_QUERIES, b"side=16&image=x&pack=..", b"pack=../..&image=x", b"opacity=nan", b"threshold=1e999", b"low=-1e308&high=1e308", b"cmap=x", b"minus=", b"frame=-1"],
    kind="text",
    says=r".",
)  # fmt: skip
def picture_address(folder: Path) -> None:
    query = dict(parse_qsl(text_of(folder / "query")[:100_000], keep_blank_values=True))
    for request in (routes.photo_request, routes.overlay_request, routes.frame_request):
        try:
            pack_id, _, draw = request(query)
            draw(_library().open(pack_id))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500


TOKEN = "a-token-of-the-viewer"
COOKIE = b"xattn_session=" + Guard(None, TOKEN).value.encode()  # type: ignore[arg-type]


def _request(
    *headers: tuple[bytes, bytes],
    path: bytes = b"/",
    query: bytes = b"",
    method: bytes = b"GET",
    body: bytes = b"",
) -> bytes:
    lines = [
        method + b" " + path + b"?" + query,
        b"host: " + HOST,
        *(name + b": " + value for name, value in headers),
    ]
    return b"\n".join(lines) + b"\n\n" + body


@target(
    "request",
    "request",
    valid=lambda: [
        _request((b"cookie", COOKIE), (b"accept", b"text/html")),
        _request((b"accept", b"text/html,*/*"), (b"sec-fetch-dest", b"document"), path=b"/image", query=b"pack=a"),
        _request(path=b"/image", query=b"pack=a&token=" + TOKEN.encode()),
        _request((b"cookie", COOKIE), (b"origin", b"http://" + HOST), path=b"/_stcore/upload_file/a/b", method=b"PUT", body=b"x"),
    ],
    nasty=lambda: [
        b"", b"\n\n", b"GET ", _request((b"host", b"evil.example")), _request((b"cookie", b"\xff=\xff; ;;=")), _request((b"cookie", b"xattn_session=" + b"x" * 100_000)),
        _request((b"cookie", b"xattn_session=" + b"0" * 64)), _request((b"cookie", b"xattn_session=")), _request((b"cookie", b"xattn_session=\xd9\xa1.x.y")),
        _request((b"origin", b"null")), _request((b"origin", b"http://[::1")), _request((b"origin", b"\xff")), _request((b"sec-fetch-site", b"cross-site")),
        _request(query=b"token=" + b"%" * 5000), _request(query=b"token=" + b"x" * 100_000), _request(query=b"token=\xff&=&token"), _request(path=b"/../../etc/passwd"),
        *(_request(path=path, query=b"token=" + TOKEN.encode()) for path in (b"//evil.example", b"/\\evil.example", b"/%5cevil.example", b"/\tevil", b"/@evil", b"/" * 5000)),
        b"GET /?\nhost: [::1", b"GET /?\nhost: :", b"GET /?\nhost: localhost:99999999", b"GET /?\nhost: localhost:x", b"GET /?\nhost: \xff", b"GET /?\nhost: " + b"a" * 100_000,
    ],
    kind="text",
    says="$",
    share=1.5,
)  # fmt: skip
def request(folder: Path) -> None:
    head, _, body = (folder / "request").read_bytes().partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, address = first.partition(b" ")
    path, _, query = address.partition(b"?")
    pairs = (line.partition(b":") for line in lines)
    # A server decodes the path, and refuses what is no header before the viewer sees it.
    headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs if name.strip()]
    messages: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": method.decode("latin-1"), "path": path.decode("utf-8", "replace"), "raw_path": path, "query_string": query,
        "headers": headers, "scheme": "http", "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 8501), "root_path": "",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    async def viewer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    asyncio.run(Guard(viewer, TOKEN)(scope, receive, send))
    assert messages[0]["type"] == "http.response.start" and messages[0]["status"] < 500
    sent = dict(messages[0]["headers"])
    assert b"\n" not in sent.get(b"location", b"/") and sent.get(b"location", b"/").startswith(b"/")
    if messages[1]["body"] == b"inside":
        assert any(b"xattn_session=" in value for name, value in headers if name == b"cookie")


# ---------------------------------------------------------------------- files


def _jobs(folder: Path) -> None:
    place = folder / "root" / JOBS / "one"
    put({
        JOB: json.dumps({"xattn": "job", "spec": dataclasses.asdict(Spec("train", "photos", "", ("ttame",))), "created": 1e9}).encode(),
        PROCESS: json.dumps({"pid": 999_999_999, "born": 5.0, "started": 1e9}).encode(),
        EXIT: json.dumps({"code": 2, "time": 1e9}).encode(),
        "stderr": b"  3%|#| 3/100 [00:01<00:09, 1step/s]\rxattn: error: lr: not finite\n",
    }, place)  # fmt: skip
    put(
        {"log.jsonl": b'{"step": 1, "epoch": 0, "loss": 0.5}\n', "run.json": b"{}"},
        folder / "root" / "one",
    )


def _look(folder: Path) -> None:
    jobs = Jobs(folder / "root")
    for job in jobs.all():
        jobs.losses(job.id)
        jobs.settings(job.id)
        jobs.tail(job.id)
        jobs.progress(job.id)
        assert not job.alive


def _job_file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _jobs(Path(folder))
        return (Path(folder) / name).read_bytes()


def _nasty_jobs() -> list[bytes]:
    whole = _job_file(f"root/{JOBS}/one/{JOB}")
    specs = [{"heads": value} for value in (5, "x", [5], [[]], None, {}, ["../x"])]
    specs += (
        [{"kind": value} for value in (5, [], "demo", "probe")]
        + [{"epochs": value} for value in ("x", 10**400, True)]
        + [{"data": value} for value in ("../..", "/", 5)]
    )
    found = [edited(whole, lambda r, s=spec: r["spec"].update(s)) for spec in specs]
    return [
        *found,
        *(
            edited(whole, lambda r, v=value: r.update(created=v))
            for value in ("x", 10**400, -1, 1e300, None, True)
        ),
        *nasty_json(),
    ]


def _without_end(folder: Path) -> None:
    (folder / "root" / JOBS / "one" / EXIT).unlink()
    _look(folder)


_OF_JOB = f"root/{JOBS}/one"
for name, file, nasty, options in (
    ("record", f"{_OF_JOB}/{JOB}", _nasty_jobs, {"share": 0.6}),
    ("end", f"{_OF_JOB}/{EXIT}", nasty_json, {}),
    ("log", "root/one/log.jsonl", nasty_json, {}),
    ("process", f"{_OF_JOB}/{PROCESS}", lambda: [
        b'{"pid": 1, "born": 0}', b'{"pid": -1}', b'{"pid": ' + b"9" * 400 + b', "born": ' + b"9" * 400 + b"}", b'{"pid": 99999, "born": NaN}', *nasty_json()
    ], {}),
    ("messages", f"{_OF_JOB}/stderr", lambda: [
        b"\xff" * 1000, b"9" * 5000 + b"/" + b"9" * 5000 + b" [x", b"1/0 [", b"\r" * 10_000, "١/٢ [".encode(), b"xattn: error: "
    ], {"kind": "text"}),
):  # fmt: skip
    valid = functools.partial(lambda file: [_job_file(file)], file)
    options = {"share": 0.4, "template": _jobs, "says": "$", **options}
    target(f"job {name}", file, valid, nasty, **options)(
        _without_end if name == "process" else _look
    )

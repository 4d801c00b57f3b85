"""Heads and weight files: ``config.json``, safetensors, pickles, and options on the command line."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

import xattn
from fuzz.engine import target
from fuzz.labels import nasty_json
from fuzz.mutations import deep
from xattn.backbone.weights import load_weight_file
from xattn.heads import create_head, load_head, parse_options, save_head

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@functools.cache
def network() -> Any:
    """A ViT of a few thousand weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=(24, 40), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
        )
    return xattn.load_backbone(model)


@functools.cache
def head_files() -> list[dict[str, bytes]]:
    """The files of two saved heads."""
    found = []
    heads = (
        create_head("ttame", network(), fusion="per_class"),
        create_head("efficient_probe", network(), classes=3, queries=4),
    )
    for head in heads:
        with tempfile.TemporaryDirectory() as folder:
            save_head(head, folder, {"loss": 0.5})
            found.append({n: (Path(folder) / n).read_bytes() for n in (CONFIG, WEIGHTS)})
    return found


def _weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(head_files()[0][WEIGHTS])


def _config(folder: Path) -> None:
    (folder / CONFIG).write_bytes(head_files()[0][CONFIG])


def _load(folder: Path) -> None:
    head = load_head(folder, network())
    with torch.inference_mode():
        head(network()(torch.zeros(1, 3, 24, 40)), class_index=0)


def _changed(**options: Any) -> bytes:
    config = json.loads(head_files()[0][CONFIG])
    config["options"] |= options
    return json.dumps(config).encode()


def _nasty_configs() -> list[bytes]:
    whole = head_files()[0][CONFIG].decode()
    config = json.loads(whole)
    return [
        _changed(branch_rank=300_000), _changed(branch_rank=10**400), _changed(branch_rank=-1), _changed(branch_rank=[1]),
        _changed(classes=10**9), _changed(classes=-5), _changed(classes=0), _changed(num_taps=10**6), _changed(num_taps=0),
        _changed(fusion="per_classes"), _changed(class_names=["a"] * 4), _changed(self=1), _changed(backbone=1),
        _changed(**{"": 1}), _changed(**{"__class__": 1}), head_files()[1][CONFIG],
        json.dumps({**config, "head": "linear", "options": {"classes": 10**8}}).encode(),
        json.dumps({**config, "head": "efficient_probe", "options": {"queries": 10**9}}).encode(),
        json.dumps({**config, "head": "abmilp", "options": {"hidden": 10**9}}).encode(),
        json.dumps({**config, "head": "delf", "options": {"features": 10**9}}).encode(),
        json.dumps({**config, "head": "cbam", "options": {"reduction": 10**9}}).encode(),
        json.dumps({**config, "head": "memetector", "options": {"hidden": [10**6, 10**6]}}).encode(),
        json.dumps({**config, "head": "reliability"}).encode(), json.dumps({**config, "format": 99}).encode(),
        json.dumps({**config, "backbone": {**config["backbone"], "taps": None}}).encode(),
        json.dumps({**config, "backbone": {**config["backbone"], "taps": 5}}).encode(),
        json.dumps({**config, "backbone": {**config["backbone"], "sha256": None}}).encode(),
        json.dumps({**config, "backbone": {**config["backbone"], "name": "x" * 100_000, "sha256": "1"}}).encode(),
        json.dumps({**config, "training": 5}).encode(), whole.replace('"options"', '"options": 1, "options"', 1).encode(),
        *nasty_json(),
    ]  # fmt: skip


@target(
    "head config",
    CONFIG,
    lambda: [head_files()[0][CONFIG]],
    _nasty_configs,
    template=_weights,
    share=2,
)
def head_config(folder: Path) -> None:
    _load(folder)


def _with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def nasty_safetensors(name: str) -> list[bytes]:
    """Files that lie about their length, types, shapes and offsets; ``name`` is of a tensor."""
    entries = [
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', '{"dtype": "F32", "shape": [], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}', '{"dtype": "F32", "shape": [9999999999999], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}', '{"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}',
        '{"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}', '{"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}',
        '{"dtype": "X", "shape": [4], "data_offsets": [0, 4]}', '{"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}',
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999]}', '{"dtype": "I64", "shape": [1], "data_offsets": [0, 4]}',
        '{"dtype": "F32", "shape": 1, "data_offsets": 0}', "null", "[]", '"x"', deep(5_000), "{}", "1e999",
        '{"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}', '{"dtype": "F32", "shape": ["1"], "data_offsets": ["0", "4"]}',
        '{"dtype": "F32", "shape": [1.0], "data_offsets": [0.0, 4.0]}', '{"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}',
    ]  # fmt: skip
    headers = [f'{{"{name}": {entry}}}'.encode() for entry in entries]
    headers += [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"__metadata__": 5}',
        b'{"__metadata__": {"a": 1}}',
        b"\xff",
        *nasty_json(),
    ]
    files = [_with_header(header, b"\0\0\xc0\x7f") for header in headers]
    files += [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8,
        b"\xff" * 8 + b"{}",
        (1 << 63).to_bytes(8, "little"),
        _with_header(b"{}"),
    ]
    files += [
        _with_header(
            f'{{"{name}":{{"dtype":"F32","shape":[{s}],"data_offsets":[0,{4 * s}]}}}}'.encode(),
            b"\0" * 4 * s,
        )
        for s in (0, 1, 3)
    ]
    return files


@target(
    "head weights",
    WEIGHTS,
    lambda: [head_files()[0][WEIGHTS]],
    lambda: [head_files()[1][WEIGHTS], *nasty_safetensors("bias")],
    template=_config,
    says="head: ",
)
def head_weights(folder: Path) -> None:
    _load(folder)


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.count": torch.tensor(3),
        "b": torch.ones(4, dtype=torch.float16),
    }


@target(
    "weights safetensors",
    "w.safetensors",
    lambda: [save(_tensors())],
    lambda: nasty_safetensors("a.weight"),
    says="weights: ",
)
def weights_safetensors(folder: Path) -> None:
    load_weight_file(folder / "w.safetensors")


def saved(value: Any, **options: Any) -> bytes:
    """The bytes of ``torch.save``."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


class _Command:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def _nasty_pickles() -> list[bytes]:
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    nested: dict[str, Any] = _tensors()
    for _ in range(300):
        nested = {"state_dict": nested}
    values = [
        {}, [], None, 5, "x", {"a": 1}, {1: torch.ones(1)}, {"a": torch.full((2,), float("nan"))}, loop, nested, {"state_dict": {}},
        {"a": torch.ones(2, 2).to_sparse()}, {"a": torch.empty(2, device="meta")}, {"a": torch.ones(1).expand(1 << 40)},
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)}, {"module.": torch.ones(1)}, {"state_dict": torch.ones(1)},
        {"a": torch.ones(2, dtype=torch.complex64)}, {"a": torch.ones(1).as_strided((5, 5), (0, 0))},
    ]  # fmt: skip
    return [*map(saved, values), pickle.dumps(_Command()), saved(_Command()), pickle.dumps(5), b"", b"PK\3\4", b"\x80\x02.", b"\x80\x05" * 50, b"(" * 5000,
            b"\x80\x02" + b"]" * 100_000 + b".", b"c__builtin__\neval\n(S'1'\ntR."]  # fmt: skip


@target(
    "weights pickle",
    "w.pth",
    lambda: [saved(_tensors()), saved({"state_dict": {f"module.{k}": v for k, v in _tensors().items()}}, _use_new_zipfile_serialization=False)],
    _nasty_pickles,
    says="weights: ",
    share=2,
)  # fmt: skip
def weights_pickle(folder: Path) -> None:
    load_weight_file(folder / "w.pth")


@target(
    "head options",
    "options",
    valid=lambda: [b"fusion=per_class\nbranch_rank=null", b"branch_rank=4\nnum_taps=2"],
    nasty=lambda: [b"", b"=", b"a", b"a=", b"a=" + deep(100_000).encode(), b"branch_rank=" + b"9" * 5000, b"num_taps=NaN", b"num_taps=1e999",
                   b"fusion=[]", b"self=1", b"backbone=1", b"branch_rank=300000", b"branch_rank=99999999999999999999", b"num_taps=true"],
    kind="text",
)  # fmt: skip
def head_options(folder: Path) -> None:
    pairs = (folder / "options").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    create_head("ttame", network(), **parse_options(pairs))

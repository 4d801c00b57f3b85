"""``xattn app``: open the viewer in the browser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from xattn.cli.checks import check_annotations
from xattn.cli.detections import check_detector
from xattn.cli.imports import imported_sources
from xattn.cli.model import BackboneArgs
from xattn.runtime.arguments import Argument


@dataclass(frozen=True)
class App:
    """Open the viewer in the browser; it shows maps, attention and comparisons from a folder, and can
    train heads."""

    root: Annotated[Path, Argument(positional=True)] = Path("runs")
    """A pack, or a folder of packs, comparisons, heads and jobs; the folder is created when something is
    saved. If it is a URL (s3://, gs://, hf://), the viewer shows its packs and comparisons and writes
    nothing."""
    model: BackboneArgs = field(default_factory=BackboneArgs)
    host: str = "127.0.0.1"
    """Address to listen on; to allow access from other machines, give one of this machine's addresses or
    0.0.0.0. The address that is printed then contains a token, which every request needs; XATTN_APP_TOKEN
    sets the token."""
    port: int = 8501
    """Port to listen on; 0 takes any free one."""
    no_token: bool = False
    """Admit everybody who can reach --host, without a token."""
    allow_host: tuple[str, ...] = ()
    """Host names under which browsers reach a proxy in front of this server, for example
    viewer.example.org."""
    allow_frame: tuple[str, ...] = ()
    """Origins whose pages may show the viewer in a frame, for example https://wiki.example.org; this only
    works without a token, because browsers block the token's cookie in frames."""
    data: Path | None = None
    """Folder whose photos and subfolders the page Train may use; the root by default."""
    annotations: Path | None = None
    """Masks or boxes to draw over the maps of the photos, in the formats of xattn evaluate."""
    upload_mb: int = 50
    """Largest upload in megabytes."""
    vlm: str | None = None
    """A vision-language model, given as for xattn caption, for the page Answer; the page runs the model
    again when you hide a part of a photo."""
    detector: str | None = None
    """A detector, given as for xattn explain, for the page What if of a pack of detections; the page runs
    it again to explain objects that it misses. --weights, --input-size, --class-names and --device then
    apply to the detector."""
    demo: bool = False
    """First create the demo pack in the root, unless it exists already."""

    def run(self) -> None:
        from xattn.app.serving.server import Address, check_installed, serve, token_of
        from xattn.runtime.stores import StorePath, resolve_place

        check_installed()
        address = Address(self.host, self.port)
        token = token_of(address, self.no_token)
        _check_frames(self.allow_frame, token)
        root = resolve_place(self.root, "root")
        if isinstance(root, StorePath):
            _check_root(root, self.demo)
        elif root.exists() and not root.is_dir():
            raise ValueError(f"root: {self.root} is a file; name a folder")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"data: {self.data} is not a folder; give the folder of your photos")
        check_annotations(self.annotations)
        if self.vlm is not None:
            from xattn.backbone.families.transformers_models import PREFIX, resolve_source

            resolve_source(self.vlm.removeprefix(PREFIX), "vlm")
        if self.detector is not None:
            check_detector(self.detector)
        if self.upload_mb <= 0:
            raise ValueError(f"upload_mb: got {self.upload_mb}; give a positive number")
        from xattn.app.state import Settings

        opened = self.no_token or self.allow_host or self.allow_frame
        alone = address.loopback and not opened  # only users of this machine get here
        settings = Settings(
            root=root,
            model=self.model,
            training=isinstance(root, Path) and (token is not None or alone),
            demo=self.demo,
            data=self.data,
            imports=imported_sources(),
            annotations=self.annotations,
            vlm=self.vlm,
            detector=self.detector,
        )
        serve(settings, address, self.upload_mb, token, self.allow_host, self.allow_frame)


def _check_frames(origins: tuple[str, ...], token: str | None) -> None:
    for origin in origins:
        if not re.fullmatch(r"https?://[a-z0-9.-]+(:\d+)?", origin):
            raise ValueError(
                f"allow_frame: got {origin!r}; give a scheme and a host, such as "
                "https://wiki.example.org"
            )
    if origins and token is not None:
        raise ValueError(
            "allow_frame: browsers block the token's cookie in frames; also give --no-token"
        )


def _check_root(root: Any, demo: bool) -> None:
    """Refuse a store folder that does not exist or does not answer, before the server starts."""
    if demo:
        raise ValueError(f"demo: {root} is read-only; give a local folder for the demo pack")
    if not root.is_dir():
        raise ValueError(
            f"root: {root} is not a folder; give the URL of a pack, or of a folder of packs"
        )

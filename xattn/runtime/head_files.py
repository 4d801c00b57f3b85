"""Where the folder of a trained head is on disk; finding it does not need torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from xattn.runtime.names import near_names
from xattn.runtime.stores import StorePath, resolve_place

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def shipped_heads() -> dict[str, Path]:
    """Heads that ship with the package: name -> folder."""
    spec = find_spec("xattn.models")
    roots = [Path(p, "heads") for p in (spec.submodule_search_locations or ())] if spec else []
    found = [path.parent for root in roots for path in sorted(root.glob(f"*/{CONFIG_FILE}"))]
    return {folder.name: folder for folder in found}


def local_head(source: str | Path, argument: str = "head") -> Path | None:
    """The folder with the files of the head given by ``source``; None if it may be a hub repository.

    ``source`` is the name of a shipped head, the folder of a head, or a folder that contains a single head:
    in its subfolder ``head``, in another subfolder, or in the ``head`` of a subfolder.

    Raises:
        ValueError: ``source`` is a file, a URL, or a folder that contains several heads.
        FileNotFoundError: the folder contains no head; or there is no such folder, and ``source`` cannot be
            a hub repository, because it is not ``owner/name`` or there is a local folder ``owner``.
    """
    path, shipped = resolve_place(source, argument), shipped_heads()
    if isinstance(path, StorePath):
        raise ValueError(
            f"{argument}: {source} is in a store; copy the head's folder to disk first"
        )
    if path.is_dir():
        return _in_folder(path, argument)
    if str(source) in shipped:
        return shipped[str(source)]
    if path.exists():
        raise ValueError(
            f"{argument}: {source} is a file; name the folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    here = path.parent != Path() and path.parent.is_dir()
    if here or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        near = near_names(source, shipped) or list(shipped)
        raise FileNotFoundError(
            f"{argument}: no folder {source}; shipped heads are {', '.join(near) or 'none'}, "
            f"a hub repository is written owner/name"
        )
    return None


def _in_folder(folder: Path, argument: str) -> Path:
    for place in (folder, folder / "head"):
        if (place / CONFIG_FILE).is_file():
            return place
    found = sorted(
        {p.parent for form in ("*", "*/head") for p in folder.glob(f"{form}/{CONFIG_FILE}")}
    )
    if len(found) > 1:
        names = ", ".join(str(place) for place in found[:6])
        raise ValueError(
            f"{argument}: {folder} holds {len(found)} heads; name one of {names}"
            + (", ..." if len(found) > 6 else "")
        )
    if not found:
        raise FileNotFoundError(
            f"{argument}: {folder} holds no {CONFIG_FILE}; name a folder that save_head wrote"
        )
    return found[0]

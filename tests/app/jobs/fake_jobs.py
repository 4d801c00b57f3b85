"""Records of jobs that have ended, without a process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from xattn.app.jobs.job_files import Spec


def fake_job(
    root: Path,
    name: str,
    spec: Spec,
    losses: tuple[float, ...] = (),
    code: int = 0,
    started: float = 1e9,
    took: float = 75.0,
) -> Path:
    """Write a job into ``root`` and its log beside it; returns the folder of its results."""
    folder, output = root / "jobs" / name, root / name
    folder.mkdir(parents=True)
    output.mkdir()
    record = {"xattn": "job", "spec": dataclasses.asdict(spec), "created": started}
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "process.json").write_text(json.dumps({"started": started}))
    (folder / "exit.json").write_text(json.dumps({"code": code, "time": started + took}))
    bar = f" 50%|##| {len(losses)}/{2 * len(losses)} [00:01<00:09, 1step/s]" if losses else ""
    (folder / "stderr.log").write_text(bar)
    lines = [
        json.dumps({"step": i + 1, "epoch": i // 2, "loss": loss}) for i, loss in enumerate(losses)
    ]
    (output / "log.jsonl").write_text("\n".join(lines) + "\n")
    return output

"""Runs a job in its own process: ``python -m xattn.app.jobs.child FOLDER`` runs the command of the job
FOLDER.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from xattn import cli
from xattn.app.jobs.job_files import ARGUMENTS, EXIT, STOP
from xattn.runtime import strict_json
from xattn.runtime.files import write_json


def main(folder: Path) -> int:
    """Run the command of a job in this process, record how it ended, and return the exit code."""
    stops: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        signal.default_int_handler(number, frame)

    # Without a handler, a process that a background server has started would ignore Ctrl-C.
    signal.signal(signal.SIGINT, stop)
    arguments = strict_json.read(folder / ARGUMENTS, "job", "start another job")
    code = 1
    try:
        if (folder / STOP).exists():  # requested before the signal handler was set
            raise KeyboardInterrupt
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    except KeyboardInterrupt:
        code = 130
    finally:
        if stops and code == 1:  # an import that is interrupted can fail with any error
            code = 130
        write_json(folder / EXIT, {"code": code, "time": time.time()}, "job")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

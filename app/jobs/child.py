"""The process of a job: ``python -m xattn.app.jobs.child FOLDER`` runs the command of a job folder."""

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
    """Run the command in this process and record how it ended."""
    stops: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stops.append(number)
        signal.default_int_handler(number, frame)

    # A process started by a server in the background would ignore Ctrl-C.
    signal.signal(signal.SIGINT, stop)
    arguments = strict_json.read(folder / ARGUMENTS, "job", "start another job")
    code = 1
    try:
        if (folder / STOP).exists():  # requested while the process still ignored signals
            raise KeyboardInterrupt
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    except KeyboardInterrupt:
        code = 130
    finally:
        if stops and code == 1:  # an interrupted import may fail with any error
            code = 130
        write_json(folder / EXIT, {"code": code, "time": time.time()}, "job")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

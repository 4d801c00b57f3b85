"""The viewer of xattn as a Space, without training and token; ``python app.py pack`` makes its pack."""

import os
import sys
from pathlib import Path

from xattn.app.demo import pack_job
from xattn.cli import main

HERE = Path()
LINE = [
    *["app", "runs", "--weights", "package", "--host", "0.0.0.0", "--port", "7860"],
    *["--no-token", "--upload-mb", "10"],
    *["--allow-host", os.environ.get("SPACE_HOST", "localhost")],
    *["--allow-frame", "https://huggingface.co"],
]

if __name__ == "__main__":
    if sys.argv[1:] == ["pack"]:
        pack_job.prepare(HERE)
        sys.exit(main(pack_job.arguments(HERE / "runs" / pack_job.NAME, HERE)))
    sys.exit(main(LINE))

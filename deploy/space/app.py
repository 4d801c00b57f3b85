"""The viewer of xattn with its demo pack, as a Space; training and the token are off."""

import os
import sys

from xattn.cli import main

LINE = [
    *["app", "runs", "--demo", "--weights", "package", "--host", "0.0.0.0", "--port", "7860"],
    *["--no-token", "--upload-mb", "10"],
    *["--allow-host", os.environ.get("SPACE_HOST", "localhost")],
    *["--allow-frame", "https://huggingface.co"],
]

if __name__ == "__main__":
    sys.exit(main(LINE))

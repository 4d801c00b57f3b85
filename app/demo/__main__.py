"""``python -m xattn.app.demo``."""

import argparse
from pathlib import Path

from xattn.app.demo import run

parser = argparse.ArgumentParser(prog="python -m xattn.app.demo", description=run.__doc__)
parser.add_argument("--output", type=Path, default=Path("demo-output"))
parser.add_argument("--epochs", type=int, default=40)
arguments = parser.parse_args()
run.main(arguments.output, arguments.epochs)

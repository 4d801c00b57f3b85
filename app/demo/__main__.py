"""``python -m xattn.app.demo``."""

import argparse
from pathlib import Path

from xattn.runtime.process import sleep_while_waiting

sleep_while_waiting()  # before torch is imported
from xattn.app.demo import run  # noqa: E402

parser = argparse.ArgumentParser(prog="python -m xattn.app.demo", description=run.__doc__)
parser.add_argument("--output", type=Path, default=Path("demo-output"))
parser.add_argument("--epochs", type=int, default=40)
arguments = parser.parse_args()
run.main(arguments.output, arguments.epochs)

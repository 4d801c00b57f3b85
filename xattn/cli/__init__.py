"""The command line: ``xattn train | probe | explain | evaluate | compare | parts | ...``."""

from xattn.cli.entry import main

__all__ = ["main"]

"""The command line: ``xattn train | probe | explain | evaluate | compare | parts | ...``."""

from xattn.cli.commands import main

__all__ = ["main"]

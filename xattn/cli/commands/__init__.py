"""One command of ``xattn`` a file: its options, what it checks without torch, and its run."""

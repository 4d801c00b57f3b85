"""The commands of ``xattn``, one per file: options, checks without torch, and the run."""

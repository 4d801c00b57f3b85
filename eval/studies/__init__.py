"""The experiments behind ``docs/results/``: ``python -m xattn.eval.studies NAME`` in a checkout."""

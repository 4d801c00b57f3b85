"""The experiments behind ``docs/results/``; run ``python -m xattn.eval.studies NAME`` in a checkout."""

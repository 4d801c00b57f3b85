"""The experiments behind ``docs/results/``, each rerun by ``xattn study`` or ``python -m``."""

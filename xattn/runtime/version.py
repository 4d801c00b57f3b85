"""The version of this xattn, recorded in everything it writes; pyproject.toml reads it from here."""

__version__ = "0.1.0"

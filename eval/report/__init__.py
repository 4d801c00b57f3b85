"""Reports of results: tables, JSON and CSV files, the leaderboard with its page and pack."""

from xattn.eval.report.results_files import (
    from_dict,
    image_lines,
    read_json,
    to_dict,
    write_csv,
    write_json,
)
from xattn.eval.report.text_tables import format_table

__all__ = [
    "format_table",
    "from_dict",
    "image_lines",
    "read_json",
    "to_dict",
    "write_csv",
    "write_json",
]

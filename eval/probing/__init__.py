"""Attentive heads trained as classifiers on a frozen backbone, side by side in one table.

    xattn probe PHOTOS --heads gap efficient_probe abmilp

Features are cached once for each set of taps that the heads ask for. Every head is trained on the same
photos, stopped early by the same validation photos, and reported on the test photos, which nothing
else looks at. The test answers of several folds or seeds are put together.
"""

from xattn.eval.probing.probe_job import ProbeJob
from xattn.eval.probing.probe_table import ProbeRow, check_results, format_rows, write_results
from xattn.eval.probing.runner import run_probes

__all__ = [
    "ProbeJob",
    "ProbeRow",
    "check_results",
    "format_rows",
    "run_probes",
    "write_results",
]

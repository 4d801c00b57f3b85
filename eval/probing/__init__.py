"""Trains attentive heads as classifiers on a frozen backbone and compares them in one table.

    xattn probe PHOTOS --heads gap efficient_probe abmilp

Features are computed once for each set of taps that the heads ask for. Every head is trained on the same
photos, stopped early on the same validation photos, and scored on the test photos, which are used for
nothing else. The test answers of several folds or seeds are pooled.
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

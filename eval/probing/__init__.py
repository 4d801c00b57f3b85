"""Trains attentive heads as classifiers on a frozen backbone and compares them in one table.

    xattn probe PHOTOS --heads gap efficient_probe abmilp

Features are computed once for each set of taps that the heads need. All heads are trained on the same
photos, use the same validation photos for early stopping, and are scored on the same test photos, which are
not used for anything else. If there are several folds or seeds, their test predictions are pooled.
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

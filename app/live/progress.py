"""Progress in forward passes, and the check that stops a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xattn.app import models
from xattn.app.live.run import BATCH, LiveRun, Stopped

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer


class PassCounter:
    """Counts forward passes while a model works, and ends the work when its run is to stop."""

    def __init__(self, run: LiveRun, total: int) -> None:
        self.run, self.total, self.passes = run, max(total, 1), 0

    @contextmanager
    def watched(self, loaded: Backbone) -> Iterator[None]:
        """Around each use of the model: its turn, and a look at the run before every pass.

        ``head_point`` lies on the way of each pass of a timm model. Other models are asked between
        two batches only.
        """

        def look(module: Any, inputs: tuple[Any, ...]) -> None:
            self.check()
            self.passes += len(inputs[0])
            self.run.share = min(0.99, self.passes / self.total)

        self.check()
        with models.turn():
            hook = loaded.head_point.register_forward_pre_hook(look)
            try:
                yield
            finally:
                hook.remove()

    def check(self) -> None:
        if self.run.stopping.is_set():
            raise Stopped


def note_memory(run: LiveRun, method: Explainer) -> None:
    """Note once that memory ran out and fewer images go through a pass."""
    if method.max_forward_batch < BATCH:
        note = (
            f"Memory ran out: {method.name} went on with {method.max_forward_batch} images a pass."
        )
        if note not in run.notes:
            run.notes.append(note)

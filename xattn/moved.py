"""Old import paths that still work.

A module that was moved or split is imported by its old name through this table: each old name finds the
names of its new modules, in their order. Pickles and scripts of earlier versions need it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "xattn.adapters": ("xattn.backbone.adapters",),
    "xattn.allocator": ("xattn.runtime.allocator",),
    "xattn.app.address": ("xattn.app.navigation.address",),
    "xattn.app.attention_charts": ("xattn.app.attention.charts",),
    "xattn.app.attention_pictures": ("xattn.app.attention.pictures",),
    "xattn.app.attention_rows": ("xattn.app.attention.map_rows",),
    "xattn.app.attention_view": ("xattn.app.attention.view",),
    "xattn.app.bound": ("xattn.app.navigation.url_widgets",),
    "xattn.app.comparison": ("xattn.app.pages.compare.leaderboard_file",),
    "xattn.app.demo_job": ("xattn.app.demo.pack_job",),
    "xattn.app.demo_pack": ("xattn.app.demo.pack_offer",),
    "xattn.app.export": ("xattn.app.pictures.export",),
    "xattn.app.film": ("xattn.app.pictures.film",),
    "xattn.app.folders": ("xattn.app.jobs.photo_folders",),
    "xattn.app.head_card": ("xattn.app.pages.image.head_card",),
    "xattn.app.image_tabs": ("xattn.app.pages.image.photo_tabs",),
    "xattn.app.image_view": ("xattn.app.pages.image.shown",),
    "xattn.app.index": ("xattn.app.serving.start_page",),
    "xattn.app.inside": ("xattn.packs.contained_files",),
    "xattn.app.last_view": ("xattn.app.navigation.last_view",),
    "xattn.app.login": ("xattn.app.serving.login",),
    "xattn.app.made_up": ("xattn.app.synthetic_packs",),
    "xattn.app.pack": ("xattn.packs.reader", "xattn.packs.contained_files"),
    "xattn.app.pack_index": ("xattn.packs.manifest",),
    "xattn.app.password": ("xattn.app.serving.password",),
    "xattn.app.reading": ("xattn.app.attention.attention_pass",),
    "xattn.app.routes": ("xattn.app.serving.routes",),
    "xattn.app.scratch": ("xattn.app.live.scratch",),
    "xattn.app.security": ("xattn.app.serving.guard",),
    "xattn.app.selection": ("xattn.app.navigation.selection",),
    "xattn.app.server": ("xattn.app.serving.server",),
    "xattn.app.theme": ("xattn.app.components.theme",),
    "xattn.app.upload_room": ("xattn.app.serving.upload_limits",),
    "xattn.app.uploads": ("xattn.app.live.uploads",),
    "xattn.app.visible": ("xattn.runtime.display_text",),
    "xattn.contact_sheet": ("xattn.pictures.contact_sheet",),
    "xattn.distributed": ("xattn.runtime.distributed",),
    "xattn.eval.attention": ("xattn.eval.bench.attention",),
    "xattn.eval.coco": ("xattn.eval.annotations.coco",),
    "xattn.eval.compare": (
        "xattn.eval.leaderboard",
        "xattn.eval.report.standings",
        "xattn.eval.report.leaderboard_files",
    ),
    "xattn.eval.differences": ("xattn.eval.report.differences",),
    "xattn.eval.engine": ("xattn.eval.evaluation.engine", "xattn.eval.evaluation.facts"),
    "xattn.eval.fidelity": ("xattn.eval.bench.fidelity",),
    "xattn.eval.folds": ("xattn.eval.studies.class_folds",),
    "xattn.eval.groups": ("xattn.eval.studies.coarse_groups",),
    "xattn.eval.heads_bench": ("xattn.eval.bench.heads", "xattn.eval.bench.operation_counts"),
    "xattn.eval.html": ("xattn.eval.report.html_page",),
    "xattn.eval.html_data": ("xattn.eval.report.html_data",),
    "xattn.eval.html_tables": ("xattn.eval.report.html_tables",),
    "xattn.eval.maps": ("xattn.eval.bench.maps", "xattn.eval.bench.tensor_memory"),
    "xattn.eval.packing": ("xattn.eval.report.comparison_pack",),
    "xattn.eval.plan": ("xattn.eval.evaluation.plan",),
    "xattn.eval.presets": ("xattn.eval.metric_presets",),
    "xattn.eval.road": ("xattn.eval.fills.imputation",),
    "xattn.eval.scorer": ("xattn.eval.evaluation.scorer",),
    "xattn.eval.speed": (
        "xattn.eval.bench.speed",
        "xattn.eval.bench.timing",
        "xattn.eval.bench.operation_counts",
        "xattn.eval.bench.random_photos",
    ),
    "xattn.eval.store": (
        "xattn.eval.evaluation.store",
        "xattn.eval.evaluation.database",
        "xattn.eval.evaluation.kept_maps",
    ),
    "xattn.eval.stream": ("xattn.eval.evaluation.stream",),
    "xattn.eval.studies.config": ("xattn.eval.studies.study_configs",),
    "xattn.explainers.perturbation": ("xattn.explainers.masked_passes",),
    "xattn.explanation": (
        "xattn.packs.explanation",
        "xattn.packs.format",
        "xattn.packs.reader",
        "xattn.packs.writer",
    ),
    "xattn.files": ("xattn.runtime.files",),
    "xattn.heads.affine": ("xattn.heads.pullback",),
    "xattn.heads.options": ("xattn.runtime.option_checks",),
    "xattn.images": ("xattn.photos.images", "xattn.photos.view"),
    "xattn.interrupts": ("xattn.runtime.interrupts",),
    "xattn.kernels.block_sparse.index": ("xattn.kernels.block_sparse.block_lists",),
    "xattn.locking": ("xattn.runtime.locking",),
    "xattn.memory": ("xattn.runtime.memory",),
    "xattn.models.sources": ("xattn.models.weights",),
    "xattn.pack_writer": ("xattn.packs.writer",),
    "xattn.parts.writer": ("xattn.parts.cutting",),
    "xattn.presets": ("xattn.training.ttame_presets",),
    "xattn.probed": ("xattn.heads.probed",),
    "xattn.sources": (
        "xattn.photos.sources",
        "xattn.photos.base",
        "xattn.photos.image_files",
        "xattn.photos.huggingface",
        "xattn.photos.shards",
    ),
    "xattn.strict_json": ("xattn.runtime.strict_json",),
    "xattn.strict_yaml": ("xattn.runtime.strict_yaml",),
    "xattn.tensor_file": ("xattn.runtime.tensor_file",),
    "xattn.training.labels": ("xattn.photos.labels", "xattn.training.splits"),
    "xattn.training.loop": ("xattn.training.fitting",),
    "xattn.training.perturbation": ("xattn.training.attention_training",),
    "xattn.video": ("xattn.explaining.clips", "xattn.explaining.film", "xattn.photos.clip"),
    "xattn.visualize": (
        "xattn.pictures.overlay",
        "xattn.pictures.scales",
        "xattn.pictures.lettering",
        "xattn.packs.explanation",
    ),
}


class _Moved(ModuleType):
    """A module by its old name."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for place in MOVED[self.__name__]:
                module = importlib.import_module(place)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds the old names; behind all other finders, so that nothing else pays for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name, f"Moved to {', '.join(MOVED[spec.name])}.")

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names are looked up when they are asked for."""

    def get_code(self, fullname: str) -> CodeType:
        """What ``python -m`` runs: the module in its new place."""
        new = MOVED[fullname][0]
        source = f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)"
        return compile(source, fullname, "exec")


def install() -> None:
    """Let the old names be imported; once is enough."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

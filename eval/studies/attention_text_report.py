"""The report of the text study: tables with intervals, differences from vanilla, every seed, and plots.

A mean over seeds has a Student's t interval over the seeds. A difference between two methods is paired by
seed with a t interval, which describes repeated training. In ``report.json`` the seeds' means are also
paired by sentence with a bootstrap interval, which describes these models on other sentences.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

from xattn.cli.model import device_name
from xattn.eval.bootstrap import Interval, paired_difference, t_interval
from xattn.eval.studies import attention_text, sst
from xattn.eval.studies.attention_text import (
    CLEAN,
    Run,
    Setting,
    TextStudyConfig,
    average_precision,
    choose,
    grid,
    top_precision,
)
from xattn.eval.studies.options import OutputAt
from xattn.runtime.files import atomic_file, write_json

DEFAULTS = TextStudyConfig()

COLUMNS = {
    "f1": "F1",
    "accuracy": "accuracy",
    "auc": "AUC",
    "correlation": "correlation",
    "product": "product",
    "auprc": "AUPRC",
    "precision": "precision",
    "entropy": "entropy",
}
COMPARED = ("f1", "auc", "correlation", "product", "auprc")
EVERY_SEED = ("f1", "correlation", "product", "entropy")
PERCENT = ("f1", "accuracy", "auc")
SENTENCES = {"correlation": "correlation", "product": "product", "auprc": "auprc"}
NAMES = {
    "none": "vanilla",
    "random": "random",
    "at": "AT",
    "iat": "iAT",
    "iat_released": "released iAT",
    "vat": "VAT",
    "ivat": "iVAT",
}

Rows = dict[Run, dict[str, Any]]


class Difference(NamedTuple):
    """A difference: ``seeds`` is the t interval over seeds, ``sentences`` the bootstrap interval, which is
    None for F1 and AUC."""

    attention: str
    left: str
    right: str
    amount: str
    seeds: Interval
    sentences: Interval | None


def amount(row: dict[str, Any], part: str, name: str) -> float:
    """One figure of one run; means cover the sentences for which the figure is defined."""
    value = row[part][name]
    return float(np.nanmean(_array(value))) if isinstance(value, list) else float(value)


def table(
    rows: Rows, config: TextStudyConfig
) -> dict[tuple[str, str], tuple[Setting, dict[str, Interval]]]:
    """(attention, method) -> the chosen setting and the figures on ``dev.txt`` over its seeds."""
    found = {}
    for attention in config.attention:
        for method in config.methods:
            runs = _runs(rows, config, attention, method)
            found[attention, method] = (
                choose(rows, attention, method, config),
                {
                    name: t_interval([amount(rows[r], "dev", name) for r in runs])
                    for name in COLUMNS
                },
            )
    return found


def differences(rows: Rows, config: TextStudyConfig) -> list[Difference]:
    """Differences: each method - vanilla, both iAT - AT, iVAT - VAT, AT and released iAT - random."""
    pairs = [(m, "none") for m in config.methods if m != "none"]
    pairs += [("iat", "at"), ("iat_released", "at"), ("ivat", "vat")]
    pairs += [("at", "random"), ("iat_released", "random")]
    found = []
    for attention in config.attention:
        for left, right in pairs:
            if left in config.methods and right in config.methods:
                for name in COMPARED:
                    found.append(_difference(rows, config, attention, left, right, name))
    return found


def _difference(
    rows: Rows, config: TextStudyConfig, attention: str, left: str, right: str, name: str
) -> Difference:
    ours = {run.seed: rows[run] for run in _runs(rows, config, attention, left)}
    theirs = {run.seed: rows[run] for run in _runs(rows, config, attention, right)}
    seeds = sorted(set(ours) & set(theirs))
    by_seed = [amount(ours[s], "dev", name) - amount(theirs[s], "dev", name) for s in seeds]
    by_sentence = None
    if name in SENTENCES:
        a, b = (
            np.mean([_array(part[s]["dev"][SENTENCES[name]]) for s in seeds], axis=0)
            for part in (ours, theirs)
        )
        by_sentence = paired_difference(a, b)
    return Difference(attention, left, right, name, t_interval(by_seed), by_sentence)


def sensitivity(
    rows: Rows, config: TextStudyConfig
) -> dict[tuple[str, str], dict[Setting, dict[str, float]]]:
    """(attention, method) -> setting -> figures on the held-out sentences, over the grid's seeds."""
    found: dict[tuple[str, str], dict[Setting, dict[str, float]]] = {}
    for attention in config.attention:
        for method in config.methods:
            found[attention, method] = {
                setting: {
                    name: float(
                        np.mean(
                            [
                                amount(rows[Run(attention, method, *setting, seed)], "held", name)
                                for seed in range(config.grid_seeds)
                            ]
                        )
                    )
                    for name in COLUMNS
                }
                for setting in grid(method, config)
            }
    return found


def chance(sentences: Sequence[sst.Sentence], draws: int = 20) -> dict[str, float]:
    """The agreement of random scores with the rationales."""
    rng = np.random.default_rng(0)
    values = [
        (average_precision(scores, s.rationale), top_precision(scores, s.rationale))
        for s in sentences
        for scores in rng.random((draws, len(s.words)))
    ]
    mean = np.nanmean(np.array(values), axis=0)
    return {"auprc": float(mean[0]), "precision": float(mean[1])}


def markdown(
    rows: Rows, config: TextStudyConfig, random_scores: dict[str, float] | None = None
) -> Iterator[str]:
    """Lines of the report."""
    figures = table(rows, config)
    for attention in config.attention:
        yield f"**{attention} attention, dev.txt**\n"
        yield "| method | epsilon | weight | " + " | ".join(COLUMNS.values()) + " | seeds |"
        yield "| :-- | --: | --: |" + " --: |" * (len(COLUMNS) + 1)
        for method in config.methods:
            setting, cells = figures[attention, method]
            row = [NAMES[method], *(f"{value:g}" if value else "" for value in setting)]
            row += [_cell(cells[name], 100 if name in PERCENT else 1) for name in COLUMNS]
            yield f"| {' | '.join([*row, str(cells['f1'].n)])} |"
        yield ""
    if random_scores:
        yield (
            f"Random scores in the place of attention: AUPRC {random_scores['auprc']:.3f}, precision "
            f"{random_scores['precision']:.3f}.\n"
        )
    yield "**differences paired by seed, dev.txt**\n"
    yield "| attention | difference | " + " | ".join(COLUMNS[n] for n in COMPARED) + " |"
    yield "| :-- | :-- |" + " --: |" * len(COMPARED)
    found = differences(rows, config)
    for first in range(0, len(found), len(COMPARED)):
        line = found[first : first + len(COMPARED)]
        row = [line[0].attention, f"{NAMES[line[0].left]} - {NAMES[line[0].right]}"]
        row += [_cell(d.seeds, 100 if d.amount in PERCENT else 1, sign="+") for d in line]
        yield f"| {' | '.join(row)} |"
    yield ""
    seeds = range(config.seeds)
    yield f"**every seed, dev.txt: {' / '.join(COLUMNS[name] for name in EVERY_SEED)}**\n"
    yield "| attention | method | " + " | ".join(map(str, seeds)) + " |"
    yield "| :-- | :-- |" + " --: |" * len(seeds)
    for attention in config.attention:
        for method in config.methods:
            cells_by_seed = {run.seed: "" for run in _runs(rows, config, attention, method)}
            for run in _runs(rows, config, attention, method):
                figures_of_run = {name: amount(rows[run], "dev", name) for name in EVERY_SEED}
                cells_by_seed[run.seed] = " / ".join(
                    f"{100 * v:.1f}" if name in PERCENT else f"{v:.2f}"
                    for name, v in figures_of_run.items()
                )
            row = [attention, NAMES[method], *(cells_by_seed.get(seed, "") for seed in seeds)]
            yield f"| {' | '.join(row)} |"
    yield ""
    yield "**over epsilon, held-out tenth: AUC / correlation / product**\n"
    epsilons = sorted(config.epsilons)
    yield "| attention | method | weight | " + " | ".join(f"{e:g}" for e in epsilons) + " |"
    yield "| :-- | :-- | --: |" + " --: |" * len(epsilons)
    for (attention, method), points in sensitivity(rows, config).items():
        for weight in sorted({setting.weight for setting in points}):
            text = [
                f"{100 * p['auc']:.1f} / {p['correlation']:.2f} / {p['product']:.2f}"
                for setting, p in points.items()
                if setting.weight == weight
            ]
            text += [""] * (len(epsilons) - len(text))
            row = [attention, NAMES[method], f"{weight:g}" if weight else "", *text]
            yield f"| {' | '.join(row)} |"


def plot(rows: Rows, config: TextStudyConfig, path: Path) -> None:
    """Plot AUC, correlation and product on the held-out sentences over epsilon, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = sensitivity(rows, config)
    columns = [(a, w) for a in config.attention for w in sorted(config.weights)]
    shown = ("auc", "correlation", "product")
    figure, axes = plt.subplots(
        len(shown), len(columns), figsize=(4.2 * len(columns), 3 * len(shown)), sharex=True,
        sharey="row", layout="constrained", squeeze=False,
    )  # fmt: skip
    for column, (attention, weight) in enumerate(columns):
        for line, name in enumerate(shown):
            axis = axes[line, column]
            for place, method in enumerate(config.methods):
                values = points[attention, method]
                if method == "none":
                    clean = values[CLEAN][name]
                    axis.axhline(clean, color="black", linewidth=1, label="vanilla")
                    continue
                epsilons = sorted(config.epsilons)
                heights = [values[Setting(e, weight)][name] for e in epsilons]
                axis.plot(epsilons, heights, f"oC{place}-", markersize=4, label=NAMES[method])
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            axis.set_ylabel(COLUMNS[name] if column == 0 else "")
        axes[0, column].set_title(f"{attention} attention, weight {weight:g}")
        axes[-1, column].set_xlabel("epsilon")
    axes[0, -1].legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def plot_seeds(rows: Rows, config: TextStudyConfig, path: Path) -> None:
    """Plot a dot for every seed on ``dev.txt`` with the mean as a line, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(config.attention), len(EVERY_SEED), layout="constrained", squeeze=False,
        figsize=(3.4 * len(EVERY_SEED), 3.2 * len(config.attention)),
    )  # fmt: skip
    for line, attention in enumerate(config.attention):
        for axis, name in zip(axes[line], EVERY_SEED, strict=True):
            for place, method in enumerate(config.methods):
                runs = _runs(rows, config, attention, method)
                values = [amount(rows[run], "dev", name) for run in runs]
                around = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0.0]
                axis.scatter(place + np.array(around), values, s=16, color=f"C{place}")
                axis.hlines(np.mean(values), place - 0.35, place + 0.35, color=f"C{place}")
            axis.set_xticks(range(len(config.methods)), [NAMES[m] for m in config.methods])
            axis.tick_params(axis="x", labelrotation=30)
            axis.set_title(COLUMNS[name])
            axis.grid(alpha=0.3, axis="y")
        axes[line, 0].set_ylabel(f"{attention} attention")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def write(rows: Rows, config: TextStudyConfig, folder: Path, data: Path) -> list[Path]:
    """Write ``report.md``, ``report.json``, ``epsilon.png`` and ``seeds.png`` to ``folder``."""
    random_scores = chance(sst.read(data / "dev.txt"))
    with atomic_file(folder / "report.md") as temporary:
        lines = markdown(rows, config, random_scores)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    value = {
        "dev": [
            {
                "attention": a, "method": m, **setting._asdict(),
                **{k: v._asdict() for k, v in cells.items()},
            }
            for (a, m), (setting, cells) in table(rows, config).items()
        ],
        "differences": [
            {**d._asdict(), "seeds": d.seeds._asdict(), "sentences": d.sentences and d.sentences._asdict()}
            for d in differences(rows, config)
        ],
        "held_out": [
            {"attention": a, "method": m, **setting._asdict(), **cells}
            for (a, m), points in sensitivity(rows, config).items()
            for setting, cells in points.items()
        ],
        "random_scores": random_scores,
    }  # fmt: skip
    write_json(folder / "report.json", value)
    plot(rows, config, folder / "epsilon.png")
    plot_seeds(rows, config, folder / "seeds.png")
    return [folder / name for name in ("report.md", "report.json", "epsilon.png", "seeds.png")]


def _runs(rows: Rows, config: TextStudyConfig, attention: str, method: str) -> list[Run]:
    setting = choose(rows, attention, method, config)
    runs = (Run(attention, method, *setting, seed) for seed in range(config.seeds))
    return [run for run in runs if run in rows]


def _array(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _cell(value: Interval, scale: float, sign: str = "") -> str:
    digits = 2 if scale == 100 else 3
    mean, lo, hi = (f"{scale * x:{sign}.{digits}f}" for x in value[:3])
    return f"{mean} [{lo}, {hi}]"


def study(
    data: tyro.conf.Positional[Path],
    output: OutputAt = "runs/study-at",
    config: TextStudyConfig = DEFAULTS,
    device: str = "cpu",
) -> Iterator[str]:
    """Carry out all runs that are not yet in ``output``, and yield the lines of the report.

    Args:
        data: a folder with train.txt and dev.txt of the Stanford Sentiment Treebank.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
    """
    folder = Path(output)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    done = attention_text.study(config, data, folder, device_name(device), say)
    files = write(done.rows, config, folder, data)
    yield (folder / "report.md").read_text(encoding="utf-8")
    yield f"report: {', '.join(map(str, files))}"

"""The report of the length study: a table and a panel for each task and form, and all scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn.eval.studies.length.network import FIXED, GROWING, LengthStudyConfig
from xattn.runtime.files import atomic_file

TITLES = {
    ("recall", FIXED): "Recall, the same number of pairs at every length: correct answers, %",
    ("recall", GROWING): "Recall, pairs in proportion to the length: correct answers, %",
    ("regression", FIXED): "Regression in context: squared error, % of the variance",
}
PANELS = {
    ("recall", FIXED): "recall, as many pairs",
    ("recall", GROWING): "recall, pairs grow",
    ("regression", FIXED): "regression in context",
}
COLOURS = ("black", "C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


@dataclass
class Trained:
    """A trained network and its scores by length and form."""

    lr: float
    steps: int
    seconds: float
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class Results:
    """What the study has found so far, by task, and by mechanism, length and form."""

    config: LengthStudyConfig
    trained: dict[tuple[str, str], list[Trained]] = field(default_factory=dict)
    baselines: dict[str, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)

    def of(self, task: str, mechanism: str, form: str, length: int) -> list[float]:
        """The scores of the seeds in percent; empty if the mechanism was not tested there."""
        networks = self.trained[task, mechanism]
        return [100 * one.scores[length][form] for one in networks if length in one.scores]

    def tables(self) -> list[tuple[str, str]]:
        """The task and form of each table."""
        return [key for key in TITLES if key[0] in self.config.tasks]


def unit_line(results: Results, task: str, mechanism: str) -> str:
    """A line on the networks of one mechanism and task, for when they are finished."""
    networks, config = results.trained[task, mechanism], results.config
    found = [f"{100 * one.scores[n][FIXED]:.1f}" for one in networks for n in _ends(one)]
    seconds = max(one.seconds for one in networks)
    return (
        f"{task}, {mechanism}: lr {networks[0].lr:g}, trained for {seconds:.0f} s at most; first and "
        f"last of {len(config.lengths)} lengths, seed by seed: {', '.join(found)}"
    )


def _ends(one: Trained) -> list[int]:
    return sorted({min(one.scores), max(one.scores)}) if one.scores else []


def lines(results: Results) -> list[str]:
    """The report in Markdown."""
    config = results.config
    found = [
        f"One layer of attention, {config.width} channels, {config.heads} head(s), trained on "
        f"{config.train_length} tokens for {config.steps} steps of {config.batch_size} sequences; means of "
        f"{config.seeds} seed(s), [least, greatest]"
    ]
    for task, form in results.tables():
        found += ["", TITLES[task, form], "", *_table(results, task, form)]
    found += ["", "Training", "", *_training(results)]
    return found


def _table(results: Results, task: str, form: str) -> Iterator[str]:
    config = results.config
    yield f"| tokens | {' | '.join(map(str, config.lengths))} |"
    yield "| :-- |" + " --: |" * len(config.lengths)
    for mechanism in config.mechanisms:
        cells = [_cell(results.of(task, mechanism, form, length)) for length in config.lengths]
        yield f"| `{mechanism}` | {' | '.join(cells)} |"
    baselines = results.baselines[task]
    for name in baselines[config.lengths[0]][form]:
        cells = [_percent(100 * baselines[length][form][name]) for length in config.lengths]
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return _percent(mean)
    return f"{_percent(mean)} [{_percent(min(values))}, {_percent(max(values))}]"


def _percent(value: float) -> str:
    """``value`` with three significant digits and at most two decimals."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _training(results: Results) -> Iterator[str]:
    config = results.config
    yield "| task | attention | learning rate | steps | seconds of processor time |"
    yield "| :-- | :-- | --: | --: | --: |"
    for (task, mechanism), networks in results.trained.items():
        steps = min(one.steps for one in networks)
        stopped = "" if steps == config.steps else f" of {config.steps}, out of time"
        seconds = max(one.seconds for one in networks)
        yield f"| {task} | `{mechanism}` | {networks[0].lr:g} | {steps}{stopped} | {seconds:.0f} |"


def figures(results: Results) -> list[dict[str, Any]]:
    """Every score, a row each; baselines have no seed."""
    rows: list[tuple[Any, ...]] = []
    for task, form in results.tables():
        for mechanism in results.config.mechanisms:
            for length in results.config.lengths:
                for seed, score in enumerate(results.of(task, mechanism, form, length)):
                    rows.append((task, form, mechanism, length, seed, score / 100))
        for length, by_form in results.baselines[task].items():
            rows += [(task, form, name, length, None, x) for name, x in by_form[form].items()]
    keys = ("task", "form", "attention", "tokens", "seed", "score")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def plot(results: Results, path: Path) -> None:
    """Plot a panel for each table: means by length, and the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, tables = results.config, results.tables()
    size = (4.2 * len(tables), 4)
    figure, panels = plt.subplots(1, len(tables), figsize=size, layout="constrained", squeeze=False)
    for axes, (task, form) in zip(panels[0], tables, strict=True):
        for i, mechanism in enumerate(config.mechanisms):
            by_length = {n: results.of(task, mechanism, form, n) for n in sorted(config.lengths)}
            by_length = {n: values for n, values in by_length.items() if values}
            means = [sum(values) / len(values) for values in by_length.values()]
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(list(by_length), means, marker="o", ms=3, color=colour, label=mechanism)
            low, high = ([end(values) for values in by_length.values()] for end in (min, max))
            axes.fill_between(list(by_length), low, high, color=colour, alpha=0.15, linewidth=0)
        baselines = results.baselines[task]
        lengths = sorted(baselines)
        for name, style in zip(baselines[lengths[0]][form], ("--", ":"), strict=False):
            found = [100 * baselines[n][form][name] for n in lengths]
            axes.plot(lengths, found, color="0.5", linestyle=style, label=name)
        axes.axvline(config.train_length, color="0.85", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.set(title=PANELS[task, form], xlabel="tokens")
        if task == "regression":
            axes.set(yscale="log", ylabel="squared error, % of the variance")
        else:
            axes.set(ylabel="correct answers, %")
    handles = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)

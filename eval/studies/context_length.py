"""Tests how attention generalises to longer contexts: one layer, trained on short sequences.

    python -m xattn.eval.studies length

Each mechanism is the only attention layer of a small network (:mod:`~xattn.eval.studies.length.network`)
that is trained on sequences of one length for each task and tested at other lengths. All are trained for
the same number of steps. The learning rate is chosen for each mechanism and task, with a network of another
seed and sequences that no table shows.

Finished results stay in the output folder: scores for choosing a learning rate, trained networks, and their
scores at each length. The same command resumes from there; a training run that was stopped starts
again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xattn.attention.model.spec import parse_mechanism
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.length import length_report
from xattn.eval.studies.length.length_report import Results, Trained
from xattn.eval.studies.length.network import (
    LengthNetwork,
    LengthStudyConfig,
    Recall,
    Regression,
    Task,
    held_out,
    made,
    scores,
    train,
    training_seeds,
)
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import AGAIN, kept_record, kept_values, reported
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, check_folder, write_json

SEARCH_SEED = 1000  # of the networks for choosing learning rates
FREE = ("mechanisms", "tasks", "lengths", "longest", "seeds")  # more of them may be asked for later
DEFAULTS = LengthStudyConfig()


class Unit(NamedTuple):
    """A mechanism on a task, and the folder of its results."""

    mechanism: str
    task: Task
    folder: Path

    def __str__(self) -> str:
        return f"{self.mechanism}, {self.task.name}"


def study(
    output: OutputAt = "runs/study-length",
    config: LengthStudyConfig = DEFAULTS,
    quick: Quick = False,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write the report, and yield its lines.

    Args:
        output: the folder for learning rates, trained networks, scores and the report.
    """
    config = config.quick() if quick else config
    output = Path(output)
    tasks = [_task(name, config) for name in config.tasks]
    for task in tasks:  # before anything is trained
        for mechanism in config.mechanisms:
            with torch.no_grad():
                made(mechanism, task, 0, config)(task.draw(config.train_length, 1, 0))
        for length in (config.train_length, *config.lengths):
            for form in task.forms():
                task.draw(length, 1, 0, form)
    check_folder(output)
    record = {k: v for k, v in asdict(config).items() if k not in FREE}
    kept_record(output / "record.json", {"config": record})
    results = Results(config)
    for task in tasks:
        for mechanism in config.mechanisms:
            unit = Unit(mechanism, task, output / task.name / _file_name(mechanism))
            results.trained[task.name, mechanism] = _measured(unit, config, progress)
            yield length_report.unit_line(results, task.name, mechanism)
        results.baselines[task.name] = _baselines(task, output / task.name, config)
    lines = length_report.lines(results)
    length_report.plot(results, output / "length.png")
    yield ""
    tables = {"figures": length_report.figures(results)}
    yield from reported(output, lines, tables, output / "length.png")


def _task(name: str, config: LengthStudyConfig) -> Task:
    if name == Recall.name:
        return Recall(config.pairs, config.train_length)
    return Regression()


def _file_name(mechanism: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", mechanism.lower()).strip("-")


def _measured(unit: Unit, config: LengthStudyConfig, progress: bool) -> list[Trained]:
    """The trained networks of all seeds, with their scores."""
    split = Split(f"length, {unit}")
    lr = _learning_rate(unit, config, split, progress)
    found = []
    for seed in range(config.seeds):
        folder = unit.folder / f"seed-{seed}"
        network = made(unit.mechanism, unit.task, seed, config)
        training = _trained(network, unit, lr, seed, folder, config, split, progress)
        one = Trained(lr, training["steps"], training["seconds"])
        limit = config.longest.get(parse_mechanism(unit.mechanism)[0])
        for length in config.lengths:
            if limit is not None and length > limit:
                continue
            one.scores[length] = _tested(network, unit.task, length, folder, config, split)
        found.append(one)
    split.write(unit.folder / "split.json")
    return found


def _learning_rate(unit: Unit, config: LengthStudyConfig, split: Split, progress: bool) -> float:
    """The learning rate with the best validation score."""
    if len(config.learning_rates) == 1:
        return config.learning_rates[0]
    file = unit.folder / "learning-rates.json"
    kept: dict[str, float] = {}
    if file.is_file():
        kept = strict_json.read(file, "output", AGAIN)
    batch = held_out(unit.task, "validation", config.train_length, config, split)
    seeds = split.fit(training_seeds(SEARCH_SEED, config))
    for lr in config.learning_rates:
        if str(lr) not in kept:
            network = made(unit.mechanism, unit.task, SEARCH_SEED, config)
            train(network, unit.task, lr, seeds, config, f"{unit}, lr {lr}", progress)
            kept[str(lr)] = float(scores(network, unit.task, batch).mean())
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, kept)
    sign = 1 if unit.task.higher_is_better else -1
    return max(config.learning_rates, key=lambda lr: sign * kept[str(lr)])


def _trained(
    network: LengthNetwork,
    unit: Unit,
    lr: float,
    seed: int,
    folder: Path,
    config: LengthStudyConfig,
    split: Split,
    progress: bool,
) -> dict[str, Any]:
    """Load the network's weights or train them; return facts about the training."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    weights, file = folder / "model.safetensors", folder / "training.json"
    seeds = split.fit(training_seeds(seed, config))
    if not file.is_file():  # it is written last
        training = train(network, unit.task, lr, seeds, config, f"{unit}, seed {seed}", progress)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: x.detach().contiguous() for name, x in network.state_dict().items()}
        with atomic_file(weights) as temporary:
            temporary.write_bytes(save(state))
        write_json(file, training._asdict())
    try:
        network.load_state_dict(load(weights.read_bytes()))
    except (SafetensorError, RuntimeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"output: {weights} is damaged ({reason}); delete {folder}, to train again"
        ) from None
    return strict_json.read(file, "output", f"delete {folder}, to train again")  # type: ignore[no-any-return]


def _tested(
    network: LengthNetwork,
    task: Task,
    length: int,
    folder: Path,
    config: LengthStudyConfig,
    split: Split,
) -> dict[str, float]:
    """The mean scores at one length, by form of the task."""

    def measure() -> dict[str, float]:
        found: dict[str, float] = {}
        for form in task.forms():
            if form != task.forms()[0] and length == config.train_length:
                found[form] = found[task.forms()[0]]  # the same sequences
            else:
                batch = held_out(task, "test", length, config, split, form)
                found[form] = float(scores(network, task, batch).mean())
        return found

    return kept_values(folder / f"{length}.json", measure)  # type: ignore[no-any-return]


def _baselines(
    task: Task, folder: Path, config: LengthStudyConfig
) -> dict[int, dict[str, dict[str, float]]]:
    """The baselines' scores by length and form."""
    folder.mkdir(parents=True, exist_ok=True)
    split = Split(f"length, {task.name}")

    def measure(length: int) -> dict[str, dict[str, float]]:
        return {
            form: task.baselines(held_out(task, "test", length, config, split, form))
            for form in task.forms()
        }

    return {
        length: kept_values(folder / f"baselines-{length}.json", partial(measure, length))
        for length in config.lengths
    }

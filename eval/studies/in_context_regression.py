"""In-context linear regression: the circuit that softmax heads learn, beside the one that theory names.

    python -m xattn.eval.studies icl

Two networks learn from the same prompts, one of several heads and one of a single head, see
:mod:`~xattn.eval.studies.in_context`. Their errors stand beside those of gradient descent and of the best
prediction, and the weights beside what they are to converge to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.eval.evaluation.split import Split
from xattn.eval.studies.in_context import (
    Circuit,
    InContext,
    InContextConfig,
    bayes,
    best_eta,
    circuit,
    draw,
    gradient_descent,
    risk,
    train,
    training_seeds,
)
from xattn.eval.studies.kept import kept_record, reported
from xattn.eval.studies.options import OutputAt, Quick
from xattn.runtime.files import atomic_file, check_folder, write_json
from xattn.training.checkpoint import load_checkpoint, save_checkpoint

CHECKPOINT_EVERY = 2_000
AT_ONCE = 4_096  # prompts of a test
DEFAULTS = InContextConfig()
LIMITS = {"other_kq": 0.05, "other_ov": 0.02, "imbalance": 0.01, "eta": 0.05}
NAMES = {
    "other_kq": "largest other entry of KQ over w",
    "other_ov": "largest other entry of OV over mu",
    "imbalance": "abs(sum mu) over sum abs(mu)",
    "eta": "relative error of eta",
}


def study(
    output: OutputAt = "runs/study-icl",
    config: InContextConfig = DEFAULTS,
    quick: Quick = False,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Train what is not finished yet, write the report, and give its lines.

    Args:
        output: folder of checkpoints, of report.md, circuit.json and circuit.png.

    Raises:
        ValueError: ``output`` holds results of other settings.
    """
    config = config.quick() if quick else config
    output = Path(output)
    check_folder(output)
    settings = {k: v for k, v in asdict(config).items() if k not in ("tests", "longer", "slack")}
    kept_record(output / "record.json", {"config": settings})
    split = Split("icl")
    split.fit(training_seeds(config))
    model = _trained(output, config, progress)
    many = config.heads
    found = circuit(model.kq[:many], model.ov[:many])
    tested = [
        row
        for examples in dict.fromkeys((config.examples, config.longer))
        for row in errors(model, config, examples, split)
    ]
    lines = [
        f"{many} heads, d = {config.width}, L = {config.examples}, variance of the noise {config.noise:g}, "
        f"{config.steps:,} steps of {config.batch_size} prompts, seed {config.seed}",
        *_circuit_table(found, config),
        *_error_table(tested, config),
    ]
    split.write(output / "split.json")
    weights = {"kq": model.kq.tolist(), "ov": model.ov.tolist(), "heads": model.heads}
    write_json(output / "circuit.json", weights)
    _plot(model.kq[:many].detach(), model.ov[:many].detach(), output / "circuit.png")
    tables = {"errors": tested, "weights": _weight_rows(model)}
    files = (output / "circuit.json", output / "circuit.png")
    yield from reported(output, lines, tables, *files)


def _weight_rows(model: InContext) -> list[dict[str, Any]]:
    """Every entry of KQ and OV, a line for each row of a head; those of the single head come last."""
    return [
        {"head": head, "matrix": matrix, "row": row, **{str(i): x for i, x in enumerate(values)}}
        for matrix, of_heads in (("KQ", model.kq), ("OV", model.ov[:, None]))
        for head, rows in enumerate(of_heads.tolist())
        for row, values in enumerate(rows)
    ]


def _trained(output: Path, config: InContextConfig, progress: bool) -> InContext:
    """Both networks, trained; a stopped training goes on with the same numbers."""
    generator = torch.Generator().manual_seed(config.seed)
    model = InContext(config.width, (config.heads, 1), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    folder = output / "checkpoints"
    state: Any = load_checkpoint(folder, ("step", "model", "optimizer"))
    first = 0
    if state is not None:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in train(model, optimizer, config, first, progress):
        if step % CHECKPOINT_EVERY == 0 or step == config.steps:
            save_checkpoint(
                folder,
                step,
                {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
            )
    return model


# ---------------------------------------------------------------------- report


def measured(found: Circuit, config: InContextConfig) -> dict[str, float]:
    """What :data:`LIMITS` bound."""
    best = best_eta(config, config.examples)
    return {
        "other_kq": found.other_kq,
        "other_ov": found.other_ov,
        "imbalance": found.imbalance,
        "eta": abs(found.eta - best) / best,
    }


def _circuit_table(found: Circuit, config: InContextConfig) -> Iterator[str]:
    yield ""
    yield "| head | w | mu |"
    yield "| :-- | --: | --: |"
    for head, (w, mu) in enumerate(zip(found.omega.tolist(), found.mu.tolist(), strict=True)):
        yield f"| {head} | {w:+.4f} | {mu:+.4f} |"
    yield ""
    yield (
        f"eta = sum mu w = {found.eta:.4f}, the best step is {best_eta(config, config.examples):.4f}."
    )
    yield ""
    yield "| of the circuit | measured | at most | |"
    yield "| :-- | --: | --: | :-- |"
    for key, value in measured(found, config).items():
        limit = config.slack * LIMITS[key]
        verdict = "reached" if value < limit else "missed"
        yield f"| {NAMES[key]} | {value:.4f} | {limit:g} | {verdict} |"


@torch.no_grad()
def errors(
    model: InContext, config: InContextConfig, examples: int, split: Split
) -> list[dict[str, Any]]:
    """Mean squared errors on the same new prompts, the variance of the noise included; a line for each
    batch, with its number of ``prompts``."""
    rows: list[dict[str, Any]] = []
    for start in range(0, config.tests, AT_ONCE):
        count = min(AT_ONCE, config.tests - start)
        (seed,) = split.score([-1 - config.seed * config.tests - start - examples])
        prompts = draw(count, examples, config, seed)
        target = prompts.y[:, -1]
        several, single = model(prompts)
        best, plain = (best_eta(config, examples, debiased) for debiased in (True, False))
        own = best_eta(config, config.examples)
        predictions: dict[str, Tensor] = {
            f"{config.heads} heads": several,
            "a single head": single,
            "debiased gradient descent, eta of training": gradient_descent(prompts, own),
            "debiased gradient descent, best eta": gradient_descent(prompts, best),
            "plain gradient descent, best eta": gradient_descent(prompts, plain, debiased=False),
            "ridge regression with the true variances": bayes(prompts, config.noise),
        }
        squares = {
            name: float((prediction - target).double().square().mean())
            for name, prediction in predictions.items()
        }
        rows.append({"examples": examples, "seed": seed, "prompts": count, **squares})
    return rows


def _error_table(rows: Sequence[Mapping[str, Any]], config: InContextConfig) -> Iterator[str]:
    lengths = list(dict.fromkeys(row["examples"] for row in rows))
    names = [name for name in rows[0] if name not in ("examples", "seed", "prompts")]
    found = [
        {
            name: sum(row[name] * row["prompts"] for row in rows if row["examples"] == n)
            / config.tests
            for name in names
        }
        for n in lengths
    ]
    yield ""
    yield f"| mean squared error | {' | '.join(f'L = {n}' for n in lengths)} |"
    yield "| :-- |" + " --: |" * len(lengths)
    for name in found[0]:
        yield f"| {name} | {' | '.join(f'{values[name]:.4f}' for values in found)} |"
    theory = [f"{risk(config, n):.4f}" for n in lengths]
    yield f"| debiased gradient descent, best eta, in theory | {' | '.join(theory)} |"


def _plot(kq: Tensor, ov: Tensor, path: Path) -> None:
    """KQ of each head, and OV below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = len(kq)
    figure, axes = plt.subplots(
        2,
        heads,
        figsize=(2.6 * heads, 3.6),
        height_ratios=(6, 1),
        layout="constrained",
        squeeze=False,
    )
    for head in range(heads):
        pictures = (f"KQ, head {head}", kq[head]), (f"OV, head {head}", ov[head][None])
        for axis, (title, values) in zip(axes[:, head], pictures, strict=True):
            most = float(values.abs().max())
            shown = axis.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            figure.colorbar(shown, ax=axis)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)

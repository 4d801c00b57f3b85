"""In-context linear regression: the circuit that softmax heads learn, beside the one in theory.

    python -m xattn.eval.studies icl

Two networks learn from the same prompts, one with several heads and one with a single head. Their
errors are compared with those of gradient descent and of the best prediction, and their weights with
the theoretical limits.

In-context linear regression by one layer of softmax attention (ICML 2025, arXiv 2503.12734).

    z_l = (x_l, y_l),   z_q = (x_q, 0),   y^ = sum_h sum_l softmax_l(z_l^T KQ_h z_q) (OV_h . z_l)

with x ~ N(0, I_d), y = beta . x + e, beta ~ N(0, I_d / d), e ~ N(0, s). Theory gives the limit of
trained heads: KQ_h = w_h I on the inputs and 0 on y, OV_h = (0, ..., 0, mu_h), sum_h mu_h = 0. Together
they take one step of gradient descent on the examples, with the mean input subtracted:

    y^ = eta / L sum_l y_l (x_l - mean x) . x_q,   eta = sum_h mu_h w_h,   best at L / (L + d + d s)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import kept_record, reported
from xattn.runtime.files import atomic_file, check_folder, write_json
from xattn.training.run_folder import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class InContextConfig:
    """The prompts and the training for in-context regression."""

    width: int = 5  # d, the number of inputs in an example's x.
    examples: int = 40  # L, the number of examples in a prompt.
    heads: int = 2
    """Heads of the network whose circuit is read; a network with a single head is trained beside it."""
    noise: float = 0.1  # Variance of y around its mean.
    steps: int = 40_000  # Steps of Adam; the last quarter at a tenth of the learning rate.
    batch_size: int = 256  # Prompts per step, all of them new.
    lr: float = 2e-3  # Learning rate of Adam.
    tests: int = 65_536  # Prompts in each test.
    longer: int = 160  # Examples per prompt in the test of longer prompts.
    slack: float = 1.0  # Factor of all thresholds.
    seed: int = 0  # Seed of weights and prompts.

    def quick(self) -> InContextConfig:
        """6,000 steps, and thresholds three times as wide."""
        return replace(self, steps=6_000, tests=8_192, slack=3.0)


BLOCK = 100  # steps whose prompts are drawn together
START = 0.1  # deviation of the weights before training


class Prompts(NamedTuple):
    """``x`` (B, L + 1, d) with the query's input last; ``y`` (B, L + 1) with the target last."""

    x: Tensor
    y: Tensor


class Circuit(NamedTuple):
    """A network's weights as a circuit, for comparison with the limit in theory.

    ``omega`` and ``mu`` (H,); the largest other entry of KQ over the smallest |w|, and of OV over the
    smallest |mu|; |sum mu| / sum |mu|; and ``eta``.
    """

    omega: Tensor
    mu: Tensor
    other_kq: float
    other_ov: float
    imbalance: float
    eta: float


class InContext(nn.Module):
    """Networks side by side, with ``heads`` heads each, that read the same prompts.

    Args:
        width: d.
        heads: H of each network; their heads follow each other in ``kq`` (H, d + 1, d + 1), whose
            last column is multiplied by the 0 of the query, and in ``ov`` (H, d + 1).
    """

    def __init__(self, width: int, heads: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.heads = list(heads)
        total = sum(heads)
        self.kq = nn.Parameter(
            START * torch.randn(total, width + 1, width + 1, generator=generator)
        )
        self.ov = nn.Parameter(START * torch.randn(total, width + 1, generator=generator))

    def contributions(self, prompts: Prompts) -> Tensor:
        """p_l OV_h . z_l, (B, H, L): the amount that each example adds to the prediction, by head."""
        width = prompts.x.shape[2]
        z = torch.cat([prompts.x, prompts.y[..., None]], 2)[:, :-1]
        queries = (prompts.x[:, -1] @ self.kq[..., :width].flatten(0, 1).mT).unflatten(
            1, (-1, width + 1)
        )
        weights = (queries @ z.mT).softmax(-1)
        return weights * (z @ self.ov.mT).mT

    def forward(self, prompts: Prompts) -> Tensor:
        """y^ of each network, (networks, B)."""
        per_head = self.contributions(prompts).sum(-1)
        return torch.stack([part.sum(1) for part in per_head.split(self.heads, 1)])


def draw(count: int, examples: int, config: InContextConfig, seed: int) -> Prompts:
    """Draw ``count`` prompts, a pure function of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    d = config.width
    x = torch.randn(count, examples + 1, d, generator=generator)
    beta = torch.randn(count, d, 1, generator=generator) * d**-0.5
    noise = torch.randn(count, examples + 1, generator=generator) * config.noise**0.5
    return Prompts(x, (x @ beta)[..., 0] + noise)


def training_seeds(config: InContextConfig) -> list[int]:
    """The seeds for the prompts of each block of steps."""
    return [1_000_003 * (config.seed + 1) + i for i in range(-(-config.steps // BLOCK))]


def batches(config: InContextConfig, first: int) -> Iterator[Prompts]:
    """The prompts of each step from number ``first`` on."""
    seeds = training_seeds(config)
    for block in range(first // BLOCK, len(seeds)):
        many = draw(BLOCK * config.batch_size, config.examples, config, seeds[block])
        steps = zip(many.x.split(config.batch_size), many.y.split(config.batch_size), strict=True)
        for number, (x, y) in enumerate(steps, block * BLOCK):
            if first <= number < config.steps:
                yield Prompts(x, y)


def train(
    model: InContext, optimizer: Any, config: InContextConfig, first: int = 0, progress: bool = True
) -> Iterator[int]:
    """Minimise the squared errors of all networks together; yield the number of steps after each block."""
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not progress)
    for step, prompts in enumerate(batches(config, first), first + 1):
        late = step > 3 * config.steps // 4
        optimizer.param_groups[0]["lr"] = config.lr * (0.1 if late else 1)
        optimizer.zero_grad(set_to_none=True)
        errors = model(prompts) - prompts.y[:, -1]
        errors.square().mean(1).sum().backward()
        optimizer.step()
        if step % BLOCK == 0 or step == config.steps:
            bar.update(step - bar.n)
            yield step
    bar.close()


@torch.no_grad()
def circuit(kq: Tensor, ov: Tensor) -> Circuit:
    """Read the weights (H, d + 1, d + 1) and (H, d + 1) of one network, ignoring KQ's last column."""
    kq, ov = kq.double(), ov.double()
    width = kq.shape[-1] - 1
    omega = kq.diagonal(dim1=1, dim2=2)[:, :width].mean(1)
    ideal = torch.zeros_like(kq[..., :width])
    ideal.diagonal(dim1=1, dim2=2).copy_(omega[:, None].expand(-1, width))
    mu = ov[:, -1]
    return Circuit(
        omega,
        mu,
        float((kq[..., :width] - ideal).abs().max() / omega.abs().min()),
        float(ov[:, :-1].abs().max() / mu.abs().min()),
        float(mu.sum().abs() / mu.abs().sum()),
        float((mu * omega).sum()),
    )


def best_eta(config: InContextConfig, examples: int, debiased: bool = True) -> float:
    """The step of gradient descent with the least error: L / (L + d + d s), or L / (L + 1 + d + d s)
    without debiasing."""
    d = config.width
    return examples / (examples + (not debiased) + d + d * config.noise)


def risk(config: InContextConfig, examples: int, eta: float | None = None) -> float:
    """The expected squared error of debiased gradient descent with step ``eta``, by default the best."""
    d, n = config.width, examples - 1
    first = n / examples
    second = n * (n + d + 1 + d * config.noise) / examples**2
    eta = best_eta(config, examples) if eta is None else eta
    return config.noise + 1 - 2 * eta * first + eta**2 * second


def gradient_descent(prompts: Prompts, eta: float, debiased: bool = True) -> Tensor:
    """eta / L sum_l y_l (x_l - mean x) . x_q, (B,); without ``debiased`` the mean is not subtracted."""
    x, y = prompts.x[:, :-1], prompts.y[:, :-1]
    if debiased:
        x = x - x.mean(1, keepdim=True)
    slope = (y[..., None] * x).mean(1)
    return eta * (slope * prompts.x[:, -1]).sum(1)


def bayes(prompts: Prompts, noise: float) -> Tensor:
    """(B,): ridge regression with the true variances, which is the best possible prediction."""
    x, y = prompts.x[:, :-1].double(), prompts.y[:, :-1].double()
    d = x.shape[2]
    gram = x.mT @ x + d * noise * torch.eye(d, dtype=torch.float64)
    beta = torch.linalg.solve(gram, x.mT @ y[..., None])
    return (prompts.x[:, -1:].double() @ beta)[:, 0, 0].float()


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
    """Train the networks that are not finished yet, write the report, and yield its lines.

    Args:
        output: folder for checkpoints, report.md, circuit.json and circuit.png.
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
    """Every entry of KQ and OV, a line for each row of a head; the single head comes last."""
    return [
        {"head": head, "matrix": matrix, "row": row, **{str(i): x for i, x in enumerate(values)}}
        for matrix, of_heads in (("KQ", model.kq), ("OV", model.ov[:, None]))
        for head, rows in enumerate(of_heads.tolist())
        for row, values in enumerate(rows)
    ]


def _trained(output: Path, config: InContextConfig, progress: bool) -> InContext:
    """Train both networks; a stopped training run resumes with the same numbers."""
    generator = torch.Generator().manual_seed(config.seed)
    model = InContext(config.width, (config.heads, 1), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    folder = output / "checkpoints"
    state: Any = load_checkpoint(folder)
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
    """The values that :data:`LIMITS` bounds."""
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
    """Mean squared errors on the same new prompts, including the noise variance: a line for each batch,
    with its number of ``prompts``."""
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
    yield f"| debiased gradient descent, best eta, theoretical value | {' | '.join(theory)} |"


def _plot(kq: Tensor, ov: Tensor, path: Path) -> None:
    """Draw KQ of each head, and OV below it."""
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

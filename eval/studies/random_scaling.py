"""How many examples random-feature attention needs for a function of tokens, beside a two-layer network.

    f1 = 1/N sum_i <beta, x_i>^p,   f2 = 1/N sum_i <x_0, x_i>^p,   f3 = 1/N sum_i <x_0, x_i>^p <beta, x_i>

of a query x_0 and N tokens on the unit sphere (after arXiv 2307.11353, section 5). RFA and BRFA are fitted
by the ridge regression of the head ``random_feature``; the network has as many random ReLU units of all
tokens side by side as they have weights, M (d + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.eval.evaluation.split import Split
from xattn.heads.random_feature import DualRidge, features, queries_of, random_weights, with_one


@dataclass(frozen=True)
class RandomFeatureConfig:
    """What the study of random features fits, to photos and to functions that are known."""

    heads: int = 1000
    """M, the random heads."""
    queries: tuple[str, ...] = ("constant", "gap", "cls")
    """Of the head random_feature; cls needs a backbone with a class token."""
    components: int | None = None
    """Principal components of the patches; None keeps all channels."""
    biased: bool = False
    """Draw W around the identity (BRFA) where the query is not constant."""
    folds: int = 4
    """Parts of the photos; each is tested once."""
    seeds: int = 2
    """Draws of the random heads: seeds 0, 1, ..."""
    seed: int = 0
    """Of the folds."""
    scaling: bool = True
    """Also fit functions of random tokens by more and more examples."""
    examples: tuple[int, ...] = (100, 200, 400, 800, 1600)
    """n, the examples to fit such a function by."""
    tests: int = 500
    """Examples to test it on."""
    width: int = 16
    """d of the random tokens."""
    tokens: int = 16
    """N of the random tokens, beside the query."""

    def quick(self) -> RandomFeatureConfig:
        """Few heads, seeds and examples, to see that all runs: no figure of it means anything."""
        return replace(
            self, heads=min(self.heads, 20), folds=2, seeds=2, examples=(20, 40), tests=50
        )


POWERS = (1, 2, 3)
MODELS = ("RF-MLP", "RFA", "BRFA")
BLOCK = 2**23  # entries of features at once


def tokens_of(config: RandomFeatureConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Queries (n, d) and tokens (n, N, d) of all examples, those to test on last."""
    count = config.examples[-1] + config.tests
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.tokens + 1, config.width, generator=generator)
    x = F.normalize(x, dim=-1)
    return x[:, 0], x[:, 1:]


def targets_of(x_0: Tensor, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The functions by name, (n,) each, with mean 0 and variance 1 over the examples."""
    generator = torch.Generator().manual_seed(seed)
    beta = F.normalize(torch.randn(x.shape[2], generator=generator), dim=0)
    along, beside = (x @ beta).double(), (x @ x_0[..., None])[..., 0].double()
    found = {}
    for p in POWERS:
        found[f"f1, p = {p}"] = along**p
        found[f"f2, p = {p}"] = beside**p
        found[f"f3, p = {p}"] = beside**p * along
    means = {name: values.mean(1) for name, values in sorted(found.items())}
    return {name: (v - v.mean()) / v.std(correction=0) for name, v in means.items()}


def kernel_of(model: str, x_0: Tensor, x: Tensor, fitted: int, heads: int, seed: int) -> Tensor:
    """(n, fitted), in float64: products of the features of all examples and of the first ``fitted``."""
    width = x.shape[2]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(heads, BLOCK // (len(x) * (width + 1))))
    features_of: Callable[[int], Tensor]
    if model == "RF-MLP":
        joined = torch.cat([x_0[:, None], x], 1).flatten(1) / math.sqrt(x.shape[1] + 1)
        joined = with_one(joined)

        def features_of(count: int) -> Tensor:
            units = torch.randn(joined.shape[1], count * (width + 1), generator=generator)
            return (joined @ units).relu()
    else:
        keys = with_one(x)

        def features_of(count: int) -> Tensor:
            weights = random_weights(width + 1, count, width + 1, model == "BRFA", generator)
            return features(queries_of(with_one(x_0), weights), keys).flatten(1)

    kernel = torch.zeros(len(x), fitted, dtype=torch.float64)
    for first in range(0, heads, size):
        phi = features_of(min(size, heads - first)).double()
        kernel += phi @ phi[:fitted].mT
    return kernel


def scaling(config: RandomFeatureConfig, seed: int) -> Iterator[dict[str, object]]:
    """A record of model, function, ``n`` and ``mse``, the mean squared error on the test examples; 1 is
    that of the mean."""
    x_0, x = tokens_of(config, seed)
    targets = targets_of(x_0, x, seed)
    most = config.examples[-1]
    for model in MODELS:
        kernel = kernel_of(model, x_0, x, most, config.heads, seed)
        for n in config.examples:
            split = Split("scaling", range(len(x)))
            seen, tested = split.fit(slice(n)), split.score(slice(most, None))
            solver = DualRidge(kernel[seen, seen])
            for name, values in targets.items():
                fit = solver.fit(values[seen, None])
                found = kernel[tested, seen] @ fit.alpha + fit.intercept
                mse = float((found[:, 0] - values[tested]).square().mean())
                yield {"model": model, "function": name, "n": n, "mse": mse}

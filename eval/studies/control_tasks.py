"""Small networks trained with a control in place of attention: digits, and recall of a value by its key.

Digits are scikit-learn's in patches of 2 x 2. Recall is drawn anew for each step: a query token with a key,
then 8 tokens with a key and a value each; the class is the value that stands beside the query's key. Keys
differ, in any order, and values repeat, so that without content the values alone can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xattn.attention import convert
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import Training, right, train
from xattn.eval.studies.small_training import minimize

PAIRS = VALUES = 8
TOKENS = {"digits": 16, "recall": 1 + PAIRS}
BATCH, TESTED = 128, 2000  # sequences of recall


def network(task: str, mechanism: str, options: Mapping[str, Any], depth: int = 2) -> nn.Module:
    """A ViT of width 64 with 4 heads whose blocks have the mechanism; without a class token.

    Its layers start as PyTorch's do, larger than timm's.

    Raises:
        ValueError: as in :func:`~xattn.attention.convert`.
    """
    shared: dict[str, Any] = {
        "patch_size": 1, "embed_dim": 64, "depth": depth, "num_heads": 4, "class_token": False,
        "weight_init": "skip",
    }  # fmt: skip
    if task == "digits":
        shared |= {"patch_size": 2, "img_size": 8, "in_chans": 1, "num_classes": 10}
        net = VisionTransformer(**shared, global_pool="avg")
        assert net.pos_embed is not None
        nn.init.trunc_normal_(net.pos_embed, std=0.02)
    else:
        shared |= {"img_size": (1, 1 + PAIRS), "in_chans": PAIRS + VALUES, "num_classes": VALUES}
        net = VisionTransformer(**shared, global_pool="", pos_embed="none")
    if mechanism != "softmax":
        own = {"tokens": TOKENS[task]} if options.get("source") == "learned" else {}
        convert(net, mechanism, options={**options, **own})
    return net


def digits_right(
    net: nn.Module, split: Split, steps: int, seed: int, lr: float
) -> dict[str, float]:
    """Train on 1,437 digits: the share right of 360 others, and CPU seconds."""
    seconds = train(net, Training(epochs=max(1, steps // 22), lr=lr, seed=seed), split)
    return {"right": right(net, split), "seconds": seconds}


def recall_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences as images (count, 16, 1, 9), the query first, and values (count,)."""
    keys = torch.rand(count, PAIRS, generator=generator, device="cpu").argsort(1)
    values = torch.randint(VALUES, (count, PAIRS), generator=generator, device="cpu")
    asked = torch.randint(PAIRS, (count, 1), generator=generator, device="cpu")
    query = F.pad(F.one_hot(keys.gather(1, asked), PAIRS), (0, VALUES))
    pairs = torch.cat([F.one_hot(keys, PAIRS), F.one_hot(values, VALUES)], 2)
    tokens = torch.cat([query, pairs], 1).float()
    return tokens.transpose(1, 2)[:, :, None], values.gather(1, asked)[:, 0]


def recall_right(
    net: nn.Module, split: Split, steps: int, seed: int, lr: float = 3e-3
) -> dict[str, float]:
    """Train on fresh sequences, reading the query's token: the share right of 2,000 others, and CPU
    seconds."""
    generator = torch.Generator().manual_seed(*split.fit([seed]))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            images, labels = recall_batch(BATCH, generator)
            yield F.cross_entropy(net(images)[:, 0], labels)

    seconds = minimize(net, losses(), steps, lr, weight_decay=0.0)
    tests = torch.Generator().manual_seed(*split.score([seed + 1000]))
    images, labels = recall_batch(TESTED, tests)
    with torch.no_grad():
        share = (net(images)[:, 0].argmax(1) == labels).double().mean()
    return {"right": float(share), "seconds": seconds}

"""Speed as ratios, both sides in one run: what an explanation costs beside the classifier alone.

    python -m xattn.eval.speed        (make bench)

Each round times every job once, in turn, so that a slow moment of the machine hits all of them; the
ratio is taken within the round and its median over rounds is reported. Both sides run with the same
allocator setting and thread count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn.config import TrainConfig

Job = Callable[[], Any]


def ratios(jobs: dict[str, Job], base: str, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median over ``rounds`` of time(job) / time(jobs[base]), each measured within one round."""
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        took = {}
        for name, job in jobs.items():
            _synchronize()
            start = time.perf_counter()
            job()
            _synchronize()
            took[name] = time.perf_counter() - start
        if turn >= warmup:
            for name, seconds in took.items():
                samples[name].append(seconds / took[base])
    return {name: statistics.median(values) for name, values in samples.items()}


def explain_jobs(backbone: Any, head: Any, batch: int) -> dict[str, Job]:
    """Explaining the predicted class, up-sampled to the input, beside a plain forward pass."""
    from xattn.explainers import create_explainer
    from xattn.heads.fusion import resize

    images = _images(backbone, batch)
    size = tuple(images.shape[2:])
    methods = {n: create_explainer(n, backbone, head) for n in ("gradcam",)}

    @torch.inference_mode()
    def forward() -> Tensor:
        return backbone.model(backbone.normalize(images))

    @torch.inference_mode()
    def with_head() -> Tensor:
        taps = backbone(images)
        return resize(head(taps, taps.logits.argmax(1)), size)

    def gradcam() -> Tensor:
        target = forward().argmax(1).clone()
        return resize(methods["gradcam"].attribute(images, target), size)

    return {"forward": forward, "head": with_head, "Grad-CAM (Captum)": gradcam}


def step_jobs(backbone: Any, head: Any, batch: int) -> dict[str, Job]:
    """A training step beside its floor: two passes and one backward pass to the image."""
    from xattn.training.objective import objective

    images = _images(backbone, batch)
    config = TrainConfig()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0)

    def floor() -> None:
        with torch.no_grad():
            target = backbone.logits(images).argmax(1)
        mask = torch.ones(batch, 1, *images.shape[2:], device=images.device, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(backbone.logits(images * mask), target)
        torch.autograd.grad(loss, mask)

    def step() -> None:
        terms = objective(head, backbone, images, config)
        optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        optimizer.step()

    return {"floor": floor, "training step": step}


def _images(backbone: Any, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *backbone.preprocessing.input_size, generator=generator)
    return images.to(backbone.device)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    from xattn.allocator import keep_memory
    from xattn.backbone import load_backbone
    from xattn.heads import create_head

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, raised allocator thresholds: {kept}")
    print("| backbone | batch | job | median ratio | of |\n| :-- | --: | :-- | --: | :-- |")
    for name in args.backbones:  # random weights: speed does not depend on them
        backbone = load_backbone(name, weights=None, device=device)
        head = create_head("ttame", backbone)
        for batch in args.batches:
            tasks = [("forward", explain_jobs(backbone, head.eval(), batch))]
            if batch > 1:
                tasks.append(("floor", step_jobs(backbone, head.train(), batch)))
            for base, jobs in tasks:
                for job, ratio in ratios(jobs, base, args.rounds).items():
                    if job != base:
                        print(f"| {name} | {batch} | {job} | {ratio:.2f}x | {base} |", flush=True)


if __name__ == "__main__":
    main()

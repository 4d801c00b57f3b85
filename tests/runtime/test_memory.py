"""Out of memory: the batch is halved with one warning, and the numbers stay the same."""

import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from xattn import TrainConfig, create_head, fit, load_backbone
from xattn.eval import evaluate
from xattn.explainers import create_explainer
from xattn.runtime.memory import ForwardBatches, is_out_of_memory

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError(CPU_TEXT), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


class Limited(torch.nn.Module):
    """A model that has no room for more than ``limit`` images."""

    def __init__(self, model, limit):
        super().__init__()
        self.inner, self.limit, self.seen = model, limit, []
        self.pretrained_cfg = model.pretrained_cfg

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def _check(self, x):
        self.seen.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward_features(self, x):
        self._check(x)
        return self.inner.forward_features(x)

    def forward_intermediates(self, x, **options):
        self._check(x)
        return self.inner.forward_intermediates(x, **options)


def limited(limit):
    torch.manual_seed(0)
    full = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    small = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    small.model.load_state_dict(full.model.state_dict())
    small.model, small._fingerprint = Limited(small.model, limit), full.fingerprint
    return full, small


IMAGES = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_metrics_go_on_with_half_the_batch_and_say_so_once():
    full, small = limited(3)
    found = {}
    for backbone in (full, small):
        methods = {n: create_explainer(n, full, max_forward_batch=8) for n in ("cam", "random")}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[backbone] = evaluate(
                backbone, methods, IMAGES, max_forward_batch=8, progress=False
            )
        said = [str(w.message) for w in caught if "max_forward_batch" in str(w.message)]
        assert len(said) == (backbone is small)
    assert "out of memory with 8 images; continuing with 4" in said[0]
    assert small.model.seen[:3] == [8, 4, 2] and set(small.model.seen[3:]) == {2}
    for name in ("cam", "random"):
        for key, expected in found[full].methods[name].scores.items():
            assert np.allclose(found[small].methods[name].scores[key], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["head", "gradcam", "cam"])
def test_explainers_go_on_with_half_the_batch(name):
    full, small = limited(2)
    head = create_head("ttame", full).eval()
    expected = create_explainer(name, full, head, max_forward_batch=8).attribute(IMAGES, 1)
    explainer = create_explainer(name, small, head, max_forward_batch=8)
    with pytest.warns(RuntimeWarning, match="out of memory with 8 images; continuing with 4"):
        found = explainer.attribute(IMAGES, 1)
    assert explainer.max_forward_batch == 2
    assert torch.allclose(found, expected, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        logits, _, maps = explainer.attribute_classes(IMAGES, lambda z: z.topk(2).indices)
    assert maps.shape[:2] == (10, 2) and torch.allclose(logits, full.logits(IMAGES), atol=1e-5)


def test_a_batch_smaller_than_allowed_is_halved_itself():
    seen = []

    def two_fit(x):
        seen.append(len(x))
        if len(x) > 2:
            raise MemoryError("no room")
        return x

    batches = ForwardBatches(32)
    with pytest.warns(RuntimeWarning, match="out of memory with 6 images; continuing with 3"):
        found = batches.run(two_fit, IMAGES[:6])
    assert seen == [6, 3, 1, 1, 1, 1, 1, 1] and torch.equal(torch.cat(found), IMAGES[:6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one image that fits never is too many
        ForwardBatches(32).run(two_fit, IMAGES[:1])


def test_one_image_that_does_not_fit_is_an_error_with_a_remedy_and_other_errors_pass():
    _, small = limited(0)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(MemoryError, match="max_forward_batch: out of memory with one image"),
    ):
        create_explainer("cam", small).attribute(IMAGES, 0)

    def broken(x):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        ForwardBatches(4).run(broken, IMAGES)
    with pytest.raises(ValueError, match="max_forward_batch: got 0"):
        ForwardBatches(0)


def test_a_training_batch_that_does_not_fit_names_batch_size(tmp_path):
    full, small = limited(2)
    head = create_head("ttame", full)
    photos = []
    for i in range(4):
        photos.append(tmp_path / f"{i}.png")
        Image.new("RGB", (70, 70), (60 * i, 90, 0)).save(photos[-1])
    config = TrainConfig("small", epochs=1, batch_size=4, workers=0)
    with pytest.raises(MemoryError, match="batch_size: out of memory with 4 images per step"):
        fit(head, small, photos, config, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_real_allocation_failure_is_survived():
    script = """
        import resource, warnings, torch
        from xattn.runtime.memory import ForwardBatches

        torch.set_num_threads(1)
        x = torch.zeros(16, 1)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
        batches = ForwardBatches(16)  # 16 x 100 MiB do not fit, four do
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts = batches.run(lambda t: torch.ones(len(t), 100 * 2**18).sum(1), x)
        print(batches.size, len(caught), float(torch.cat(parts).sum()) == 16 * 100 * 2**18)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=900
    )
    assert done.stdout.split() == ["4", "1", "True"], done.stderr

"""Threads that share a network: each gets the results it would get alone; the network stays unchanged."""

import copy
import pickle
import sys
import threading
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_networks import PAIRS, cheap, made

from xattn import evaluate, explain
from xattn.attention import convert, record, revert
from xattn.explainers import create_explainer
from xattn.heads import create_head
from xattn.runtime.locking import alone, lock_of

LONG = 600  # seconds, after which a thread counts as hung


def kept(kind):
    """A backbone with a state that is not the default one, which has to be kept."""
    backbone = made(kind)
    model = backbone.model
    classifier = model.net.heads[0] if kind == "masks" else model.get_classifier()
    classifier.train().weight.requires_grad_(True)
    return backbone


def state(*modules):
    """Everything that explaining may change and has to put back."""
    parts = [m for module in modules for m in module.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(m.training, getattr(m, "fused_attn", None)) for m in parts],
        [len(getattr(m, kind)) for m in parts for kind in hooks],
        [(p.requires_grad, p.grad) for m in modules for p in m.parameters()],
        [b.double().sum().item() for m in modules for b in m.buffers()],
    )


def together(*jobs):
    """Results of functions that run at once, with threads switched as often as Python can."""
    results, errors = [None] * len(jobs), []
    start = threading.Barrier(len(jobs))

    def run(i):
        try:
            start.wait(LONG)
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_two_threads_explain_as_one_after_the_other(name, kind):
    backbone = kept(kind)
    fusion = "per_class" if kind == "masks" else "classifier"
    head = create_head("ttame", backbone, fusion=fusion).train()
    explainer = cheap(name, backbone, head)
    images = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = [explainer.attribute(x, 3) for x in images]
    before = state(backbone, head)

    def explain(i):
        method = cheap(name, backbone, head)
        return [method.attribute(images[i], 3) for _ in range(3)]

    for found, wanted in zip(
        together(*(lambda i=i: explain(i) for i in (0, 1))), expected, strict=True
    ):
        assert all(torch.equal(maps, wanted) for maps in found)
    assert state(backbone, head) == before


@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("name", ["gradcam", "ablationcam"])
def test_passes_beside_an_explanation_see_nothing_of_it(name, kind):
    backbone = kept(kind)
    layer = backbone.model.layer1 if kind == "cnn" else None
    explainer = create_explainer(name, backbone, layer=layer)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps, taps = explainer.attribute(images, 3), backbone(images)

    def passes():
        with torch.no_grad():
            return [backbone(images).logits for _ in range(20)] + [backbone.logits(images)]

    found, logits = together(lambda: [explainer.attribute(images, 3) for _ in range(4)], passes)
    assert all(torch.equal(x, maps) for x in found)
    assert all(torch.equal(x, taps.logits) for x in logits)


def test_explain_and_evaluate_share_a_backbone_with_whoever_converts_it(tmp_path):
    backbone = kept("vit")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")

    def explained():
        return explain(tmp_path, backbone, explainer="gradcam", classes=[1, 2], batch_size=2)

    def evaluated():
        methods = {"gradcam": create_explainer("gradcam", backbone)}
        found = evaluate(backbone, methods, tmp_path, max_forward_batch=2, metrics=["masking"])
        return found.methods["gradcam"].values

    def converted():
        for _ in range(3):
            convert(backbone, "softmax")
            revert(backbone)

    maps, report, before = explained(), evaluated(), state(backbone)
    found, again, _ = together(explained, evaluated, converted)
    for one, other in zip(found, maps, strict=True):
        assert np.allclose(one.map, other.map, atol=1e-5)
    for metric, values in report.items():
        assert np.allclose(again[metric], values, atol=1e-3)
    assert state(backbone) == before


def test_recordings_side_by_side_keep_the_settings_of_the_layers():
    backbone = kept("vit")
    for block in backbone.model.blocks:
        block.attn.fused_attn = False
    images = torch.rand(2, 3, 32, 32)

    def read():
        with torch.no_grad():
            for _ in range(20):
                with record(backbone.model) as calls:
                    backbone.logits(images)
                assert len(calls) == 2
        return True

    before = state(backbone)
    assert together(read, read, read) == [True] * 3
    assert state(backbone) == before


def test_a_converted_model_takes_images_of_two_sizes_from_two_threads():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_classes=7,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    convert(model, "gna", options={"kernel": 2})
    for block in model.blocks:
        block.attn.fused_attn = False
    images = [torch.rand(1, 3, 16, 64), torch.rand(1, 3, 64, 16)]

    @torch.no_grad()
    def run(x):
        return [model(x) for _ in range(20)]

    expected = [run(x)[0] for x in images]
    for found, want in zip(together(*(lambda x=x: run(x) for x in images)), expected, strict=True):
        assert all(torch.equal(x, want) for x in found)


# ---------------------------------------------------------------------- the lock itself


def test_an_explanation_inside_an_explanation_goes_on():
    backbone = kept("cnn")
    outer, inner = create_explainer("gradcam", backbone), create_explainer("saliency", backbone)
    images, found = torch.rand(1, 3, 32, 32), []

    def choose(logits):
        found.append(inner.attribute(images, 2))
        return logits.topk(1).indices

    outer.attribute_classes(images, choose)
    assert torch.equal(found[0], inner.attribute(images, 2))


def test_a_hook_may_explain_from_within_a_pass():
    backbone = kept("cnn")
    explainer, images, found = create_explainer("gradcam", backbone), torch.rand(1, 3, 32, 32), []
    expected = explainer.attribute(images, 2)

    def hook(module, args, output):
        if not found:
            found.append(None)
            found.append(explainer.attribute(images, 2))

    handle = backbone.model.fc.register_forward_hook(hook)
    together(lambda: backbone.logits(images))
    handle.remove()
    assert torch.equal(found[1], expected)


def wait_until(true):
    for _ in range(1000 * LONG):
        if true():
            return
        time.sleep(0.001)
    pytest.fail("nobody came to wait")


def test_passes_run_side_by_side_and_a_change_waits_for_them():
    backbone = kept("cnn")
    lock, order = lock_of(backbone.model), []
    inside, go = threading.Barrier(3), threading.Event()

    def one_pass():
        with lock.shared():
            inside.wait(LONG)  # both passes at once
            go.wait(LONG)
            order.append("pass")

    def change():
        with backbone.alone():
            order.append("alone")

    threads = [threading.Thread(target=one_pass) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(LONG)
    threads.append(threading.Thread(target=change))
    threads[-1].start()
    wait_until(lambda: lock._line)
    go.set()
    for thread in threads:
        thread.join(LONG)
    assert order == ["pass", "pass", "alone"]


def test_who_came_first_goes_first_so_that_nobody_waits_for_ever():
    lock, order = lock_of(torch.nn.Linear(1, 1)), []

    def take(way, name):
        with way():
            order.append(name)

    threads = []
    with lock.alone():
        for i, way in enumerate((lock.alone, lock.shared, lock.alone)):
            threads.append(threading.Thread(target=take, args=(way, i)))
            threads[-1].start()
            wait_until(lambda: len(lock._line) > i)  # noqa: B023
    for thread in threads:
        thread.join(LONG)
    assert order == [0, 1, 2]


def test_an_error_inside_frees_the_lock():
    backbone = kept("cnn")
    with pytest.raises(ZeroDivisionError), backbone.alone():
        1 / 0  # noqa: B018
    with pytest.raises((RuntimeError, ValueError)):
        backbone.logits(torch.rand(1, 5, 32, 32))
    assert together(lambda: create_explainer("gradcam", backbone)) != [None]


def test_networks_of_the_same_weights_share_a_lock_and_copies_have_their_own():
    backbone = kept("vit")
    own = lock_of(backbone.model)
    assert lock_of(backbone.with_taps("block").model) is own
    with backbone.alone():  # copies and pickles of a network in use are free
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert lock_of(other.model) is not own
            assert together(lambda other=other: create_explainer("gradcam", other)) != [None]
    with alone(backbone.model, backbone.model), backbone.alone():
        pass


def test_a_copy_made_beside_an_explanation_has_none_of_its_hooks():
    backbone = kept("cnn")
    explainer, images = create_explainer("gradcam", backbone), torch.rand(1, 3, 32, 32)
    before = state(backbone)
    _, copies = together(
        lambda: [explainer.attribute(images, 3) for _ in range(10)],
        lambda: [copy.deepcopy(backbone) for _ in range(10)],
    )
    assert all(state(twin) == before for twin in copies)


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have():
    if not hasattr(torch.multiprocessing, "get_context") or sys.platform == "win32":
        pytest.skip("needs fork")
    lock = lock_of(torch.nn.Linear(1, 1))
    held, done = threading.Event(), threading.Event()
    weights = torch.nn.Linear(1, 1)

    def hold():
        with lock_of(weights).alone():
            held.set()
            done.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LONG)
    context = torch.multiprocessing.get_context("fork")
    child = context.Process(target=_enter, args=(weights,))
    child.start()
    child.join(LONG)
    alive = child.is_alive()
    child.kill()
    done.set()
    thread.join(LONG)
    assert not alive and child.exitcode == 0 and lock is not None


def _enter(weights):
    with lock_of(weights).alone():
        pass


def test_a_network_is_not_converted_while_it_is_hashed(monkeypatch):
    backbone = kept("vit")
    holders = []

    def hashed(model, preprocessing):
        holders.append(set(lock_of(model)._passes))
        return "hash"

    monkeypatch.setattr("xattn.backbone.backbone.network_sha256", hashed)
    backbone._fingerprint = None
    assert backbone.fingerprint == "hash"
    assert holders == [{threading.get_ident()}]

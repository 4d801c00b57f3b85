"""A caller's module stays as it is: its training goes on, and explanations see what it has become."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import xattn
from xattn import load_backbone
from xattn.backbone.families.traced import from_torchvision
from xattn.explainers import create_explainer

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


class Small(nn.Module):
    """With a layer of each kind that training changes, or runs otherwise than evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Branching(Small):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


KINDS = {
    "timm": lambda: timm.create_model("test_resnet", num_classes=4),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=4),
    "traced": Small,
    "hooked": Branching,
}


@pytest.fixture(params=KINDS)
def module(request):
    """In the middle of a training: partly frozen, partly in evaluation mode, with gradients."""
    torch.manual_seed(0)
    made = KINDS[request.param]().train()
    layers = list(made.modules())
    layers[-1].eval()
    next(made.parameters()).requires_grad_(False)
    made(torch.rand(3, 3, 64, 64)).sum().backward()
    return made


def state(model):
    return {
        "modes": [m.training for m in model.modules()],
        "needed": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        "values": [v.numpy().tobytes() for v in model.state_dict().values()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def step(model):
    torch.manual_seed(1)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.rand(3, 3, 64, 64)), torch.tensor([0, 1, 2])).backward()
    optimizer.step()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def explained(backbone):
    return create_explainer("gradcam", backbone, relu=False).attribute(IMAGES, 1)


def test_loading_and_explaining_leave_the_module_as_it_was(module):
    before = state(module)
    backbone = load_backbone(module, input_size=64, **HALF)
    assert state(module) == before
    explained(backbone)
    assert state(module) == before

    def fail(*_):
        raise RuntimeError("interrupted")

    handle = next(m for m in backbone.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        fail
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        explained(backbone)
    handle.remove()
    assert state(module) == before


def test_a_training_step_after_an_explanation_is_seen_by_the_next_one(module):
    backbone = load_backbone(module, input_size=64, **HALF)
    before, known = explained(backbone), backbone.fingerprint
    assert torch.equal(explained(backbone), before) and backbone.fingerprint == known
    step(module)
    after = explained(backbone)
    assert not torch.allclose(after, before)
    afresh = load_backbone(module, input_size=64, **HALF)  # no state is left over
    assert torch.equal(after, explained(afresh))
    assert known != backbone.fingerprint == afresh.fingerprint
    with torch.no_grad():
        own = copy.deepcopy(module).eval()(backbone.normalize(IMAGES))
    torch.testing.assert_close(backbone.logits(IMAGES), own)


def test_the_weights_lie_in_the_same_memory_until_the_backbone_is_cast(module):
    backbone = load_backbone(module, input_size=64, **HALF)
    places = {p.data_ptr() for p in module.parameters()}
    assert {p.data_ptr() for p in backbone.parameters()} == places
    kinds = [p.dtype for p in module.parameters()]
    known = backbone.fingerprint
    backbone.double()
    assert [p.dtype for p in module.parameters()] == kinds
    assert places.isdisjoint({p.data_ptr() for p in backbone.parameters()})
    for twin in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert twin.fingerprint == known


def test_gradients_through_the_module_flow_as_pytorch_grad_cam_needs_them(module):
    load_backbone(module, input_size=64, **HALF)
    seen = []
    layer = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))

    def keep(module, inputs, output):
        output.register_hook(lambda gradient: seen.append(gradient.shape))

    handle = layer.register_forward_hook(keep)
    module.eval()(IMAGES)[:, 1].sum().backward()
    handle.remove()
    assert seen and seen[0][0] == len(IMAGES)


def test_a_layer_may_be_a_module_of_the_caller(module):
    name = [n for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)][-1]
    backbone = load_backbone(module, input_size=64, **HALF)
    expected = create_explainer("layercam", backbone, layer=name).attribute(IMAGES, 1)
    for one in (backbone, copy.deepcopy(backbone)):
        found = create_explainer("layercam", one, layer=module.get_submodule(name))
        assert torch.equal(found.attribute(IMAGES, 1), expected)
    other = load_backbone("test_resnet", None, num_classes=4)
    with pytest.raises(ValueError, match="layer: BatchNorm2d is not a module of test_resnet"):
        create_explainer("layercam", other, layer=module.get_submodule(name))


def test_a_captum_object_of_the_module_gets_normalised_images_and_evaluation_mode(module):
    captum = pytest.importorskip("captum.attr")
    backbone = load_backbone(module, input_size=64, **HALF)
    before = state(module)
    found = xattn.as_explainer(captum.Saliency(module), backbone).attribute(IMAGES, 1)
    assert state(module) == before
    x = backbone.normalize(IMAGES).requires_grad_()
    (gradient,) = torch.autograd.grad(copy.deepcopy(module).eval()(x)[:, 1].sum(), x)
    torch.testing.assert_close(found, gradient.abs().sum(1, keepdim=True))


# ---------------------------------------------------------------------- unusual modules


def test_tied_weights_hooks_and_computed_weights_are_copied():
    torch.manual_seed(0)
    net = Small()
    net.twin = nn.Linear(6, 4)
    net.twin.weight = net.fc.weight
    nn.utils.parametrizations.weight_norm(net.conv)
    calls = []
    net.norm.register_forward_hook(lambda m, i, o: calls.append(m) or o * 2)
    expected = copy.deepcopy(net).eval()(IMAGES * 2 - 1)
    backbone = load_backbone(net, input_size=64, **HALF)
    torch.testing.assert_close(backbone.logits(IMAGES), expected)
    assert net.norm not in calls
    assert len(list(backbone.model.parameters())) <= len(list(net.parameters()))


def test_an_old_weight_norm_whose_weight_is_no_leaf_is_copied():
    torch.manual_seed(0)
    net = Small()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.conv)
    net(IMAGES).sum().backward()
    backbone = load_backbone(net, input_size=64, **HALF)
    assert net.training and all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(backbone.logits(IMAGES), net.eval()(backbone.normalize(IMAGES)))


class Locked(Small):
    def __init__(self):
        super().__init__()
        self.lock = __import__("threading").Lock()


def test_a_module_that_cannot_be_copied_is_frozen_itself_and_says_so():
    net = Locked()
    with pytest.warns(
        UserWarning, match=r"Locked cannot be copied .*model.train\(\).requires_grad_"
    ):
        backbone = load_backbone(net, input_size=64, **HALF)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    net.train().requires_grad_(True)
    step(net)
    assert explained(backbone).shape[0] == 2


def test_a_patched_forward_that_runs_the_module_itself_is_frozen_itself_and_says_so():
    net = Small()
    own, known = net.forward, net.norm.running_mean.clone()
    net.forward = lambda x: own(x) * 2  # a copy would call the layers of the original
    with pytest.warns(UserWarning, match="its copy calls a Conv2d of the module itself"):
        backbone = load_backbone(net, input_size=64, **HALF)
    assert not net.training and torch.equal(net.norm.running_mean, known)
    assert torch.equal(backbone.logits(IMAGES), backbone.logits(IMAGES))  # nothing is dropped
    torch.testing.assert_close(backbone.logits(IMAGES), 2 * own(backbone.normalize(IMAGES)))


def test_from_torchvision_leaves_the_module_as_it_was():
    net = torchvision.models.resnet18(num_classes=3)
    before = state(net)
    load_backbone(from_torchvision(net), input_size=64)
    assert state(net) == before and net.training


@pytest.mark.parametrize("kind", ["timm", "traced", "hooked"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_wrappers_are_taken_off(kind, wrap):
    torch.manual_seed(0)
    net = KINDS[kind]()
    plain, wrapped = load_backbone(net, input_size=64), load_backbone(wrap(net), input_size=64)
    assert wrapped.name == plain.name and wrapped.taps == plain.taps
    assert wrapped.fingerprint == plain.fingerprint
    assert torch.equal(explained(wrapped), explained(plain))


def test_a_module_that_was_compiled_in_place_is_explained_without_its_compiled_form():
    torch.manual_seed(0)
    net = Small().eval()
    expected = net(IMAGES * 2 - 1)
    net.compile(backend="eager")
    net(IMAGES)
    backbone = load_backbone(net, input_size=64, **HALF)
    torch.testing.assert_close(backbone.logits(IMAGES), expected)


def test_distributed_modules_are_unwrapped(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net = Small()
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert load_backbone(wrapped, input_size=64, **HALF).name == "Small"
        assert net.training
    finally:
        torch.distributed.destroy_process_group()


def test_other_copies_are_explained_as_before():
    """Rows of randomised weights take a layer of the caller's module, too."""
    from xattn.eval.sanity import randomized_explainer

    net = torchvision.models.resnet18(num_classes=3)
    backbone = load_backbone(net, input_size=64)
    row = randomized_explainer("gradcam", backbone, layer=net.layer3)
    assert np.isfinite(row.attribute(IMAGES, 1).numpy()).all()

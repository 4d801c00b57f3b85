"""Options of heads: invalid values are refused by the option's name, for every head and option."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from attentive_fakes import CLASSES, HEADS, make, read_by, small, vit
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import get_type_hints

import xattn
from xattn.heads import (
    create_head,
    head_class,
    list_heads,
    load_head,
    parse_options,
    save_head,
)
from xattn.heads.attentive import AttentiveHead
from xattn.heads.base import HEADS as REGISTERED
from xattn.runtime.option_checks import Count, Positive, Share, check, checked

# By the type of an option, what is none of its values; a Literal's choices are texts.
WRONG = {
    bool: ["no", "false", "yes", 1],
    int: ["4", 2.0, True, math.nan, [4]],
    float: ["0.5", math.nan, math.inf, -math.inf, 1e300, True],
    str: ["", "nothing", True, 3],
    Sequence: ["a", 8, [True], [0.5]],
    Mapping: ["anchors", 8, [1]],
}


def kinds(hint):
    """The types of an option: of its union, without ranges and None."""
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    origin = get_origin(hint)
    if origin is Literal:
        return {str}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {Sequence}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {Mapping}
    if get_args(hint):
        return set().union(*map(kinds, get_args(hint)))
    return set() if hint is type(None) else {hint}


def options_of(function):
    hints = get_type_hints(function, include_extras=True)
    names = inspect.signature(function).parameters
    skipped = ("self", "backbone", "options", "pooled", "shared", "return")
    return {name: hints[name] for name in names if name not in skipped and name in hints}


APART = {"num_taps", *REGISTERED.given}  # what heads set themselves is no option
OWN = [(h, o, t) for h in list_heads() for o, t in options_of(head_class(h).__init__).items()]
SHARED = [("gap", o, t) for o, t in options_of(AttentiveHead.__init__).items() if o not in APART]


@pytest.mark.parametrize(
    ("name", "option", "hint"), OWN + SHARED, ids=[f"{h} {o}" for h, o, _ in OWN + SHARED]
)
def test_every_option_of_every_head_refuses_what_is_none_of_its_values(name, option, hint):
    if option == "mask_policy":
        hint = Literal["raw_normalize"]
    found = kinds(hint)
    assert found and found <= WRONG.keys()
    backbone = read_by(name)
    wrong = [v for v in WRONG[min(found, key=str)] if type(v) not in found]
    wrong += [v for v in (math.nan, math.inf) if float in found]
    assert wrong
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{option}: got ") as error:
            create_head(name, backbone, **{option: value})
        assert "; give " in str(error.value) or "; choose " in str(error.value)
        with pytest.raises(ValueError, match=f"^{option}: got "):
            head_class(name)(backbone, **{option: value})


class LargestTensor(TorchDispatchMode):
    """Watches for the largest tensor that takes memory, in bytes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            self.size = max(self.size, made.numel() * made.element_size())
        return made


SIZES = [(h, o) for h, o, t in OWN + SHARED if int in kinds(t)]
SIZES += [(h, o) for h, o, _ in OWN if o in ("mlp_ratio", "hidden")]


@pytest.mark.parametrize(("name", "option"), SIZES, ids=[f"{h} {o}" for h, o in SIZES])
def test_a_config_that_asks_for_more_than_its_file_holds_takes_no_memory(name, option, tmp_path):
    backbone = read_by(name)
    head = save_head(create_head(name, backbone, **small(name)), tmp_path / "h")
    for size in (2**16, 2**62, 2**90):  # large, overflowing and huge
        config = json.loads((head / "config.json").read_text())
        config["options"][option] = [size, 24] if option == "hidden" else size
        (head / "config.json").write_text(json.dumps(config))
        with LargestTensor() as largest, pytest.raises(ValueError, match=f"{option}|does not fit"):
            load_head(head, backbone)
        # A backbone that is given other taps tries them on an image of zeros.
        assert largest.size < max((head / "model.safetensors").stat().st_size, 1 << 16)


def test_a_config_of_anchors_that_its_file_lacks_takes_no_memory(tmp_path):
    head = save_head(create_head("gap", vit(), reliability={"anchors": 2}), tmp_path / "h")
    config = json.loads((head / "config.json").read_text())
    config["options"]["reliability"]["anchors"] = 2**16
    (head / "config.json").write_text(json.dumps(config))
    with (
        LargestTensor() as largest,
        pytest.raises(ValueError, match=r"does not fit its config.*anchors"),
    ):
        load_head(head, vit())
    assert largest.size < (head / "model.safetensors").stat().st_size


@pytest.mark.parametrize("pair", ["norm=no", "norm=False", 'norm="false"', "norm=yes", "norm=1"])
def test_booleans_of_the_command_line_are_json(pair):
    with pytest.raises(ValueError, match="norm: got .*give True or False"):
        create_head("gap", vit(), **parse_options([pair]))
    assert create_head("gap", vit(), **parse_options(["norm=false"])).norm is None
    with pytest.raises(ValueError, match="options written as name=value are JSON: true, false"):
        create_head("gap", vit(), norm="no")


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("gem", "p=NaN", r"^p: got nan; give a positive, finite number"),
        ("gem", "eps=-Infinity", r"^eps: got -inf"),
        ("simpool", "gamma=Infinity", r"^gamma: got inf; give .* or None"),
        ("cait", "layer_scale=NaN", r"^layer_scale: got nan; give a finite number"),
        ("cait", "mlp_ratio=0.001", r"^mlp_ratio: got 0.001; that leaves none of the 32 channels"),
        ("memetector", "hidden=24", r"^hidden: got 24; give a list \(an int of at least 1 each\)"),
        ("memetector", "dropout=1", r"^dropout: got 1; give a number from 0 to below 1"),
        ("linear", "read=None", r"^read: got 'None'; give 'class', 'mean', 'both' or None .*null"),
        ("gap", 'reliability={"anchors": 2.5}', r"^reliability: anchors: got 2.5"),
        (
            "gap",
            'reliability={"anchor": 2}',
            r"^reliability: got 'anchor'; its options are anchors,",
        ),
        ("gap", 'reliability={"classes": 2}', r"^reliability: got 'classes'"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_is_wanted(name, pair, message):
    backbone = read_by(name)
    with pytest.raises(ValueError, match=message):
        create_head(name, backbone, **parse_options([pair]))


@pytest.mark.parametrize("name", HEADS)
def test_saved_options_make_the_head_again(name):
    backbone = read_by(name)
    head = create_head(name, backbone, **small(name))
    assert create_head(name, backbone, **head.options).options == head.options


def test_a_list_and_a_tuple_are_lists_and_an_int_is_a_number():
    assert make("memetector", hidden=[8, 4]).options["hidden"] == [8, 4]
    assert make("gem", p=2).p == 2.0
    assert make("gap", class_names=("a", "b")).class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("abc", "got 'abc'; give a list of names, one per class"),
        ([], "got []; give a list of names"),
        ({"a": 0}, "got {'a': 0}; give a list of names"),
        ([1, 2, 3], "got [1, 2, 3]; give a list of names"),
        (["a", None], "got ['a', None]; give a list of names"),
        (["a", ""], "got '' for class 1; give it a name"),
        (["a", " \t"], "for class 1; give it a name"),
        (["a", "b", "a"], "got 'a' twice; give every class a name of its own"),
    ],
)
def test_names_of_classes_are_told_apart(names, message):
    with pytest.raises(ValueError) as error:
        create_head("gap", vit(), class_names=names)
    assert str(error.value).startswith("class_names: ") and message in str(error.value)


def test_as_many_names_as_classes():
    with pytest.raises(
        ValueError, match="class_names: got 2 names for 3 classes; give one per class"
    ):
        create_head("gap", vit(), classes=3, class_names=["a", "b"])
    assert create_head("gap", vit(), class_names=["a", "b"]).num_classes == 2
    assert create_head("gap", vit()).num_classes == CLASSES


def test_names_of_the_backbone_may_repeat_as_imagenets_do():
    names = ["crane", "tabby", "crane", "fox", "owl"]
    backbone = xattn.load_backbone(vit().model, taps=["head"], class_names=names)
    assert create_head("gap", backbone, class_names=names).class_names == names
    with pytest.raises(ValueError, match="'crane' twice"):
        create_head("gap", vit(), class_names=names)


def test_checks_follow_the_signature():
    @checked
    def made(first, count: Count, /, *rest, size: Positive | None = None, share: Share = 0.0):
        return first, count, rest, size, share

    assert made("x", 2, 7, size=1, share=0.5) == ("x", 2, (7,), 1, 0.5)
    assert made(first := object(), 1)[0] is first
    for bad, name in (((0, 0), "count"), ((0, "1"), "count")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            made(*bad)
    with pytest.raises(ValueError, match="size: got 0; give a positive, finite number.* or None"):
        made(0, 1, size=0)
    with pytest.raises(ValueError, match="share: got 1.0"):
        made(0, 1, share=1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        made(0, 1, other=1)
    check("x", 2**200, int)
    with pytest.raises(ValueError, match="x: got 1606938"):
        check("x", 2**200, float)


def test_options_that_ask_for_more_memory_than_there_is_are_one_line():
    with pytest.raises(
        ValueError, match="^options: not enough memory for ttame .*; give smaller values$"
    ):
        create_head("ttame", vit(), branch_rank=2**53)

"""Options that a command does not read in the state it is in are refused; those that it reads are not."""

from __future__ import annotations

import copy
import dataclasses
import sys
import typing

import pytest
import torch
from training_runs import write_photos

import xattn
from xattn.cli import main
from xattn.cli.commands.bench import JOBS, Bench
from xattn.cli.entry import COMMANDS
from xattn.config import DistillConfig, ProbeConfig, PruneConfig, TrainConfig
from xattn.runtime.arguments import check_read, options_of, parse
from xattn.runtime.option_checks import AnyExcept
from xattn.training import fit, list_objectives
from xattn.training.features import cache_features
from xattn.training.probe import probe

EVERY = COMMANDS
NEEDED = {  # what a command cannot do without
    "parts": ["a.jpg", "--evidence", "mser"],
    "caption": ["a.jpg", "--vlm", "m"],
    "export": ["a.pt2"],
    "diff": ["a", "b"],
    "board": ["make", "runs/board"],
}


def made(name):
    """The command ``name`` with its defaults."""
    return copy.deepcopy(parse(EVERY[name], NEEDED.get(name, []), f"xattn {name}"))


def accepted(command, *options) -> bool:
    try:
        check_read(command, {option.dest for option in options})
    except ValueError as error:
        assert "\n" not in str(error) and "leave out" in str(error)
        return False
    return True


def put(monkeypatch, command, path, name, value):
    """Give the setting ``name`` of the dataclass at ``path``, or of one nested in it, a value."""
    owner = command
    for part in path:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        nested = [getattr(owner, field.name) for field in dataclasses.fields(owner)]
        owner = next(p for p in nested if dataclasses.is_dataclass(p) and hasattr(p, name))
    if name in {field.name for field in dataclasses.fields(owner)}:
        object.__setattr__(owner, name, value)
    else:
        monkeypatch.setattr(type(owner), name, property(lambda self: value))


def values(command, name, wanted):
    """Values that the rule allows, and values that it does not."""
    if isinstance(wanted, AnyExcept):
        return ["another"], list(wanted.values)
    allowed = wanted if isinstance(wanted, list) else [wanted]
    options = [option for option in options_of(type(command)) if option.path[-1] == name]
    choices = [c for option in options for c in typing.get_args(option.kind)]
    return allowed, [c for c in choices or ["another"] if c not in allowed]


RULES = [
    pytest.param(name, option, id=f"{name} {option.flag}")
    for name, cls in EVERY.items()
    for option in options_of(cls)
    if option.option_rules and not option.positional
]


@pytest.mark.parametrize(("name", "option"), RULES)
def test_an_option_is_taken_with_the_choices_it_belongs_to_and_no_others(name, option, monkeypatch):
    rules = [(path, s, w) for path, rule in option.option_rules for s, w in rule.settings.items()]

    def state(changed=None):
        """The command where the rules allow the option, but for one setting."""
        with monkeypatch.context() as patch:
            command = made(name)
            for place, setting, wanted in rules:
                allowed = values(command, setting, wanted)[0]
                both = [v for v in allowed if all(_fits(v, s, w, setting) for _, s, w in rules)]
                put(patch, command, place, setting, both[0])
            if changed is not None:
                put(patch, command, *changed)
            return accepted(command, option)

    assert state()
    for place, setting, wanted in rules:
        allowed, others = values(made(name), setting, wanted)
        assert others
        for value in others:
            assert not state((place, setting, value)), (setting, value)
        for value in allowed:
            if all(_fits(value, s, w, setting) for _, s, w in rules):
                assert state((place, setting, value)), (setting, value)


def _fits(value, setting, wanted, name) -> bool:
    if setting != name:
        return True
    if isinstance(wanted, AnyExcept):
        return value not in wanted.values
    return value in wanted if isinstance(wanted, list) else value == wanted


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_speaks_of_options_that_there_are(name):
    cls = EVERY[name]
    for kind in [
        cls,
        *(f for f in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(f)),
    ]:
        nested = typing.get_type_hints(kind)
        known = set(nested) | {option.path[-1] for option in options_of(kind)}
        for rule in vars(kind).get("option_rules", ()):
            assert set(rule.options) <= known
            owners = [kind, *(hint for hint in nested.values() if dataclasses.is_dataclass(hint))]
            assert all(s in known or any(hasattr(o, s) for o in owners) for s in rule.settings)


@pytest.mark.parametrize("name", EVERY)
def test_options_without_a_rule_are_always_taken(name):
    assert accepted(made(name), *(o for o in options_of(EVERY[name]) if not o.option_rules))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench explain --tokens 1025", "tokens: for job attention alone, got explain; leave"),
        ("bench explain --plot a.png", "plot: for job attention alone, got explain; leave out --plot"),
        ("train p --recipe small --crops 3", "crops: not read with mask; leave out --crops"),
        ("train p --recipe outcomes --area 1", "area: for mask alone, got outcomes"),
        ("train p --preset ttame-vgg16 --head ttame", "head: not read with --preset; leave out one"),
        ("probe p --epsilon 2", "epsilon: not read with --attention none; leave out --epsilon"),
        ("distill p --mechanism agent --rank 4", "rank: for --finetune lora alone, got none"),
        ("distill p --mechanism agent --student-lr 1", "student_lr: not read with --student-epochs 0"),
        ("prune p --method shrp --scored 9", "scored: for --method heads alone, got shrp"),
        ("explain p --classes 1 --top 3", "top: not read with --classes; leave out one of the two"),
        ("explain a.mp4 --labels folders", "labels: for photos alone, got a clip; leave out --labels"),
        ("explain a.jpg --every 2", "every: for a clip alone, got photos; leave out --every"),
        ("list heads --filter vit", "filter: for what all or models alone, got heads; leave out"),
    ],
)  # fmt: skip
def test_the_line_that_is_told(line, told, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"xattn: error: {told}")


def test_a_network_that_says_all_itself(tmp_path, capsys):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "network.json").write_text('{"settings": {"dims": 3}, "about": {}}')
    line = ["explain", "a.nii", "-b", str(folder), "--explainers", "gates"]
    for option in (["--top", "2"], ["--view", "crop"], ["--features"], ["--device", "cpu"]):
        assert main([*line, *option]) == 2
        name = option[0][2:]
        assert f"{name}: " in (told := capsys.readouterr().err) and f"leave out {option[0]}" in told
    (folder / "network.json").write_text('{"settings": {"dims": 2}, "about": {}}')
    assert main([*line, "--weights", "random"]) == 2
    assert "weights: for a classifier alone, got a mask network" in capsys.readouterr().err


# ---------------------------------------------------------------- what is read indeed


def spied(settings, read: set[str]):
    """A copy of ``settings`` that notes which fields are read, but for copies and records of all."""

    class Spy(type(settings)):  # type: ignore[misc]
        def __getattribute__(self, name):
            if sys._getframe(1).f_globals["__name__"] not in ("dataclasses", "copy"):
                read.add(name)
            return super().__getattribute__(name)

    spy = object.__new__(Spy)
    vars(spy).update(vars(settings))
    read.clear()
    return spy


@pytest.mark.parametrize("job", JOBS)
def test_a_job_of_bench_reads_the_options_that_it_takes(job):
    bench, read = Bench(job=job, aot=True), set()
    JOBS[job][1](spied(bench, read))
    read |= {"aot"} if job == "kernels" else set()  # see check
    for option in options_of(Bench):
        name = option.path[-1]
        if name not in ("job", "raw"):
            given = dataclasses.replace(bench, images=("p",)) if name == "images" else bench
            assert accepted(given, option) == (name in read), (job, name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 21)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, input_size=64, num_classes=4)


def trained(objective):
    return TrainConfig("small", objective, epochs=1, batch_size=4, workers=0, masks=4)


SETTINGS = [
    *(("train", trained(name)) for name in list_objectives()),
    ("probe", ProbeConfig("small", epochs=1, batch_size=4)),
    ("probe", ProbeConfig("small", epochs=1, batch_size=4, attention="at")),
    ("prune", PruneConfig("heads", epochs=1, batch_size=4, scored=4)),
    ("prune", PruneConfig("shrp", epochs=1, batch_size=4)),
    *(("distill", DistillConfig(1, finetune=f, finetune_epochs=1, workers=0)) for f in ("none", "lora")),
]  # fmt: skip
CHOOSE = {"recipe", "objective", "attention", "method", "finetune", "precision"}


@pytest.mark.filterwarnings("ignore:outcomes")
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_training_reads_the_settings_that_it_takes(name, settings, photos, vit, tmp_path):
    read: set[str] = set()
    config = spied(settings, read)
    if name == "train":
        head = xattn.create_head("evidence", vit, components=4, hidden=5)
        fit(head, vit, photos, config, progress=False)
    elif name == "prune":
        xattn.prune(vit, data=photos, config=config, progress=False)
    elif name == "distill":
        xattn.distill(vit, "agent", data=photos, config=config, progress=False)
    else:
        network = vit.with_taps(("head",))
        features = cache_features(network, photos, tmp_path, progress=False)
        head = xattn.create_head("efficient_probe", network, queries=4, class_names=["a", "b"])
        labels = torch.arange(len(features)) % 2
        probe(head, features, labels, config, train=range(16), validation=range(16, 21), progress=False)  # fmt: skip
    command = made(name)
    object.__setattr__(command, "train", settings)
    taken = {
        option.path[-1]: accepted(command, option)
        for option in options_of(type(command))
        if option.path[0] == "train"
    }
    unread = {field for field, is_taken in taken.items() if not is_taken}
    rates = {"lr", "student_lr", "finetune_lr", "finetune_epochs"} if name == "distill" else set()
    assert not (unread & read) - rates  # which are read beside epochs of 0
    assert set(taken) - unread - CHOOSE - rates <= read

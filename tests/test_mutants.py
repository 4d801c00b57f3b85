"""The mutants that ``make mutants`` makes: one fault each, the same ones whatever else changes."""

from __future__ import annotations

from collections import Counter

import mutants

CODE = '''
def f(x: int = 3) -> float:
    """1 + 2"""
    if x < 2 and not -x:
        raise ValueError(f"x: got {x + 1}")
    x += max(x, y=True)
    return x / 2 if x is None else x.sum(dim=1)
'''


def faults(monkeypatch, code):
    monkeypatch.setattr(mutants, "source_of", lambda path: code.encode())
    found = list(mutants.mutants_of("heads", "a.py"))
    return {m.id: (m.kind, m.source().decode()) for m in found}


def test_every_fault_is_python_and_they_differ(monkeypatch):
    found = faults(monkeypatch, CODE)
    for _, text in found.values():
        compile(text, "a.py", "exec")
        assert text.startswith('\ndef f(x: int = 3) -> float:\n    """1 + 2"""')
    assert len({text for _, text in found.values()} | {CODE}) == len(found) + 1
    assert Counter(kind for kind, _ in found.values()) == {
        **{"constant": 3, "condition": 2, "compare": 2, "sign": 2, "removed": 2, "call": 2},
        **dict.fromkeys(["logic", "flip", "boolean", "arithmetic"], 1),
    }


def test_a_fault_has_the_same_id_when_other_functions_change(monkeypatch):
    before = faults(monkeypatch, CODE)
    after = faults(monkeypatch, "def g():\n    return 1 - 2\n\n" + CODE)
    assert set(before) < set(after)


def test_a_sample_has_as_many_of_each_part_and_depends_on_the_seed(monkeypatch):
    few = {"fills": ("eval/fills", "tests/eval/fills"), "parts": ("xattn/parts", "tests/parts")}
    monkeypatch.setattr(mutants, "PARTS", few)
    found = mutants.sample(12, 0)
    assert [m.part for m in found] == 6 * list(few)
    assert mutants.sample(12, 0) == found
    assert {m.id for m in mutants.sample(12, 1)} != {m.id for m in found}

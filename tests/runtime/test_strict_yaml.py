"""Strict YAML: plain values, and aliases that cannot grow."""

import pytest

from xattn.eval.annotations.objects import parse


def powers(first, line, levels=9):
    """Each level stands for nine of the previous one."""
    lines = [f"a: &a {first}"]
    for letter in map(chr, range(ord("b"), ord("a") + levels)):
        before = chr(ord(letter) - 1)
        lines.append(f"{letter}: &{letter} " + line.format(",".join([f"*{before}"] * 9)))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (powers("[x,x,x]", "[{}]"), "alias"),
        (powers("{x: y}", "{{<<: [{}]}}"), "alias"),
        ("a: &a [*a]", "alias"),
        ("[" * 300 + "]" * 300, "nested too deep"),
        ("[" * 20_000, "nested too deep"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!int ''", "."),
        ("2026-99-99", "month"),
        ("[", "expected"),
    ],
)
def test_what_is_wrong_is_a_value_error(text, what):
    with pytest.raises(ValueError, match=what):
        parse(text)


def test_an_alias_of_a_text_is_read():
    assert parse("classes: {1: &cat cat, 2: *cat}") == {"classes": {1: "cat", 2: "cat"}}

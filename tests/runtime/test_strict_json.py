"""Strict JSON: any fault is a ValueError with a message of its own."""

import pytest

from xattn.runtime.strict_json import DEEPEST, parse


def nested(levels, opening="[", closing="]"):
    return opening * levels + closing * levels


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (nested(DEEPEST + 1), "nested too deep"),
        (nested(100_000), "nested too deep"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "nested too deep"),
        ("[NaN]", "NaN"),
        ("-Infinity", "Infinity"),
        ("9" * 5000, "too many digits"),
        ("{", "Expecting"),
        ("", "Expecting"),
        (b"\xff", "decode"),
    ],
)
def test_what_is_wrong_is_a_value_error(text, what):
    with pytest.raises(ValueError, match=what):
        parse(text)


def test_the_deepest_level_is_read_in_lists_and_tables():
    value = parse(nested(DEEPEST))
    for _ in range(DEEPEST - 1):
        (value,) = value
    assert value == []
    assert parse('{"a":' * DEEPEST + "1" + "}" * DEEPEST)["a"]["a"]


def test_bytes_text_and_a_byte_order_mark_are_one():
    assert parse('{"ä": 1}') == parse('{"ä": 1}'.encode()) == parse('{"ä": 1}'.encode("utf-8-sig"))


def test_a_log_may_hold_nan():
    assert str(parse("[NaN, Infinity]", nan=True)) == "[nan, inf]"


def test_tables_can_refuse_equal_keys():
    def strict(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    assert parse('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="twice"):
        parse('{"a": 1, "a": 2}', table=strict)

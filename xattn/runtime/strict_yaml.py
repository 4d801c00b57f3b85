"""YAML from files that may be damaged or hostile: any fault of the text is a ``ValueError``."""

from __future__ import annotations

from typing import Any

from xattn.runtime.strict_json import check_depth


def parse(text: str) -> Any:
    """The value of YAML with plain types only.

    An alias may stand for a text or number, but not for a list or table: nine lists, each with nine
    aliases of the previous one, stand for 9^9 values.

    Raises:
        ValueError: not YAML, nested too deep, or an alias of a list or table.

    >>> parse("names: {1: &cat cat, 2: *cat}")
    {'names': {1: 'cat', 2: 'cat'}}
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            is_alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            if is_alias and not isinstance(node, yaml.ScalarNode):
                raise ValueError("an alias in it stands for a list or table; write that out")
            return node

    try:
        value = yaml.load(text, Loader)
    except MemoryError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # parsing numbers and dates can fail in any way
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    check_depth(value)
    return value

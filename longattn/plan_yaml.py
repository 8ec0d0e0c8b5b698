"""YAML as plans and flags write it: `1e6` is a number, no key comes twice, nothing is an alias of another part."""

from __future__ import annotations

import re
from collections import Counter
from typing import IO, Any

import yaml

__all__ = ["dump_yaml", "load_yaml"]

# what YAML 1.2 and people take for a number, and YAML 1.1 for text
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))

LINE_BREAKS = frozenset("\x85\u2028\u2029")

# What PyYAML's constructors raise, besides its own errors, for a text that its tag does not fit (`!!bool maybe`).
TAG_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader follows YAML 1.1, where 1e6 is text and the last of two equal keys wins."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A few aliases of aliases stand for more values than any memory holds."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                problem=f"aliases are not read, write out what *{event.anchor} stands for",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} comes twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*_FLOAT)


def load_yaml(text: str | IO[str], name: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document, or an open file.
        name: what errors call it.

    Raises:
        ValueError: it is not YAML, or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"Plan: {name}{place}: {error.problem or error.context}") from None
    except RecursionError:
        raise ValueError(f"Plan: {name} is nested too deeply") from None
    except (yaml.YAMLError, *TAG_ERRORS) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"Plan: {name} is not YAML text: {reason}") from None


class _Dumper(yaml.SafeDumper):
    """Writes no alias, and quotes what `_Loader` would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if LINE_BREAKS.intersection(data) else None  # unquoted, PyYAML reads them as the end of a line
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_implicit_resolver(*_FLOAT)
_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(value: Any) -> str:
    """Write JSON's types as a YAML document that `load_yaml` reads back.

    Example:
        >>> dump_yaml({"rope": {"rope_type": "yarn", "factor": 4.0}})
        'rope:\\n  rope_type: yarn\\n  factor: 4.0\\n'
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)

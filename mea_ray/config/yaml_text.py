"""Reads and writes YAML 1.2 (core schema), safely for arbitrary files.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``on`` is a truth value, ``1:30`` is 90, and a later key silently
replaces an earlier one. Here floats are floats, only ``true`` and ``false`` are truth values, times are text, and a
duplicate key is an error. Time and memory are bounded: by the size of the text, its depth, its number of values with
all aliases written out, and the size of its whole numbers.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import BaseConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from mea_ray.core.errors import ConfigError

MAX_BYTES = 256 * 1024
"""Largest file."""
MAX_DEPTH = 50
"""Deepest nesting."""
MAX_VALUES = 50_000
"""Maximum number of values in a file, with aliases expanded."""
MAX_INTEGER = 2**63 - 1
"""Maximum absolute value of an integer."""

_TAG = "tag:yaml.org,2002:"
_TRUTH = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("bool", _TRUTH, "tTfF"),
    ("int", _INTEGER, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", re.compile(r"(?:~|null|Null|NULL)\Z"), "~nN"),
    ("merge", re.compile(r"<<\Z"), "<"),
)


class _Resolver(BaseResolver):
    """The core schema of YAML 1.2, and the merge key ``<<``."""


class _Constructor(BaseConstructor):
    """Builds texts, numbers, truth values, null, lists and mappings with text as keys; no other tag is known."""

    def null(self, node: Node) -> None:
        self.text(node)

    def text(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise _problem("expected a single value", node)
        return str(node.value)

    def truth(self, node: Node) -> bool:
        text = self._matching(node, _TRUTH, "not a boolean; write true or false")
        return text.lower() == "true"

    def integer(self, node: Node) -> int:
        text = self._matching(node, _INTEGER, "not an integer")
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Python itself refuses to read thousands of digits.
        number = int(text if base == 10 else text[2:], base) if len(text) <= 40 else MAX_INTEGER + 1
        if abs(number) > MAX_INTEGER:
            raise _problem(f"{_short(text)} is beyond {MAX_INTEGER}; quote it if it is text", node)
        return number

    def real(self, node: Node) -> float:
        text = self._matching(node, _FLOAT, "not a number")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _matching(self, node: Node, pattern: re.Pattern[str], otherwise: str) -> str:
        text = self.text(node)
        if not pattern.match(text):
            raise _problem(f"{_short(text)} is {otherwise}", node)
        return text

    def sequence(self, node: Node) -> list[Any]:
        if not isinstance(node, SequenceNode):
            raise _problem("expected a list", node)
        return [self.construct_object(child, deep=True) for child in node.value]

    def mapping(self, node: Node) -> dict[str, Any]:
        if not isinstance(node, MappingNode):
            raise _problem("expected keys with values", node)
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        has_merge = False
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                if has_merge:
                    raise _problem("the key '<<' is given twice; merge several mappings by a list: <<: [*a, *b]", key)
                has_merge = True
                # Of several mappings the first wins, as the merge key's specification says.
                for source in reversed(value.value) if isinstance(value, SequenceNode) else [value]:
                    merged = {**merged, **self.mapping(source)}
                continue
            if not isinstance(key, ScalarNode):
                raise _problem("a key must be text", key)
            if key.value in own:
                raise _problem(f"the key {_short(key.value)} is given twice; remove one of them", key)
            own[key.value] = self.construct_object(value, deep=True)
        return {**merged, **own}

    def unknown(self, node: Node) -> None:
        raise _problem(f"the tag {_short(node.tag)} is not known; leave it out", node)

    yaml_constructors = {
        f"{_TAG}null": null,
        f"{_TAG}str": text,
        f"{_TAG}bool": truth,
        f"{_TAG}int": integer,
        f"{_TAG}float": real,
        f"{_TAG}seq": sequence,
        f"{_TAG}map": mapping,
        None: unknown,
    }


class _Loader(Reader, Scanner, Parser, Composer, _Constructor, _Resolver):
    """A loader with bounded time and memory."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Constructor.__init__(self)
        _Resolver.__init__(self)
        self._depth = self._composed = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node; count its values with aliases expanded."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"lists and mappings are nested more than {MAX_DEPTH} deep",
                problem_mark=self.get_mark(),
            )
        self._composed += 1
        if self._composed > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=self.get_mark())
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        elif id(node) not in self._sizes:
            raise _problem("an alias stands inside of what it refers to", node)
        if self._sizes[id(node)] > MAX_VALUES:
            raise _problem(f"more than {MAX_VALUES} values, with aliases expanded", node)
        return node


class _TextLoader(_Loader):
    """A loader that reads every scalar as text."""

    yaml_implicit_resolvers = {}


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


for _tag, _pattern, _first in _SCALARS:
    _Resolver.add_implicit_resolver(f"{_TAG}{_tag}", _pattern, list(_first))
_Resolver.add_implicit_resolver(f"{_TAG}null", re.compile(r"\Z"), [""])
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}int", _INTEGER, list("-+0123456789"))


def parse(text: str, where: str, *, only_text: bool = False) -> Any:
    """Read one YAML value.

    Args:
        text: YAML.
        where: Description, for messages.
        only_text: Read unquoted scalars as text, too.

    Raises:
        ConfigError: It is not YAML, or too large, too deep, or circular; one line with the position.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} characters; split it, or shorten its lists")
    try:
        return (_TextLoader if only_text else _Loader)(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_one_line(error)}") from None


def read(path: str | Path) -> Any:
    """Read the YAML file ``path``, UTF-8 or UTF-16 with a byte order mark.

    Raises:
        ConfigError: It cannot be read, or is not text or not YAML.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 4)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read config {str(path)!r}: {reason}; give the path of a YAML file") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes; give the path of a YAML file")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: the byte {data[error.start]:#04x} at position {error.start}; save it as UTF-8"
        ) from None
    return parse(text, str(path))


def dump(tree: Any, width: int = 80) -> str:
    """Write plain JSON types as YAML; ``parse`` gives the same back, and so does a reader of YAML 1.1.

    Args:
        tree: Texts, numbers, truth values, null, lists and mappings with text as keys.
        width: Columns at which long lines are broken.
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def _problem(text: str, node: Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _one_line(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    parts = [part for part in (error.context, error.problem) if part]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + ", ".join(parts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")

"""YAML as data that remembers its lines, and data as YAML.

The text is read by the plain rules of YAML 1.2: `1e-4` is a number, `true` and `false` are the only
flags, `2020-01-01` is text. What YAML 1.1 reads as something else (`no`, `017`, `12:30`) must be quoted or
written plainly. Tags other than those of plain data are refused, and so are aliases.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stackwise.config.errors import NO_VALUE, ConfigError, Problem
from stackwise.config.shape import Path, Source, dotted, source_of

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

_PREFIX = "tag:yaml.org,2002:"


@dataclass
class Document:
    """Nested data, where each key was written, and what was wrong with the text."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: dict[Path, Source] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def merge(self, other: "Document") -> None:
        """Lay another document over this one: maps merge key by key, everything else is replaced."""
        self.problems += other.problems
        self._merge(self.data, other.data, (), other.sources)

    def _merge(
        self, into: dict[str, Any], data: Mapping[str, Any], at: Path, sources: Mapping[Path, Source]
    ) -> None:
        for key, value in data.items():
            path = (*at, key)
            old = into.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                self._merge(old, value, path, sources)
                continue
            into[key] = value
            self.sources = {p: s for p, s in self.sources.items() if p[: len(path)] != path}
            self.sources[path] = source_of(path, sources)
            self.sources |= {p: s for p, s in sources.items() if p[: len(path)] == path}


def parse(text: str, file: str) -> Document:
    """Read YAML text. Duplicate keys are collected as problems; text that is no YAML map raises ConfigError."""
    document = Document()
    if len(text) > MAX_BYTES:
        raise ConfigError(
            Problem("", f"larger than {MAX_BYTES} bytes, too large for a configuration", file=file)
        )
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        problem = str(error.problem)
        hint = "indent with blanks, not with tabs" if "'\\t'" in problem else ""
        raise ConfigError(Problem("", f"not YAML: {problem}", hint=hint, file=file, line=line)) from None
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(Problem("", f"not YAML: {reason}", file=file)) from None
    if root is None or root.tag.endswith(":null"):
        return document
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            Problem("", "must be a map of sections", allowed="section: {key: value}", file=file, line=1)
        )
    document.data = _Builder(document, file).build(root, ())
    return document


def parse_value(text: str) -> Any:
    """The value that one piece of YAML stands for, as in `key=value`. Raises ConfigError."""
    document = parse(f"value: {text}", "command line")
    if document.problems:
        raise ConfigError(document.problems)
    return document.data["value"]


def flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data by dotted keys. Lists of maps are taken apart as well: `training.stages.0.lr`."""
    rows: dict[str, Any] = {}
    if isinstance(data, dict) and data:
        children = data.items()
    elif isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        children = {str(i): item for i, item in enumerate(data)}.items()
    else:
        return {prefix: data}
    for key, child in children:
        rows |= flattened(child, f"{prefix}.{key}" if prefix else key)
    return rows


def dump(data: Any) -> str:
    """YAML that `parse` reads back as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _refused(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As PyYAML, but without aliases and with an end to nesting."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            # A short text of aliases can stand for endless data.
            raise _refused(f"the alias *{event.anchor} is not supported; write the value again", event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _refused(f"nested too deeply, {MAX_DEPTH} levels at most", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    # The same rules as the loader's, so that a text that would be read as a number is quoted.
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # These count as line ends or vanish unless they are escaped, which only double quotes allow.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(_PREFIX + "str", text, style=style)


def _number(text: str) -> int:
    text = text.replace("_", "").lower()
    return int(text, 16 if "0x" in text else 10)


def _real(text: str) -> float:
    value = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text:
        raise ValueError(f"{text:.40} is too large for a number; write .inf where infinity is meant")
    return value


def _unclear(text: str) -> Any:
    if ":" in text:
        raise ValueError(f"some readers of YAML take {text} for a number of minutes; put it in quotes")
    if text.lstrip("+-").startswith("0"):
        raise ValueError(
            f"some readers of YAML take {text} as octal; write {_number(text)}, or put it in quotes"
        )
    flag = "true" if text.lower() in ("yes", "on") else "false"
    raise ValueError(f"some readers of YAML take {text} for {flag}; write {flag}, or put it in quotes")


_PLAIN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "unclear": (
        r"[yY]es|YES|[nN]o|NO|[oO]n|ON|[oO]ff|OFF|[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?",
        _unclear,
    ),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+", _number),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        lambda text: _real(text),
    ),
}
"""Kind of plain scalar -> its spelling and its value. The first that matches counts."""

for _kind, (_spelling, _) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _kind, re.compile(f"^(?:{_spelling})$"), None)
_Dumper.add_representer(str, _represent_text)


def is_text(text: str) -> bool:
    """Whether a text can be written down: half of a surrogate pair, which YAML can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Builder:
    """Turns composed nodes into data, noting the line of every key."""

    def __init__(self, document: Document, file: str) -> None:
        self.document = document
        self.file = file

    def build(self, node: yaml.Node, path: Path) -> Any:
        """The data of a node; NO_VALUE where there is none, with a problem that says why."""
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            items = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return [item for item in items if item is not NO_VALUE]
        if isinstance(node, yaml.ScalarNode) and node.tag.startswith(_PREFIX):
            kind = node.tag.removeprefix(_PREFIX)
            if not is_text(node.value):
                self.document.problems.append(self._problem(node, path, "holds half of a character"))
                return NO_VALUE
            if kind == "str":
                return node.value
            if kind in _PLAIN:
                try:
                    return _PLAIN[kind][1](node.value)
                except ValueError as error:
                    self.document.problems.append(self._problem(node, path, str(error)))
                    return NO_VALUE
        self.document.problems.append(self._problem(node, path, f"the tag {node.tag} is not supported"))
        return NO_VALUE

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not is_text(key_node.value):
                self.document.problems.append(self._problem(key_node, path, "a key must be plain text"))
                continue
            key = key_node.value
            if key in lines:
                message = f"written twice, in lines {lines[key]} and {line}"
                self.document.problems.append(
                    Problem(dotted((*path, key)), message, file=self.file, line=line)
                )
                continue
            lines[key] = line
            value = self.build(value_node, (*path, key))
            if value is not NO_VALUE:  # what is wrong with it has been noted, and is enough
                self.document.sources[*path, key] = Source(self.file, line)
                data[key] = value
        return data

    def _problem(self, node: yaml.Node, path: Path, message: str) -> Problem:
        return Problem(dotted(path), message, file=self.file, line=node.start_mark.line + 1)

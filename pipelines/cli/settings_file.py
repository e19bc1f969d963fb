"""Parses the values of settings, in a YAML file (`--config`) and on the command line.

YAML 1.1 reads `no` as false and `none` as a string. The type of the setting decides instead: a choice
of words accepts the word, an optional setting accepts `none`. Nothing in a file is ignored: a duplicate
key is an error, an empty section keeps its defaults, and a dotted key (`train.steps: 3`) is the setting
of that name.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

import yaml

from vlv_model.config import Config
from vlv_model.errors import ConfigError

# PyYAML does not catch errors of the constructors that a tag calls.
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
NONE = ("none", "null")  # as --help shows an unset value, and as YAML writes it


# ------------------------------------------------------------------------------ types of settings


def section_of(annotation: Any) -> type[Config] | None:
    """The class of a section of settings; None for a single setting."""
    is_class = isinstance(annotation, type)
    return annotation if is_class and issubclass(annotation, Config) else None


def annotation_of(cls: type[Config], dotted: str) -> Any:
    """The type of a setting; None if there is no such setting."""
    annotation: Any = cls
    for name in dotted.split("."):
        section = section_of(annotation)
        if section is None or name not in section.model_fields:
            return None
        annotation = section.model_fields[name].annotation
    return annotation


def is_list(annotation: Any) -> bool:
    """Whether a setting is a list of any length."""
    return any(Ellipsis in get_args(inner) for inner in (annotation, *get_args(annotation)))


def type_words(annotation: Any) -> str:
    """The type of a setting in words, as `--help` shows it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_words(get_args(annotation)[0])
    if origin is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        inner = [type_words(a) for a in get_args(annotation) if a is not type(None)]
        return " or ".join(inner)
    if origin is not None:
        inner = [type_words(a) for a in get_args(annotation) if a is not Ellipsis]
        name = {tuple: "list", dict: "mapping"}.get(origin, origin.__name__)
        return f"{name} of {', '.join(inner)}"
    return {str: "text", int: "integer", float: "number", bool: "true|false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _alternatives(inner)
    else:
        yield annotation


def _is_choice(annotation: Any, text: str) -> bool:
    """Whether a text is one of the literal choices of a setting."""
    choices = (get_args(a) for a in _alternatives(annotation) if get_origin(a) is Literal)
    return any(text in words for words in choices)


def _is_none(annotation: Any, text: str) -> bool:
    return type(None) in _alternatives(annotation) and text in NONE


# ------------------------------------------------------------------------------- the command line


def parse_value(cls: type[Config], key: str, text: str) -> Any:
    """The value of a text on the command line; ConfigError if it cannot be parsed."""
    annotation = annotation_of(cls, key)
    if _is_choice(annotation, text):
        return text
    if _is_none(annotation, text):
        return None
    if type_words(annotation) == "text":  # unparsed: a path may look like YAML
        return text
    try:
        value = yaml.safe_load(text)
        lists = [get_args(a) for a in _alternatives(annotation) if Ellipsis in get_args(a)]
        is_switch = isinstance(value, bool) and bool in _alternatives(annotation)
        if value is None or isinstance(value, list | dict) or is_switch or not lists:
            return value
        # A list of any length may be written without brackets: a,b,c.
        items = [item.strip() for item in text.split(",")]
        return items if lists[0][0] is not int else [yaml.safe_load(i) for i in items]
    except _YAML_ERRORS:
        raise ConfigError(f"{key}: cannot read the value '{text}'") from None


# -------------------------------------------------------------------------------------- the file


class FileSetting(NamedTuple):
    """The value of a setting in a file, and its line."""

    value: Any
    line: int


def read_file(cls: type[Config], file: str) -> dict[str, FileSetting]:
    """The settings of a YAML file, by dotted key.

    Raises ConfigError, one line, for a file that cannot be read or is not YAML, and for a duplicate
    key.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"--config {file}: {reason}") from None
    try:
        return _Reader(cls, file, text).read()
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"--config {file}: not valid YAML{where}") from None


class _Reader:
    """Reads one file; each YAML node is parsed according to the type of its setting."""

    def __init__(self, cls: type[Config], file: str, text: str) -> None:
        self.cls, self.file = cls, file
        self.loader = yaml.SafeLoader(text)
        self.found: dict[str, FileSetting] = {}
        self._merged: set[int] = set()  # ids of mappings whose `<<` is already resolved

    def read(self) -> dict[str, FileSetting]:
        root = self.loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            self._section(root, "")
        elif root is not None and not _is_empty(root):
            raise ConfigError(f"--config {self.file}: expected a mapping of settings")
        return self.found

    def _section(self, node: yaml.MappingNode, prefix: str) -> None:
        for name, inner in self._entries(node, prefix):
            key = prefix + str(name.value)
            annotation = annotation_of(self.cls, key)
            if section_of(annotation) is not None:
                if isinstance(inner, yaml.MappingNode):
                    self._section(inner, f"{key}.")
                    continue
                if _is_empty(inner):  # everything in it is commented out
                    continue
            if key in self.found:  # given with a dotted key and in its section
                self._refuse(key, self.found[key].line, name)
            self.found[key] = FileSetting(self._value(inner, annotation, key), _line(name))

    def _entries(self, node: yaml.MappingNode, prefix: str) -> list[tuple[yaml.Node, yaml.Node]]:
        """Keys and values of a mapping. Its own keys override those merged by `<<`; no duplicates."""
        if id(node) not in self._merged:
            self._merged.add(id(node))
            lines: dict[Any, int] = {}
            for name, _ in node.value:
                if name.value in lines:
                    self._refuse(f"{prefix}{name.value}", lines[name.value], name)
                if isinstance(name, yaml.ScalarNode):
                    lines[name.value] = _line(name)
            self.loader.flatten_mapping(node)
        return list({str(name.value): (name, inner) for name, inner in node.value}.values())

    def _refuse(self, key: str, line: int, again: yaml.Node) -> NoReturn:
        raise ConfigError(
            f"--config {self.file}: '{key}' is given twice (lines {line} and {_line(again)}): "
            "give it once"
        )

    def _value(self, node: yaml.Node, annotation: Any, key: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is None:  # without quotes
            if _is_choice(annotation, node.value):
                return node.value
            if _is_none(annotation, node.value):
                return None
        if isinstance(node, yaml.MappingNode):
            self._entries(node, f"{key}.")
        return self.loader.construct_object(node, deep=True)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"

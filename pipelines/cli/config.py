"""The settings of a job: defaults < YAML file (`--config`) < `key=value` on the command line.

A job's settings are one frozen pydantic class, nested by section. This module builds an instance of it
from a command line, prints `--help` and `--print-config` from the class, and turns every error into one
line that names the setting. `pipelines.cli.settings_file` parses the values.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from pipelines.cli.settings_file import (
    annotation_of,
    is_list,
    parse_value,
    read_file,
    section_of,
    type_words,
)
from pipelines.storage.files import PROTOCOLS, is_url
from vlv_model.config import Config
from vlv_model.errors import ConfigError

C = TypeVar("C", bound=Config)


# ---------------------------------------------------------------------------------------- paths


def in_submitted_copy(folder: Path) -> bool:
    """Whether a folder is in the temporary copy of `--working-dir` that Ray makes for a submitted job."""
    return "working_dir_files" in folder.parts


def _local(path: str) -> Path:
    if not path.strip():
        raise ValueError("it is empty: give a path")
    if is_url(path):
        raise ValueError(f"'{path}' is a URL: give a path on a disk that all machines share")
    if path != path.encode("utf-8", "replace").decode():
        raise ValueError(f"{path!a} is not UTF-8 and could not be stored in a table: rename it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"'{path}': {error}") from None


def _output(path: str) -> str:
    expanded = _local(path)
    if not expanded.is_absolute() and in_submitted_copy(Path.cwd()):
        raise ValueError(
            f"'{path}' is relative, but this job runs in Ray's temporary copy of the working "
            "directory, where results are deleted: give an absolute path"
        )
    return os.path.abspath(expanded)


def as_input(path: str) -> str:
    """The absolute path of what a job reads. Raises ValueError for a URL and for text that is no path."""
    return os.path.abspath(_local(path))


def _path_or_url(path: str, local: Callable[[str], str]) -> str:
    if not is_url(path):
        return local(path)
    protocol = path.partition("://")[0]
    if protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ValueError(f"'{path}': expected a path or a URL of {known}")
    return path.rstrip("/")


OutputPath = Annotated[str, AfterValidator(_output)]
"""A local path that a job writes to. A relative path is refused in a job submitted to Ray."""

InputPath = Annotated[str, AfterValidator(as_input)]
"""A local path that a job reads; made absolute because workers run in other folders."""

OutputPathOrUrl = Annotated[str, AfterValidator(partial(_path_or_url, local=_output))]
"""Where a table is written: an OutputPath or a URL of an object store."""

InputPathOrUrl = Annotated[str, AfterValidator(partial(_path_or_url, local=as_input))]
"""Where a table or a list is read: an InputPath or a URL of an object store."""


def one_or_more(value: Any) -> Any:
    """A validator of lists: one text is a list of one."""
    return (value,) if isinstance(value, str) else value


# ------------------------------------------------------------------------------------- building


def load(
    cls: type[C],
    config_file: str | None,
    overrides: Sequence[str],
    given: Mapping[str, Any] = types.MappingProxyType({}),
) -> C:
    """Build `cls` from its defaults, a YAML file, `key=value` overrides, and values that need no parsing
    (`given`, by dotted key); the later ones win.

    A setting that earlier versions had (`Config.removed`) is ignored, with a warning that says what
    decides, so their files still open. Raises ConfigError, one line, for an unreadable file, an unknown
    setting (with the nearest known one), a value of the wrong type or out of range, and a missing
    required setting.
    """
    values: dict[str, Any] = {}
    file_settings = read_file(cls, config_file) if config_file else {}
    origins = {k: f" (--config {config_file} line {s.line})" for k, s in file_settings.items()}
    for key, setting in file_settings.items():
        if not _is_removed(cls, key, origins[key]):
            _insert(values, key, setting.value, origins[key])
    previous = ""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            hint = f"; if it belongs to the word before it: '{previous} {override}'"
            raise ConfigError(
                f"cannot read '{override}': settings are given as key=value{hint if previous else ''}"
            )
        previous = override
        if _is_removed(cls, key, ""):
            continue
        _insert(values, key, parse_value(cls, key, text))
        origins.pop(key, None)
    for key, value in given.items():
        _insert(values, key, value)
        origins.pop(key, None)
    return build(cls, values, origins)


def build(
    cls: type[C],
    values: Mapping[str, Any],
    origins: Mapping[str, str] = types.MappingProxyType({}),
) -> C:
    """Validate a nested mapping as `cls`; ConfigError, one line, if it is invalid.

    `origins` maps dotted keys to where they were given, as text that is appended to the error.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(cls, error, origins)) from None


def dump(config: Config) -> dict[str, Any]:
    """The resolved settings as JSON values, as run folders and checkpoints store them."""
    return config.model_dump(mode="json")


def _is_removed(cls: type[Config], key: str, origin: str) -> bool:
    """Whether an earlier version had this setting; if so, say what decides in its place."""
    section, _, name = key.rpartition(".")
    owner = section_of(annotation_of(cls, section)) if section else cls
    if owner is None or name not in owner.removed:
        return False
    print(f"warning: setting '{key}' is gone{origin}: {owner.removed[name]}", file=sys.stderr)
    return True


def _insert(values: dict[str, Any], dotted: str, value: Any, origin: str = "") -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: '{section}' is a single value, not a section{origin}")
        values = inner
    values[name] = value


def _required_in(cls: type[Config], key: str) -> str:
    """The setting itself, or the first required one of a missing section."""
    section = section_of(annotation_of(cls, key))
    needed = [n for n, f in section.model_fields.items() if f.is_required()] if section else []
    return _required_in(cls, f"{key}.{needed[0]}") if needed else key


def _one_line(cls: type[Config], error: ValidationError, origins: Mapping[str, str]) -> str:
    details = error.errors()
    # A misspelt required setting is both unknown and missing: report the unknown one.
    details = [d for d in details if d["type"] == "extra_forbidden"] or details
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    key = ".".join(map(str, details[0]["loc"]))
    found: Iterator[str] = (
        origin for name, origin in origins.items() if f"{key}.".startswith(f"{name}.")
    )
    if details[0]["type"] == "extra_forbidden":  # perhaps a section: look for its settings
        found = chain(found, (o for name, o in origins.items() if name.startswith(f"{key}.")))
    origin = next(found, "")
    return _describe(cls, details[0]) + origin + more


def _describe(cls: type[Config], detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        value = detail["input"]
        while isinstance(value, dict) and value:  # an unknown section: name its setting
            name, value = next(iter(value.items()))
            key += f".{name}"
        known = [setting.key for setting in settings(cls)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if not near:  # perhaps the right name in the wrong section
            last = key.rsplit(".", 1)[-1]
            near = [k for k in known if difflib.get_close_matches(last, [k.rsplit(".")[-1]])][:1]
        hint = f"did you mean '{near[0]}'?" if near else "--help lists all settings"
        return f"unknown setting '{key}': {hint}"
    if detail["type"] == "missing":
        key = _required_in(cls, key)
        return f"setting '{key}' is required: give {key}=… or put it in the --config file"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # Rules between settings of a section name them in full themselves.
        names = key and section_of(annotation_of(cls, key)) is not None and f"{key}." in message
        return message if names or not key else f"{key}: {message}"
    return f"{key}={detail['input']!r}: {message[0].lower()}{message[1:]}"


# ----------------------------------------------------------------------------------------- help


class Setting:
    """One setting of a settings class: dotted key, type in words, default, meaning."""

    def __init__(self, key: str, field: FieldInfo) -> None:
        self.key = key
        self.type = type_words(field.annotation) + _bounds(field)
        self.meaning = field.description or ""
        if field.is_required():
            self.default = "required"
        else:
            default = field.get_default(call_default_factory=True)
            self.default = _default_words(default)


def _default_words(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return str(list(default)) if isinstance(default, tuple) else str(default)


def settings(cls: type[Config], prefix: str = "") -> Iterator[Setting]:
    """All settings of a class, depth first, in the order of declaration."""
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, field)


def _bounds(field: FieldInfo) -> str:
    words = []
    for rule in field.metadata:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (bound := getattr(rule, name, None)) is not None:
                words.append(f" {sign} {bound:g}")
    return "".join(words)


def help_text(
    cls: type[Config],
    usage: str,
    description: str,
    aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
    """The text of `--help`: usage, what the job does, its options, and every setting."""
    lines = [
        f"usage: {usage} [--config FILE] [--print-config] [key=value ...]",
        "",
        description.strip(),
        "",
        "  --config FILE    YAML file of settings; the command line overrides it",
        "  --print-config   print the resolved settings as YAML and exit",
        *(f"  --{name.replace('_', '-'):<15}  {name}=true" for name in _flags(cls)),
        *(f"  {option + ' VALUE':<15}  {key}=VALUE" for option, key in aliases.items() if option),
        "  --help           print this text and exit",
        "",
        "settings: key (type, default): meaning",
    ]
    section = None
    for setting in settings(cls):
        head = setting.key.rpartition(".")[0]
        if head != section:
            lines.append("")
            section = head
        lines.append(f"  {setting.key} ({setting.type}, {setting.default})")
        lines += textwrap.wrap(
            setting.meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------- command line


def _flags(cls: type[Config]) -> list[str]:
    """Top-level boolean settings, which are options too: `--dry-run` sets `dry_run=true`."""
    return [name for name, field in cls.model_fields.items() if field.annotation is bool]


def _flag(cls: type[Config], word: str) -> str | None:
    name = word.removeprefix("--").replace("-", "_")
    return name if word.startswith("--") and name in _flags(cls) else None


_OPTIONS_EVERYWHERE = {"--model": "model.path"}


def _names_file(cls: type[Config], word: str) -> bool:
    """Whether a word with `=` or a leading `-` is the name of a file and cannot be a setting."""
    if not word.startswith("-") and "=" not in word:
        return False
    return annotation_of(cls, word.partition("=")[0]) is None and os.path.lexists(word)


def parse(
    cls: type[C],
    argv: Sequence[str],
    usage: str,
    description: str,
    aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> C:
    """Parse a job's command line; `--help` and `--print-config` print and exit with status 0.

    `aliases` maps options to settings (`{"--format": "format"}`); every job with a model also has
    `--model`. The empty name is the positional argument (`{"": "table"}` in `jobs/status.py TABLE`), or
    all of them where its setting is a list. Of these, a word that is a file's name is no setting, and
    after `--` no word is.
    """
    aliases = dict(_OPTIONS_EVERYWHERE if annotation_of(cls, "model.path") else {}) | dict(aliases)
    takes_many = "" in aliases and is_list(annotation_of(cls, aliases[""]))
    config_file: str | None = None
    show = False
    overrides: list[str] = []
    listed: list[str] = []
    words = iter(argv)
    for word in words:
        option, separator, value = word.partition("=")
        if takes_many and word == "--":
            listed += words
        elif takes_many and _names_file(cls, word):
            listed.append(word)
        elif word in ("-h", "--help"):
            print(help_text(cls, usage, description, aliases))
            sys.exit(0)
        elif word == "--print-config":
            show = True
        elif (flag := _flag(cls, word)) is not None:
            overrides.append(f"{flag}=true")
        elif option == "--config" or (option in aliases and option):
            if not separator and (value := next(words, "")) == "":
                raise ConfigError(f"{option} needs a value: {option} VALUE")
            if option == "--config":
                if config_file is not None:
                    raise ConfigError(
                        f"--config is given twice ({config_file}, {value}): put both in one file"
                    )
                config_file = value
            else:
                overrides.append(f"{aliases[option]}={value}")
        elif word.startswith("-"):
            raise ConfigError(f"unknown option '{option}': settings are given as key=value")
        elif takes_many and not separator:
            listed.append(word)
        elif "" in aliases and not separator:
            earlier = next((o for o in overrides if o.startswith(f"{aliases['']}=")), None)
            if earlier is not None:
                raise ConfigError(
                    f"cannot read '{word}': {aliases['']} is already given ('{earlier}'), and settings are "
                    f"given as key=value; if it belongs to the word before it: '{overrides[-1]} {word}'"
                )
            overrides.append(f"{aliases['']}={word}")
        else:
            overrides.append(word)
    config = load(cls, config_file, overrides, {aliases[""]: listed} if listed else {})
    if show:
        print(yaml.safe_dump(dump(config), sort_keys=False), end="")
        sys.exit(0)
    return config

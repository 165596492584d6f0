"""The few of vLLM's arguments that a launcher must know before a stage is started.

The head tells everything else, once vLLM's own parser has read its arguments (observe/status_events.py, `HeadApi`). To
ask that parser here would cost every start the import of vLLM, 4 to 8 s. This one reads the same words: those of a
--config file first, then those typed. It takes underscores as dashes, prefixes of options, and the last of several. A
test compares both parsers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from stagewire.checkpoint.model_config import LoadFlags, parse_overrides
from stagewire.errors import ConfigError

__all__ = [
    "ADDRESS_FLAGS",
    "CONFIG_FLAG",
    "OPTIONS",
    "OWN_FLAGS",
    "START_TIMEOUT_FLAG",
    "TLS_FLAGS",
    "EarlyArguments",
    "read_early",
]

CONFIG_FLAG = "--config"
START_TIMEOUT_FLAG = "--pipeline-start-timeout"
TENSOR_FLAG = "--tensor-parallel-size"
# Set for each stage by the launcher.
OWN_FLAGS = (
    "--model",
    "--external-pp-worker",
    "--pipeline-stage-mode",
    "--pipeline-stage-idx",
    "--pipeline-total-stages",
    "--pipeline-layer-range",
    "--pipeline-local-bind-port",
    "--pipeline-prev-stage-addr",
    "--pipeline-prev-stage-service-addr",
    "--pipeline-standby",
)
ADDRESS_FLAGS = ("--host", "--port", "--uds")
TLS_FLAGS = ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers")
# Flags that take no value.
_SWITCHES = ("--external-pp-worker", "--pipeline-standby")
OVERRIDES_FLAG = "--hf-overrides"
LOAD_FLAGS = ("--load-format", "--config-format", "--hf-config-path", OVERRIDES_FLAG)
OPTIONS = (*OWN_FLAGS, *ADDRESS_FLAGS, *TLS_FLAGS, TENSOR_FLAG, START_TIMEOUT_FLAG, *LOAD_FLAGS)


@dataclass(frozen=True)
class EarlyArguments:
    """``typed``, ``given``: which of `OPTIONS` are on the command line, and which there or in the --config file.
    ``num_ranks``: tensor parallel ranks of each stage. ``load``: how the model's folder is read.
    """

    typed: frozenset[str]
    given: frozenset[str]
    num_ranks: int
    load: LoadFlags = field(default_factory=LoadFlags)

    def describe(self, flags: Sequence[str]) -> str:
        """Those of ``flags`` that are given, and where; empty when there is none."""
        found = [flag for flag in flags if flag in self.given]
        where = "after `--`" if self.typed.intersection(found) else f"in the file of {CONFIG_FLAG}"
        return f"{', '.join(found)} {where}" if found else ""


class _Unreadable(Exception):
    """Arguments that vLLM's parser will refuse, in its own words."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Unreadable(message)


def read_early(arguments: Sequence[str]) -> EarlyArguments:
    """What can be known of arguments that go to every stage. Arguments that vLLM will refuse count as not given.

    Raises:
        ConfigError: the --config file cannot be read.
    """
    typed, from_file = _split_config(list(arguments))
    own, both = _parse(typed), _parse([*from_file, *typed])
    size = str(both.get(TENSOR_FLAG) or 1)
    num_ranks = int(size) if size.isdecimal() and int(size) else 1
    return EarlyArguments(frozenset(own), frozenset(both), num_ranks, _load_flags(both))


def _load_flags(values: Mapping[str, Any]) -> LoadFlags:
    try:
        overrides = parse_overrides(values.get(OVERRIDES_FLAG) or "{}")
    except ConfigError:
        overrides = {}
    load_format, config_format = (str(values.get(flag) or "auto") for flag in LOAD_FLAGS[:2])
    return LoadFlags(load_format, config_format, values.get("--hf-config-path"), overrides)


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag in OPTIONS:
        names = (flag, "-tp") if flag == TENSOR_FLAG else (flag,)
        parser.add_argument(*names, dest=flag, action="store_true" if flag in _SWITCHES else "store")
    words = [_with_dashes(argument) for argument in arguments]
    known = [word for word in _join_overrides(words) if word.partition("=")[0] != CONFIG_FLAG]
    try:
        return vars(parser.parse_known_args(known)[0])
    except _Unreadable:
        return {}


def _with_dashes(argument: str) -> str:
    """``--ssl_keyfile=a_b`` -> ``--ssl-keyfile=a_b``, ``--hf_overrides.a_b`` -> ``--hf-overrides.a_b``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name, dot, keys = name.partition(".")
    return name.replace("_", "-") + dot + keys + equals + value


def _join_overrides(words: Sequence[str]) -> list[str]:
    """``--hf-overrides.a.b 1`` as vLLM's parser takes it: ``--hf-overrides '{"a": {"b": 1}}'``, all of them in one."""
    others, overrides = [], dict[str, Any]()
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith(f"{OVERRIDES_FLAG}."):
            others.append(word)
            continue
        *sections, key = name.removeprefix(f"{OVERRIDES_FLAG}.").split(".")
        inner = overrides
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = _as_json(value if equals else next(rest, ""))
    return [*others, OVERRIDES_FLAG, json.dumps(overrides)] if overrides else others


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _split_config(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is typed beside ``--config FILE``, and what the file says. vLLM takes this flag in no other form."""
    if CONFIG_FLAG not in arguments[:-1]:
        return arguments, []
    at = arguments.index(CONFIG_FLAG)
    return arguments[:at] + arguments[at + 2 :], _read_config(Path(arguments[at + 1]))


def _read_config(path: Path) -> list[str]:
    """The file as arguments, as vLLM's `FlexibleArgumentParser.load_config_file` makes them."""
    import yaml  # as vLLM reads it; loaded only here, because few use it

    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{CONFIG_FLAG} {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{CONFIG_FLAG} {path}: expected lines like `dtype: float32`, found {type(settings).__name__}"
        )
    return [word for name, value in settings.items() for word in _as_arguments(f"--{name}", value)]


def _as_arguments(flag: str, value: object) -> list[str]:
    match value:
        case bool():
            return [flag] if value else []
        case list():
            return [flag, *map(str, value)] if value else []
        case dict():
            return [flag, json.dumps(value, default=str)]
        case _:
            return [flag, str(value)]

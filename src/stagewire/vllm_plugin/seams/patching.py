"""Wraps or adds a function of vLLM, and defines the record that each patch has.

A patch raises when its target has moved. Importing a module patches nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stagewire.errors import ConfigError
from stagewire.vllm_plugin.seams.versions import expected

__all__ = ["Patch", "add", "wrap"]

_MARK = "__stagewire_patch__"


@dataclass(frozen=True)
class Patch:
    target: str  # module:qualified.name
    reason: str  # and the processes in which it is installed
    until: str  # the change in vLLM that makes the patch unnecessary


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replaces ``owner.name`` by ``make(original)``. A second call changes nothing.

    Raises:
        ConfigError: there is no such attribute, so the patch was not written for this vLLM.
    """
    original = vars(owner).get(name)
    if original is None:
        raise ConfigError(f"{getattr(owner, '__name__', owner)}.{name} is gone in this vLLM: {expected()}")
    function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
    if hasattr(function, _MARK):
        return
    replacement = functools.wraps(function)(make(function))
    setattr(replacement, _MARK, True)
    if isinstance(original, (staticmethod, classmethod)):
        setattr(owner, name, type(original)(replacement))
    else:
        setattr(owner, name, replacement)


def add(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Gives ``owner`` a method that it lacks. A second call changes nothing.

    Raises:
        ConfigError: ``owner`` has such a method, so the patch was not written for this vLLM.
    """
    existing = vars(owner).get(name)
    if existing is not None and not hasattr(existing, _MARK):
        raise ConfigError(f"{getattr(owner, '__name__', owner)}.{name} exists in this vLLM: {expected()}")
    if existing is None:
        setattr(function, _MARK, True)
        setattr(owner, name, function)

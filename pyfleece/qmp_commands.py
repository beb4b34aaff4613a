"""The table of commands: their names, the types of their arguments, and what runs them.

A command is a function that takes its arguments by keyword ("max-workers" is max_workers) and returns what JSON can
say. The types are written as in QMP's schema: a name that starts with * may be left out.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyfleece.errors import Error, describe
from pyfleece.qmp_wire import NOT_FOUND, QmpError, Request

# What a type is called, in the schema and in messages.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63,
    "bool": lambda value: isinstance(value, bool),
    "dict": lambda value: isinstance(value, dict),
    "strs": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
}
_NAMES = {"str": "string", "int": "integer", "bool": "boolean", "dict": "object", "strs": "array of strings"}


class _Command(NamedTuple):
    run: Callable[..., Any]
    parameters: dict[str, str]          # name, without its *, to type
    required: frozenset[str]


class Commands:
    """Commands by name. They are added before the first one is called."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._commands: dict[str, _Command] = {}

    def add(self, name: str, run: Callable[..., Any], parameters: Mapping[str, str] | None = None) -> None:
        named = {key.lstrip("*"): kind for key, kind in (parameters or {}).items()}
        required = frozenset(key for key in parameters or {} if not key.startswith("*"))
        self._commands[name] = _Command(run, named, required)

    def describe(self) -> list[dict[str, Any]]:
        """For `query-commands`: names as QMP has it, and the types of the arguments for people and for `pyfleece
        ctl`.
        """
        return [
            {
                "name": name,
                "arguments": {key if key in command.required else f"*{key}": kind
                              for key, kind in command.parameters.items()},
            }
            for name, command in sorted(self._commands.items())
        ]  # fmt: skip

    def execute(self, request: Request) -> Any:
        """Run a command. Raises QmpError, or what the library raises."""
        command = self._commands.get(request.command)
        if command is None:
            raise QmpError(f"The command {request.command} has not been found", NOT_FOUND)
        arguments = _check(command, request.arguments)
        try:
            answer = command.run(**arguments)
        except (QmpError, Error, OSError):
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            self._log(f"{request.command}: {trace}")
            raise QmpError(f"internal error: {type(error).__name__}: {describe(error)}") from error
        return {} if answer is None else answer


def _check(command: _Command, given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name not in command.parameters:
            raise QmpError(f"Parameter '{name}' is unexpected")
        kinds = command.parameters[name].split("|")
        if not any(_TYPES[kind](value) for kind in kinds):
            expected = " or ".join(_NAMES[kind] for kind in kinds)
            raise QmpError(f"Invalid parameter type for '{name}', expected: {expected}")
    for name in command.parameters:
        if name in command.required and name not in given:
            raise QmpError(f"Parameter '{name}' is missing")
    return {name.replace("-", "_"): value for name, value in given.items()}

"""QMP's wire format: finding messages in a stream of bytes, and making the ones that go out.

A message is a JSON object. It ends where its braces do (QMP clients need not send a newline), or at a newline, whole
or not: so a client that sent half a line, or garbage, is understood again from its next line on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import pyfleece
from pyfleece.errors import describe

# Far more than a command needs; what a client can make the server keep in memory.
MAX_MESSAGE = 256 << 10

GENERIC, NOT_FOUND, NO_DEVICE = "GenericError", "CommandNotFound", "DeviceNotFound"

_SPACE = b" \t\r\n"
_TOKEN = re.compile(rb'"|\\[^\n]|[{}\[\]]|\n')


class QmpError(Exception):
    """What a client is answered instead of a result: a class that programs look at, and a sentence for people."""

    def __init__(self, text: str, kind: str = GENERIC) -> None:
        super().__init__(text)
        self.kind = kind


class Request(NamedTuple):
    command: str
    arguments: dict[str, Any]


class Framer:
    """Cuts a stream of bytes into messages. For one thread."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._dropping = False
        self._restart()

    def feed(self, data: bytes) -> Iterator[bytes | QmpError]:
        """Take the next bytes; gives the messages that end in them, and an error for each that is too long."""
        self._buffer += data
        while True:
            end = self._find_end()
            if end is None:
                if self._dropping:
                    self._drop_seen()
                elif len(self._buffer) > self._limit:
                    self._dropping = True
                    self._drop_seen()
                    yield self._too_long()
                return
            message, dropped = bytes(self._buffer[:end]), self._dropping
            del self._buffer[:end]
            self._restart()
            if not dropped:
                yield message if end <= self._limit else self._too_long()

    def _too_long(self) -> QmpError:
        return QmpError(f"JSON parse error, the message is longer than {self._limit} bytes")

    @property
    def begun(self) -> bool:
        """Is there a part of a message that has not ended?"""
        return self._begun

    def _restart(self) -> None:
        self._begun = False         # is a part of a message in the buffer, or was it?
        self._is_object = False     # else only a newline ends it
        self._dropping = False      # it was too long: wait for its end, keep nothing
        # Of an object, as far as it was looked at:
        self._at, self._depth, self._in_string = 0, 0, False

    def _drop_seen(self) -> None:
        del self._buffer[: self._at]
        self._at = 0

    def _find_end(self) -> int | None:
        """Where the first message in the buffer ends; None: not yet."""
        if not self._begun:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
            self._begun, self._is_object = bool(self._buffer), self._buffer.startswith(b"{")
        for token in _TOKEN.finditer(self._buffer, self._at):
            found = token[0]
            if found == b"\n":
                return token.start()
            if found == b'"':
                self._in_string = not self._in_string
            elif self._is_object and not self._in_string and found in b"{[":
                self._depth += 1
            elif self._is_object and not self._in_string and found in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return token.end()
            self._at = token.end()
        # A backslash at the end that is not escaped itself waits for what it escapes.
        waits = len(self._buffer) > self._at and self._buffer.endswith(b"\\")
        self._at = len(self._buffer) - waits
        return None


def decode(message: bytes) -> dict[str, Any]:
    """The object that a message is, or QmpError."""
    try:
        decoded = json.loads(message.decode("utf-8"), parse_constant=_refuse)
        json.dumps(decoded, ensure_ascii=False).encode("utf-8")     # no halves of surrogate pairs
    except RecursionError:
        raise QmpError("JSON parse error, nested too deeply") from None
    except ValueError as error:
        raise QmpError(f"JSON parse error, {error}") from None
    if not isinstance(decoded, dict):
        raise QmpError("QMP input must be a JSON object")
    return decoded


def check_request(asked: dict[str, Any]) -> Request:
    for name in asked:
        if name not in ("execute", "arguments", "id"):
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if "execute" not in asked:
        raise QmpError("QMP input lacks member 'execute'")
    if not isinstance(asked["execute"], str):
        raise QmpError("QMP input member 'execute' must be a string")
    arguments = asked.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return Request(asked["execute"], arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# ---- what goes out ----


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def greeting() -> dict[str, Any]:
    return {"QMP": {"version": version(), "capabilities": []}}


def version() -> dict[str, Any]:
    """In the shape that QMP clients expect; the numbers are those of pyfleece."""
    numbers = [int(part) for part in re.findall(r"\d+", pyfleece.__version__)[:3]]
    return {"qemu": dict(zip(("major", "minor", "micro"), numbers)), "package": f"pyfleece {pyfleece.__version__}"}


def failure(error: BaseException) -> dict[str, Any]:
    """The answer that a command failed."""
    kind = error.kind if isinstance(error, QmpError) else GENERIC
    return {"error": {"class": kind, "desc": describe(error)}}


def event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    now = time.time_ns() // 1000
    stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
    return {"event": name, "data": data, "timestamp": stamp}

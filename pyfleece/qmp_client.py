"""A small client for the control socket, in the calling thread. For programs of more ambition there is qemu.qmp."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from types import TracebackType
from typing import Any

from pyfleece.errors import from_os_error
from pyfleece.image import Path
from pyfleece.qmp_wire import QmpError

_Message = dict[str, Any]        # JSON


class Client:
    """A connection to the server at `path`. Not for several threads at once. OSError when there is none, or when it
    ends.
    """

    def __init__(self, path: Path) -> None:
        self._name = os.fsdecode(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(os.fspath(path))
            self._file = self._socket.makefile("rb")
        except OSError as error:
            self._socket.close()
            raise from_os_error(error, f"no server at {self._name}") from error
        self._events: deque[_Message] = deque()
        try:
            self.greeting: _Message = self._receive()
            if "error" in self.greeting:
                raise QmpError(self.greeting["error"]["desc"], self.greeting["error"]["class"])
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: _Message | None = None) -> Any:
        """The answer to a command. Raises QmpError."""
        message = {"execute": command, "arguments": arguments or {}}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise from_os_error(error, f"the server at {self._name} has ended") from error
        while True:
            received = self._receive()
            if "event" in received:
                self._events.append(received)
            elif "error" in received:
                raise QmpError(received["error"]["desc"], received["error"]["class"])
            else:
                return received["return"]

    def next_event(self) -> _Message:
        """The next event; waits for it."""
        while not self._events:
            received = self._receive()
            if "event" in received:
                self._events.append(received)
        return self._events.popleft()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _receive(self) -> _Message:
        try:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                raise ConnectionResetError(104, "the server ended")
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ConnectionResetError(104, "it is no QMP server")
        except (OSError, ValueError) as error:
            told = error if isinstance(error, OSError) else ConnectionResetError(104, "it is no QMP server")
            raise from_os_error(told, f"no answer from {self._name}") from error
        return message

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

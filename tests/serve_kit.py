"""What tests of a server share: clients of the control socket, guests that write, disks to serve."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, wait_for

import pyfleece
from pyfleece.serve import Server

COMMAND = Path(sys.executable).with_name("pyfleece")
BLOCK = 4096
SIZE = 16 * MIB              # of the fixture's disk


class Client:
    """The control socket as socat has it: bytes go out as they are, messages come in."""

    def __init__(self, path: str | Path, *, negotiate: bool = True, timeout: float = 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.greeting = self.receive()
        if negotiate:
            assert self.execute("qmp_capabilities") == {}

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("the server closed the connection")
        return json.loads(line)

    def answer(self) -> dict[str, Any]:
        """The next message that is no event; events before it are kept."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def ask(self, data: bytes | dict[str, Any]) -> dict[str, Any]:
        self.send(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")
        return self.answer()

    def execute(self, command: str, **arguments: Any) -> Any:
        """The result of a command; arguments with _ for -."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        answer = self.ask({"execute": command, "arguments": named})
        assert "return" in answer, answer
        return answer["return"]

    def refusal(self, command: str, **arguments: Any) -> tuple[str, str]:
        """The class and the sentence of the error that a command ends with."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        answer = self.ask({"execute": command, "arguments": named})
        assert set(answer) == {"error"} and set(answer["error"]) == {"class", "desc"}, answer
        return answer["error"]["class"], answer["error"]["desc"]

    def event(self, name: str, **data: Any) -> dict[str, Any]:
        """Wait for an event with this name and data; those up to it are kept in `events`."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                seen += 1
                if event["event"] == name and data.items() <= event["data"].items():
                    return event
            message = self.receive()
            assert "event" in message, message
            self.events.append(message)

    def end_of(self, uuid: str) -> dict[str, Any]:
        """Wait for the end of a backup; its status then."""
        while self.event("BACKUP_STATUS_CHANGE", uuid=uuid)["data"]["status"] == "active":
            self.events = [e for e in self.events if e["data"] != {"uuid": uuid, "status": "active"}]
        return self.execute("query-backup", uuid=uuid)

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Guest:
    """Writes random blocks to a disk until it is stopped, by `write(data, offset)`. Raises what a write raised."""

    def __init__(self, write: Callable[[bytes, int], Any], size: int, seed: int = 1) -> None:
        self._write, self._size, self._rng = write, size, random.Random(seed)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.writes = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._write(self._rng.randbytes(BLOCK), self._rng.randrange(self._size // BLOCK) * BLOCK)
                self.writes += 1
        except BaseException as error:
            self._failure = error

    def goes_on(self) -> None:
        """It writes now."""
        before = self.writes
        wait_for(lambda: self.writes > before + 10 or self._failure, 20)
        assert self._failure is None, self._failure

    def __enter__(self) -> Guest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a guest's write hangs"
        if self._failure is not None:
            raise self._failure


@contextmanager
def served_disk(path: Path, size: int, seed: int = 1) -> Iterator[pyfleece.Disk]:
    """A disk with random data in every other MiB."""
    rng = random.Random(seed)
    with pyfleece.create(path, size) as image, pyfleece.Disk(image) as disk:
        for offset in range(0, size, 2 << 20):
            disk.pwrite(rng.randbytes(min(1 << 20, size - offset)), offset)
        yield disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[pyfleece.Disk]:
    with served_disk(tmp_path / "vm.raw", SIZE) as disk:
        yield disk


@pytest.fixture
def server(disk: pyfleece.Disk, tmp_path: Path) -> Iterator[Server]:
    """Serves it by a control socket."""
    with Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None) as server:
        yield server


@contextmanager
def serving(
    *arguments: str | os.PathLike[str], until: str = "serving ", **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """`pyfleece serve` with these arguments, from when it says that it serves."""
    command = [os.fspath(word) for word in (COMMAND, "serve", *arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
    said: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if until in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    process.said = said                 # type: ignore[attr-defined]
    try:
        assert ready.wait(30) and any(until in line for line in said), said
        yield process
    finally:
        process.terminate()                 # so that it unmounts; does nothing to one that has ended
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        reader.join(20)
        assert process.stderr is not None
        process.stderr.close()

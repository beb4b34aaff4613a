"""The control socket: clients that send commands in QMP's form, and get answers and events.

Each client has two threads: one reads its messages and runs its commands, one after the other; one writes to it what
is in its queue. So a client that sends garbage, that stops reading, or that dies, is its own affair:

* an answer waits for room in the queue of its own client, and holds up nobody else;
* an event never waits: a client whose queue is full misses it, and is told how many it missed (event EVENTS_LOST).

Clients get events, and may run commands, once they have sent `qmp_capabilities`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pyfleece import qmp_wire, unix_socket
from pyfleece.image import Path
from pyfleece.qmp_wire import Framer, QmpError, Request

MOST_CLIENTS = 64
_QUEUE = 1000               # messages
_LAST_WORDS = 1.0           # seconds that clients get to read what is in their queues when the server ends
_NEGOTIATE = "qmp_capabilities"


class Control:
    """Listens at `path` and runs what clients ask for by `execute`, which returns the answer or raises.

    `execute` is called by the threads of the clients, any number at once. `log`: is told what operators may want to
    know, in one line.
    """

    def __init__(self, path: Path, execute: Callable[[Request], Any], log: Callable[[str], None]) -> None:
        self._path = unix_socket.check(path)
        self._execute = execute
        self._log = log
        self._lock = threading.Lock()           # protects _clients and _closing, and the order of events
        self._clients: dict[_Client, None] = {}
        self._closing = False
        self._listener = unix_socket.listen(self._path)
        self._accepter = threading.Thread(target=self._accept, name="pyfleece-control", daemon=True)

    def start(self) -> None:
        """Answer clients. Until then they wait in the queue of the socket."""
        self._accepter.start()

    @property
    def path(self) -> str:
        return self._path

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to all clients. Never waits for any of them."""
        with self._lock:
            message = qmp_wire.event(name, data)
            for client in self._clients:
                client.tell(message)

    def close(self) -> None:
        """End all connections, when the clients have read what was sent to them, or after a second."""
        with self._lock:
            self._closing = True
            clients = list(self._clients)
        unix_socket.stop(self._listener, self._path)
        if self._accepter.is_alive():
            self._accepter.join()
        deadline = time.monotonic() + _LAST_WORDS
        for client in clients:
            client.finish(deadline)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                with self._lock:
                    if self._closing:
                        return
                self._log(f"control socket: cannot accept a client: {error.strerror}")
                time.sleep(0.1)                 # out of descriptors, perhaps; it may get better
                continue
            with self._lock:
                if self._closing or len(self._clients) >= MOST_CLIENTS:
                    _refuse(connection)
                    continue
                client = _Client(connection, self._execute, self._log, self._forget)
                self._clients[client] = None
            client.start()

    def _forget(self, client: _Client) -> None:
        with self._lock:
            self._clients.pop(client, None)


def _refuse(connection: socket.socket) -> None:
    with connection:
        try:
            connection.setblocking(False)
            connection.send(qmp_wire.encode(qmp_wire.failure(QmpError(f"there are {MOST_CLIENTS} clients already"))))
        except OSError:
            pass


class _Client:
    """One connection."""

    def __init__(
        self,
        connection: socket.socket,
        execute: Callable[[Request], Any],
        log: Callable[[str], None],
        forget: Callable[[_Client], None],
    ) -> None:
        self._socket = connection
        self._execute = execute
        self._log = log
        self._forget = forget
        self._changed = threading.Condition()   # protects what follows
        self._ready = False                     # was answered to qmp_capabilities
        self._busy = False                      # a command runs, and its answer is not queued yet
        self._queue: deque[dict[str, Any]] = deque()
        self._missed = 0                        # events, since the last that went into the queue
        self._ending = False                    # nothing more goes into the queue; what is there is still sent
        self._broken = False                    # nothing can be sent any more
        self._writer = threading.Thread(target=self._write, name="pyfleece-client-w", daemon=True)
        self._reader = threading.Thread(target=self._read, name="pyfleece-client", daemon=True)

    def start(self) -> None:
        self._writer.start()
        self._reader.start()

    def tell(self, message: dict[str, Any]) -> None:
        """Queue an event, if there is room and the client wants events."""
        with self._changed:
            if not self._ready or self._ending:
                return
            if len(self._queue) >= _QUEUE:
                self._missed += 1
                return
            self._queue.append(message)
            self._changed.notify_all()

    def finish(self, deadline: float) -> None:
        """Let the command that runs end, and send what is queued, until `deadline` at most; then end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, max(deadline - time.monotonic(), 0))
        self._end()
        self._writer.join(max(deadline - time.monotonic(), 0))
        self._shut_down()

    # ---- the thread that reads ----

    def _read(self) -> None:
        framer = Framer()
        try:
            self._answer(qmp_wire.greeting())
            while data := self._socket.recv(65536):
                for message in framer.feed(data):
                    self._set_busy()
                    self._answer(*self._answer_to(message))
                    if self._broken:
                        return
            if framer.begun:
                self._log("control socket: a client ended in the middle of a message; it was not a command yet")
        except OSError:
            pass                                # it died
        finally:
            self._end()
            self._writer.join()
            self._forget(self)
            self._socket.close()

    def _answer_to(self, message: bytes | QmpError) -> tuple[dict[str, Any], bool]:
        """The answer, and whether the client may run commands after it."""
        identity = {}
        try:
            if isinstance(message, QmpError):
                raise message
            asked = qmp_wire.decode(message)
            identity = {"id": asked["id"]} if "id" in asked else {}
            request = qmp_wire.check_request(asked)
            if request.command == _NEGOTIATE:
                self._negotiate(request.arguments)
                return {"return": {}, **identity}, True
            if not self._ready:
                raise QmpError(f"Expecting capabilities negotiation with '{_NEGOTIATE}'", qmp_wire.NOT_FOUND)
            return {"return": self._execute(request), **identity}, True
        except Exception as error:
            return {**qmp_wire.failure(error), **identity}, self._ready

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        if self._ready:
            raise QmpError("Capabilities negotiation is already complete, command ignored", qmp_wire.NOT_FOUND)
        if arguments.get("enable"):
            raise QmpError("there are no capabilities that could be enabled")

    def _set_busy(self) -> None:
        with self._changed:
            self._busy = True

    def _answer(self, message: dict[str, Any], ready: bool = False) -> None:
        """Queue an answer; wait for room. Events follow the answer that made the client ready."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < _QUEUE or self._broken or self._ending)
            if not self._ending:
                self._queue.append(message)
                self._ready = ready
            self._busy = False
            self._changed.notify_all()

    # ---- the thread that writes ----

    def _write(self) -> None:
        try:
            while (message := self._next()) is not None:
                self._socket.sendall(qmp_wire.encode(message))
        except OSError:
            pass                                # it died, or `finish` had enough
        with self._changed:
            self._broken = True
            self._changed.notify_all()
        self._shut_down()                       # wakes up the reader

    def _next(self) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending)
            if not self._queue:
                return None
            message = self._queue.popleft()
            if self._missed and len(self._queue) < _QUEUE // 2:
                self._queue.append(qmp_wire.event("EVENTS_LOST", {"count": self._missed}))
                self._missed = 0
            self._changed.notify_all()
            return message

    def _end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def _shut_down(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

"""NBD for what a mount shows: nbdkit's file plugin, run and watched.

nbdkit serves a private directory of symbolic links to the mount's files, one for each export: `vm.raw` is the guest's
view, `vm.raw@now` the snapshot of `.snap/now`. So exports come and go without nbdkit being told. It ends with us, even
if we are killed; when it dies by itself that is told, and it is started again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pyfleece import unix_socket
from pyfleece.errors import Error, from_os_error, invalid

_START_WAIT = 10.0          # seconds until it listens
_OLD_ONE_WAIT = 3.0         # seconds that the nbdkit of a server that was killed gets to end
_STOP_WAIT = 5.0            # seconds that it gets to end
_STEADY = 60.0              # seconds after which a death is not one in a row any more
_LONGEST_PAUSE = 30.0       # seconds between two attempts


class Address(NamedTuple):
    arguments: list[str]        # for nbdkit
    path: str | None            # of the Unix socket
    uri: str                    # as clients have it; the name of an export comes after it


def parse_address(text: str) -> Address:
    """ "unix:PATH", or "tcp:HOST:PORT"; the HOST of an IPv6 address has brackets."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        path = unix_socket.check(rest)
        return Address(["--unix", path], path, f"nbd+unix:///?socket={path}")
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):(\d{1,5})", rest)
    if kind == "tcp" and match and 0 < int(match[2]) < 65536:
        return Address(["--ipaddr", match[1].strip("[]"), "--port", match[2]], None, f"nbd://{rest}/")
    raise invalid(f"{text!r} is no address for NBD: write unix:PATH or tcp:HOST:PORT")


class Nbdkit:
    """A running nbdkit. `on_death` is called with a sentence when it ended by itself; `log` with what it says.

    `default`: the export that clients get who name none. `directory`: a private one, for our files. `options`:
    further arguments of nbdkit (`--tls=require`).
    Raises Error when it cannot be started.
    """

    def __init__(
        self,
        address: Address,
        default: str,
        directory: str,
        *,
        options: Sequence[str] = (),
        log: Callable[[str], None],
        on_death: Callable[[str], None],
    ) -> None:
        if shutil.which("nbdkit") is None:
            raise from_os_error(FileNotFoundError(2, "No such file or directory"), "NBD needs the program nbdkit")
        self._address = address
        self._log = log
        self._on_death = on_death
        self._exports = os.path.join(directory, "exports")
        self._pidfile = os.path.join(directory, "nbdkit.pid")
        os.mkdir(self._exports)
        self._command = [
            "nbdkit", "--foreground", "--exit-with-parent", "--pidfile", self._pidfile, "--threads", "16",
            *address.arguments, *options,
            "--filter=exportname", "file", f"dir={self._exports}", f"default-export={default}",
        ]  # fmt: skip
        self._lock = threading.Lock()           # protects _process and _said
        self._process: subprocess.Popen[bytes] | None = None
        self._said = ""
        self._stopping = threading.Event()
        self._up = threading.Event()            # it listens, or the first attempt failed
        self._failures: list[Error] = []        # of the first attempt
        # One thread for all its life: nbdkit ends when the thread that started it does.
        self._keeper = threading.Thread(target=self._keep, name="pyfleece-nbd", daemon=True)
        self._keeper.start()
        self._up.wait()
        if self._failures:
            self.close()
            raise self._failures[0]

    @property
    def pid(self) -> int | None:
        with self._lock:
            return self._process.pid if self._process is not None else None

    def export(self, files: Mapping[str, str]) -> None:
        """The exports from now on: names and the paths of their files. Not for several threads at once."""
        there = set(os.listdir(self._exports))
        for name in there - set(files):
            os.unlink(os.path.join(self._exports, name))
        for name, path in files.items():
            if name not in there:
                os.symlink(path, os.path.join(self._exports, name))

    def close(self) -> None:
        """End it. Requests that run are answered before; a client that hangs is waited for 5 seconds."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                self._process.terminate()
        self._keeper.join(_STOP_WAIT)
        if self._keeper.is_alive():
            with self._lock:
                if self._process is not None:
                    self._process.kill()
            self._keeper.join(1)                # it may hang in the kernel: then it is left behind
        if self._address.path is not None:
            try:
                unix_socket.remove_stale(self._address.path)
            except OSError:
                pass                            # it is another one's

    # ---- the thread that keeps it running ----

    def _keep(self) -> None:
        pause = 0.5
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                self._run()
            except Error as error:
                self._told_end(error)
            except OSError as error:
                self._told_end(from_os_error(error, "cannot start nbdkit"))
            if time.monotonic() - begun > _STEADY:
                pause = 0.5
            self._stopping.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _run(self) -> None:
        """Start it, and wait for its end."""
        self._clear_the_way()
        if os.path.exists(self._pidfile):
            os.unlink(self._pidfile)
        with self._lock:
            if self._stopping.is_set():
                return
            self._said = ""
            self._process = process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        listener = threading.Thread(target=self._listen_to, args=(process,), name="pyfleece-nbd-log", daemon=True)
        listener.start()
        self._wait_until_it_listens(process)
        status = process.wait()
        listener.join(1)                        # its last words tell why
        with self._lock:
            self._process = None
        if not self._stopping.is_set():
            ended = f"exit status {status}" if status >= 0 else f"{signal.Signals(-status).name}"
            self._told_end(Error(f"nbdkit ended ({ended}){': ' + self._said if self._said else ''}"))

    def _clear_the_way(self) -> None:
        """Remove the socket of a server that was killed. Its nbdkit ends with it, but not always in the same moment."""
        deadline = time.monotonic() + _OLD_ONE_WAIT
        while self._address.path is not None:
            try:
                unix_socket.remove_stale(self._address.path)
                return
            except OSError as error:
                if time.monotonic() > deadline or self._stopping.is_set():
                    raise from_os_error(error, f"cannot serve NBD at {self._address.path}") from error
            time.sleep(0.05)

    def _wait_until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_WAIT
        while process.poll() is None and not self._stopping.is_set():
            if os.path.exists(self._pidfile):       # written when it does
                if self._address.path is not None:
                    os.chmod(self._address.path, 0o600)     # nbdkit lets others see it, but not connect
                self._up.set()
                return
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.01)

    def _told_end(self, error: Error) -> None:
        if not self._up.is_set():                   # the first attempt: whoever starts us is told, and decides
            self._failures.append(error)
            self._stopping.set()
            self._up.set()
        else:
            self._on_death(str(error))

    def _listen_to(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as said:
            for line in said:
                text = line.decode(errors="replace").strip()
                with self._lock:
                    if process is self._process:
                        self._said = text.removeprefix("nbdkit: error: ")
                self._log(text if text.startswith("nbdkit") else f"nbdkit: {text}")

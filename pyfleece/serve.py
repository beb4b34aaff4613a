"""Serving disks to other programs: as files, over NBD, and by a control socket. See docs/serving.md, docs/control.md.

What a server does lives elsewhere: `mount` shows the disks, `nbd` runs nbdkit on the mount, `control` talks to clients,
the `qmp_*` modules know the commands. Here these are put together, started, watched and ended in the right order.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from pyfleece import nbd as _nbd
from pyfleece import qmp_bitmaps, qmp_cuts, qmp_disks, qmp_nodes
from pyfleece.control import Control
from pyfleece.disk import Disk
from pyfleece.errors import Error, describe, invalid
from pyfleece.fleecing import Fleecing
from pyfleece.group import Hook
from pyfleece.image import Path
from pyfleece.mount import Mount
from pyfleece.mount import mount as _mount
from pyfleece.qmp_backup import broken_event
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.qmp_jobs import Jobs
from pyfleece.runtime import PrivateDirectory
from pyfleece.snapshot import Snapshot

_JOBS_WAIT = 5.0            # seconds that backups get to end when they are cancelled

FILE_SUFFIX = ".raw"        # of a disk's file in the mount


class Server:
    """Serves `disks`, by name, until it is stopped. The disks stay the caller's.

    `control`: path of the control socket. `mountpoint`: an existing, empty directory. `nbd`: "unix:PATH" or
    "tcp:HOST:PORT"; without a mountpoint a private one is made. `nbd_options`: further arguments of nbdkit.
    `fleecing_images`: paths, by the name of their disk with "-fleecing" after it, for backups that want them.
    `fleecing` and `snapshot_options`: those of `snapshot_group`, for all cuts. `bitmap`: what a mkdir in the mount
    makes an incremental of. `freeze`, `thaw`, `freeze_timeout`: around each cut. `log`: called with one line.

    A context manager: entering starts, leaving stops. `wait` returns when somebody asked it to stop.
    """

    def __init__(
        self,
        disks: Mapping[str, Disk],
        *,
        control: Path | None = None,
        mountpoint: Path | None = None,
        nbd: str | None = None,
        nbd_options: Sequence[str] = (),
        fleecing_images: Mapping[str, Path] | None = None,
        fleecing: Fleecing = None,
        snapshot_options: Mapping[str, Any] | None = None,
        bitmap: str | None = None,
        freeze: Hook | None = None,
        thaw: Hook | None = None,
        freeze_timeout: float = 10.0,
        allow_other: bool = False,
        log: Callable[[str], None],
    ) -> None:
        if not disks:
            raise invalid("a server has one disk at least")
        if control is None and mountpoint is None and nbd is None:
            raise invalid("nothing to serve: no mount, no NBD, no control socket")
        self._disks = Disks(disks, fleecing_images or {}, fleecing)
        self._mountpoint = mountpoint
        self._nbd_address = _nbd.parse_address(nbd) if nbd is not None else None
        self._nbd_options = tuple(nbd_options)
        self._control_path = control
        self._options = dict(snapshot_options or {})
        self._hooks: dict[str, Any] = {"freeze": freeze, "thaw": thaw, "freeze_timeout": freeze_timeout}
        self._bitmap = bitmap
        self._allow_other = allow_other
        self._log = log
        self._control: Control | None = None
        self._nbd: _nbd.Nbdkit | None = None
        self._mount: Mount | None = None
        self._stack = ExitStack()               # undoes what `start` did, in reverse
        self._jobs = Jobs(self._disks, self._options, self._hooks, self._emit)
        self._commands = self._make_commands()
        self._stopped = threading.Event()
        self._look = threading.Lock()           # protects _known, and the exports
        self._known: dict[str, Mapping[str, Snapshot]] = {}     # the mount's cuts that were told of
        self._broken: set[tuple[str, str]] = set()
        self._reason = ""                       # why `wait` returns
        self._bell: tuple[socket.socket, socket.socket] | None = None       # what wakes `wait` up: made by `start`

    def start(self) -> None:
        """All of it, or nothing and an exception."""
        with ExitStack() as undo:
            self._bell = socket.socketpair()
            for end in self._bell:
                end.setblocking(False)
                undo.callback(end.close)
            if self._control_path is not None:
                # First: it tells whether another server serves here already. Clients are answered last.
                self._control = Control(self._control_path, self._commands.execute, self._log)
                undo.callback(self._control.close)
            undo.callback(self._flush)
            if self._nbd_address is not None:
                private = PrivateDirectory()
                undo.callback(private.close)
                self._start_mount(undo, self._mountpoint if self._mountpoint is not None else private.mountpoint)
                self._start_nbd(undo, self._nbd_address, private.path)
            elif self._mountpoint is not None:
                self._start_mount(undo, self._mountpoint)
            if self._mount is not None:
                self._look_at_snapshots()       # on_change was called too early for the first ones, maybe
                threading.Thread(target=self._watch_mount, name="pyfleece-mount", daemon=True).start()
            if self._control is not None:
                undo.callback(self._jobs.close, _JOBS_WAIT)
                self._control.start()
            self._stack = undo.pop_all()

    def stop(self) -> None:
        """Cancel backups, end NBD and the mount, flush the disks, close the control socket. All of it, also when a
        part fails; then raises the first failure.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        with self._look:
            pass                                # nobody looks any more
        self._emit("SHUTDOWN", {"guest": False, "reason": self._reason or "stopped"})
        self._stack.close()

    def request_stop(self, reason: str) -> None:
        """Let `wait` return. From any thread, and from a signal handler."""
        self._reason = self._reason or reason
        try:
            if self._bell is not None:
                self._bell[1].send(b"!")
        except OSError:
            pass                                # full: it was rung before; or the server has stopped

    def wait(self, timeout: float | None = None) -> str | None:
        """Wait until somebody asked it to stop; returns why. None: nobody did for `timeout` seconds."""
        assert self._bell is not None           # it was started
        return self._reason if select.select([self._bell[0]], [], [], timeout)[0] else None

    @property
    def mount(self) -> Mount | None:
        return self._mount

    @property
    def summary(self) -> str:
        """What is served where, in one line."""
        where = []
        if self._mountpoint is not None:
            where.append(f"files in {os.fsdecode(self._mountpoint)}")
        if self._nbd_address is not None:
            where.append(f"NBD at {self._nbd_address.uri}")
        if self._control is not None:
            where.append(f"control socket {self._control.path}")
        return f"serving {', '.join(self._disks.by_name)}: {'; '.join(where)}"

    # ---- starting ----

    def _make_commands(self) -> Commands:
        commands = Commands(self._log)
        self._jobs.add_commands(commands)
        qmp_bitmaps.add_commands(commands, self._disks)
        qmp_disks.add_commands(commands, self._disks)
        qmp_nodes.add_commands(commands, self._disks, self._list_snapshots)
        if self._mountpoint is not None or self._nbd_address is not None:
            qmp_cuts.add_commands(commands, self._disks, self._the_mount, FILE_SUFFIX)
        commands.add("quit", lambda: self.request_stop("quit"))
        return commands

    def _start_mount(self, undo: ExitStack, mountpoint: Path) -> None:
        names = {name: name + FILE_SUFFIX for name in self._disks.by_name}
        bitmaps = dict.fromkeys(names.values(), self._bitmap) if self._bitmap is not None else None
        fleecing = {file: self._disks.fleecing_for(name, False) for name, file in names.items()}
        self._mount = _mount(
            {file: self._disks.by_name[name] for name, file in names.items()},
            mountpoint,
            snapshot_options={**self._options, "fleecing": fleecing},
            bitmaps=bitmaps,
            allow_other=self._allow_other,
            on_error=self._tell_mount_error,
            on_change=self._on_change,
            **self._hooks,
        )
        undo.callback(self._mount.close)
        self._jobs.avoid = self._mount.mountpoint

    def _start_nbd(self, undo: ExitStack, address: _nbd.Address, directory: str) -> None:
        first = next(iter(self._disks.by_name)) + FILE_SUFFIX
        self._nbd = _nbd.Nbdkit(
            address, first, directory, options=self._nbd_options, log=self._log, on_death=self._tell_nbd_death
        )
        undo.callback(self._nbd.close)

    def _the_mount(self) -> Mount:
        assert self._mount is not None          # commands are run when it is there
        return self._mount

    # ---- while it runs ----

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        if self._control is not None:
            self._control.emit(name, data)

    def _tell_mount_error(self, path: str, error: Error) -> None:
        self._log(f"{path}: {describe(error)}")
        self._emit("BLOCK_IO_ERROR", {"path": path, "reason": describe(error)})

    def _tell_nbd_death(self, sentence: str) -> None:
        self._log(f"{sentence}; starting it again")
        self._emit("NBD_SERVER_DIED", {"reason": sentence})

    def _list_snapshots(self) -> dict[str, dict[str, Snapshot]]:
        """By disk: the mount's cuts and what backups are copying."""
        found: dict[str, dict[str, Snapshot]] = {name: {} for name in self._disks.by_name}
        for cut, snapshots in (self._mount.snapshots if self._mount is not None else {}).items():
            for file, snapshot in snapshots.items():
                found[file[: -len(FILE_SUFFIX)]][cut] = snapshot
        for uuid, name, snapshot in self._jobs.snapshots:
            found[name][uuid] = snapshot
        return found

    def _watch_mount(self) -> None:
        """When somebody unmounts it there is nothing left to serve; backups that run are finished first."""
        assert self._mount is not None
        try:
            while not self._mount.wait(1.0):
                pass
        except Error:
            pass                                # it was closed in this moment
        if not self._stopped.is_set():
            self._log("the mount was unmounted; ending when no backup runs any more")
            self._jobs.wait(self._stopped)
            self.request_stop("unmounted")

    def _on_change(self) -> None:
        try:
            self._look_at_snapshots()
        except Exception as error:              # it may be different next time
            self._log(f"looking at snapshots failed: {type(error).__name__}: {describe(error)}")

    def _look_at_snapshots(self) -> None:
        """Tell of cuts that came and went, and of snapshots that broke; export them."""
        with self._look:
            if self._mount is None or self._mount.closed or self._stopped.is_set():
                return
            cuts = self._mount.snapshots
            if self._nbd is not None:
                self._nbd.export(self._exports(cuts))
            for cut in [name for name in self._known if self._known[name] is not cuts.get(name)]:
                self._emit("SNAPSHOT_DELETED", {"snapshot": cut, "devices": _names(self._known.pop(cut))})
            for cut, snapshots in cuts.items():
                if cut not in self._known:
                    self._known[cut] = snapshots
                    self._emit("SNAPSHOT_CREATED", {"snapshot": cut, "devices": _names(snapshots)})
                for file, snapshot in snapshots.items():
                    self._tell_if_broken(cut, file[: -len(FILE_SUFFIX)], snapshot)
            self._broken &= {(cut, name) for cut, name in self._broken if cut in cuts}

    def _tell_if_broken(self, cut: str, name: str, snapshot: Snapshot) -> None:
        try:
            error = snapshot.broken
        except Error:
            return                              # it was closed meanwhile
        if error is not None and (cut, name) not in self._broken:
            self._broken.add((cut, name))
            self._log(f"snapshot {cut} of {name} is broken: {describe(error)}")
            self._emit(*broken_event(name, cut, error))

    def _exports(self, cuts: Mapping[str, Mapping[str, Snapshot]]) -> dict[str, str]:
        assert self._mount is not None
        top = self._mount.mountpoint
        files = {file: os.path.join(top, file) for file in self._mount.disks}
        for cut, snapshots in cuts.items():
            for file in snapshots:
                files[f"{file}@{cut}"] = os.path.join(top, ".snap", cut, file)
        return {name: path for name, path in files.items() if len(os.fsencode(name)) <= 255}

    def _flush(self) -> None:
        """What a guest wrote is on stable storage, as far as the storage lets it."""
        with ExitStack() as stack:              # all of them, whichever fails
            for disk in self._disks.by_name.values():
                if not disk.closed:
                    stack.callback(disk.flush)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _names(files: Iterable[str]) -> list[str]:
    """The disks that files of the mount belong to."""
    return [file[: -len(FILE_SUFFIX)] for file in files]

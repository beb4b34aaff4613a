"""Disks as files: a FUSE mount that guests write to and backup programs read from.

    MOUNT/vm.raw                    the guest's view of each disk
    MOUNT/.snap/                    mkdir MOUNT/.snap/NAME cuts all disks at one instant, rmdir ends the snapshots
    MOUNT/.snap/NAME/vm.raw         the state at the cut
    MOUNT/.snap/NAME/vm.changed     of an incremental: the same, but everything outside of the bitmap is a hole

See docs/mount.md for what each file can do. The files are served by threads in C that never need Python; only a
mkdir, a rmdir and reports of errors and of changes come here.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

from pyfleece import _binding
from pyfleece._binding import Resource, call, call_code, nanoseconds, positive
from pyfleece._native import ffi, lib
from pyfleece.disk import Disk
from pyfleece.errors import ClosedError, Error, FreezeError, from_code, invalid
from pyfleece.group import OK, SKIPPED, FreezeReport, Hook, snapshot_group
from pyfleece.image import Path
from pyfleece.mountpoint import Watch, check_mountpoint, failure
from pyfleece.snapshot import Snapshot

# Called with the path below the mount point (".snap/now/vm.raw") and what happened.
OnError = Callable[[str, Error], Any]

_log = logging.getLogger(__name__)
_FOREVER = 1 << 62
_OPTIONS = frozenset(
    ("cluster_size", "on_cbw_error", "cbw_timeout", "fleecing", "fleecing_dir", "fleecing_limit", "stage_size", "whole")
)


class MountSnapshot(Mapping[str, Snapshot]):
    """The snapshots of one cut, by the name of their disk: a directory in `.snap`."""

    def __init__(self, name: str, snapshots: Mapping[str, Snapshot], freeze_report: FreezeReport) -> None:
        # The directory's name; bytes that are no UTF-8 are surrogate escapes, as os.fsdecode makes them.
        self.name = name
        # When it was cut: time.time().
        self.time = time.time()
        self.freeze_report = freeze_report
        self._snapshots = dict(snapshots)

    def close(self) -> None:
        with ExitStack() as stack:
            for snapshot in self._snapshots.values():
                stack.callback(snapshot.close)

    def __getitem__(self, disk: str) -> Snapshot:
        return self._snapshots[disk]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)

    def __repr__(self) -> str:
        return f"<MountSnapshot {self.name!r} of {', '.join(self._snapshots)}>"


class Mount(Resource):
    """Disks that are mounted as files. Made by `pyfleece.mount`. All methods may be called by any thread."""

    def __init__(self, mountpoint: str, disks: Mapping[str, Disk], threads: int | None, allow_other: bool) -> None:
        """Not for users. The defaults for cuts are set by `mount`."""
        super().__init__()
        self._mountpoint = mountpoint
        self._disks = dict(disks)
        self._defaults: dict[str, Any] = {}
        self._bitmaps: Mapping[str, str | None] = {}
        self._on_error: OnError | None = None
        self._on_change: Callable[[], Any] | None = None
        self._lock = threading.Lock()                       # protects the next two
        self._cuts: dict[str, MountSnapshot] = {}
        self._reserved: set[str] = set()                    # names of cuts that are being made
        self._pid = os.getpid()
        options = ffi.new("fl_mount_options *")
        options.threads = positive(threads, "threads", 32)
        options.allow_other = bool(allow_other)
        names = [ffi.new("char[]", os.fsencode(name)) for name in self._disks]
        handles = [disk._handle for disk in self._disks.values()]
        self._handle = _binding.make(
            "fl_mount **",
            lib.fl_mount_free,
            lib.fl_mount_start,
            os.fsencode(mountpoint),
            handles,
            names,
            len(names),
            options,
            filename=mountpoint,
        )
        self._watch = Watch(mountpoint)
        # What is sent into the second one lets `_tell_changes` go on. A full one loses nothing: it will be looked at.
        self._bell = socket.socketpair()
        self._bell[1].setblocking(False)
        for disk in self._disks.values():
            disk._users.add(self)
        self._threads = [
            threading.Thread(target=self._serve_requests, args=(self._handle,), name="pyfleece-mount", daemon=True),
            threading.Thread(target=self._tell_failures, args=(self._handle,), name="pyfleece-mount", daemon=True),
            threading.Thread(target=self._tell_changes, name="pyfleece-mount", daemon=True),
        ]

    def _start(self) -> None:
        atexit.register(self._close_at_exit)
        for thread in self._threads:
            thread.start()

    @property
    def mountpoint(self) -> str:
        """The absolute path that was given, without symbolic links."""
        return self._mountpoint

    @property
    def disks(self) -> dict[str, Disk]:
        """The disks by the name of their file."""
        return dict(self._disks)

    @property
    def snapshots(self) -> dict[str, MountSnapshot]:
        """What is in `.snap` now, however it was cut, in the order of the cuts. A copy."""
        with self._lock:
            return dict(self._cuts)

    @property
    def open_files(self) -> int:
        """How many files of the mount are open in any program: a loop device counts as one."""
        count = ffi.new("uint64_t *")
        call(lib.fl_mount_open_files, self._handle, count)
        return int(count[0])

    def cut(
        self,
        name: str | None = None,
        *,
        disks: Sequence[str] | None = None,
        bitmaps: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> MountSnapshot:
        """Cut disks at one instant, as mkdir does, and show the snapshots as `.snap/NAME`.

        `name`: None: the time, as 2026-01-31T12:00:00.000000Z. `disks`: names; None: all of them. `bitmaps` and
        `options` (those of `snapshot_group`: freeze, thaw, cluster_size, ...) replace what was given to `mount`, for
        this cut; `bitmaps={}` makes a full snapshot where the mount makes incrementals.

        Raises FileExistsError (name in use), `ArgumentError` (a bad name, an unknown disk), and what `snapshot_group`
        raises; the guest's I/O goes on in all cases.
        """
        if name is None:
            name = datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
        _check_name(name)
        names = list(self._disks) if disks is None else list(dict.fromkeys(disks))
        self._check_disks(names, "disks")
        bitmaps = self._bitmaps if bitmaps is None else bitmaps
        self._check_disks(bitmaps, "bitmaps")
        options = {**self._defaults, **options}
        fleecing = options.pop("fleecing", None)
        if isinstance(fleecing, Mapping):
            self._check_disks(fleecing, "fleecing")
            fleecing = [fleecing.get(name) for name in names]
        with self._lock:
            if name in self._cuts or name in self._reserved:
                raise failure(errno.EEXIST, f"there is a snapshot {name!r} already")
            self._reserved.add(name)
        try:
            group = snapshot_group(
                [self._disks[name] for name in names],
                fleecing,
                bitmap=[bitmaps.get(name) for name in names],
                **options,
            )
            made = MountSnapshot(name, dict(zip(names, group)), group.freeze_report)
            try:
                self._show(made)
            except BaseException as error:
                _binding.close_after(made.close, error)
                raise
        finally:
            with self._lock:
                self._reserved.discard(name)
        return made

    def _show(self, made: MountSnapshot) -> None:
        handles = [made[name]._handle if name in made else ffi.NULL for name in self._disks]
        with self._lock:
            # Under the lock, so that whoever sees the directory finds it here; the C calls do not wait for anything.
            call(lib.fl_mount_show, self._handle, os.fsencode(made.name), handles)
            self._cuts[made.name] = made
            for snapshot in made.values():
                snapshot._tell_break(self._bell[1])
        self._ring()

    def commit(self, name: str) -> None:
        """`Snapshot.commit` for each incremental of this cut: the backup that was made of it is good."""
        for snapshot in self._find(name).values():
            snapshot.commit()

    def drop(self, name: str) -> None:
        """End the snapshots of a cut, as rmdir does. Files in it that are open fail with ESTALE from then on. Raises
        FileNotFoundError.
        """
        made = self._find(name)
        with self._lock:
            if self._cuts.get(name) is made:
                call(lib.fl_mount_hide, self._handle, os.fsencode(name))
                del self._cuts[name]
        self._ring()
        made.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until somebody unmounts it (umount, fusermount3 -u), or it is closed. False: not within `timeout`
        seconds.
        """
        span = _FOREVER if timeout is None else nanoseconds(timeout, "timeout")
        if self._closed:
            return True
        return call_code(lib.fl_mount_wait, self._handle, span, expected=(-lib.FL_ERUNNING,)) == 0

    def _close(self) -> None:
        """Unmount, let the requests that run end, end the snapshots, flush the disks. The disks stay open.

        It always ends: when files are open, they fail with ENOTCONN from now on (what was written before is on the
        disks). See `open_files`.
        """
        with ExitStack() as stack:
            stack.callback(atexit.unregister, self._close_at_exit)
            for disk in self._disks.values():
                if not disk.closed:
                    stack.callback(disk.flush)
            stack.callback(self._close_bell)
            stack.callback(self._join)
            stack.callback(self._bell[1].shutdown, socket.SHUT_RDWR)
            stack.callback(self._end_cuts)
            stack.callback(self._watch.close)
            stack.callback(call, lib.fl_mount_close, self._handle)

    def _close_bell(self) -> None:
        with self._lock:                        # no snapshot is about to get it
            for end in self._bell:
                end.close()

    def _end_cuts(self) -> None:
        with self._lock:
            cuts = list(self._cuts.values())
            self._cuts.clear()
        with ExitStack() as stack:
            for made in cuts:
                stack.callback(made.close)

    def _join(self) -> None:
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    def _close_at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.close()

    def _find(self, name: str) -> MountSnapshot:
        with self._lock:
            made = self._cuts.get(name)
        if made is None:
            raise failure(errno.ENOENT, f"there is no snapshot {name!r}")
        return made

    def _check_disks(self, names: Sequence[str] | Mapping[str, Any], what: str) -> None:
        unknown = [name for name in names if name not in self._disks]
        if unknown:
            raise invalid(f"{what}: there is no disk {unknown[0]!r}; there are {', '.join(self._disks)}")

    # ---- the threads ----

    def _serve_requests(self, handle: Any) -> None:
        """Do what mkdir and rmdir ask for."""
        request = ffi.new("fl_mount_request *")
        while lib.fl_mount_next_request(handle, _FOREVER, request, ffi.NULL) == 0:
            name = os.fsdecode(ffi.string(request.name))
            story: Error | None = None
            code = 0
            try:
                if request.kind == lib.FL_MOUNT_MKDIR:
                    report = self.cut(name).freeze_report
                    if report.thaw not in (OK, SKIPPED):
                        story = FreezeError(f"thawing the guest did not work ({report.thaw}); the snapshot is good")
                else:
                    self.drop(name)
            except Exception as error:
                story = error if isinstance(error, Error) else Error(f"{type(error).__name__}: {error}")
                code = _errno_of(error)
            lib.fl_mount_answer(handle, request.id, code, os.fsencode(str(story or "")), ffi.NULL)
            if story is not None:
                # In a thread of its own: whoever is told may well use the mount, and wait for us.
                threading.Thread(
                    target=self._tell, args=(f".snap/{name}", story), name="pyfleece-mount", daemon=True
                ).start()

    def _tell_failures(self, handle: Any) -> None:
        """Tell what failed in reads and writes."""
        failure = ffi.new("fl_mount_failure *")
        while lib.fl_mount_next_failure(handle, _FOREVER, failure, ffi.NULL) == 0:
            error = from_code(failure.error.code, failure.error)
            self._tell(os.fsdecode(ffi.string(failure.path)), error, int(failure.left_out))

    def _ring(self) -> None:
        try:
            self._bell[1].send(b"!")
        except OSError:
            pass                                # full: it was rung before; or the mount is closed

    def _tell_changes(self) -> None:
        """Call `on_change`, once for all that changed since it was called."""
        try:
            while self._bell[0].recv(4096):
                if self._on_change is None:
                    continue
                try:
                    self._on_change()
                except Exception:
                    _log.exception("on_change raised")
        except OSError:
            pass                                # on_change closed the mount

    def _tell(self, path: str, error: Error, left_out: int = 0) -> None:
        if self._on_error is None:
            more = f" ({left_out} more before it)" if left_out else ""
            _log.warning("%s: %s: %s%s", self._mountpoint, path or "the mount", error, more)
            return
        try:
            self._on_error(path, error)
        except Exception:
            _log.exception("on_error raised, for %s: %s", path, error)

    def __repr__(self) -> str:
        return f"<Mount of {', '.join(self._disks)} on {self._mountpoint}{' closed' if self._closed else ''}>"


def mount(
    disks: Mapping[str, Disk],
    mountpoint: Path,
    *,
    snapshot_options: Mapping[str, Any] | None = None,
    bitmaps: Mapping[str, str | None] | None = None,
    freeze: Hook | None = None,
    thaw: Hook | None = None,
    freeze_timeout: float = 10.0,
    threads: int | None = None,
    allow_other: bool = False,
    on_error: OnError | None = None,
    on_change: Callable[[], Any] | None = None,
) -> Mount:
    """Mount disks as files below `mountpoint`, an existing and empty directory. Needs libfuse3.

    `disks`: by the name of their file ("vm.raw"). They stay the caller's: the mount does not close them; a disk that
    is closed closes the mount first.
    `snapshot_options`: for cuts, those of `snapshot_group`: cluster_size, on_cbw_error, cbw_timeout, fleecing_limit,
    stage_size, fleecing_dir, fleecing (also a dict by the disk's name), whole (True here).
    `bitmaps`: for cuts: by the disk's name, the dirty bitmap that makes an incremental. With `whole` as False only what
    is in it is saved, and can be read.
    `freeze`, `thaw`, `freeze_timeout`: around every cut, as in `snapshot_group`.
    `threads`: how many requests are worked on at the same time, at most. None: 64. There are fewer threads while they
    are not blocked in storage.
    `allow_other`: other users may use it (as far as the files' modes allow). For others than root, /etc/fuse.conf
    must allow that.
    `on_error`: called in a thread of its own for what failed; repetitions are left out. None: they are logged as
    warnings by `logging.getLogger("pyfleece.mount")`.
    `on_change`: called in a thread of its own soon after `snapshots` changed or one of them broke, however that came
    about; once for several changes, maybe. Nothing in the mount waits for it.

    The mount is closed when the interpreter exits; when the process is killed, a small process that watches it
    unmounts, and else the next mount at the same place cleans up.

    Raises ImageError with ENOSYS where the extension module was built without libfuse3, FileNotFoundError,
    NotADirectoryError, PermissionError, and EBUSY or ENOTEMPTY for a mount point that is in use or not empty.
    """
    for name, disk in disks.items():
        if not isinstance(disk, Disk):
            raise TypeError(f"{name!r} is to be a Disk, not a {type(disk).__name__}")
        if "\0" in name:
            raise invalid(f"{name!r} cannot be the name of a disk's file")
    unknown = set(snapshot_options or ()) - _OPTIONS
    if unknown:
        raise TypeError(f"snapshot_options has no {min(unknown)!r}: there are {', '.join(sorted(_OPTIONS))}")
    nanoseconds(freeze_timeout, "freeze_timeout")
    path = os.path.realpath(os.fsdecode(mountpoint))
    check_mountpoint(path)
    made = Mount(path, disks, threads, allow_other)
    try:
        made._defaults = {"whole": True, **(snapshot_options or {}), "freeze_timeout": freeze_timeout}
        made._defaults.update({"freeze": freeze, "thaw": thaw})
        made._bitmaps = dict(bitmaps or {})
        made._check_disks(made._bitmaps, "bitmaps")
        made._on_error = on_error
        made._on_change = on_change
        made._start()
    except BaseException as error:
        _binding.close_after(made.close, error)
        raise
    return made


def _check_name(name: str) -> None:
    encoded = os.fsencode(name)
    if not encoded or len(encoded) > 255 or b"/" in encoded or b"\0" in encoded or encoded in (b".", b".."):
        raise invalid(f"{name!r} cannot be the name of a snapshot: 1 to 255 bytes, no '/', not '.' or '..'")


def _errno_of(error: Exception) -> int:
    """What mkdir or rmdir fails with."""
    if isinstance(error, FreezeError):
        return errno.EAGAIN
    if isinstance(error, ClosedError):
        return errno.ESTALE
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return getattr(error, "errno", None) or errno.EIO

"""Disks as files: a FUSE mount that guests write to and backup programs read from.

    MOUNT/vm.raw                    the guest's view of each disk
    MOUNT/.snap/                    mkdir MOUNT/.snap/NAME cuts all disks at one instant, rmdir ends the snapshots
    MOUNT/.snap/NAME/vm.raw         the state at the cut
    MOUNT/.snap/NAME/vm.changed     of an incremental: the same, but everything outside of the bitmap is a hole

See docs/serving.md for what each file can do. The files are served by threads in C that never need Python; only a
mkdir, a rmdir and reports of errors come here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyfleece._binding import Resource
from pyfleece.disk import Disk
from pyfleece.errors import Error, ImageError
from pyfleece.group import Hook
from pyfleece.image import Path
from pyfleece.snapshot import Snapshot

# Called with the path below the mount point (".snap/now/vm.raw") and what happened.
OnError = Callable[[str, Error], Any]


class MountSnapshot(Mapping[str, Snapshot]):
    """The snapshots of one cut, by the name of their disk: a directory in `.snap`."""

    # The directory's name; bytes that are no UTF-8 are surrogate escapes, as os.fsdecode makes them.
    name: str
    # When it was cut: time.time().
    time: float


class Mount(Resource):
    """Disks that are mounted as files. Made by `pyfleece.mount`. All methods may be called by any thread."""

    @property
    def mountpoint(self) -> str:
        """The absolute path that was given."""
        raise NotImplementedError

    @property
    def disks(self) -> dict[str, Disk]:
        """The disks by the name of their file."""
        raise NotImplementedError

    @property
    def snapshots(self) -> dict[str, MountSnapshot]:
        """What is in `.snap` now, however it was cut, in the order of the cuts. A copy."""
        raise NotImplementedError

    @property
    def open_files(self) -> int:
        """How many files of the mount are open in any program: a loop device counts as one."""
        raise NotImplementedError

    def cut(
        self,
        name: str | None = None,
        *,
        disks: Sequence[str] | None = None,
        bitmaps: Mapping[str, str | None] | None = None,
        freeze: Hook | None = None,
        thaw: Hook | None = None,
        **options: Any,
    ) -> MountSnapshot:
        """Cut disks at one instant, as mkdir does, and show the snapshots as `.snap/NAME`.

        `name`: None: the time, as 2026-01-31T12:00:00.000000. `disks`: names; None: all of them. `bitmaps`, `freeze`,
        `thaw` and `options` (those of `snapshot_group`) replace what was given to `mount`, for this cut; `bitmaps={}`
        makes a full snapshot where the mount makes incrementals.

        Raises FileExistsError (name in use), `ArgumentError` (a bad name, an unknown disk), and what `snapshot_group`
        raises; the guest's I/O goes on in all cases.
        """
        raise NotImplementedError

    def commit(self, name: str) -> None:
        """`Snapshot.commit` for each incremental of this cut: the backup that was made of it is good."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """End the snapshots of a cut, as rmdir does. Files in it that are open fail with ESTALE from then on. Raises
        FileNotFoundError.
        """
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until somebody unmounts it (umount, fusermount3 -u), or it is closed. False: not within `timeout`
        seconds.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let the requests that run end, flush the disks, unmount, end the snapshots. The disks stay open.

        It always ends: when files are open, they fail with ENOTCONN from now on (what was written before is on the
        disks). See `open_files`.
        """
        raise NotImplementedError


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
) -> Mount:
    """Mount disks as files below `mountpoint`, an existing and empty directory. Needs libfuse3.

    `disks`: by the name of their file ("vm.raw"). They stay the caller's: the mount does not close them; a disk that
    is closed closes the mount first.
    `snapshot_options`: for cuts, those of `snapshot_group`: cluster_size, on_cbw_error, cbw_timeout, fleecing_limit,
    stage_size, fleecing_dir, fleecing (also a dict by the disk's name).
    `bitmaps`: for cuts: by the disk's name, the dirty bitmap that makes an incremental.
    `freeze`, `thaw`, `freeze_timeout`: around every cut, as in `snapshot_group`.
    `threads`: how many requests are worked on at the same time. None: 16.
    `allow_other`: other users may use it (as far as the files' modes allow). For others than root, /etc/fuse.conf
    must allow that.
    `on_error`: called in a thread of its own for what failed; repetitions are left out. None: they are logged as
    warnings by `logging.getLogger("pyfleece.mount")`.

    Raises ImageError with ENOSYS where the extension module was built without libfuse3, FileNotFoundError,
    NotADirectoryError, PermissionError, and EBUSY or ENOTEMPTY for a mount point that is in use or not empty.
    """
    raise ImageError(
        38,
        "pyfleece was built without libfuse3, so it cannot mount: install libfuse3-dev (fuse3-devel) and pkg-config, "
        "then build pyfleece anew",
    )

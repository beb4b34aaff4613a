"""Disks: the guest's view of an image, through which every write has to go so that snapshots can save what it
overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyfleece import _binding
from pyfleece._binding import Resource, call, nanoseconds, positive, unsigned
from pyfleece._native import ffi, lib
from pyfleece.bitmap import Bitmaps
from pyfleece.errors import invalid
from pyfleece.fleecing import Fleecing, open_fleecing
from pyfleece.image import Image, Path
from pyfleece.snapshot import POLICIES, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Disk(Resource):
    """The guest's view of `source`, an Image that is open for writing. Closing the image closes the disk first.

    Any number of threads may read and write at once. A write that returned is on the source, whatever happens to
    snapshots. What is written around the disk, to the image itself, snapshots do not see. All methods raise
    `ClosedError` once it is closed, `ForkedError` in a forked child, `OutOfRangeError` beyond the end, and
    `ImageError` (an OSError) when the storage fails.
    """

    def __init__(self, source: Image) -> None:
        super().__init__()
        if not isinstance(source, Image):
            raise TypeError(f"a Disk is made on an Image, not on {type(source).__name__}: see pyfleece.open")
        self._source = source
        self._handle = _binding.make("fl_disk **", lib.fl_disk_free, lib.fl_disk_open, source._handle)
        self._size = int(lib.fl_disk_size(self._handle))
        source._users.add(self)

    @property
    def source(self) -> Image:
        return self._source

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    @property
    def bitmaps(self) -> Bitmaps:
        """The dirty bitmaps, by name: what was written since."""
        return Bitmaps(self)

    def pread(self, count: int, offset: int) -> bytes:
        """The `count` bytes at `offset`: all of them, or an exception."""
        return _binding.read_bytes(lib.fl_disk_pread, self._handle, count, offset, self._size)

    def readinto(self, buffer: Buffer, offset: int) -> int:
        """Fill a writable, contiguous buffer from `offset` on, without a copy. Returns its length in bytes."""
        return _binding.transfer(lib.fl_disk_pread, self._handle, buffer, offset, self._size, into=True)

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of `data` at `offset`. Returns its length in bytes.

        With the policy "break-guest-write" of a snapshot it raises `ImageError` when old data could not be saved. As
        after any error, each part of the range then has the old or the new data: it goes through in pieces of up to
        256 clusters, or half a stage.
        """
        return _binding.transfer(lib.fl_disk_pwrite, self._handle, data, offset, self._size, into=False)

    def zero(self, count: int, offset: int) -> None:
        """Make `count` bytes at `offset` read as zeros. A write like any other."""
        _binding.in_pieces(lib.fl_disk_zero, self._handle, count, offset, self._size)

    def discard(self, count: int, offset: int) -> None:
        """Hint that `count` bytes at `offset` are not needed any more; what they read as is undefined. A write like
        any other.
        """
        _binding.in_pieces(lib.fl_disk_discard, self._handle, count, offset, self._size)

    def flush(self) -> None:
        """Return when every write that returned before is on stable storage."""
        call(lib.fl_disk_flush, self._handle)

    def snapshot(
        self,
        fleecing: Fleecing = None,
        *,
        cluster_size: int | None = None,
        bitmap: str | None = None,
        on_cbw_error: str = "break-snapshot",
        cbw_timeout: float = 45.0,
        fleecing_limit: int | None = None,
        stage_size: int = 64 << 20,
        fleecing_dir: Path | None = None,
    ) -> Snapshot:
        """Cut: the state of the disk at this instant, to read from while the disk goes on being written.

        `fleecing`: where old data goes that does not stay in memory. None: a file without a name, gone with the
        snapshot, in `fleecing_dir` (None: the source's directory, else /var/tmp, but no tmpfs). A directory: a
        nameless file there. Another path: that image or block device, whose size is the cap; what it held is
        overwritten. An open Image: that, and it is not closed. "memory": none; the stage is all there is, for disks
        too small to deserve a file.
        `fleecing_limit`: the most bytes of the fleecing image that may be in use.
        `stage_size`: the most memory for old data, in bytes, used lazily. Guest writes never wait for fleecing I/O
        while it has room.
        `cluster_size`: the unit in which old data is saved: a power of two from 4096 on; None: a default for random
        writes.
        `bitmap`: the name of a dirty bitmap: the snapshot has only what is dirty in it (an incremental), and the
        bitmap starts anew.
        `on_cbw_error`: what happens when old data can't be saved: "break-snapshot": the guest goes on, reading the
        snapshot raises from then on; "break-guest-write": the write fails, the snapshot lives; "lose-range": the
        guest goes on, these clusters are lost.
        `cbw_timeout`: the longest that a guest write waits for room, in seconds.

        Raises `ArgumentError`, `FormatError`, `ImageError` (side "fleecing") for a fleecing image that is missing,
        empty or read-only.
        """
        return cut(
            [self],
            [(fleecing, bitmap)],
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            fleecing_limit=fleecing_limit,
            stage_size=stage_size,
            fleecing_dir=fleecing_dir,
        )[0]

    def _close(self) -> None:
        call(lib.fl_disk_close, self._handle)

    def __repr__(self) -> str:
        return f"<Disk on {self._source.name} ({self._size} bytes){' closed' if self._closed else ''}>"


def cut(
    disks: Sequence[Disk],
    each: Sequence[tuple[Fleecing, str | None]],
    *,
    cluster_size: int | None,
    on_cbw_error: str,
    cbw_timeout: float,
    fleecing_limit: int | None,
    stage_size: int,
    fleecing_dir: Path | None,
) -> list[Snapshot]:
    """Snapshots of several disks at one instant: all or none. `each`: per disk, its fleecing= and its bitmap=."""
    if on_cbw_error not in POLICIES:
        raise invalid(f"on_cbw_error is {on_cbw_error!r}; it can be {', '.join(POLICIES)}")
    options = ffi.new("fl_snapshot_options[]", len(disks))
    images: list[tuple[Image | None, bool]] = []
    names = []                          # keeps what the options point at alive
    with ExitStack() as undo:
        for disk, option, (fleecing, bitmap) in zip(disks, options, each):
            option.cluster_size = positive(cluster_size, "cluster_size", 32)
            option.on_cbw_error = POLICIES[on_cbw_error]
            option.cbw_timeout = nanoseconds(cbw_timeout, "cbw_timeout")
            option.stage_size = unsigned(stage_size, "stage_size")
            option.fleecing_limit = positive(fleecing_limit, "fleecing_limit")
            if bitmap is not None:
                names.append(ffi.new("char[]", bitmap.encode()))
                option.bitmap = names[-1]
            image, ours = open_fleecing(fleecing, fleecing_dir, disk.source)
            images.append((image, ours))
            if image is not None:
                option.fleecing = image._handle
                if ours:
                    undo.callback(image.close)
        output = ffi.new("fl_snapshot *[]", len(disks))
        undo.callback(_free, output)
        call(lib.fl_snapshot_cut, [disk._handle for disk in disks], options, len(disks), output)
        snapshots = []
        for index, (disk, (image, ours)) in enumerate(zip(disks, images)):
            pointer, output[index] = output[index], ffi.NULL
            snapshot = Snapshot(ffi.gc(pointer, lib.fl_snapshot_free), disk, image, ours, on_cbw_error)
            disk._users.add(snapshot)
            snapshots.append(snapshot)
        undo.pop_all()
    return snapshots


def _free(snapshots: Any) -> None:
    """What was cut and is not owned by anything yet, when something was raised in between (Ctrl-C, perhaps)."""
    for pointer in snapshots:
        lib.fl_snapshot_free(pointer)

"""Disks: the guest's view of an image, through which every write has to go so that snapshots can save what it
overwrites.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pyfleece import _binding
from pyfleece._binding import Resource, call, call_code, nanoseconds, positive, unsigned
from pyfleece._native import ffi, lib
from pyfleece.bitmap import SUFFIX, Bitmaps
from pyfleece.errors import invalid
from pyfleece.fleecing import Fleecing, open_fleecing
from pyfleece.image import Image, Path
from pyfleece.snapshot import BITMAP_MODES, POLICIES, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Disk(Resource):
    """The guest's view of `source`, an Image that is open for writing. Closing the image closes the disk first.

    Any number of threads may read and write at once. A write that returned is on the source, whatever happens to
    snapshots. What is written around the disk, to the image itself, snapshots do not see. All methods raise
    `ClosedError` once it is closed, `ForkedError` in a forked child, `OutOfRangeError` beyond the end, and
    `ImageError` (an OSError) when the storage fails.

    `bitmap_file`: where the persistent dirty bitmaps are: a path; None: the name of the image and `.fleece-bitmaps`
    (a block device has no such default); False: nowhere. One that is there is opened, and its bitmaps are the disk's
    again; `FormatError` when it is damaged, `ImageLockedError` when another disk uses it. Closing the disk flushes the
    source then.
    """

    def __init__(self, source: Image, *, bitmap_file: Path | Literal[False] | None = None) -> None:
        super().__init__()
        if not isinstance(source, Image):
            raise TypeError(f"a Disk is made on an Image, not on {type(source).__name__}: see pyfleece.open")
        self._source = source
        self._handle = _binding.make("fl_disk **", lib.fl_disk_free, lib.fl_disk_open, source._handle)
        self._size = int(lib.fl_disk_size(self._handle))
        self._bitmap_file = _bitmap_file(source, bitmap_file)
        self._has_bitmap_file = False
        if self._bitmap_file is not None:
            try:
                self._open_bitmap_file(create=False)
            except BaseException as error:
                _binding.close_after(self._close, error)
                raise
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

    def _open_bitmap_file(self, create: bool) -> None:
        handle, path = self._handle, self._bitmap_file
        missing = () if create else (-errno.ENOENT,)
        self._has_bitmap_file = call_code(lib.fl_disk_bitmap_file, handle, path, create, expected=missing) == 0

    def _make_bitmap_file(self) -> None:
        """For the first persistent bitmap."""
        if self._bitmap_file is None:
            raise invalid("there is no file for persistent bitmaps: give the Disk a path as bitmap_file=")
        if not self._has_bitmap_file:
            self._open_bitmap_file(create=True)

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
        bitmap_mode: str = "on-success",
        on_cbw_error: str = "break-snapshot",
        cbw_timeout: float = 45.0,
        fleecing_limit: int | None = None,
        stage_size: int = 64 << 20,
        fleecing_dir: Path | None = None,
        whole: bool = False,
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
        bitmap starts anew. `InconsistentBitmapError`: it is no base for an incremental.
        `bitmap_mode`: when what was frozen is merged back into the bitmap: "on-success": unless `commit` is called;
        "always": as above, but without a commit only what was not discarded from the snapshot (copied, that is);
        "never": always: the bitmap just says what to copy. Ranges that were lost come back in any case.
        `whole`: save what is outside of the bitmap, too, so that reading works everywhere. What the incremental has is
        still what the bitmap has: that is what `extents`, `backup` and `chunks` deal with.
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
            bitmap_mode=bitmap_mode,
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            fleecing_limit=fleecing_limit,
            stage_size=stage_size,
            fleecing_dir=fleecing_dir,
            whole=whole,
        )[0]

    def _close(self) -> None:
        call(lib.fl_disk_close, self._handle)

    def __repr__(self) -> str:
        return f"<Disk on {self._source.name} ({self._size} bytes){' closed' if self._closed else ''}>"


def cut(
    disks: Sequence[Disk],
    each: Sequence[tuple[Fleecing, str | None]],
    *,
    bitmap_mode: str,
    cluster_size: int | None,
    on_cbw_error: str,
    cbw_timeout: float,
    fleecing_limit: int | None,
    stage_size: int,
    fleecing_dir: Path | None,
    whole: bool,
) -> list[Snapshot]:
    """Snapshots of several disks at one instant: all or none. `each`: per disk, its fleecing= and its bitmap=."""
    if on_cbw_error not in POLICIES:
        raise invalid(f"on_cbw_error is {on_cbw_error!r}; it can be {', '.join(POLICIES)}")
    if bitmap_mode not in BITMAP_MODES:
        raise invalid(f"bitmap_mode is {bitmap_mode!r}; it can be {', '.join(BITMAP_MODES)}")
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
            option.bitmap_mode = BITMAP_MODES[bitmap_mode]
            option.whole = bool(whole)
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


def _bitmap_file(source: Image, chosen: Path | Literal[False] | None) -> bytes | None:
    if chosen is False:
        return None
    if chosen is not None:
        path = os.fsencode(chosen)
        if not path or b"\0" in path:
            raise invalid(f"bitmap_file is no path: {chosen!r}")
        return os.path.abspath(path)
    if source.path is None or source.info.block_device:
        return None                     # beside a device there is no place that lasts
    return os.path.realpath(os.fsencode(source.path)) + SUFFIX.encode()


def _free(snapshots: Any) -> None:
    """What was cut and is not owned by anything yet, when something was raised in between (Ctrl-C, perhaps)."""
    for pointer in snapshots:
        lib.fl_snapshot_free(pointer)

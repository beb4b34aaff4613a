"""Snapshots: the state of a disk at the instant of the cut, to read from while the disk goes on being written."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyfleece import _binding
from pyfleece._binding import Extent, Resource, call, unsigned
from pyfleece._native import ffi, lib
from pyfleece.chunks import Chunks
from pyfleece.errors import ClosedError, SnapshotBrokenError, invalid

if TYPE_CHECKING:
    import socket

    from typing_extensions import Buffer

    from pyfleece.disk import Disk
    from pyfleece.image import Image

POLICIES = {
    "break-snapshot": lib.FL_BREAK_SNAPSHOT,
    "break-guest-write": lib.FL_BREAK_GUEST_WRITE,
    "lose-range": lib.FL_LOSE_RANGE,
}
BITMAP_MODES = {
    "on-success": lib.FL_BITMAP_ON_SUCCESS,
    "always": lib.FL_BITMAP_ALWAYS,
    "never": lib.FL_BITMAP_NEVER,
}
_BOUNDS = (*(lib.fl_latency_bound(i) / 1e9 for i in range(lib.FL_LATENCY_BUCKETS - 1)), math.inf)


@dataclass(frozen=True)
class Latency:
    """How long operations took, in seconds: a histogram. In `Stats`: what copy-before-write added to guest writes."""

    count: int                                      # operations measured
    max: float
    histogram: tuple[tuple[float, int], ...]        # (upper bound, operations) of the buckets that are not empty

    def percentile(self, percent: float) -> float:
        """The latency that `percent` of the operations did not exceed, to the precision of the histogram. 0 when
        there was none.
        """
        if not 0 <= percent <= 100:
            raise invalid(f"a percentile is between 0 and 100, not {percent}")
        seen = 0
        for bound, writes in self.histogram:
            seen += writes
            if seen >= self.count * percent / 100:
                return min(bound, self.max)
        return self.max

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p99(self) -> float:
        return self.percentile(99)


def latency_of(counts: Any, count: int, longest: int) -> Latency:
    """From C's `uint64_t[FL_LATENCY_BUCKETS]`, their sum, and nanoseconds."""
    filled = zip(_BOUNDS, counts[0 : lib.FL_LATENCY_BUCKETS])
    return Latency(count, longest / 1e9, tuple((bound, writes) for bound, writes in filled if writes))


@dataclass(frozen=True)
class Stats:
    """What a snapshot did so far. Sizes are bytes."""

    clusters_saved: int         # ever put in the store; zero clusters not counted
    bytes_copied: int           # old data that went through the stage
    zero_clusters: int          # saved as zeros: nothing stored
    clusters_lost: int
    clusters_discarded: int
    staged_bytes: int           # in memory now
    staged_peak: int
    fleecing_bytes: int         # in the fleecing image now
    fleecing_peak: int
    bytes_spilled: int          # written to the fleecing image, ever
    spill_errors: int
    room_waits: int             # guest writes that had to wait for room
    room_timeouts: int          # of these, the ones that waited in vain
    claim_waits: int            # guest writes that waited for another one that was saving the same cluster
    reads_repeated: int         # source reads whose range was saved meanwhile, read again from the store
    latency: Latency


class Snapshot(Resource):
    """The state of a disk at one instant. Made by `Disk.snapshot` and `snapshot_group`.

    Any number of threads may use it at once; reading it never makes a guest write wait. A read returns the bytes at
    the cut or raises: `SnapshotBrokenError`, `DiscardedError`, `LostError`, `OutsideBitmapError`, `OutOfRangeError`,
    `ClosedError`, `ForkedError`, or `ImageError` when the storage fails.
    """

    def __init__(self, handle: Any, disk: Disk, fleecing: Image | None, owns_fleecing: bool, policy: str) -> None:
        """Not for users: `handle` is an `fl_snapshot *` that is freed when it is collected."""
        super().__init__()
        self._handle = handle
        self._disk = disk
        self._fleecing = fleecing
        self._owns_fleecing = owns_fleecing
        self._policy = policy
        self._size = int(lib.fl_snapshot_size(handle))
        self._cluster_size = int(lib.fl_snapshot_cluster_size(handle))

    @property
    def disk(self) -> Disk:
        return self._disk

    @property
    def fleecing(self) -> Image | None:
        """The image that saved data is spilled to; None with `fleecing="memory"`."""
        return self._fleecing

    @property
    def on_cbw_error(self) -> str:
        return self._policy

    @property
    def size(self) -> int:
        """The size of the disk at the cut, in bytes."""
        return self._size

    @property
    def cluster_size(self) -> int:
        """The unit in which old data is saved, in bytes."""
        return self._cluster_size

    def pread(self, count: int, offset: int) -> bytes:
        """The `count` bytes at `offset` as they were at the cut: all of them, or an exception."""
        return _binding.read_bytes(lib.fl_snapshot_pread, self._handle, count, offset, self._size)

    def readinto(self, buffer: Buffer, offset: int) -> int:
        """Fill a writable, contiguous buffer, without a copy. Returns its length. After an exception its contents are
        undefined.
        """
        return _binding.transfer(lib.fl_snapshot_pread, self._handle, buffer, offset, self._size, into=True)

    def extents(self, offset: int = 0, length: int | None = None, *, readable: bool = False) -> Iterator[Extent]:
        """What the snapshot holds, in order, from `offset` on; `length` None: to the end. What is not in the bitmap of
        an incremental is "outside"; with `readable` that is told only where it can't be read (see `whole` of
        `Disk.snapshot`).
        """
        function = lib.fl_snapshot_extents_readable if readable else lib.fl_snapshot_extents
        return _binding.extents(function, self._handle, offset, length, self._size)

    def discard(self, count: int, offset: int) -> None:
        """Say that the whole clusters in this range are not needed any more: writes do not save them from now on,
        what is saved is freed, and reading them raises `DiscardedError`.
        """
        _binding.in_pieces(lib.fl_snapshot_discard, self._handle, count, offset, self._size)

    def open(self) -> SnapshotFile:
        """A read-only binary file over the snapshot, unbuffered; wrap it in `io.BufferedReader` for small reads.
        Closing it leaves the snapshot open.
        """
        return SnapshotFile(self)

    def chunks(
        self,
        granularity: int | None = None,
        workers: int | None = None,
        buffers: int | None = None,
        discard: bool = True,
        ack_timeout: float = 300.0,
    ) -> Chunks:
        """Hand the snapshot out in chunks, in order, read ahead by `workers` threads into `buffers` buffers of
        `granularity` bytes. For agents with their own store: see `Chunks`.
        """
        skip_lost = self._policy == "lose-range"
        made = Chunks(self._handle, granularity, workers, buffers, discard, ack_timeout, skip_lost, None)
        self._users.add(made)
        return made

    @property
    def stats(self) -> Stats:
        """What it did so far."""
        raw = ffi.new("fl_stats *")
        call(lib.fl_snapshot_stats, self._handle, raw)
        latency = latency_of(raw.latency, raw.latency_count, raw.latency_max)
        return Stats(latency=latency, **{name: getattr(raw, name) for name in _COUNTERS})

    @property
    def broken(self) -> SnapshotBrokenError | None:
        """None while it lives; else the exception that tells why it broke."""
        try:
            self.check()
        except SnapshotBrokenError as error:
            return error
        return None

    @property
    def lost(self) -> list[Extent]:
        """The ranges that were lost so far (policy "lose-range"), in order."""
        if not self.stats.clusters_lost:
            return []
        return [extent for extent in self.extents(readable=True) if extent.kind == "lost"]

    def check(self) -> None:
        """Raise `SnapshotBrokenError`, with the first cause, when the snapshot is broken."""
        call(lib.fl_snapshot_check, self._handle)

    def _tell_break(self, bell: socket.socket) -> None:
        """Have a byte sent there when it breaks, by C, which never waits for it."""
        call(lib.fl_snapshot_tell_break, self._handle, bell.fileno())

    def commit(self) -> None:
        """Say that the incremental backup made of this snapshot is good, and on stable storage: the frozen dirty
        bitmap is dropped (see `bitmap_mode`). Not after `abort`.
        """
        call(lib.fl_snapshot_commit, self._handle)

    def abort(self) -> None:
        """Say that it is not: the frozen dirty bitmap is merged back. Closing does that too, where neither was called.
        Not after `commit`.
        """
        call(lib.fl_snapshot_abort, self._handle)

    def _close(self) -> None:
        # First the image: its last user is then a thread of the snapshot's own, so that storage that hangs when a file
        # is closed does not hang us.
        try:
            if self._fleecing is not None and self._owns_fleecing:
                self._fleecing.close()
        finally:
            call(lib.fl_snapshot_close, self._handle)

    def __repr__(self) -> str:
        return f"<Snapshot of {self._disk.source.name} ({self._size} bytes){' closed' if self._closed else ''}>"


_COUNTERS = tuple(name for name in Stats.__annotations__ if name != "latency")


class SnapshotFile(io.RawIOBase):
    """A snapshot as a read-only, seekable binary file. Not for several threads at once: it has one position."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._position = 0
        snapshot.check()

    @property
    def size(self) -> int:
        return self._snapshot.size

    @property
    def name(self) -> str:
        return repr(self._snapshot)

    @property
    def mode(self) -> str:
        return "rb"

    def readable(self) -> bool:
        self._check()
        return True

    def seekable(self) -> bool:
        self._check()
        return True

    def tell(self) -> int:
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise invalid(f"whence is {whence!r}")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = unsigned(base + offset, "the position")
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        self._check()
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), max(self.size - self._position, 0))
            if count:
                self._snapshot.readinto(view[:count], self._position)
        self._position += count
        return count

    def readall(self) -> bytes:
        self._check()
        data = self._snapshot.pread(max(self.size - self._position, 0), min(self._position, self.size))
        self._position += len(data)
        return data

    def write(self, buffer: Buffer) -> int:
        raise io.UnsupportedOperation("a snapshot is read-only")

    def _check(self) -> None:
        if self.closed:
            raise ClosedError("the snapshot's file is closed")

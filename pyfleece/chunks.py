"""Chunks: a snapshot for backup agents that have their own store.

C threads read ahead into a fixed set of buffers; the agent gets the buffers themselves, one chunk each, in the order
of their offsets, and acknowledges each chunk, in any order and from any thread, when it has stored it.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

from pyfleece import _binding
from pyfleece._binding import Extent, Resource, call, call_code, positive
from pyfleece._native import ffi, lib
from pyfleece.errors import Error, invalid

# How long one wait in C lasts at most: close() from another thread waits for it.
_SLICE = 100_000_000
DEFAULT_BUFFERS = 16


class _Job:
    """A job in chunks mode, shared by the iterator and its chunks: a chunk that lives longer than the iterator can be
    acknowledged.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.held: set[int] = set()         # the ids of chunks whose buffers are out; adding and discarding are atomic


class Chunk:
    """A part of a snapshot, one granularity long (the last one may be shorter).

    `kind`: "data" or "zero". `buffer`: its bytes, read-only, or None for zeros. The buffer is valid until `ack`.
    """

    __slots__ = ("_id", "_job", "_memory", "buffer", "kind", "length", "offset")

    def __init__(self, job: _Job, raw: Any) -> None:
        self._job = job
        self._id = raw.id
        self.offset: int = raw.offset
        self.length: int = raw.length
        self.kind = "data" if raw.kind == lib.FL_DATA else "zero"
        self.buffer: memoryview | None = None
        if self.kind == "data":
            # The memory is the job's: every view of it keeps the job alive.
            handle = job.handle
            memory = ffi.buffer(ffi.gc(raw.buffer, lambda _: handle), self.length)
            self._memory = weakref.ref(memory)
            self.buffer = memoryview(memory).toreadonly()

    def ack(self, discard: bool = True) -> None:
        """Give the chunk back: its data is stored. With `discard` (and where the job discards at all) the snapshot
        forgets the range.

        Raises BufferError, with nothing done, while something else still uses `buffer` (a slice of it, a numpy array,
        ...); `ArgumentError` when it was acknowledged before; `ClosedError` when the job was closed.
        """
        if self.buffer is not None:
            self.buffer.release()                   # BufferError: an array, say, was made of it
            memory = self._memory()
            if memory is not None:                  # a slice of it still holds on to that
                self.buffer = memoryview(memory).toreadonly()
                raise BufferError(
                    f"the chunk at {self.offset} is still in use: release what was made of its buffer first"
                )
            self.buffer = None
        call(lib.fl_backup_ack, self._job.handle, self._id, discard)
        self._job.held.discard(self._id)

    def __repr__(self) -> str:
        return f"<Chunk {self.kind} offset={self.offset} length={self.length}>"


class Chunks(Resource):
    """An iterator of `Chunk`, and a context manager. Made by `Snapshot.chunks`.

    Any number of threads may take chunks from one iterator and acknowledge them. Leaving a loop early closes the job
    when the iterator is not referred to any more; leaving its `with` block closes it in any case. After the last
    chunk the job stays until its chunks are acknowledged or forgotten.

    `ack_timeout`: seconds after which `next()` raises TimeoutError when all buffers are held by chunks that nobody
    acknowledges.
    """

    def __init__(
        self,
        snapshot: Any,
        granularity: int | None,
        workers: int | None,
        buffers: int | None,
        discard: bool,
        ack_timeout: float,
        skip_lost: bool,
        speed: int | None,
    ) -> None:
        """Not for users: `snapshot` is an `fl_snapshot *`."""
        super().__init__()
        self._exhausted = False
        self._ack_timeout = _binding.nanoseconds(ack_timeout, "ack_timeout") / 1e9
        self._buffers = positive(buffers, "buffers", 32) or DEFAULT_BUFFERS
        if self._buffers < 2:
            raise invalid("chunks need at least 2 buffers")
        options = ffi.new("fl_backup_options *")
        options.granularity = positive(granularity, "granularity")
        options.workers = positive(workers, "workers", 32)
        options.buffers = self._buffers
        options.speed = positive(speed, "speed")
        options.discard = discard
        options.skip_lost = skip_lost
        start = lib.fl_backup_start
        self._job = _Job(_binding.make("fl_backup **", lib.fl_backup_free, start, snapshot, ffi.NULL, options))

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> Chunk:
        if self._exhausted:
            raise StopIteration
        job = self._job
        raw = ffi.new("fl_chunk *")
        since = time.monotonic()
        while True:
            code = call_code(lib.fl_backup_next, job.handle, _SLICE, raw, expected=(-lib.FL_ERUNNING, -lib.FL_EEND))
            if code == 0:
                break
            if code == -lib.FL_EEND:
                self._exhausted = True
                raise StopIteration
            if len(job.held) < self._buffers:       # the wait is the source's fault
                since = time.monotonic()
            elif time.monotonic() - since > self._ack_timeout:
                raise TimeoutError(
                    f"no chunk was acknowledged for {self._ack_timeout:g} s and all {self._buffers} buffers are held:"
                    " call ack() on each chunk"
                )
        if raw.kind == lib.FL_DATA:
            job.held.add(raw.id)
        return Chunk(job, raw)

    @property
    def lost(self) -> list[Extent]:
        """The ranges that were left out because they were lost (policy "lose-range"), in order."""
        return lost_ranges(self._job.handle)

    def _close(self) -> None:
        call(lib.fl_backup_close, self._job.handle)

    def __del__(self) -> None:
        # Chunks that are out may still be acknowledged after a loop that ran to its end.
        if hasattr(self, "_job") and not self._exhausted and not self._closed:
            try:
                self.close()
            except Error:
                pass

    def __repr__(self) -> str:
        return f"<Chunks{' closed' if self._closed else ''}>"


def lost_ranges(job: Any) -> list[Extent]:
    """What an `fl_backup *` left out."""
    buffer, found = ffi.new("fl_extent[]", 256), ffi.new("size_t *")
    ranges: list[Extent] = []
    while True:
        call(lib.fl_backup_lost, job, len(ranges), buffer, 256, found)
        if not found[0]:
            return ranges
        ranges.extend(Extent(e.offset, e.length, _binding.KINDS[e.kind]) for e in buffer[0 : found[0]])

"""Digests of what a backup copied, and finding out whether it is still so.

A file of digests has a line of text, then records of 48 bytes, ordered by offset, none overlapping:

    pyfleece-digests 1 ALGORITHM\n
    offset u64, length u64, digest 32 bytes        (little-endian; a digest of zeros stands for a range of zeros)

ALGORITHM is "blake3" where the package of that name is installed (2.5 GB/s against 0.5 on one core where both were
measured), else "sha256".
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pyfleece._binding import PIECE, Extent
from pyfleece.errors import Error, FormatError
from pyfleece.image import Image

_MAGIC = "pyfleece-digests 1 "
_RECORD = struct.Struct("<QQ32s")
_ZEROS = bytes(32)
_LONGEST = 1 << 30                      # bytes of data behind one digest: a piece of a backup has far less


class Record(NamedTuple):
    offset: int
    length: int
    digest: bytes | None                # None: zeros


def best_algorithm() -> str:
    try:
        import blake3  # noqa: F401
    except ImportError:
        return "sha256"
    return "blake3"


def hasher(algorithm: str) -> Callable[[Any], bytes]:
    """A function from a buffer to its digest of 32 bytes; it lets go of the GIL."""
    if algorithm == "sha256":
        return lambda data: hashlib.sha256(data).digest()
    if algorithm == "blake3":
        try:
            import blake3
        except ImportError:
            raise FormatError("these digests are BLAKE3: pip install 'pyfleece[digests]'") from None
        return lambda data: bytes(blake3.blake3(data).digest())
    raise FormatError(f"digests of the kind {algorithm!r} are not known")


class Collector:
    """The `on_piece` of a backup: the threads that copy add the digest of each piece that they hold."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._digest = hasher(algorithm)
        self._records: list[Record] = []
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int, data: memoryview | None) -> None:
        record = Record(offset, length, None if data is None else self._digest(data))
        with self._lock:
            self._records.append(record)

    def records(self) -> list[Record]:
        """In order; neighbouring zeros as one."""
        merged: list[Record] = []
        for record in sorted(self._records):
            last = merged[-1] if merged else None
            if last and last.digest is record.digest is None and last.offset + last.length == record.offset:
                merged[-1] = Record(last.offset, last.length + record.length, None)
            else:
                merged.append(record)
        return merged


def encode(algorithm: str, records: Iterable[Record]) -> bytes:
    packed = (_RECORD.pack(offset, length, digest or _ZEROS) for offset, length, digest in records)
    return (_MAGIC + algorithm + "\n").encode() + b"".join(packed)


def decode(data: bytes, size: int, name: str) -> tuple[str, list[Record]]:
    """The algorithm and the records; `FormatError` unless they make sense for a disk of `size` bytes."""
    line, _, body = data.partition(b"\n")
    if not line.startswith(_MAGIC.encode()) or len(line) > 40 or len(body) % _RECORD.size:
        raise FormatError(f"{name} is not a file of digests")
    records = []
    end = 0
    for offset, length, digest in _RECORD.iter_unpack(body):
        zeros = digest == _ZEROS
        if offset < end or length == 0 or length > size - offset or (length > _LONGEST and not zeros):
            raise FormatError(f"{name} is damaged: a record of {length} bytes at {offset}")
        end = offset + length
        records.append(Record(offset, length, None if zeros else digest))
    return line[len(_MAGIC) :].decode("ascii", "replace"), records


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int | None) -> Iterator[Any]:
    """The results of `function` for the items, in order, with a bounded number of them on their way."""
    count = workers or min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(count, "pyfleece-verify") as pool:
        running: list[Any] = []
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) >= 4 * count:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:
            for future in running:
                future.cancel()


def verify(
    image: Image,
    algorithm: str,
    records: Iterable[Record],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Extent]:
    """Read all of it again, in parallel. Returns the ranges that are not as they were, in order: of the kinds "wrong"
    and "unreadable". `progress` is called with the bytes that were looked at since the last call.
    """
    digest = hasher(algorithm)

    def look(record: Record) -> list[Extent]:
        try:
            if record.digest is None:
                return list(_nonzero(image, record.offset, record.length))
            right = digest(image.pread(record.length, record.offset)) == record.digest
        except Error:
            return [Extent(record.offset, record.length, "unreadable")]
        return [] if right else [Extent(record.offset, record.length, "wrong")]

    bad: list[Extent] = []
    todo = list(records)
    for record, found in zip(todo, in_parallel(look, todo, workers)):
        for extent in found:
            if bad and bad[-1].kind == extent.kind and bad[-1].offset + bad[-1].length == extent.offset:
                extent = Extent(bad[-1].offset, bad.pop().length + extent.length, extent.kind)
            bad.append(extent)
        if progress is not None:
            progress(record.length)
    return bad


def _nonzero(image: Image, offset: int, length: int) -> Iterator[Extent]:
    """The pieces of a range that should read as zeros and do not."""
    for extent in image.extents(offset, length):
        end = extent.offset + extent.length
        for at in range(extent.offset, end if extent.kind == "data" else extent.offset, PIECE):
            count = min(PIECE, end - at)
            data = image.pread(count, at)
            if data.count(0) != count:
                yield Extent(at, count, "wrong")

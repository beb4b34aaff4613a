"""What an image says about itself: its details, where its bytes are, and what else is stored in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pyfleece._binding import call, check_range, unsigned
from pyfleece._native import ffi, lib

_BATCH = 256
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Qcow2Info:
    """What only a qcow2 image has."""

    version: int                # 2 or 3
    refcount_bits: int
    compression: str            # of compressed clusters: "zlib" or "zstd"
    dirty: bool                 # refcounts may be wrong: it was not closed properly
    corrupt: bool               # somebody found damage in it: it can't be opened for writing
    lazy_refcounts: bool
    snapshots: int              # how many `Image.internal_snapshots` lists
    bitmaps: int                # how many `Image.persistent_bitmaps` lists


@dataclass(frozen=True)
class ImageInfo:
    """What there is to know about an image. Sizes are bytes."""

    format: str
    size: int                   # the guest's size
    allocated: int              # what it occupies on its file system; a block device: its size
    cluster_size: int           # the unit in which it allocates
    alignment: int              # what its storage asks of offsets and lengths: 1 when buffered. Callers need not care
    block_device: bool
    writable: bool
    direct: bool
    backing: str | None = None          # the backing file, as the image tells it
    backing_format: str | None = None
    qcow2: Qcow2Info | None = None


@dataclass(frozen=True)
class InternalSnapshot:
    """A snapshot inside of an image, made by another program, such as `qemu-img snapshot`. They are kept; nothing here
    makes, reads or removes one.
    """

    id: str
    name: str
    size: int | None            # of the disk then, in bytes; None: not told, it is as the image's
    vm_state_size: int          # bytes
    date: float                 # seconds since 1970
    vm_clock: float             # seconds that the machine had run
    icount: int | None          # instructions that it had executed


@dataclass(frozen=True)
class PersistentBitmap:
    """A dirty bitmap that is stored in an image."""

    name: str
    granularity: int            # bytes
    in_use: bool                # it was not closed properly: not to be trusted
    enabled: bool               # whoever writes the image has to keep it up to date
    extra: bool                 # it has extra data of an unknown kind


class MapEntry(NamedTuple):
    """Where the bytes of a range are. `kind` is "data" (may hold anything) or "zero" (reads as zeros)."""

    offset: int
    length: int
    kind: str
    allocated: bool             # an image of the chain says what is here; False: none does, and it reads as zeros
    depth: int                  # which one: 0: this image; 1: its backing file, ...
    compressed: bool
    host_offset: int | None     # where the bytes are in that image's file


def read_info(handle: Any) -> ImageInfo:
    raw = ffi.new("fl_image_info *")
    call(lib.fl_image_info_get, handle, raw)
    details = None
    if raw.version:
        details = Qcow2Info(
            version=raw.version,
            refcount_bits=raw.refcount_bits,
            compression=_text(raw.compression),
            dirty=bool(raw.dirty),
            corrupt=bool(raw.corrupt),
            lazy_refcounts=bool(raw.lazy_refcounts),
            snapshots=raw.snapshots,
            bitmaps=raw.bitmaps,
        )
    return ImageInfo(
        format=_text(raw.format),
        size=raw.size,
        allocated=raw.allocated,
        cluster_size=raw.cluster_size,
        alignment=raw.alignment,
        block_device=bool(raw.block_device),
        writable=bool(raw.writable),
        direct=bool(raw.direct),
        backing=_text(raw.backing) or None,
        backing_format=_text(raw.backing_format) or None,
        qcow2=details,
    )


def read_snapshots(handle: Any) -> list[InternalSnapshot]:
    return _read_list(lib.fl_image_snapshots, handle, "fl_internal_snapshot[]", _snapshot)


def read_bitmaps(handle: Any) -> list[PersistentBitmap]:
    return _read_list(lib.fl_image_bitmaps, handle, "fl_persistent_bitmap[]", _bitmap)


def _snapshot(raw: Any) -> InternalSnapshot:
    return InternalSnapshot(
        id=_text(raw.id),
        name=_text(raw.name),
        size=raw.size or None,
        vm_state_size=raw.vm_state_size,
        date=raw.date_ns / 1e9,
        vm_clock=raw.vm_clock_ns / 1e9,
        icount=None if raw.icount == 2**64 - 1 else raw.icount,
    )


def _bitmap(raw: Any) -> PersistentBitmap:
    return PersistentBitmap(_text(raw.name), raw.granularity, bool(raw.in_use), bool(raw.enabled), bool(raw.extra))


def read_map(handle: Any, offset: int, length: int | None, size: int) -> Iterator[MapEntry]:
    """In order and without gaps; neighbours that continue each other are one. The first batch is fetched at once, so
    that errors show in the call that asked.
    """
    offset = unsigned(offset, "offset")
    length = unsigned(length, "length") if length is not None else max(size - offset, 0)
    check_range(length, offset, size)
    end = offset + length
    buffer = ffi.new("fl_mapping[]", _BATCH)
    found = ffi.new("size_t *")

    def fetch(at: int) -> list[MapEntry]:
        call(lib.fl_image_map, handle, at, end - at, buffer, _BATCH, found)
        return [_entry(raw) for raw in buffer[0 : found[0]]]

    def walk(batch: list[MapEntry]) -> Iterator[MapEntry]:
        last: MapEntry | None = None
        while batch:
            for entry in batch:
                if last and _continues(last, entry):
                    last = last._replace(length=last.length + entry.length)
                    continue
                if last:
                    yield last
                last = entry
            at = batch[-1].offset + batch[-1].length
            batch = fetch(at) if at < end else []
        if last:
            yield last

    return walk(fetch(offset) if length else [])


def _entry(raw: Any) -> MapEntry:
    flags = raw.flags
    return MapEntry(
        offset=raw.offset,
        length=raw.length,
        kind="data" if flags & lib.FL_MAP_DATA else "zero",
        allocated=bool(flags & lib.FL_MAP_ALLOCATED),
        depth=raw.depth,
        compressed=bool(flags & lib.FL_MAP_COMPRESSED),
        host_offset=raw.host_offset if flags & lib.FL_MAP_OFFSET else None,
    )


def _continues(last: MapEntry, entry: MapEntry) -> bool:
    if last[2:6] != entry[2:6]:
        return False
    if last.host_offset is None or entry.host_offset is None:
        return last.host_offset is entry.host_offset
    return last.host_offset + last.length == entry.host_offset


def _read_list(function: Any, handle: Any, array: str, convert: Callable[[Any], _Item]) -> list[_Item]:
    """All that a C function lists. Each call reads the file, and there may be many: the batches grow."""
    found = ffi.new("size_t *")
    items: list[_Item] = []
    batch = 16
    while True:
        buffer = ffi.new(array, batch)
        call(function, handle, len(items), buffer, batch, found)
        items += [convert(raw) for raw in buffer[0 : found[0]]]
        if found[0] < batch:
            return items
        batch *= 8


def _text(field: Any) -> str:
    """Names in a file are what somebody wrote there."""
    return bytes(ffi.string(field)).decode("utf-8", "surrogateescape")

"""Dirty bitmaps of a disk: what was written since a bitmap was added, or since a snapshot last froze it. They live in
memory.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pyfleece import _binding
from pyfleece._binding import Extent, call, call_code, unsigned
from pyfleece._native import ffi, lib
from pyfleece.errors import invalid

if TYPE_CHECKING:
    from pyfleece.disk import Disk

_KINDS = {lib.FL_DATA: "dirty", lib.FL_OUTSIDE: "clean"}


class DirtyBitmap:
    """One bitmap of a disk. Stays valid until the bitmap is removed or the disk closed (then: FileNotFoundError,
    `ClosedError`).
    """

    def __init__(self, disk: Disk, name: str) -> None:
        """Not for users: see `Disk.bitmaps`."""
        self._disk = disk
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def granularity(self) -> int:
        """The bytes that one bit stands for."""
        return self._info()[0]

    @property
    def count(self) -> int:
        """How many bytes are dirty, in whole units of the granularity (the last one may end with the disk)."""
        return self._info()[1]

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Which parts are "dirty" and which "clean", in order, from `offset` on; `length` None: to the end."""
        function, disk = lib.fl_disk_bitmap_extents, self._disk
        return _binding.extents(function, disk._handle, offset, length, disk.size, self._name.encode(), kinds=_KINDS)

    def _info(self) -> tuple[int, int]:
        granularity, dirty = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        call(lib.fl_disk_bitmap_info, self._disk._handle, self._name.encode(), granularity, dirty)
        return granularity[0], dirty[0]

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self._name!r}>"


class Bitmaps(Mapping[str, DirtyBitmap]):
    """The dirty bitmaps of a disk, by name."""

    def __init__(self, disk: Disk) -> None:
        """Not for users: see `Disk.bitmaps`."""
        self._disk = disk

    def add(self, name: str, granularity: int = 65536) -> DirtyBitmap:
        """Start to record what is written, in units of `granularity` bytes (a power of two). `FileExistsError`: the
        name is taken.
        """
        call(lib.fl_disk_bitmap_add, self._disk._handle, _encode(name), unsigned(granularity, "granularity"))
        return DirtyBitmap(self._disk, name)

    def remove(self, name: str) -> None:
        """Forget a bitmap. `FileNotFoundError`: there is none of this name; `ImageError` (EBUSY): a snapshot has it
        frozen.
        """
        call(lib.fl_disk_bitmap_remove, self._disk._handle, _encode(name))

    def __getitem__(self, name: str) -> DirtyBitmap:
        bitmap = DirtyBitmap(self._disk, name)
        try:
            bitmap._info()
        except FileNotFoundError:
            raise KeyError(name) from None
        return bitmap

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"<Bitmaps {self._names()}>"

    def _names(self) -> list[str]:
        names: list[str] = []
        buffer = ffi.new("char[256]")
        handle = self._disk._handle
        while call_code(lib.fl_disk_bitmap_name, handle, len(names), buffer, expected=(-errno.ENOENT,)) == 0:
            names.append(ffi.string(buffer).decode())
        return names


def _encode(name: str) -> bytes:
    encoded = name.encode()
    if not encoded or b"\0" in encoded or len(encoded) > 255:
        raise invalid(f"a bitmap's name has 1 to 255 bytes, none of them null: {name!r}")
    return encoded

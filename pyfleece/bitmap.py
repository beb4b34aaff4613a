"""Dirty bitmaps of a disk: what was written since a bitmap was added or cleared, or since a snapshot last froze it. In
memory, or kept in a file beside the image, where they survive the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pyfleece import _binding
from pyfleece._binding import Extent, call, call_code, unsigned
from pyfleece._native import ffi, lib
from pyfleece.errors import invalid

if TYPE_CHECKING:
    from pyfleece.disk import Disk

SUFFIX = ".fleece-bitmaps"
_KINDS = {lib.FL_DATA: "dirty", lib.FL_OUTSIDE: "clean"}


class DirtyBitmap:
    """One bitmap of a disk. Stays valid until the bitmap is removed or the disk closed (then: FileNotFoundError,
    `ClosedError`).

    One that is `inconsistent` may miss writes: using it raises `InconsistentBitmapError`, and a full backup is needed.
    Clear it at the time of that backup, or remove it. While a snapshot has a bitmap frozen, changing it raises
    `ImageError` (EBUSY).
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
        return int(self._state().granularity)

    @property
    def count(self) -> int:
        """How many bytes are dirty, in whole units of the granularity (the last one may end with the disk)."""
        granularity, dirty = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        call(lib.fl_disk_bitmap_info, self._disk._handle, self._name.encode(), granularity, dirty)
        return int(dirty[0])

    @property
    def enabled(self) -> bool:
        """Whether it records what is written."""
        return bool(self._state().enabled)

    @property
    def busy(self) -> bool:
        """Whether a snapshot has it frozen."""
        return bool(self._state().busy)

    @property
    def persistent(self) -> bool:
        """Whether it is kept in the disk's bitmap file."""
        return bool(self._state().persistent)

    @property
    def write_intent(self) -> bool:
        """Whether it is good after a crash of the machine, too."""
        return bool(self._state().write_intent)

    @property
    def inconsistent(self) -> bool:
        """Whether it may miss writes; `problem` says why."""
        return bool(self._state().inconsistent)

    @property
    def problem(self) -> str | None:
        """Why it is inconsistent; or, of one that is not, why it will be when the disk is opened next. None: all is
        well.
        """
        return ffi.string(self._state().problem).decode() or None

    @property
    def uuid(self) -> str | None:
        """A name that no other bitmap ever has; None where it is not persistent."""
        return ffi.string(self._state().uuid).decode() or None

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Which parts are "dirty" and which "clean", in order, from `offset` on; `length` None: to the end."""
        function, disk = lib.fl_disk_bitmap_extents, self._disk
        return _binding.extents(function, disk._handle, offset, length, disk.size, self._name.encode(), kinds=_KINDS)

    def clear(self) -> None:
        """Begin anew: nothing is dirty but what a write changes that ends after this. An inconsistent one is good
        again.
        """
        call(lib.fl_disk_bitmap_clear, self._disk._handle, self._name.encode())

    def enable(self) -> None:
        """Record what is written from now on."""
        call(lib.fl_disk_bitmap_enable, self._disk._handle, self._name.encode(), 1)

    def disable(self) -> None:
        """Record nothing more. What is dirty stays so."""
        call(lib.fl_disk_bitmap_enable, self._disk._handle, self._name.encode(), 0)

    def merge(self, *others: DirtyBitmap | str) -> None:
        """What is dirty in any of the others, which may have other granularities, is dirty here as well."""
        names = [other.name if isinstance(other, DirtyBitmap) else other for other in others]
        self._disk.bitmaps.merge(self._name, *names)

    def _state(self) -> Any:
        state = ffi.new("fl_bitmap_state *")
        call(lib.fl_disk_bitmap_state, self._disk._handle, self._name.encode(), state)
        return state

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self._name!r}>"


class Bitmaps(Mapping[str, DirtyBitmap]):
    """The dirty bitmaps of a disk, by name."""

    def __init__(self, disk: Disk) -> None:
        """Not for users: see `Disk.bitmaps`."""
        self._disk = disk

    @property
    def file(self) -> str | None:
        """Where the persistent ones are, or would be; None: nowhere."""
        path = self._disk._bitmap_file
        return os.fsdecode(path) if path is not None else None

    def add(
        self, name: str, granularity: int = 65536, *, persistent: bool = False, write_intent: bool = False
    ) -> DirtyBitmap:
        """Start to record what is written, in units of `granularity` bytes (a power of two from 4096 to 2 GiB).

        `persistent`: in the disk's bitmap file, which is made if need be. It survives the end of the process, also by
        kill -9: it then has all that was written, and perhaps more. After a crash of the machine it is
        `inconsistent`, unless `write_intent` is set as well: then bits reach stable storage before the first write
        to their unit does, which makes that write as slow as a sync.

        `FileExistsError`: the name is taken.
        """
        handle, encoded, unit = self._disk._handle, _encode(name), unsigned(granularity, "granularity")
        if persistent or write_intent:
            self._disk._make_bitmap_file()
            call(lib.fl_disk_bitmap_add_persistent, handle, encoded, unit, write_intent)
        else:
            call(lib.fl_disk_bitmap_add, handle, encoded, unit)
        return DirtyBitmap(self._disk, name)

    def remove(self, name: str) -> None:
        """Forget a bitmap. `FileNotFoundError`: there is none of this name; `ImageError` (EBUSY): a snapshot has it
        frozen.
        """
        call(lib.fl_disk_bitmap_remove, self._disk._handle, _encode(name))

    def merge(self, into: str, *others: str) -> None:
        """What is dirty in any of the others is dirty in `into` as well. All of them, or none."""
        names = [ffi.new("char[]", _encode(other)) for other in others]
        call(lib.fl_disk_bitmap_merge, self._disk._handle, _encode(into), names, len(names))

    def __getitem__(self, name: str) -> DirtyBitmap:
        bitmap = DirtyBitmap(self._disk, name)
        try:
            bitmap._state()
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
            names.append(ffi.string(buffer).decode(errors="replace"))
        return names


def _encode(name: str) -> bytes:
    encoded = name.encode()
    if not encoded or b"\0" in encoded or len(encoded) > 255:
        raise invalid(f"a bitmap's name has 1 to 255 bytes, none of them null: {name!r}")
    return encoded

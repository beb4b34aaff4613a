"""What of an ext3 or ext4 file system is still in its journal.

The file systems of a disk that was not unmounted have recent changes, of minutes at times, in the journal only. As a
mount would, we look for the transactions that are complete; unlike a mount we write nothing, but remember where the
newest copy of each block is.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable

from pyfleece.filesystems.base import damaged

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPER1, _SUPER2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_REVOKES, _64BIT, _ASYNC_COMMIT, _CHECKSUM_2, _CHECKSUM_3, _FAST_COMMIT = 1, 2, 4, 8, 16, 32
_KNOWN = _REVOKES | _64BIT | _ASYNC_COMMIT | _CHECKSUM_2 | _CHECKSUM_3 | _FAST_COMMIT


class Journal:
    """The journal of a file system of `blocks` blocks of `block` bytes; `pread(count, offset)` reads the journal, which
    is `size` bytes.
    """

    def __init__(self, pread: Callable[[int, int], bytes], size: int, block: int, blocks: int) -> None:
        self.warning: str | None = None
        self._pread = pread
        self._block = block
        self._places: dict[int, tuple[int, bool]] = {}     # block: its copy in the journal, and if that is escaped
        self._sorted: list[int] = []
        if size < block:
            raise damaged("its journal is empty")
        header = pread(1024, 0)
        magic, kind = struct.unpack_from(">II", header)
        if magic != _MAGIC or kind not in (_SUPER1, _SUPER2):
            raise damaged("its journal has no superblock")
        own_block, length, first, sequence, start = struct.unpack_from(">IIIII", header, 12)
        _, incompatible, _ = struct.unpack_from(">III", header, 36) if kind == _SUPER2 else (0, 0, 0)
        if incompatible & ~_KNOWN:
            raise damaged(f"its journal uses unknown features ({incompatible & ~_KNOWN:#x})")
        if not start:
            return                                          # nothing to be done
        if incompatible & _FAST_COMMIT:
            fast = struct.unpack_from(">I", header, 0x54)[0] or 256
            length -= fast
            self.warning = "it uses fast commits, which were not replayed: changes of the last seconds may be missing"
        if incompatible & _ASYNC_COMMIT:
            self.warning = "it uses asynchronous commits, whose checksums are not checked: the last one may be torn"
        if own_block != block or not 0 < first <= start < length or length * block > size:
            raise damaged("the superblock of its journal makes no sense")
        self._first, self._length = first, length
        self._wide = bool(incompatible & _64BIT)
        self._tag_3 = bool(incompatible & _CHECKSUM_3)
        self._tag_size = 16 if self._tag_3 else 8 + 4 * self._wide + 2 * bool(incompatible & _CHECKSUM_2)
        self._tail = 4 if incompatible & (_CHECKSUM_2 | _CHECKSUM_3) else 0
        self._scan(start, sequence, blocks)
        self._sorted = sorted(self._places)

    def over(self, data: bytes, place: int) -> bytes:
        """`data`, read from the volume at `place`, with what the journal has newer of it."""
        first, end = place // self._block, -(-(place + len(data)) // self._block)
        index = bisect_left(self._sorted, first)
        if index == len(self._sorted) or self._sorted[index] >= end:
            return data
        changed = bytearray(data)
        while index < len(self._sorted) and self._sorted[index] < end:
            number = self._sorted[index]
            where, escaped = self._places[number]
            copy = self._pread(self._block, where * self._block)
            if escaped:
                copy = _MAGIC.to_bytes(4, "big") + copy[4:]
            start = number * self._block - place
            lead = max(-start, 0)
            part = copy[lead : len(data) - start]
            changed[start + lead : start + lead + len(part)] = part
            index += 1
        return bytes(changed)

    def _scan(self, position: int, sequence: int, blocks: int) -> None:
        """Follow the log for as long as its transactions are complete, each with the number after the last one's."""
        pending: list[tuple[int, int, bool]] = []           # of the transaction that we are in
        revoked: list[int] = []
        left = self._length - self._first                   # a log can't be longer than itself
        while left > 0:
            block = self._pread(self._block, position * self._block)
            magic, kind, number = struct.unpack_from(">III", block)
            if magic != _MAGIC or number != sequence:
                return
            position = self._after(position)
            left -= 1
            if kind == _DESCRIPTOR:
                for target, escaped in self._tags(block):
                    if target >= blocks:
                        raise damaged("its journal holds a block beyond the end of the volume")
                    pending.append((target, position, escaped))
                    position = self._after(position)
                    left -= 1
            elif kind == _REVOKE:
                revoked += self._revokes(block)
            elif kind == _COMMIT:
                # A revoked block was freed: its older copies may not be replayed over what uses it now.
                for target in revoked:
                    self._places.pop(target, None)
                gone = set(revoked)
                for target, where, escaped in pending:
                    if target not in gone:
                        self._places[target] = where, escaped
                pending, revoked = [], []
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                return

    def _after(self, position: int) -> int:
        return position + 1 if position + 1 < self._length else self._first

    def _tags(self, block: bytes) -> list[tuple[int, bool]]:
        """The blocks that follow a descriptor: their number on the volume, and whether they are escaped."""
        found = []
        position = 12
        while position + self._tag_size <= len(block) - self._tail:
            if self._tag_3:
                low, flags, high = struct.unpack_from(">III", block, position)
            else:
                low, _, flags = struct.unpack_from(">IHH", block, position)
                high = struct.unpack_from(">I", block, position + 8)[0] if self._wide else 0
            found.append((low | (high << 32 if self._wide else 0), bool(flags & _ESCAPED)))
            position += self._tag_size
            if not flags & _SAME_UUID:
                position += 16
            if flags & _LAST:
                break
        return found

    def _revokes(self, block: bytes) -> list[int]:
        end = min(struct.unpack_from(">I", block, 12)[0], len(block) - self._tail)
        width = 8 if self._wide else 4
        return [int.from_bytes(block[at : at + width], "big") for at in range(16, end - width + 1, width)]

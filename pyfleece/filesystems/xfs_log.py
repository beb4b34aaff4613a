"""What of an XFS is still in its log.

XFS writes changes of metadata to its log first, and in their place minutes later. As a mount would, we follow the log
from its tail to its head and collect the transactions that are complete; unlike a mount we write nothing, but keep the
sectors that they change in memory. Intents, the halves of operations that were cut off in the middle, stay undone.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

from pyfleece.filesystems.base import Window, damaged
from pyfleece.filesystems.xfs_trees import root_from_log

_SECTOR = 512
_MAGIC = 0xFEEDBABE
_WINDOW = 8192                              # sectors before the head in which records may be incomplete
_MAX_RECORD = 1 << 19
_START, _COMMIT, _WAS_CONTINUED, _UNMOUNT = 0x01, 0x02, 0x08, 0x20
_TRANSACTION = b"NART"                      # as a little-endian machine writes it
_INODE_ITEM, _BUFFER_ITEM = 0x123B, 0x123C
_INODE_BUFFER, _CANCEL = 0x1, 0x2
_FORK_DATA, _FORK_ROOT, _FORK_DEVICE = 0x2 | 0x4, 0x8, 0x10
_CHUNK = 128
_BIGTIME = 0x8

Region = bytearray


class _Record:
    """A record of the log: operations of transactions, in sectors that are stamped with the round of the log."""

    def __init__(self, header: bytes) -> None:
        fields = struct.unpack_from(">4I", header)
        self.cycle, self.version, self.length = fields[1:]
        self.tail: int = struct.unpack_from(">Q", header, 24)[0]
        self.operations: int = struct.unpack_from(">I", header, 40)[0]
        size: int = struct.unpack_from(">I", header, 320)[0]
        # A large record has more sectors of header, one for each 32 KiB.
        self.headers = -(-size // 32768) if self.version & 2 and size > 32768 else 1
        self.sectors = self.headers + -(-self.length // _SECTOR)


class Log:
    """The log of an XFS: `size` bytes at `start` of the volume. `version` is that of the file system, whose inodes have
    `inode_size` bytes.
    """

    def __init__(self, window: Window, start: int, size: int, version: int, inode_size: int) -> None:
        self._window = window
        self._start = start
        self._sectors = size // _SECTOR
        self._version = version
        self._inode_size = inode_size
        self._changed: dict[int, bytearray] = {}            # sectors of the volume
        if self._sectors < 2 or start + size > window.size:
            raise damaged("its log is not on the volume")
        transactions = list(self._transactions())
        cancelled = Counter(
            _key(regions[0])
            for items in transactions
            for kind, regions in items
            if kind == _BUFFER_ITEM and struct.unpack_from("<H", regions[0], 4)[0] & _CANCEL
        )
        for items in transactions:
            # Buffers first, as a mount does it: an inode is changed in what is there then.
            for wanted in (_BUFFER_ITEM, _INODE_ITEM):
                for kind, regions in items:
                    if kind == wanted == _BUFFER_ITEM:
                        self._buffer(regions, cancelled)
                    elif kind == wanted:
                        self._inode(regions, cancelled)
            for kind, regions in items:
                if kind == _BUFFER_ITEM and struct.unpack_from("<H", regions[0], 4)[0] & _CANCEL:
                    cancelled[_key(regions[0])] -= 1

    def over(self, data: bytes, place: int) -> bytes:
        """`data`, read from the volume at `place`, with what the log has newer of it."""
        if not self._changed:
            return data
        first, end = place // _SECTOR, -(-(place + len(data)) // _SECTOR)
        if end - first <= len(self._changed):
            found = [sector for sector in range(first, end) if sector in self._changed]
        else:
            found = [sector for sector in self._changed if first <= sector < end]
        if not found:
            return data
        changed = bytearray(data)
        for sector in found:
            at = sector * _SECTOR - place
            lead = max(-at, 0)
            part = self._changed[sector][lead : len(data) - at]
            changed[at + lead : at + lead + len(part)] = part
        return bytes(changed)

    # ---- the log ----

    def _read(self, sector: int, count: int) -> bytes:
        """Sectors of the log, which goes on at its start."""
        sector %= self._sectors
        count = min(count, self._sectors)
        before = min(count, self._sectors - sector)
        data = self._window.pread(before * _SECTOR, self._start + sector * _SECTOR)
        return data + self._window.pread((count - before) * _SECTOR, self._start)

    def _head(self) -> int:
        """The log is written round and round: its head is where the number of the round changes."""

        def cycle(sector: int) -> int:
            data = self._read(sector, 1)
            head: tuple[int, int] = struct.unpack_from(">II", data)
            return head[1] if head[0] == _MAGIC else head[0]

        first, low, high = cycle(0), 0, self._sectors
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cycle(middle) == first else (low, middle)
        return high

    def _record(self, sector: int) -> tuple[_Record, bytes] | None:
        """The record that starts at a sector, and its data; None if there is none, or not all of it."""
        sector %= self._sectors
        header = self._read(sector, 1)
        if int.from_bytes(header[:4], "big") != _MAGIC:
            return None
        record = _Record(header)
        if record.length > _MAX_RECORD or record.headers > 16 or record.sectors > self._sectors:
            return None
        data = bytearray(self._read(sector, record.sectors))
        for index in range(1, record.sectors):
            # The first word of each sector is the stamp; what was there is in the header.
            at = index * _SECTOR
            wrapped = sector + index >= self._sectors
            if int.from_bytes(data[at : at + 4], "big") != record.cycle + wrapped:
                return None
            if index >= record.headers:
                part, word = divmod(index - record.headers, 64)
                if part and part >= record.headers:
                    return None
                kept = part * _SECTOR + 4 * word + (4 if part else 44)
                data[at : at + 4] = data[kept : kept + 4]
        return record, bytes(data[record.headers * _SECTOR :][: record.length])

    def _records(self) -> Iterator[tuple[_Record, bytes]]:
        """From the tail to the last one that is complete, as are all before it."""
        head = self._head()
        last = None
        back = min(_WINDOW, self._sectors)
        before = self._read(head - back, back)
        for index in range(back - 1, -1, -1):
            if before[index * _SECTOR : index * _SECTOR + 4] == b"\xfe\xed\xba\xbe":
                found = self._record(head - back + index)
                if found is not None:
                    last = found[0]
                    break
        if last is None:
            raise damaged("its log has no record that is complete")
        position, cycle = last.tail & 0xFFFFFFFF, last.tail >> 32
        left = self._sectors
        while left > 0:
            found = self._record(position)
            if found is None or found[0].cycle != cycle:
                return
            yield found
            left -= found[0].sectors
            position += found[0].sectors
            if position >= self._sectors:
                position, cycle = position - self._sectors, cycle + 1

    def _transactions(self) -> Iterator[list[tuple[int, list[Region]]]]:
        """Those that are complete, in the order in which they were committed: their items."""
        running: dict[int, list[Region]] = {}
        for record, data in self._records():
            position = 0
            for _ in range(record.operations):
                if position + 12 > len(data):
                    raise damaged("its log makes no sense")
                transaction, length, _, flags = struct.unpack_from(">IIBB", data, position)
                region = Region(data[position + 12 : position + 12 + length])
                position += 12 + length
                if len(region) < length:
                    raise damaged("its log makes no sense")
                if flags & _UNMOUNT:
                    running.clear()
                elif flags & _START:
                    running[transaction] = []
                elif transaction not in running:
                    continue                                # it started before the tail
                elif flags & _COMMIT:
                    yield list(_items(running.pop(transaction)))
                elif flags & _WAS_CONTINUED and running[transaction]:
                    running[transaction][-1] += region
                elif region:
                    running[transaction].append(region)

    # ---- items ----

    def _change(self, data: bytes, place: int) -> None:
        """Change bytes of the volume, in memory."""
        if place < 0 or place + len(data) > self._window.size:
            raise damaged("its log changes what is beyond the end of the volume")
        done = 0
        while done < len(data):
            sector, inside = divmod(place + done, _SECTOR)
            if sector not in self._changed:
                self._changed[sector] = bytearray(self._window.pread(_SECTOR, sector * _SECTOR))
            part = data[done : done + _SECTOR - inside]
            self._changed[sector][inside : inside + len(part)] = part
            done += len(part)

    def _buffer(self, regions: list[Region], cancelled: Counter[tuple[int, int]]) -> None:
        """A buffer: which of its pieces of 128 bytes changed, and to what."""
        head = regions[0]
        flags, _, block, words = struct.unpack_from("<HHqI", head, 4)
        # Of buffers of inodes, only the list of unlinked ones is logged this way.
        if flags & (_CANCEL | _INODE_BUFFER) or cancelled[_key(head)] > 0:
            return
        if words * 4 > len(head) - 20:
            raise damaged("its log makes no sense")
        bits = int.from_bytes(head[20 : 20 + 4 * words], "little")
        bit = 0
        for region in regions[1:]:
            while bit < 32 * words and not bits >> bit & 1:
                bit += 1
            count = 0
            while count < len(region) // _CHUNK and bits >> (bit + count) & 1:
                count += 1
            self._change(bytes(region[: count * _CHUNK]), block * _SECTOR + bit * _CHUNK)
            bit += count

    def _inode(self, regions: list[Region], cancelled: Counter[tuple[int, int]]) -> None:
        """An inode: its core, and all of what is in its data fork if that changed."""
        head = regions[0]
        short = len(head) < 56                      # as a 32-bit kernel packs it
        fields, = struct.unpack_from("<I", head, 4)
        device, = struct.unpack_from("<I", head, 20 if short else 24)
        block, count, inside = struct.unpack_from("<qii", head, 36 if short else 40)
        if cancelled[block, count] > 0 or len(regions) < 2 or len(regions[1]) < 96:
            return
        core = regions[1]
        version, place = core[4], block * _SECTOR + inside
        disk = _core_for_disk(core, version)
        self._change(disk[:96], place)
        if version == 3:
            self._change(disk[104:], place + 104)
        fork = 176 if version == 3 else 100
        if fields & _FORK_DEVICE:
            self._change(struct.pack(">I", device), place + fork)
        elif fields & (_FORK_DATA | _FORK_ROOT) and len(regions) > 2:
            data = bytes(regions[2])
            if fields & _FORK_ROOT:
                data = root_from_log(data, disk[82] * 8 or self._inode_size - fork, self._version)
            self._change(data, place + fork)


def _items(regions: list[Region]) -> Iterator[tuple[int, list[Region]]]:
    """The items of a transaction, each of some regions, of which the first one says how many."""
    if not regions or regions[0][:4] != _TRANSACTION:
        raise damaged("its log makes no sense, or was written by a big-endian machine")
    position = 1
    while position < len(regions):
        if len(regions[position]) < 4:
            raise damaged("its log makes no sense")
        kind, count = struct.unpack_from("<HH", regions[position])
        found = regions[position : position + count]
        least = {_BUFFER_ITEM: 24, _INODE_ITEM: 52}.get(kind, 4)
        if not count or len(found) < count or len(found[0]) < least:
            raise damaged("its log makes no sense")
        yield kind, found
        position += count


def _key(head: Region) -> tuple[int, int]:
    """What a buffer is cancelled by: its first sector, and how many it has."""
    length, block = struct.unpack_from("<Hq", head, 6)
    return block, length


_TIMES = {True: "QQQ", False: "6i"}
_LAST_TIME = {True: "Q", False: "2i"}


def _core_for_disk(core: Region, version: int) -> bytes:
    """The core of an inode is logged in the order of bytes of the machine, and is big-endian on the disk."""
    if version == 3 and len(core) < 176:
        raise damaged("its log makes no sense")
    big = version == 3 and bool(struct.unpack_from("<Q", core, 120)[0] & _BIGTIME)
    extents = "Q" if version == 3 else "6sH"
    layout = f"2H2BH3I2H{extents}{_TIMES[big]}2Q2IH2BI2H2I"
    if version == 3:
        layout += f"I3QI12s{_LAST_TIME[big]}Q16s"
    if struct.calcsize("<" + layout) > len(core):
        raise damaged("its log makes no sense")
    return struct.pack(">" + layout, *struct.unpack_from("<" + layout, core))

"""What a file can look like after a crash, and what must be on the disk then: the log of tests/c/qcow2_crash.c,
replayed.

The storage is taken to be as bad as it may be. A change of the file (a write, a hole, a length) is there for sure only
when a sync that began after it has ended before the crash. Until then each 512-byte sector of it is there or not,
independently of all others and whatever the order; but a sector that is there has what all writes to it up to that one
have made of it, as in a page cache.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
WRITE, ZERO, LENGTH, ALLOCATE, SYNC_BEGIN, SYNC_END, BEGIN, END, CLOSE = range(1, 10)
OP_WRITE, OP_ZERO, OP_DISCARD, OP_COMPRESSED, OP_FLUSH = range(1, 6)
RECORD = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class Event:
    kind: int
    id: int
    offset: int
    length: int
    data: bytes = b""


def parse(log: Path) -> list[Event]:
    """All events; the last one may have been cut off by a kill."""
    raw = log.read_bytes()
    events, at = [], 0
    while at + RECORD.size <= len(raw):
        kind, length, number, offset, size = RECORD.unpack_from(raw, at)
        at += RECORD.size
        if at + length > len(raw):
            break
        events.append(Event(kind, number, offset, size, raw[at : at + length]))
        at += length
    return events


# ---- the file ----


@dataclass
class Change:
    """A change of the file: its sectors as the page cache has them afterwards, or a new length."""

    index: int                          # of its event
    first: int = 0                      # sector
    data: bytes = b""
    end: int = 0                        # byte: the file is at least this long where any of it is there; 0: as it was
    length: int | None = None           # the file gets this length

    @property
    def sectors(self) -> int:
        return len(self.data) // SECTOR


def apply(state: bytearray, change: Change, sectors: list[int] | None = None) -> None:
    """`sectors`: only these of the change, counted from its first."""
    if change.length is not None:
        if change.length < len(state):
            del state[change.length :]
        else:
            state.extend(bytes(change.length - len(state)))
        return
    if sectors is None:
        _put(state, change.first * SECTOR, change.data, change.end)
    else:
        for sector in sectors:
            data = change.data[sector * SECTOR : (sector + 1) * SECTOR]
            end = min(change.end, (change.first + sector + 1) * SECTOR)
            _put(state, (change.first + sector) * SECTOR, data, end)


def _put(state: bytearray, offset: int, data: bytes, end: int) -> None:
    """The file grows to `end` at most, and never shrinks."""
    if end > len(state):
        state.extend(bytes(end - len(state)))
    data = data[: max(0, len(state) - offset)]
    state[offset : offset + len(data)] = data


class File:
    """The file while the log is replayed: what is durable, and what is not yet."""

    def __init__(self, initial: bytes) -> None:
        self.durable = bytearray(initial)
        self.cache = bytearray(initial)         # as the running system sees it
        self.pending: list[Change] = []
        self._begun: dict[int, int] = {}        # sync: index of its begin
        self.syncs = 0

    def feed(self, index: int, event: Event) -> bool:
        """The next event; True: the file changed."""
        if event.kind == SYNC_BEGIN:
            self._begun[event.id] = index
        elif event.kind == SYNC_END:
            begun = self._begun.pop(event.id)
            for change in self.pending:
                if change.index < begun:
                    apply(self.durable, change)
            self.pending = [change for change in self.pending if change.index > begun]
            self.syncs += 1
        elif event.kind in (WRITE, ZERO, ALLOCATE, LENGTH):
            change = self._change(index, event)
            if change is not None:
                self.pending.append(change)
                return True
        return False

    def _change(self, index: int, event: Event) -> Change | None:
        cache = self.cache
        if event.kind == LENGTH:
            change = Change(index, length=event.length)
            apply(cache, change)
            return change
        end = event.offset + event.length
        if event.kind == ALLOCATE:
            change = Change(index, length=end)
            if end <= len(cache):
                return None
            apply(cache, change)
            return change
        if event.kind == ZERO and event.id:     # keeps the size
            end = min(end, len(cache))
            if end <= event.offset:
                return None
        if end > len(cache):
            cache.extend(bytes(end - len(cache)))
        cache[event.offset : end] = event.data if event.kind == WRITE else bytes(end - event.offset)
        first, last = event.offset // SECTOR, -(-end // SECTOR)
        data = bytes(cache[first * SECTOR : last * SECTOR]).ljust((last - first) * SECTOR, b"\0")
        return Change(index, first, data, end)

    # ---- states after a crash now ----

    def everything(self) -> bytes:
        return bytes(self.cache)

    def nothing(self) -> bytes:
        return bytes(self.durable)

    def sample(self, rng: random.Random) -> bytes:
        """One of the other states."""
        state, pending = bytearray(self.durable), self.pending
        way = rng.randrange(7)
        odd = rng.randrange(len(pending)) if pending else 0
        share = rng.choice([0.1, 0.5, 0.9])
        for number, change in enumerate(pending):
            if way == 0:                        # all but one
                there = number != odd
            elif way == 1:                      # just one
                there = number == odd
            elif way == 2:                      # the last ones, and not the first
                there = number >= odd
            elif way == 3:                      # the short ones (tables, mostly), or the long ones
                there = (change.sectors > 1) == (share == 0.5)
            else:
                there = rng.random() < share
            if way in (5, 6) and change.sectors > 1 and rng.random() < (0.9 if way == 6 else 0.3):
                apply(state, change, self._some_sectors(rng, change.sectors))
            elif there:
                apply(state, change)
        return bytes(state)

    @staticmethod
    def _some_sectors(rng: random.Random, count: int) -> list[int]:
        way, cut = rng.randrange(3), rng.randrange(count + 1)
        if way == 0:
            return list(range(cut))
        if way == 1:
            return list(range(cut, count))
        return [sector for sector in range(count) if rng.random() < 0.5]


# ---- the disk ----


@dataclass
class Version:
    """What an operation makes of a sector."""

    content: bytes
    id: int                             # of the operation
    sure: bool = True                   # False: a discard; what was there before may as well stay


@dataclass
class Disk:
    """What each sector may hold, while the log is replayed: what it had at the last flush, or what came later."""

    initial: bytes
    changed: dict[int, list[Version]] = field(default_factory=dict)     # by sector; the first is the oldest possible
    completed: dict[int, int] = field(default_factory=dict)             # operation: index of its end
    flushes: dict[int, int] = field(default_factory=dict)               # flush: index of its begin
    flushed: int = 0                    # flushes that ended
    acknowledged: int = 0               # changes that ended

    def feed(self, index: int, event: Event) -> None:
        operation, count = event.length & 255, event.length >> 8
        if event.kind == BEGIN and operation == OP_FLUSH:
            self.flushes[event.id] = index
        elif event.kind == END and operation == OP_FLUSH:
            self._settle(self.flushes.pop(event.id))
            self.flushed += 1
        elif event.kind == BEGIN:
            first = event.offset // SECTOR
            for sector in range(first, first + count // SECTOR):
                if operation in (OP_WRITE, OP_COMPRESSED):
                    content = struct.pack("<QQ", sector, event.id) * (SECTOR // 16)
                else:
                    content = bytes(SECTOR)
                version = Version(content, event.id, operation != OP_DISCARD)
                before = Version(self.initial[sector * SECTOR : (sector + 1) * SECTOR], 0)
                self.changed.setdefault(sector, [before]).append(version)
        elif event.kind == END:
            self.completed[event.id] = index
            self.acknowledged += 1

    def _settle(self, begun: int) -> None:
        """What ended before `begun` can't be undone any more."""
        for versions in self.changed.values():
            if len(versions) > 1:
                for number in range(len(versions) - 1, 0, -1):
                    version = versions[number]
                    if version.sure and self.completed.get(version.id, begun) < begun:
                        del versions[:number]
                        break

    def check(self, found: bytes | bytearray) -> str | None:
        """What is wrong with a disk that holds this; None: nothing."""
        if len(found) > len(self.initial):
            return f"the disk has {len(found)} bytes"
        found = bytes(found).ljust(len(self.initial), b"\0")       # it was not made larger yet
        whole, initial = memoryview(found), memoryview(self.initial)
        position = 0
        for sector in sorted(self.changed):
            offset = sector * SECTOR
            if whole[position:offset] != initial[position:offset]:
                return f"something changed between sectors {position // SECTOR} and {sector}, where nothing was written"
            got = bytes(whole[offset : offset + SECTOR])
            if not any(version.content == got for version in self.changed[sector]):
                number, operation = struct.unpack_from("<QQ", got)
                allowed = ", ".join(str(version.id) for version in self.changed[sector])
                return f"sector {sector} has {number}:{operation} ({got[:8].hex()}...), not of one of {allowed}"
            position = offset + SECTOR
        if whole[position:] != initial[position:]:
            return f"after sector {position // SECTOR}, where nothing was written, something changed"
        return None


def play(events: list[Event], file: File, disk: Disk) -> Iterator[int]:
    """Feed all events; yields the index of each that changed the file, or ended a sync, when both have it."""
    for index, event in enumerate(events):
        disk.feed(index, event)
        if file.feed(index, event) or event.kind == SYNC_END:
            yield index

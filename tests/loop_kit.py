"""What the fault loops are made of: faults, a guest with a model of its disk, and a world to run a scenario in.

A *scenario* (test_fault_loops.py) uses a `World`: it takes snapshots, lets the guest write, makes backups. A *fault*
says what goes wrong, on which side, and with which kind of operation; a *run* is a scenario in which it goes wrong from
the nth such operation on. Whatever fails in a run goes through `World.failed`, which knows what this fault may lead to
under this policy, and checks class, side, errno and range. `World.verify` then looks at everything that is left.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import os
import random
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import descriptors

import pyfleece
import pyfleece.image
from pyfleece.testing import FaultyImage

CLUSTER = 4096
SIZE = (256 << 10) + 513            # the tail cluster is short
CLUSTERS = -(-SIZE // CLUSTER)
STAGE = 8 * CLUSTER
GRANULARITY = 4 * CLUSTER
FLEECING = 512 << 10                # more than enough

POLICIES = ["break-snapshot", "break-guest-write", "lose-range"]

# Where which kinds of operations happen.
OPS = {
    "source": ("read", "write", "zero", "discard", "flush", "extents"),
    "fleecing": ("read", "write", "discard"),
    "target": ("write", "zero", "flush"),
}

ROOMY, SHORT_OF_TIME = 20.0, 0.15   # cbw_timeout where nobody may run into it, and where somebody will


# ---- faults ----


@dataclass(frozen=True)
class Fault:
    """What happens to an operation. `error` 0: it is done in the end, so nobody may notice."""

    name: str
    action: str                     # the method of FaultyImage
    error: int = 0
    times: int | None = 1
    after: bool = False             # hang: when it is done

    def options(self) -> dict[str, Any]:
        extra: dict[str, dict[str, Any]] = {
            "fail": {"error": self.error},
            "short": {"error": self.error},
            "delay": {"seconds": 0.003},
            "hang": {"after": self.after},
        }
        return {"times": self.times, **extra[self.action]}

    def fits(self, op: str) -> bool:
        return self.action != "short" or op in ("read", "write")


EIO = Fault("EIO", "fail", errno.EIO)
ENOSPC = Fault("ENOSPC", "fail", errno.ENOSPC)
ONCE = [
    ENOSPC,
    Fault("half-then-EIO", "short", errno.EIO),
    Fault("EINTR", "fail", errno.EINTR),
]
FOREVER = [
    Fault("EIO-forever", "fail", errno.EIO, times=None),
    Fault("ENOSPC-forever", "fail", errno.ENOSPC, times=None),
    Fault("half-then-ENOSPC-forever", "short", errno.ENOSPC, times=None),
]
HARMLESS = [
    Fault("in-two-goes", "short"),
    Fault("all-in-two-goes", "short", times=None),
    Fault("late", "delay"),
    Fault("hang", "hang"),
    Fault("hang-when-done", "hang", after=True),
]


class OwnedFaultyImage(FaultyImage):
    """Closes what it is around: for an image that the library opened for itself."""

    def _close(self) -> None:
        super()._close()
        self.inner.close()


class FaultyFile(io.RawIOBase):
    """A Python file object as a target, with the faults of a FaultyImage as far as they make sense here."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.writes = 0
        self._fault: tuple[Fault, int] | None = None

    def arm(self, fault: Fault, nth: int) -> None:
        self._fault = fault, nth

    def clear(self) -> None:
        self._fault = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.writes += 1
        if self._fault is not None:
            fault, nth = self._fault
            halves = fault.action == "short"
            if self.writes == nth and halves:
                data = data[: max(1, len(data) // 2)]
            elif self.writes >= nth + halves and (fault.times is None or self.writes < nth + halves + fault.times):
                if fault.error:
                    raise OSError(fault.error, os.strerror(fault.error))
                if fault.action in ("delay", "hang"):
                    time.sleep(0.003)
        self.content += data
        return len(data)


# ---- the guest ----


@cache
def disk_content(index: int) -> bytes:
    """Data, with clusters of zeros, and holes short and long (`zero_ranges`)."""
    data = bytearray(random.Random(index).randbytes(SIZE))
    for offset, length in zero_ranges():
        data[offset : offset + length] = bytes(length)
    return bytes(data)


def zero_ranges() -> list[tuple[int, int]]:
    return [(CLUSTER * first, CLUSTER * count) for first, count in ((6, 1), (9, 2), (24, 20), (60, 1))]


class Guest:
    """Writes to a disk, and knows what must be on it.

    A write that failed may have changed any byte of its range, and no other: each of them is as it was, or as it
    should have become.
    """

    def __init__(self, world: World, disk: pyfleece.Disk, content: bytes) -> None:
        self.world = world
        self.disk = disk
        self.content = bytearray(content)
        self.touched: set[int] = set()                      # clusters that it tried to change since the start
        self._maybe: list[tuple[int, bytes]] = []           # what failed writes may have left
        self._lock = threading.Lock()                       # of all three
        self._random = random.Random(len(content))

    def write(self, offset: int, length: int) -> bool:
        data = self._random.randbytes(length)
        return self._change("write", offset, data, lambda: self.disk.pwrite(data, offset))

    def zero(self, offset: int, length: int) -> bool:
        return self._change("zero", offset, bytes(length), lambda: self.disk.zero(length, offset))

    def discard(self, offset: int, length: int) -> bool:
        return self._change("discard", offset, bytes(length), lambda: self.disk.discard(length, offset))

    def flush(self) -> None:
        self._try("flush", 0, SIZE, self.disk.flush)

    def read(self, offset: int, length: int) -> None:
        data = bytearray(length)
        if self._try("read", offset, length, lambda: self.disk.readinto(data, offset)):
            self._compare(bytes(data), offset)

    def check(self, actual: bytes) -> None:
        """Every acknowledged write is there, and nothing else changed."""
        self._compare(actual, 0)

    def settle(self) -> None:
        """Write again, with nothing in the way, what failed: then all is known again."""
        end = time.monotonic() + 5
        while self._maybe:
            offset, data = self._maybe[0]
            # Once a write has waited for room in vain, the next ones do not wait: the spiller must come to it first.
            if not self.write(offset, len(data)):
                assert self.world.op == "write" and time.monotonic() < end, f"a write can't be repeated: {self.world}"
                time.sleep(0.01)

    def _try(self, what: str, offset: int, length: int, call: Callable[[], object]) -> bool:
        try:
            call()
        except pyfleece.Error as error:
            if not (self.world.ended and isinstance(error, pyfleece.ClosedError)):
                self.world.failed(error, f"guest {what}", offset, length)
            return False
        return True

    def _change(self, what: str, offset: int, new: bytes, call: Callable[[], object]) -> bool:
        end = offset + len(new)
        with self._lock:
            self.touched.update(range(offset // CLUSTER, -(-end // CLUSTER)))
        done = self._try(what, offset, len(new), call)
        with self._lock:
            if not done or what == "discard":               # what a discarded range reads as is undefined
                self._maybe.append((offset, new))
            else:
                self.content[offset:end] = new
                self._maybe = [piece for old in self._maybe for piece in _outside(*old, offset, end)]
        return done

    def _compare(self, actual: bytes, start: int) -> None:
        with self._lock:
            expected, maybe = self.content[start : start + len(actual)], list(self._maybe)
        if actual == expected:
            return
        for offset, data in maybe:
            first, last = max(offset, start), min(offset + len(data), start + len(actual))
            for at in range(first, last, CLUSTER):
                end = min(at + CLUSTER, last)
                part = slice(at - start, end - start)
                here, wanted, other = actual[part], expected[part], data[at - offset : end - offset]
                if here == other:
                    expected[part] = other
                elif here != wanted:
                    expected[part] = bytes(a if a == c else b for a, b, c in zip(here, wanted, other))
        if actual != expected:
            wrong = [start + i for i, (a, b) in enumerate(zip(actual, expected)) if a != b]
            raise AssertionError(f"the guest's data is wrong in {len(wrong)} bytes from {wrong[:1]} on: {self.world}")


def clusters_of(extent: pyfleece.Extent) -> range:
    return range(extent.offset // CLUSTER, -(-(extent.offset + extent.length) // CLUSTER))


def around(touched: set[int], snapshot: pyfleece.Snapshot) -> set[int]:
    """What goes with what the guest touched, where the clusters of a snapshot are larger."""
    step = snapshot.cluster_size // CLUSTER
    return {cluster for first in touched for cluster in range(first // step * step, (first // step + 1) * step)}


def _outside(offset: int, data: bytes, start: int, end: int) -> list[tuple[int, bytes]]:
    """The parts of `data` at `offset` that are not in [start, end)."""
    before, after = data[: max(0, start - offset)], data[max(0, end - offset) :]
    return [(at, part) for at, part in ((offset, before), (offset + len(data) - len(after), after)) if part]


# ---- one disk and its files ----


class Unit:
    def __init__(self, world: World, index: int, directory: Path) -> None:
        self.world = world
        self.paths = {side: directory / f"{side}{index}.raw" for side in OPS}
        self.content = disk_content(index)
        self._write_source()
        with self.paths["fleecing"].open("wb") as file:
            file.truncate(FLEECING)
        self.paths["target"].write_bytes(b"\xee" * (SIZE + 100))    # zeros must be zeroed there; it may be larger
        self.inner = {side: pyfleece.open(path, "r+") for side, path in self.paths.items()}
        self.images = {side: FaultyImage(image) for side, image in self.inner.items()}
        self.disk = pyfleece.Disk(self.images["source"])
        self.guest = Guest(world, self.disk, self.content)
        self.snapshots: list[tuple[pyfleece.Snapshot, bytes]] = []     # with what they must hold

    def _write_source(self) -> None:
        with self.paths["source"].open("wb") as file:
            file.truncate(SIZE)
            at = 0
            for offset, length in [*zero_ranges(), (SIZE, 0)]:
                file.seek(at)
                file.write(self.content[at:offset])
                at = offset + length
            file.seek(zero_ranges()[0][0])
            file.write(bytes(CLUSTER))                      # zeros that are no hole

    def now(self) -> bytes:
        """What is on the source."""
        return self.inner["source"].pread(SIZE, 0)

    def snapshot(self, fleecing: Any = None, **options: Any) -> pyfleece.Snapshot:
        return self.adopt(self.disk.snapshot(fleecing or self.images["fleecing"], **{**self.world.options, **options}))

    def adopt(self, snapshot: pyfleece.Snapshot) -> pyfleece.Snapshot:
        self.snapshots.append((snapshot, self.now()))
        return snapshot

    def close(self) -> None:
        self.disk.close()
        for image in (*self.images.values(), *self.inner.values()):
            image.close()


# ---- a run ----

INJECTED = re.compile(r"injected fault: (\w+)(?: of (\d+) bytes at (\d+))? of image '(.*?)'?(?:$|:)")


class World:
    """The files and objects of one run, in an empty directory of its own."""

    def __init__(
        self, directory: Path, side: str, op: str, fault: Fault, nth: int, policy: str, units: int = 1
    ) -> None:
        self.directory, self.side, self.op, self.fault, self.nth, self.policy = directory, side, op, fault, nth, policy
        self.can_spoil = bool(fault.error) and (side, op) in (("source", "read"), ("fleecing", "write"))
        times_out = fault.times is None and (side, op) == ("fleecing", "write")
        self.options = {
            "stage_size": STAGE,
            "cluster_size": CLUSTER,
            "on_cbw_error": policy,
            "cbw_timeout": SHORT_OF_TIME if times_out and fault.error else ROOMY,
        }
        self.told: Counter[str] = Counter()         # how often each caller was told of the fault
        self.hit = False
        self.seen = 0                               # operations of the kind after `arm`
        self.armed = False
        self.ended = False                          # by the scenario: errors that tell of an end are right from now on
        self.resume_hangs = True                    # soon after they began
        self.expected_files: set[str] = set()       # beside those of the units
        self._victims: list[tuple[Any, int]] = []   # what the rule was added to, and what had been seen there before
        self._stop = threading.Event()
        self._releaser: threading.Thread | None = None
        self.units = [Unit(self, index, directory) for index in range(units)]
        self.unit = self.units[0]
        self.guest = self.unit.guest

    def __repr__(self) -> str:
        return f"{self.fault.name} at {self.side} {self.op} {self.nth}, {self.policy}"

    # ---- making it fail ----

    def arm(self, target: Any = None) -> None:
        """From here on. The last unit's images are the ones; `target`: instead of the prepared target image."""
        assert not self.armed
        self.armed = True
        self._target_given = target is not None
        victim = self.units[-1].images[self.side]
        if self.side == "target" and isinstance(target, FaultyFile):
            if self.op == "write":
                target.arm(self.fault, self.nth)
                self._victims.append((target, 0))
        elif self.side == "target" and target is not None:
            pass                                    # a new file: see `new_files`
        else:
            self._arm(victim)

    def _arm(self, image: FaultyImage) -> None:
        self._victims.append((image, image.seen(self.op)))
        getattr(image, self.fault.action)(self.op, nth=self.nth, **self.fault.options())
        if self.fault.action == "hang" and self.resume_hangs:
            self._releaser = threading.Thread(target=self._release, args=(image,))
            self._releaser.start()

    def _release(self, image: FaultyImage) -> None:
        while not self._stop.wait(0.001):
            if image.hanging:
                time.sleep(0.005)
                image.resume()

    @contextmanager
    def new_files(self) -> Iterator[None]:
        """Files that the library makes under a name in here get the fault of the target; the last one made, that is."""
        real, made = pyfleece.image.create, [0]

        def create(*arguments: Any, **options: Any) -> pyfleece.Image:
            image = OwnedFaultyImage(real(*arguments, **options))
            made[0] += 1
            if self.side == "target" and made[0] == len(self.units):
                self._arm(image)
            return image

        pyfleece.image.create = create
        try:
            yield
        finally:
            pyfleece.image.create = real

    def clear(self) -> None:
        """No more faults; notes whether there was one."""
        for victim, before in self._victims:
            seen = victim.writes if isinstance(victim, FaultyFile) else victim.seen(self.op) - before
            self.seen += seen
            self.hit |= seen >= self.nth
            victim.clear()
        self._victims.clear()
        self._stop.set()
        if self._releaser is not None:
            self._releaser.join()

    # ---- what failed ----

    def failed(self, error: BaseException, where: str, offset: int = 0, length: int = SIZE) -> None:
        """Is this what whoever did `where` on [offset, offset + length) should be told?"""
        note = f"{where} of {length} at {offset}, {self}: {type(error).__name__}: {error}"
        assert self.fault.error, f"a fault that does no harm was felt: {note}"
        self.told[where] += 1
        if isinstance(error, pyfleece.LostError):
            assert self.can_spoil and self.policy == "lose-range" and not where.startswith("guest"), note
            assert offset // CLUSTER * CLUSTER <= error.offset < offset + length, note
            assert error.offset // CLUSTER in {cluster for unit in self.units for cluster in unit.guest.touched}, note
            return
        if isinstance(error, pyfleece.SnapshotBrokenError):
            assert self.can_spoil and self.policy == "break-snapshot" and not where.startswith("guest"), note
        else:
            assert isinstance(error, pyfleece.ImageError) and error.errno == self.fault.error, note
            self._check_where(where, note)
        assert error.side == self.side, f"side {error.side}: {note}"
        assert error.cause == self.fault.error, f"cause {error.cause}: {note}"
        self._check_range(error, where, offset, length, note)

    def _check_where(self, where: str, note: str) -> None:
        """Those who may feel a fault on this side."""
        if where.startswith("guest"):
            if self.side == "source" and self.op != "read":
                assert where == f"guest {self.op}", note
            elif where != "guest read" or self.side != "source":
                assert self.can_spoil and self.policy == "break-guest-write" and where != "guest flush", note
        elif self.side == "fleecing":
            assert self.op == "read", note
        elif self.side == "source":
            assert self.op in ("read", "extents"), note
        else:
            assert where == "backup", note

    def _check_range(self, error: Any, where: str, offset: int, length: int, note: str) -> None:
        """It is that of the operation that failed, and lies where the caller was busy."""
        injected = INJECTED.search(str(error))
        if injected is None:                        # a FaultyFile knows nothing
            assert self.side == "target" and self._target_given, note
            assert error.length and error.offset + error.length <= SIZE, note
            return
        kind, count, at, name = injected.groups()
        assert kind == {"extents": "map"}.get(self.op, self.op), note
        assert name.endswith((".raw", ".partial")) and self.side in os.path.basename(name), note
        if kind == "flush":
            assert error.offset is None and error.length is None, note
            return
        assert (error.offset, error.length) == (int(at), int(count)), f"{error.offset}, {error.length}: {note}"
        if self.side == "source" and not isinstance(error, pyfleece.SnapshotBrokenError):
            step = max(snapshot.cluster_size for unit in self.units for snapshot, _ in unit.snapshots)
            first, last = offset // step * step, -(-(offset + length) // step) * step
            assert first <= error.offset and error.offset + error.length <= last, note

    @contextmanager
    def may_fail(self, where: str, offset: int = 0, length: int = SIZE) -> Iterator[None]:
        try:
            yield
        except (pyfleece.CancelledError, pyfleece.ClosedError):
            if not self.ended:
                raise
        except pyfleece.Error as error:
            self.failed(error, where, offset, length)

    # ---- what is left ----

    def verify(self) -> None:
        """Nothing is in the way any more: the guest's data, and what all open snapshots hold, and once more after the
        guest made up for its failed writes.
        """
        self.clear()
        self._check_told()
        for unit in self.units:
            if unit.disk.closed:
                continue
            unit.guest.check(unit.now())
            for snapshot, cut in unit.snapshots:
                self._check_snapshot(unit, snapshot, cut)
            unit.guest.settle()
            assert unit.now() == unit.guest.content
            for snapshot, cut in unit.snapshots:
                self._check_snapshot(unit, snapshot, cut)

    def _check_told(self) -> None:
        """Somebody must have felt it, where nothing can make up for it."""
        if not self.hit or not self.fault.error:
            return
        told = set(self.told)
        if self.side == "source" and self.op in ("write", "zero", "discard", "flush"):
            assert f"guest {self.op}" in told, f"nobody told the guest: {self}"
        elif self.side == "target" and not self.ended:
            assert "backup" in told, f"a backup succeeded all the same: {self}"
        elif (self.side, self.op) == ("fleecing", "read") and not self.ended:
            assert told, f"a failed read was made up for: {self}"
        elif self.side == "fleecing" and self.fault.times == 1 and self.op != "read":
            assert not told, f"what could be tried again was told: {self}"

    def _check_snapshot(self, unit: Unit, snapshot: pyfleece.Snapshot, cut: bytes) -> None:
        if snapshot.closed:
            return
        broken = snapshot.broken
        if broken is not None:
            self.failed(broken, "snapshot")
            for offset in (0, SIZE - 1):
                try:
                    snapshot.pread(1, offset)
                    raise AssertionError(f"a broken snapshot was read: {self}")
                except pyfleece.SnapshotBrokenError as error:
                    again = (str(error), error.side, error.offset, error.length, error.cause)
                    assert again == (str(broken), broken.side, broken.offset, broken.length, broken.cause)
            return
        kinds = {}
        for extent in snapshot.extents():
            kinds.update(dict.fromkeys(clusters_of(extent), extent.kind))
        lost = {cluster for cluster, kind in kinds.items() if kind == "lost"}
        assert lost <= around(unit.guest.touched, snapshot), f"lost {lost}: {self}"
        assert not lost or (self.can_spoil and self.policy == "lose-range"), f"lost {lost}: {self}"
        for cluster in range(CLUSTERS):
            offset = cluster * CLUSTER
            expected = cut[offset : offset + CLUSTER]
            try:
                actual = snapshot.pread(len(expected), offset)
            except pyfleece.DiscardedError:
                assert kinds[cluster] == "discarded", self
            except pyfleece.LostError:
                assert kinds[cluster] == "lost", self
            else:
                assert actual == expected, f"cluster {cluster} of a snapshot is not what it was at the cut: {self}"
                assert kinds[cluster] == "data" or not any(actual), self

    def close(self) -> None:
        """Close everything; then nothing is left, and every file is free at once."""
        for unit in self.units:
            unit.close()
        files = {path.name for unit in self.units for path in unit.paths.values()} | self.expected_files
        assert {path.name for path in self.directory.iterdir()} == files, self
        for name in files:
            pyfleece.open(self.directory / name, "r+").close()
            (self.directory / name).unlink()

    def abandon(self) -> None:
        """After a failed check: out of the way of the tests that come next."""
        with ExitStack() as stack:
            for unit in self.units:
                stack.callback(unit.close)
            self.clear()


def check_backup(world: World, unit: Unit, target: object, result: pyfleece.Result | None) -> None:
    """A backup that succeeded is the cut, but for what it says was lost; one that failed left nothing."""
    if isinstance(target, Path):
        assert target.exists() == (result is not None), world
        assert not target.with_name(target.name + ".partial").exists(), world
        if result is not None:
            world.expected_files.add(target.name)
    if result is None:
        return
    if isinstance(target, Path):
        actual = bytearray(target.read_bytes())
    elif isinstance(target, FaultyFile):
        actual = target.content
    else:
        actual = bytearray(unit.inner["target"].pread(SIZE, 0))
        assert unit.inner["target"].pread(100, SIZE) == b"\xee" * 100, world
    expected = bytearray(unit.snapshots[0][1])
    assert not result.lost or (world.policy == "lose-range" and world.can_spoil), world
    for extent in result.lost:
        part = slice(extent.offset, extent.offset + extent.length)
        assert set(clusters_of(extent)) <= unit.guest.touched, world
        actual[part] = expected[part]
    assert actual == expected, f"a backup is not what was cut: {world}"
    assert result.data_bytes + result.zero_bytes + result.lost_bytes == result.total == SIZE, world


def run(scenario: Callable[[World], None], *arguments: Any, units: int = 1) -> World:
    """One run of a scenario, and a look at what is left. `arguments`: those of World."""
    return run_in(scenario, lambda: World(*arguments, units=units))


def run_in(scenario: Callable[[World], None], make: Callable[[], World]) -> World:
    before, threads = descriptors(), tasks()
    world = make()
    try:
        scenario(world)
        world.verify()
    except BaseException:
        world.abandon()
        raise
    world.close()
    after = descriptors()
    assert len(after) <= len(before), f"left open: {set(after.items()) - set(before.items())}, {world}"
    wait_for_threads(threads)
    return world


def tasks() -> dict[str, str]:
    """The threads of this process: their names by number."""
    found = {}
    for number in os.listdir("/proc/self/task"):
        with suppress(OSError):                     # it ended meanwhile
            found[number] = Path(f"/proc/self/task/{number}/comm").read_text().strip()
    return found


def wait_for_threads(before: Iterable[str], seconds: float = 5.0) -> None:
    """No thread runs any more that did not before. They end a moment after the last call returned."""
    end = time.monotonic() + seconds
    while left := {number: name for number, name in tasks().items() if number not in before}:
        assert time.monotonic() < end, f"threads are left: {left}, {threading.enumerate()}"
        time.sleep(0.0005)


def memory() -> dict[str, int]:
    """Bytes that this process holds: mapped, resident, and in use in malloc's books."""

    class Info(ctypes.Structure):
        # struct mallinfo2, see mallinfo(3).
        _fields_ = [
            ("arena", ctypes.c_size_t),
            ("chunks", ctypes.c_size_t * 3),
            ("hblkhd", ctypes.c_size_t),
            ("unused", ctypes.c_size_t * 2),
            ("uordblks", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 2),
        ]

    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Info
    info = library.mallinfo2()
    pages = [int(n) * os.sysconf("SC_PAGESIZE") for n in Path("/proc/self/statm").read_text().split()]
    return {"mapped": pages[0], "resident": pages[1], "malloc": info.uordblks + info.hblkhd}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: thousands of runs, each with an fsync or two."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pyfleece-") as name:
            yield Path(name)
    else:
        yield tmp_path

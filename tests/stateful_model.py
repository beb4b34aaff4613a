"""Disks and snapshots beside what they must hold: the model that test_stateful.py compares the library with.

A `Guest` is a disk and the bytes that its guest wrote (`content`); a `Cut` is a snapshot and the bytes of its instant
(`state`); a `Dirty` is a dirty bitmap and the set of its units that are dirty. They are told of everything that is
done through the API, predict what it does, and check that it did.

What is predicted exactly: every byte of a disk, and of a snapshot wherever it can be read; which exception a range
raises that can't be read; dirty bitmaps, except after a change that failed. What depends on how far threads in the
background are, room for old data in the main, is predicted as "can happen" or "can't happen": what happened is then
looked up, and from there on it has to stay so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateful_kit import (
    BREAK,
    FAIL,
    LOSE,
    PATIENT,
    RAISES,
    READABLE,
    USED,
    Change,
    Outcome,
    Running,
    Scratch,
    Setup,
    attempt,
    cut_options,
    initial,
    perform,
    runs_of,
    soon,
)

import pyfleece
from pyfleece.testing import FaultyImage

# ---- snapshots ----


@dataclass
class Plan:
    """What a change will mean for a snapshot: the clusters that have to be saved, whether that may have to wait for
    room, and whether the wait can be in vain.
    """

    cut: Cut
    needs: set[int]
    waits: bool
    no_room: bool


class Cut:
    """A snapshot, and what it must hold."""

    def __init__(self, guest: Guest, real: pyfleece.Snapshot, setup: Setup, scratch: Scratch) -> None:
        self.guest, self.real, self.setup, self.scratch = guest, real, setup, scratch
        self.state = bytes(guest.content)
        self.size, self.cluster = len(self.state), setup.cluster
        self.clusters = -(-self.size // self.cluster)
        self.frozen: Dirty | None = None
        self.frozen_units: frozenset[int] = frozenset()
        self.outside: frozenset[int] = frozenset()
        self.zeros = frozenset(c for c in range(self.clusters) if not any(self.state[self.bytes_of(c, c + 1)]))
        self.released: set[int] = set()
        self.lost: set[int] = set()
        self.saved: set[int] = set()  # for certain
        self.maybe_saved: set[int] = set()
        self.broken = self.closed = self.committed = False
        self.damaged = False  # somebody wrote to its fleecing image
        self.keeps = False  # the fleecing image fails to give space back
        self.discarder = False  # a backup that runs discards from it
        self.blurred = False  # it is not known how clusters came to be what they are
        self.hung_spill = False
        self.files: list[tuple[pyfleece.SnapshotFile, list[int]]] = []
        assert (real.size, real.cluster_size) == (self.size, self.cluster)

    def freeze(self, dirty: Dirty) -> None:
        self.frozen, self.frozen_units = dirty, frozenset(dirty.units)
        dirty.frozen_by, dirty.units = self, set()
        each = dirty.granularity // self.cluster
        self.outside = frozenset(c for c in range(self.clusters) if c // each not in self.frozen_units)

    # ---- clusters ----

    def bytes_of(self, first: int, end: int) -> slice:
        return slice(first * self.cluster, min(end * self.cluster, self.size))

    def touched(self, offset: int, count: int) -> range:
        return range(offset // self.cluster, (offset + count - 1) // self.cluster + 1) if count else range(0)

    def whole(self, offset: int, count: int) -> range:
        """The clusters that a discard of this range is about."""
        end = self.clusters if offset + count == self.size else (offset + count) // self.cluster
        return range(-(-offset // self.cluster), end)

    def kind(self, cluster: int) -> str:
        if cluster in self.outside:
            return "outside"
        if cluster in self.released:
            return "discarded"
        return "lost" if cluster in self.lost else READABLE

    @property
    def inside(self) -> set[int]:
        return set(range(self.clusters)) - self.outside

    @property
    def unreadable(self) -> set[int]:
        return (self.released | self.lost) - self.outside

    @property
    def live(self) -> bool:
        return not self.broken and not self.closed

    @property
    def gone(self) -> type[Exception]:
        """What its methods raise when it is not alive."""
        return pyfleece.ClosedError if self.closed else pyfleece.SnapshotBrokenError

    # ---- changes of the guest ----

    def plan(self, changes: Iterable[Change], threads: int) -> Plan:
        needs: set[int] = set()
        if self.live:
            for change in changes:
                needs.update(self.touched(change.offset, change.count))
            needs -= self.saved | self.unreadable | self.outside
        # Zeros need room only while they are looked at: the stage's half, or a cluster, for each write that runs.
        passing = min(len(needs & self.zeros), threads * max(1, self.setup.slots // 2))
        ever = (self.saved | self.maybe_saved | needs) - self.zeros - self.lost
        now = len(ever - self.released) + passing
        # What is being spilled takes room until that is done, also when it was discarded meanwhile.
        waits = (len(ever) + passing if self.scratch.slots else now) > self.setup.slots
        patient = self.setup.timeout >= PATIENT and not self.hung_spill
        no_room = now > self.setup.slots + self.scratch.slots if patient else waits
        return Plan(self, needs, bool(needs) and waits, bool(needs) and no_room)

    def settle(self, plan: Plan, outcomes: list[Outcome], fault: bool) -> None:
        """After changes: see whether something could not be saved, and whether that was possible. `fault`: reads of the
        source may have failed.
        """
        if not self.live:
            return
        trouble = plan.no_room or (fault and bool(plan.needs))
        broken = self.real.broken
        if broken is not None:
            assert self.setup.policy == BREAK and trouble, f"broken without a reason: {broken}"
            assert broken.side in (("fleecing",) if not fault else ("fleecing", "source")), broken
            assert broken.cause, broken
            self.broken = True
            return
        if self.setup.policy == LOSE:
            lost = {c for extent in self.real.lost for c in self.touched(extent.offset, extent.length)} - self.lost
            assert lost <= plan.needs, f"clusters {sorted(lost - plan.needs)} were lost that nobody wrote to"
            assert not lost or trouble, f"clusters {sorted(lost)} were lost without a reason"
            self.lost |= lost
        for outcome in outcomes:
            self._note_saved(plan, outcome)

    def _note_saved(self, plan: Plan, outcome: Outcome) -> None:
        change = outcome.change
        for cluster in self.touched(change.offset, change.count):
            if cluster not in plan.needs or cluster in self.lost:
                continue
            # A hole need not be saved before it is zeroed.
            part = self.bytes_of(cluster, cluster + 1)
            first, last = max(part.start, change.offset), min(part.stop, change.end)
            sure = outcome.whole and cluster not in self.released and not self.discarder
            # What was released while it was saved may be saved as anything.
            self.blurred |= cluster in self.released
            if change.kind != "write" and not any(outcome.before[first - change.offset : last - change.offset]):
                sure = False
            (self.saved if sure else self.maybe_saved).add(cluster)
        self.maybe_saved -= self.saved

    # ---- reading ----

    def expect(self, offset: int, count: int) -> tuple[tuple[type[Exception], ...], bool]:
        """What a read may raise, and whether it may return data."""
        if not self.live:
            return (self.gone,), False
        touched = self.touched(offset, count)
        bad = next((kind for kind in map(self.kind, touched) if kind != READABLE), None)
        errors: tuple[type[Exception], ...] = (RAISES[bad],) if bad else ()
        if self.discarder and any(c not in self.outside for c in touched):
            errors += (pyfleece.DiscardedError,)
        if self.damaged and any(c in self.saved or c in self.maybe_saved for c in touched):
            errors += (pyfleece.ImageError,)
        return errors, bad is None

    def judge(self, outcome: Any, offset: int, count: int, side: str | None = None) -> bool:
        """Is this what reading the range may return or raise? `side`: of a fault that was put there. Was it read?"""
        errors, good = self.expect(offset, count)
        where = f"{count} bytes at {offset}"
        if isinstance(outcome, Exception):
            if side and isinstance(outcome, pyfleece.ImageError):
                assert (outcome.side, outcome.errno) == (side, errno.EIO), outcome
                return False
            assert isinstance(outcome, errors), f"{where} raised {outcome!r}, not one of {errors}"
            if isinstance(outcome, pyfleece.ImageError):
                assert (outcome.side, outcome.errno) == ("fleecing", errno.EIO), outcome
            return False
        assert good, f"{where} could be read; expected one of {errors}"
        if outcome != self.state[offset : offset + count]:
            wrong = next(at for at in range(count) if outcome[at] != self.state[offset + at])
            raise AssertionError(f"the snapshot lies: {where}, at {offset + wrong}")
        return True

    def read(self, offset: int, count: int, side: str | None = None) -> bool:
        return self.judge(attempt(self.real.pread, count, offset), offset, count, side)

    # ---- discarding ----

    def discard(self, offset: int, count: int) -> None:
        error = attempt(self.real.discard, count, offset)
        if self.live:
            assert error is None, error
            self.note_released(self.whole(offset, count))
        else:
            assert isinstance(error, self.gone), error

    def note_released(self, clusters: Iterable[int]) -> None:
        self.released.update(clusters)

    def look_up_released(self, must: set[int], may: set[int]) -> None:
        """After something discarded that can't be predicted exactly."""
        if not self.live:
            return
        found = {
            c for e in self.real.extents() if e.kind == "discarded" for c in self.touched(e.offset, e.length)
        } - self.released
        assert must - self.released <= found, f"clusters {sorted(must - self.released - found)} were not discarded"
        assert found <= may, f"clusters {sorted(found - may)} were discarded"
        self.released |= found
        self.blurred = True

    # ---- comparing ----

    def verify(self) -> None:
        """All that the snapshot tells about itself is as it should be."""
        if self.closed:
            self.read(0, 1)
            return
        assert (self.real.broken is not None) == self.broken
        if self.broken:
            self.read(0, self.size)
        else:
            for first, end, kind in runs_of(map(self.kind, range(self.clusters))):
                part = self.bytes_of(first, end)
                if kind != READABLE:
                    self.read(part.start, 1)
                    self.read(part.stop - 1, 1)
                elif not self.read(part.start, part.stop - part.start):
                    for cluster in range(first, end):
                        one = self.bytes_of(cluster, cluster + 1)
                        self.read(one.start, one.stop - one.start)
            self.verify_extents(0, self.size)
        self.verify_stats()

    def verify_extents(self, offset: int, length: int) -> None:
        extents = attempt(lambda: list(self.real.extents(offset, length)))
        if not self.live:
            assert isinstance(extents, self.gone) or length == 0, extents
            return
        assert not isinstance(extents, Exception), extents
        at, last = offset, None
        for extent in extents:
            assert extent.offset == at and extent.length > 0 and extent.kind != last, extent
            at, last = extent.offset + extent.length, extent.kind
            if extent.kind == "zero":
                assert not any(self.state[extent.offset : at]), extent
            for cluster in self.touched(extent.offset, extent.length):
                kind = self.kind(cluster)
                good = extent.kind in ("data", "zero") if kind == READABLE else extent.kind == kind
                if self.discarder and extent.kind == "discarded":
                    good = kind != "outside"
                assert good, f"cluster {cluster} is {kind}, but in {extent}"
        assert at == offset + length

    def held(self) -> tuple[int, int]:
        """The bytes of old data that must be in the store, at least and at most."""
        gone = self.zeros | self.released | self.lost
        return len(self.saved - gone) * self.cluster, len((self.saved | self.maybe_saved) - gone) * self.cluster

    def verify_stats(self) -> None:
        stats = self.real.stats
        stage, file = self.setup.slots * self.cluster, self.scratch.slots * self.cluster
        assert stats.staged_bytes <= stats.staged_peak <= stage
        assert stats.fleecing_bytes <= stats.fleecing_peak <= file
        assert stats.bytes_copied == stats.clusters_saved * self.cluster
        assert stats.room_timeouts <= stats.room_waits
        assert stats.latency.count == sum(writes for _, writes in stats.latency.histogram)
        if not self.scratch.slots:
            assert stats.bytes_spilled == stats.spill_errors == 0
        if self.broken:
            if self.scratch.slots and not self.hung_spill:
                soon(lambda: self._stored() == 0, f"a broken snapshot keeps {self._stored()} bytes")
            return
        if self.discarder:
            return
        saved = self.saved | self.maybe_saved
        if not self.blurred:
            assert len(self.saved - self.zeros) <= stats.clusters_saved <= len(saved - self.zeros)
            assert len(self.saved & self.zeros) <= stats.zero_clusters <= len(saved & self.zeros)
            assert stats.clusters_lost == len(self.lost)
            assert stats.clusters_discarded == len(self.released)
        least, most = self.held()
        if self.hung_spill:
            assert stats.staged_bytes + stats.fleecing_bytes >= least
        else:
            soon(lambda: least <= self._stored() <= most, f"{self._stored()} bytes are stored, not {least} to {most}")

    def _stored(self) -> int:
        """Settled once nothing is being spilled: what is then counts on both sides."""
        stats = self.real.stats
        return stats.staged_bytes + stats.fleecing_bytes

    # ---- the end ----

    def commit(self) -> None:
        self.real.commit()
        if self.frozen is not None and not self.committed:  # what was lost is in no backup
            each = self.frozen.granularity // self.cluster
            self.frozen.units |= {cluster // each for cluster in self.lost}
        self.committed = True

    def note_closed(self) -> None:
        """It was closed: by `close`, or because its disk was."""
        self.closed = True
        if self.frozen is not None:
            if not self.committed:
                self.frozen.units |= self.frozen_units
            self.frozen.frozen_by = None
            self.frozen = None

    def put_away(self) -> None:
        """When nothing hangs in its fleecing image any more, but for a spill."""
        scratch = self.scratch
        if scratch.faulty is not None:
            scratch.faulty.clear()
        first, last = USED * self.cluster, scratch.slots * self.cluster
        if scratch.inner is not None and first < last and not (self.damaged or self.keeps):
            holes = [pyfleece.Extent(first, last - first, "zero")]
            inner = scratch.inner
            soon(
                lambda: list(inner.extents(first, last - first)) == holes,
                "a fleecing image that outlives its snapshot is not empty",
            )
        scratch.close()


class Parked:
    """A read of a snapshot that hangs in an image, in a thread of its own."""

    def __init__(self, image: FaultyImage, cut: Cut, offset: int, count: int, thread: Running) -> None:
        self.image, self.cut, self.offset, self.count, self.thread = image, cut, offset, count, thread

    def let_go(self) -> None:
        """It goes on and ends: with the bytes of the cut, or the exception that tells what happened meanwhile."""
        self.image.clear()
        data = self.thread.end()
        cut, touched = self.cut, self.cut.touched(self.offset, self.count)
        gone = [cut.kind(c) != READABLE for c in touched]
        if isinstance(data, Exception) or cut.closed or cut.broken or all(gone):
            errors, _ = cut.expect(self.offset, self.count)
            if any(gone) and cut.live:  # whatever it came to first
                errors = tuple(RAISES[kind] for kind in map(cut.kind, touched) if kind != READABLE)
            assert isinstance(data, errors), f"a read that was overtaken gave {data!r:.200}, not one of {errors}"
        else:
            assert data == cut.state[self.offset : self.offset + self.count], "the snapshot lies to a read that hung"


# ---- dirty bitmaps ----


class Dirty:
    """A dirty bitmap, and its units that are dirty."""

    def __init__(self, guest: Guest, name: str, granularity: int) -> None:
        self.guest, self.name, self.granularity = guest, name, granularity
        self.real = guest.disk.bitmaps.add(name, granularity)
        self.units: set[int] = set()
        self.frozen_by: Cut | None = None

    def units_of(self, offset: int, count: int) -> range:
        return range(offset // self.granularity, (offset + count - 1) // self.granularity + 1) if count else range(0)

    def record(self, outcomes: Iterable[Outcome], exact: bool) -> None:
        """`exact`: what was discarded was; else perhaps not, for want of room for old data."""
        may = set(self.units)
        for outcome in outcomes:
            change = outcome.change
            units = self.units_of(change.offset, change.count)
            may.update(units)
            if outcome.error is None and (exact or change.kind != "discard"):
                self.units.update(units)
                continue
            for unit in units:
                first = max(unit * self.granularity - change.offset, 0)
                last = (unit + 1) * self.granularity - change.offset
                if outcome.before[first:last] != outcome.after[first:last]:
                    self.units.add(unit)
        if self.units != may:
            found = {u for e in self.real.extents() if e.kind == "dirty" for u in self.units_of(e.offset, e.length)}
            assert self.units <= found, f"written, but not dirty: {sorted(self.units - found)}"
            assert found <= may, f"dirty, but not written: {sorted(found - may)}"
            self.units = found

    def verify(self) -> None:
        size = self.guest.size
        expected = [
            (first * self.granularity, min(end * self.granularity, size) - first * self.granularity, kind)
            for first, end, kind in runs_of(
                "dirty" if unit in self.units else "clean" for unit in range(-(-size // self.granularity))
            )
        ]
        assert [tuple(extent) for extent in self.real.extents()] == expected
        assert self.real.count == sum(length for _, length, kind in expected if kind == "dirty")
        assert self.real.granularity == self.granularity
        assert self.guest.disk.bitmaps[self.name].name == self.name


# ---- disks ----


class Guest:
    """A disk, and what its guest knows that it holds."""

    def __init__(self, path: Path, size: int, seed: int) -> None:
        self.path, self.size = path, size
        self.content = bytearray(initial(size, seed))
        with pyfleece.create(path, size) as image:
            for offset in range(0, size, 4096):
                block = self.content[offset : offset + 4096]
                if any(block):
                    image.pwrite(block, offset)
        self.cuts: list[Cut] = []
        self.dirties: dict[str, Dirty] = {}
        self._names = 0
        self.open()

    def open(self) -> None:
        with ExitStack() as undo:
            self.inner = undo.enter_context(pyfleece.open(self.path, "r+"))
            self.source = FaultyImage(self.inner)
            self.disk = pyfleece.Disk(self.source)
            undo.pop_all()

    def close(self, step: int = 0) -> None:
        """`step`: where closing begins: with the image around the source, with the disk, with the newest snapshot."""
        if step > 1 and self.cuts:
            self.cuts[-1].real.close()
        if step > 0:
            self.disk.close()
        self.source.close()
        self.inner.close()
        for cut in self.cuts:
            assert cut.real.closed
            cut.note_closed()
            cut.put_away()
        self.cuts.clear()
        self.dirties.clear()

    def verify_closed(self) -> None:
        """What is in the file, when nobody has it open."""
        if self.path.suffix == ".raw":
            assert self.path.read_bytes() == self.content
            return
        with pyfleece.open(self.path) as image:
            assert image.pread(self.size, 0) == self.content
        checked = pyfleece.check(self.path)
        assert checked.status == 0, checked

    # ---- changes ----

    def change(self, changes: list[Change], *, fault: bool = False) -> list[Outcome]:
        """One after the other. `fault`: a read or a change of the source may fail."""
        return [self._one(change, fault) for change in changes]

    def _one(self, change: Change, fault: bool) -> Outcome:
        plans = [cut.plan([change], 1) for cut in self.cuts]
        calm = self.source.clear if fault else lambda: None
        outcome = perform(self.disk, change, self.content, 0, calm)
        calm()
        self.settle(plans, [outcome], fault)
        return outcome

    def race(self, lanes: list[list[Change]], bounds: list[int], beside: Callable[[], None]) -> None:
        """The changes of each lane, all inside of its part of the disk (from bounds[i] to bounds[i + 1]), run in a
        thread of their own. `beside` is called in between.
        """
        plans = [cut.plan([change for lane in lanes for change in lane], len(lanes)) for cut in self.cuts]
        parts = [self.content[first:last] for first, last in zip(bounds, bounds[1:])]
        threads = [Running(self.lane, *each) for each in zip(lanes, parts, bounds)]
        while any(thread.runs for thread in threads):
            beside()
        outcomes = [outcome for thread in threads for outcome in thread.result()]
        for base, part in zip(bounds, parts):
            self.content[base : base + len(part)] = part
        self.settle(plans, outcomes, False)

    def lane(self, changes: list[Change], part: bytearray, base: int) -> list[Outcome]:
        return [perform(self.disk, change, part, base, lambda: None) for change in changes]

    def settle(self, plans: list[Plan], outcomes: list[Outcome], fault: bool) -> None:
        for error in filter(None, (outcome.error for outcome in outcomes)):
            assert isinstance(error, pyfleece.ImageError), error
            if error.side == "source":
                assert fault, f"the source failed without a reason: {error}"
            else:
                assert error.side == "fleecing", error
                assert any(p.cut.setup.policy == FAIL and p.no_room for p in plans), (
                    f"a write failed without a reason: {error}"
                )
        for plan in plans:
            plan.cut.settle(plan, outcomes, fault)
        exact = not any(plan.waits for plan in plans) and not fault
        for dirty in self.dirties.values():
            dirty.record(outcomes, exact)

    # ---- cuts ----

    def prepare(self, setup: Setup, directory: Path) -> Scratch:
        self._names += 1
        return Scratch(setup, directory, f"{self.path.stem}-{self._names}", self.size)

    def cut(self, setup: Setup, directory: Path, dirty: Dirty | None) -> Cut:
        scratch = self.prepare(setup, directory)
        return self.note_cut(self.disk.snapshot(**cut_options(setup, scratch, dirty)), setup, scratch, dirty)

    def note_cut(self, real: pyfleece.Snapshot, setup: Setup, scratch: Scratch, dirty: Dirty | None) -> Cut:
        cut = Cut(self, real, setup, scratch)
        if dirty is not None:
            cut.freeze(dirty)
        self.cuts.append(cut)
        return cut

    # ---- comparing ----

    def verify(self) -> None:
        assert self.disk.pread(self.size, 0) == self.content, "the disk is not what the guest wrote"
        for cut in self.cuts:
            cut.verify()
        for dirty in self.dirties.values():
            dirty.verify()
        assert sorted(self.disk.bitmaps) == sorted(self.dirties)

    def verify_source_extents(self) -> None:
        at, last = 0, None
        for extent in self.source.extents():
            assert extent.offset == at and extent.length > 0 and extent.kind != last, extent
            at, last = extent.offset + extent.length, extent.kind
            assert extent.kind == "data" or not any(self.content[extent.offset : at]), extent
        assert at == self.size

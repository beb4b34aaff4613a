"""The part of the state machine of test_stateful.py that is about disks, snapshots and dirty bitmaps: its rules say
what is done, stateful_model.py what must come of it.
"""

from __future__ import annotations

import errno
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import descriptors
from fault_kit import tasks
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stateful_jobs import Job
from stateful_kit import BREAK, FAIL, LOSE, PATIENT, Change, Setup, attempt, cut_options, soon
from stateful_model import Cut, Dirty, Guest, Parked

import pyfleece

MOST_CUTS = 3  # alive at once on one disk
BLOCK = 4096

# ---- what rules draw. All of it up front, and preconditions look at nothing but how many snapshots there are: what is
# drawn must not depend on what threads did. ----

which = st.integers(0, 7)
offsets = st.builds(
    lambda unit, number, more: max(unit * number + more, 0),
    st.sampled_from((BLOCK, BLOCK, 16384, 65536)),
    st.integers(0, 66),
    st.sampled_from((0, 0, 0, 1, -1, 511, 512, 513, 3000)),
)
counts = st.one_of(
    st.sampled_from((BLOCK, 1, 512, 2 * BLOCK, 5 * BLOCK - 513, 30_000, 65536, 100_000, 1 << 20, 0)),
    st.integers(1, 9000),
)
# What is written: 0 stands for zeros; others are seeds.
fills = st.integers(0, 9)
Raw = tuple[str, int, int, int]
raw_changes = st.tuples(st.sampled_from(("write", "write", "write", "zero", "discard")), offsets, counts, fills)
setups = st.builds(
    Setup,
    cluster=st.sampled_from((4096, 4096, 4096, 4096, 8192, 65536)),
    slots=st.sampled_from((100, 1, 2, 3, 5, 8, 17, 40)),
    place=st.sampled_from((*("image", "memory") * 3, "path", "directory", "fleecing_dir", "nameless")),
    file_slots=st.sampled_from((100, 100, 30, 1, 3, 10)),
    limited=st.sampled_from((False, False, True)),
    slack=st.sampled_from((0, 0, 1, 4095)),
    policy=st.sampled_from((BREAK, FAIL, LOSE)),
    timeout=st.sampled_from((0.0, 0.02, PATIENT)),
)
moves = st.sampled_from(("set", "end", "by", "read", "readinto", "rest"))
NAMES = ("a", "b", "täglich")
names = st.sampled_from(("a", *NAMES))
granularities = st.sampled_from((4096, 16384, 65536, 65536, 1 << 20))


def clip(offset: int, count: int, first: int, last: int) -> tuple[int, int]:
    """The range as far as it is inside of [first, last)."""
    offset = first + offset % (last - first + 1)
    return offset, min(count, last - offset)


def made(raw: Raw, first: int, last: int) -> Change:
    kind, offset, count, fill = raw
    offset, count = clip(offset, count, first, last)
    if kind != "write" or fill == 0:
        return Change(kind, offset, bytes(count))
    rng = random.Random(fill * 1_000_003 + offset)
    if fill % 3 == 0:  # with a stretch of zeros in it
        half = count // 2
        return Change(kind, offset, bytes(half) + rng.randbytes(count - half))
    return Change(kind, offset, rng.randbytes(count))


class DiskMachine(RuleBasedStateMachine):
    suffix = ".raw"
    sizes = ((256 << 10) + 513, (96 << 10) + 4097)

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="pyfleece-stateful-"))
        self.files, self.threads = descriptors(), tasks()
        self.guests: list[Guest] = []
        self.parked: list[Parked] = []
        self.jobs: list[Job] = []
        self.count = 0

    @initialize(
        seeds=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        granularity=granularities,
        raw=st.lists(raw_changes, max_size=5),
        cuts=st.lists(st.tuples(which, setups, st.booleans()), min_size=1, max_size=3),
    )
    def make(self, seeds: tuple[int, int], granularity: int, raw: list[Raw], cuts: list[Any]) -> None:
        """Two disks, with snapshots: without them little happens."""
        for number, (size, seed) in enumerate(zip(self.sizes, seeds)):
            self.guests.append(Guest(self.directory / f"vm{number}{self.suffix}", size, seed))
            self.bitmap_add(self.guests[number], NAMES[0], granularity)
            self.guests[number].change([made(each, 0, size) for each in raw])
        for number, setup, incremental in cuts:
            self.cut_one(self.guest(number), setup, NAMES[0] if incremental else None)

    def teardown(self) -> None:
        failed = sys.exc_info()[1] is not None
        try:
            for guest in self.guests:
                self.calm(guest)
                guest.close()
            if not failed:
                soon(lambda: tasks() <= self.threads, "threads are left behind")
                soon(lambda: len(descriptors()) <= len(self.files), lambda: f"left open: {descriptors()}")
        except Exception:
            if not failed:  # else it is a consequence
                raise
        finally:
            shutil.rmtree(self.directory)

    # ---- helpers ----

    def guest(self, number: int) -> Guest:
        return self.guests[number % len(self.guests)]

    @property
    def cuts(self) -> list[Cut]:
        return [cut for guest in self.guests for cut in guest.cuts]

    def pick(self, number: int) -> Cut:
        """One that is alive, mostly."""
        live = [cut for cut in self.cuts if cut.live]
        cuts = live if live and number else self.cuts
        return cuts[number % len(cuts)]

    def pick_faulty(self, number: int) -> Cut | None:
        """One that has a fleecing image in which faults can be injected."""
        cuts = [cut for cut in self.cuts if cut.scratch.faulty is not None]
        return cuts[number % len(cuts)] if cuts else None

    def new_name(self, suffix: str) -> Path:
        self.count += 1
        return self.directory / f"{self.count}{suffix}"

    def unpark(self, keep: Callable[[Parked], bool] = lambda _: False) -> None:
        for parked in [p for p in self.parked if not keep(p)]:
            self.parked.remove(parked)
            parked.let_go()

    def calm(self, guest: Guest) -> None:
        """Nothing hangs and nothing runs on this disk."""
        for job in [job for job in self.jobs if job.cut.guest is guest]:
            self.jobs.remove(job)
            job.finish()
        self.unpark(lambda parked: parked.cut.guest is not guest)
        for cut in guest.cuts:
            self.free_spill(cut)

    def free_spill(self, cut: Cut) -> None:
        if cut.hung_spill:
            assert cut.scratch.faulty is not None
            cut.scratch.faulty.clear()
            cut.hung_spill = False

    def end(self, cut: Cut) -> None:
        """Close it under what uses it: reads that hang, jobs."""
        for job in self.jobs:
            if job.cut is cut:
                job.let_go()
        cut.real.close()
        cut.guest.cuts.remove(cut)
        cut.note_closed()
        for job in [job for job in self.jobs if job.cut is cut]:
            self.jobs.remove(job)
            job.finish()
        self.unpark(lambda parked: parked.cut is not cut)
        cut.put_away()
        cut.verify()

    def is_busy(self, guest: Guest) -> bool:
        """Do other threads read the source at times that are not known?"""
        return any(job.cut.guest is guest for job in self.jobs)

    def settle_setup(self, setup: Setup, guest: Guest) -> Setup:
        """Without a long wait for room that can't come."""
        clusters = -(-guest.size // setup.cluster)
        files = setup.file_slots if setup.place in ("image", "path") or setup.limited else clusters
        ample = setup.slots >= clusters or (setup.place != "memory" and files >= clusters)
        if setup.timeout == PATIENT and not ample:
            setup = replace(setup, timeout=0.02)
        return setup

    # ---- the guest ----

    @rule(number=which, raw=st.lists(raw_changes, min_size=1, max_size=6))
    def write(self, number: int, raw: list[Raw]) -> None:
        guest = self.guest(number)
        guest.change([made(each, 0, guest.size) for each in raw])

    @rule(
        number=which,
        first=offsets,
        steps=st.integers(3, 40),
        stride=st.sampled_from((BLOCK, BLOCK, 5000, 2 * BLOCK, 65536 + 512)),
        raw=raw_changes,
    )
    def sweep(self, number: int, first: int, steps: int, stride: int, raw: Raw) -> None:
        """Many clusters, one after the other."""
        guest = self.guest(number)
        kind, _, count, fill = raw
        places = [(first + step * stride) % guest.size for step in range(steps)]
        guest.change([made((kind, at, count % 6000, fill), 0, guest.size) for at in places])

    @rule(number=which, raw=st.lists(raw_changes, min_size=1, max_size=6), first=offsets, length=counts)
    def write_in_one_place(self, number: int, raw: list[Raw], first: int, length: int) -> None:
        guest = self.guest(number)
        first, length = clip(first, max(length, 600), 0, guest.size - 1)
        guest.change([made(each, first, first + max(length, 1)) for each in raw])

    @rule(
        number=which,
        raw=st.lists(st.lists(raw_changes, min_size=1, max_size=5), min_size=2, max_size=3),
        bounds=st.lists(offsets, min_size=2, max_size=2),
        step=st.sampled_from((BLOCK, 3 * BLOCK, 30_000)),
    )
    def write_at_once(self, number: int, raw: list[list[Raw]], bounds: list[int], step: int) -> None:
        """Threads that write beside each other, into the same clusters too, while snapshots are read."""
        guest = self.guest(number)
        inner = sorted(1 + bound % (guest.size - 2) for bound in bounds)[: len(raw) - 1]
        limits = [0, *inner, guest.size]
        lanes = [
            [made(each, first, last) for each in lane] for lane, first, last in zip(raw, limits, limits[1:])
        ]
        live = [cut for cut in guest.cuts if cut.live]
        at = 0

        def beside() -> None:
            nonlocal at
            for cut in live:
                count = min(step, guest.size - at)
                data = attempt(cut.real.pread, count, at)
                if isinstance(data, Exception):
                    errors, _ = cut.expect(at, count)
                    assert isinstance(data, (pyfleece.SnapshotBrokenError, pyfleece.LostError, *errors)), data
                else:
                    assert data == cut.state[at : at + count], "the snapshot lies to a read beside writes"
            at = (at + step) % guest.size

        guest.race(lanes, limits, beside)

    # ---- cuts ----

    def dirty_for(self, guest: Guest, name: str | None, setup: Setup) -> Dirty | None:
        dirty = guest.dirties.get(name or "")
        return dirty if dirty and not dirty.frozen_by and dirty.granularity >= setup.cluster else None

    def make_room(self, guest: Guest) -> None:
        """For another snapshot: at the cost of the oldest."""
        while len(guest.cuts) >= MOST_CUTS:
            self.free_spill(guest.cuts[0])
            self.unpark(lambda parked: parked.cut is not guest.cuts[0])
            self.end(guest.cuts[0])

    def cut_one(self, guest: Guest, setup: Setup, name: str | None) -> None:
        self.make_room(guest)
        guest.cut(self.settle_setup(setup, guest), self.directory, self.dirty_for(guest, name, setup))

    @rule(
        number=which,
        setup=setups,
        name=st.one_of(st.none(), names),
        group=st.sampled_from(("", "", "", "group", "group after a failure")),
    )
    def cut(self, number: int, setup: Setup, name: str | None, group: str) -> None:
        if group:
            self.cut_group(setup, name, group == "group after a failure")
        else:
            self.cut_one(self.guest(number), setup, name)

    def cut_group(self, setup: Setup, name: str | None, fails: bool) -> None:
        guests = self.guests
        for guest in guests:
            self.make_room(guest)
            setup = self.settle_setup(setup, guest)
        dirties = [self.dirty_for(guest, name, setup) for guest in guests]
        scratches = [guest.prepare(setup, self.directory) for guest in guests]
        options = cut_options(setup, scratches[0], None)
        options["fleecing"] = [scratch.options.get("fleecing") for scratch in scratches]
        options["bitmap"] = [dirty and dirty.name for dirty in dirties]
        calls: list[str] = []
        hooks = {"freeze": lambda: calls.append("freeze"), "thaw": lambda: calls.append("thaw")}
        disks = [guest.disk for guest in guests]
        if fails:
            # All or nothing: what is wrong with one of them leaves the others alone.
            wrong = {**options, "bitmap": [options["bitmap"][0], "no such bitmap"]}
            with pytest.raises(FileNotFoundError):
                pyfleece.snapshot_group(disks, **wrong, **hooks)
            assert calls == ["freeze", "thaw"]
        group = pyfleece.snapshot_group(disks, **options, **hooks)
        assert calls == ["freeze", "thaw"] * (1 + fails)
        for guest, real, scratch, dirty in zip(guests, group, scratches, dirties):
            guest.note_cut(real, setup, scratch, dirty)

    # ---- reading snapshots ----

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        offset=offsets,
        count=counts,
        moves=st.lists(st.tuples(moves, offsets, counts), max_size=8),
        fails=st.sampled_from(("", "source", "fleecing")),
        nth=st.integers(1, 2),
    )
    def snapshot_read(
        self, number: int, offset: int, count: int, moves: list[tuple[str, int, int]], fails: str, nth: int
    ) -> None:
        cut = self.pick(number)
        offset, count = clip(offset, count, 0, cut.size)
        if fails:
            self.read_fails(cut, offset, count, fails, nth)
        buffer = bytearray(count)
        done = attempt(cut.real.readinto, buffer, offset)
        cut.judge(buffer if done == count else done, offset, count)
        cut.verify_extents(offset, count)
        with pytest.raises(pyfleece.OutOfRangeError):
            cut.real.pread(cut.size - offset + 1, offset)
        if cut.live:
            self.read_as_file(cut, moves)
        else:
            assert isinstance(attempt(cut.real.open), cut.gone)

    def read_fails(self, cut: Cut, offset: int, count: int, side: str, nth: int) -> None:
        """An error of either side is raised by the read that it hit, and does no harm."""
        image = cut.guest.source if side == "source" else cut.scratch.faulty
        if image is not None and not self.is_busy(cut.guest):
            self.calm(cut.guest)
            image.fail("read", error=errno.EIO, nth=nth)
            cut.read(offset, count, side)
            image.clear()
            cut.read(offset, count)

    def read_as_file(self, cut: Cut, moves: list[tuple[str, int, int]]) -> None:
        """A file over it behaves as a file of the bytes of the cut."""
        position = 0
        with cut.real.open() as file:
            for move, offset, count in moves:
                if move == "set":
                    position = file.seek(offset)
                    assert position == offset
                elif move == "end":
                    position = file.seek(-min(offset, cut.size), io.SEEK_END)
                    assert position == cut.size - min(offset, cut.size)
                elif move == "by":
                    position = file.seek(count, io.SEEK_CUR)
                else:
                    count = cut.size if move == "rest" else count
                    expected = max(min(count, cut.size - position), 0)
                    data = bytearray(count)
                    if move == "readinto":
                        done = attempt(file.readinto, data)
                        data = data[:done] if isinstance(done, int) else done
                    else:
                        data = attempt(file.read, *([count] if move == "read" else []))
                    if expected == 0:
                        assert data == b""
                    elif cut.judge(data, position, expected):
                        position += expected
                assert file.tell() == position

    # ---- discarding ----

    @precondition(lambda self: self.cuts)
    @rule(number=which, ranges=st.lists(st.tuples(offsets, counts), max_size=4))
    def discard(self, number: int, ranges: list[tuple[int, int]]) -> None:
        """Some ranges; none: all of it."""
        cut = self.pick(number)
        for offset, count in ranges or [(0, cut.size)]:
            offset, count = clip(offset, count, 0, cut.size) if ranges else (offset, count)
            cut.discard(offset, count)
            for job in self.jobs:
                if job.cut is cut and cut.live and any(c in cut.inside for c in cut.whole(offset, count)):
                    job.overtaken = True
        if not ranges and cut.live and not cut.hung_spill:
            soon(lambda: cut.real.stats.staged_bytes == 0, "memory is left in use after all was discarded")
            soon(lambda: cut.real.stats.fleecing_bytes == 0, "fleecing space is left in use after all was discarded")

    # ---- small things ----

    @rule(
        number=which,
        what=st.lists(
            st.tuples(st.sampled_from(("add", "add", "remove", "commit", "read", "flush", "let go", "refuse")), names),
            min_size=1,
            max_size=3,
        ),
        granularity=granularities,
        offset=offsets,
        count=counts,
    )
    def small_things(
        self, number: int, what: list[tuple[str, str]], granularity: int, offset: int, count: int
    ) -> None:
        guest = self.guest(number)
        for action, name in what:
            if action == "add":
                self.bitmap_add(guest, name, granularity)
            elif action == "remove":
                self.bitmap_remove(guest, name)
            elif action == "commit" and self.cuts:
                self.pick(number).commit()
            elif action == "read":
                self.read(guest, *clip(offset, count, 0, guest.size))
            elif action == "flush":
                self.flush(guest)
            elif action == "let go":
                self.unpark()
                for cut in self.cuts:
                    self.free_spill(cut)
            elif action == "refuse":
                self.cut_refused(guest, name, 2 * granularity)

    def bitmap_add(self, guest: Guest, name: str, granularity: int) -> None:
        if name in guest.dirties:
            with pytest.raises(FileExistsError):
                guest.disk.bitmaps.add(name, granularity)
        else:
            guest.dirties[name] = Dirty(guest, name, granularity)

    def bitmap_remove(self, guest: Guest, name: str) -> None:
        dirty = guest.dirties.get(name)
        if dirty is None:
            with pytest.raises(FileNotFoundError):
                guest.disk.bitmaps.remove(name)
        elif dirty.frozen_by is not None:
            error = attempt(guest.disk.bitmaps.remove, name)
            assert isinstance(error, pyfleece.ImageError) and error.errno == errno.EBUSY, error
        else:
            guest.disk.bitmaps.remove(name)
            del guest.dirties[name]
            with pytest.raises(FileNotFoundError):
                list(dirty.real.extents())

    def read(self, guest: Guest, offset: int, count: int) -> None:
        buffer = bytearray(count)
        assert guest.disk.readinto(buffer, offset) == count
        assert buffer == guest.content[offset : offset + count]
        with pytest.raises(pyfleece.OutOfRangeError):
            guest.disk.pread(guest.size - offset + 1, offset)
        with pytest.raises(pyfleece.OutOfRangeError):
            guest.disk.pwrite(bytes(guest.size - offset + 1), offset)
        guest.verify_source_extents()

    def flush(self, guest: Guest) -> None:
        self.unpark()
        guest.source.fail("flush", error=errno.EIO)
        error = attempt(guest.disk.flush)
        assert isinstance(error, pyfleece.ImageError) and (error.side, error.errno) == ("source", errno.EIO), error
        guest.source.clear()
        guest.disk.flush()

    def cut_refused(self, guest: Guest, name: str, cluster: int) -> None:
        dirty = guest.dirties.get(name)
        wrong: list[tuple[dict[str, Any], type[Exception]]] = [
            ({"bitmap": "no such bitmap"}, FileNotFoundError),
            ({"stage_size": cluster - 1}, pyfleece.ArgumentError),
            ({"cluster_size": 3 * cluster}, pyfleece.ArgumentError),
            ({"fleecing": None, "fleecing_dir": self.directory / "nowhere"}, FileNotFoundError),
            ({"fleecing": None, "fleecing_dir": self.directory, "fleecing_limit": cluster - 1}, ValueError),
            ({"fleecing": guest.source}, pyfleece.ImageError),
        ]
        if dirty and dirty.frozen_by:
            wrong.append(({"bitmap": name, "cluster_size": 4096}, pyfleece.ImageError))
        elif dirty and dirty.granularity < cluster:
            wrong.append(({"bitmap": name}, pyfleece.ArgumentError))
        wrong += [({"fleecing": cut.scratch.faulty}, pyfleece.ImageError) for cut in guest.cuts if cut.scratch.faulty]
        for options, error in wrong:
            with pytest.raises(error):
                guest.disk.snapshot(**{"fleecing": "memory", "cluster_size": cluster, **options})

    # ---- after each step ----

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        for guest in self.guests:
            guest.verify()

"""A Hypothesis state machine: everything that the Python API can do to disks and snapshots, in any order, against a
model that says what they must hold.

After each step the disks are compared with what their guests wrote, each snapshot that is alive with the bytes of its
cut (and what can't be read of it with the exception that it has to raise), dirty bitmaps with the units that were
written, and statistics with what the model knows to be stored.

Interleavings that threads would meet once in a million runs are made on purpose: `FaultyImage` lets a read of a
snapshot, a spill, or a guest's write hang half-way, at the step that the machine chose, while others go on.

Runs are the same each time. For a long run, with other examples each time:

    PYFLEECE_EXAMPLES=5000 python -m pytest tests/test_stateful.py

The same on raw and qcow2 images.

stateful_rules.py has the rules for disks and snapshots, stateful_faults.py those for what fails or hangs, this file
those for backups and for closing. stateful_model.py and stateful_jobs.py are the model.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from stateful_faults import FaultMachine
from stateful_jobs import KINDS, Chunked, Copy, check_result
from stateful_kit import attempt
from stateful_model import Cut
from stateful_rules import which

import pyfleece

EXAMPLES = int(os.environ.get("PYFLEECE_EXAMPLES", "0"))

granules = st.sampled_from((1, 2, 3, 8, 100))


class Machine(FaultMachine):
    # ---- backups ----

    def free(self, cut: Cut) -> bool:
        """Alive, and nothing else reads all of it."""
        return cut.live and all(job.cut is not cut for job in self.jobs)

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        kind=st.sampled_from((*KINDS, "group")),
        granules=granules,
        workers=st.integers(1, 4),
        discard=st.booleans(),
        skip=st.sampled_from((None, False, True)),
        fails=st.sampled_from(("", "", "source", "target")),
        nth=st.integers(1, 9),
    )
    def backup(
        self,
        number: int,
        kind: str,
        granules: int,
        workers: int,
        discard: bool,
        skip: bool | None,
        fails: str,
        nth: int,
    ) -> None:
        """From beginning to end. An error of either side ends it, and the snapshot is as good as before."""
        cut = self.pick(number)
        if kind == "group":
            self.backup_of_group(number, discard)
            return
        if not self.free(cut) or (fails and self.is_busy(cut.guest)):
            self.refused(cut)
            return
        self.unpark()
        self.calm(cut.guest) if fails else self.free_spill(cut)
        options = {"kind": "image" if fails == "target" else kind, "granules": granules, "workers": workers}
        Copy(cut, self.new_name(".raw"), discard=discard, skip=skip, fail=fails, nth=nth, **options).finish()

    def refused(self, cut: Cut) -> None:
        if not cut.live:
            path = self.new_name(".raw")
            with pytest.raises((pyfleece.SnapshotBrokenError, pyfleece.ClosedError)):
                pyfleece.backup(cut.real, path)
            assert not path.exists()

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        kind=st.sampled_from(KINDS),
        granules=granules,
        workers=st.integers(1, 4),
        discard=st.booleans(),
        skip=st.sampled_from((None, False, True)),
        slow=st.sampled_from(("speed", "hang", "hang")),
        nth=st.integers(1, 6),
        cancel=st.booleans(),
    )
    def backup_in_background(
        self,
        number: int,
        kind: str,
        granules: int,
        workers: int,
        discard: bool,
        skip: bool | None,
        slow: str,
        nth: int,
        cancel: bool,
    ) -> None:
        """It runs on while other things happen; or one that was started before ends."""
        jobs = [job for job in self.jobs if isinstance(job, Copy)]
        cut = self.pick(number)
        if jobs:
            self.jobs.remove(jobs[0])
            self.free_spill(jobs[0].cut)
            jobs[0].finish(cancel)
        elif self.free(cut):
            self.unpark()
            path = self.new_name(".raw")
            options = {"kind": kind, "granules": granules, "workers": workers, "discard": discard, "skip": skip}
            self.jobs.append(Copy(cut, path, slow=slow, nth=nth, **options))

    def backup_of_group(self, number: int, discard: bool) -> None:
        if not all(guest.cuts for guest in self.guests):
            return
        cuts = [guest.cuts[number % len(guest.cuts)] for guest in self.guests]
        if not all(map(self.free, cuts)):
            return
        self.unpark()
        for cut in cuts:
            self.free_spill(cut)
        paths = [self.new_name(".raw") for _ in cuts]
        skips = [cut.setup.policy == "lose-range" for cut in cuts]
        bad = [cut for cut, skip in zip(cuts, skips) if cut.unreadable and not skip]
        damaged = any(cut.damaged for cut in cuts)
        missing = [set(cut.unreadable) for cut in cuts]
        reals = [cut.real for cut in cuts]
        done = attempt(lambda: pyfleece.backup_group(reals, paths, discard_source=discard, workers=2))
        if isinstance(done, Exception):
            assert isinstance(done, (pyfleece.DiscardedError, pyfleece.LostError, pyfleece.ImageError)), done
            assert damaged if isinstance(done, pyfleece.ImageError) else bad, done
            assert not any(path.exists() for path in paths), "a part of a group is left of a backup that failed"
            if discard:
                for cut in cuts:
                    cut.look_up_released(set(), cut.inside)
            return
        assert not bad and done.ok
        for cut, path, result, gone, skip in zip(cuts, paths, done.results, missing, skips):
            assert result is not None
            check_result(cut, result, path.read_bytes(), bytes(cut.size), gone, skip)
            path.unlink()
            if discard:
                cut.look_up_released(cut.inside - cut.unreadable, cut.inside)

    # ---- chunks ----

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        granules=granules,
        workers=st.integers(1, 3),
        buffers=st.sampled_from((2, 3, 16)),
        discard=st.sampled_from((True, True, False)),
        steps=st.lists(st.tuples(st.sampled_from(("take", "take", "ack", "keep")), which), min_size=1, max_size=25),
        ends=st.booleans(),
    )
    def chunks(
        self,
        number: int,
        granules: int,
        workers: int,
        buffers: int,
        discard: bool,
        steps: list[tuple[str, int]],
        ends: bool,
    ) -> None:
        """The agent that was started before takes more chunks, and acknowledges some; or a new one does."""
        cut = self.pick(number)
        if not any(isinstance(job, Chunked) for job in self.jobs) and self.free(cut):
            self.unpark()
            self.jobs.append(Chunked(cut, granules, workers, buffers, discard))
        for job in [job for job in self.jobs if isinstance(job, Chunked)]:
            for step, index in steps:
                if step == "take":
                    job.take()
                else:
                    job.ack(index, step == "ack")
            if ends:
                self.jobs.remove(job)
                job.finish()

    # ---- the end of things ----

    @rule(
        number=which,
        what=st.sampled_from(("snapshot", "snapshot", "snapshot", "all")),
        patience=st.integers(0, 5),
        step=st.integers(0, 2),
        calmly=st.booleans(),
    )
    def close(self, number: int, what: str, patience: int, step: int, calmly: bool) -> None:
        if what == "all":
            self.close_and_open(number, step, calmly)
        elif self.cuts:
            self.close_snapshot(self.cuts[number % len(self.cuts)], patience > 0)

    def close_snapshot(self, cut: Cut, patience: bool) -> None:
        """With what uses it: jobs, and now and then (it takes half a second) a read that hangs."""
        if patience:
            self.unpark(lambda parked: parked.cut is not cut)
            self.free_spill(cut)
        self.end(cut)

    def close_and_open(self, number: int, step: int, calmly: bool) -> None:
        """Everything on one disk is closed, from anywhere on; then its image is opened again."""
        guest = self.guest(number)
        cuts = list(guest.cuts)
        jobs = [job for job in self.jobs if job.cut.guest is guest]
        if calmly:
            self.calm(guest)
            jobs = []
        self.unpark(lambda parked: parked.cut.guest is not guest)
        for cut in cuts:
            self.free_spill(cut)
        for job in jobs:
            job.let_go()
        guest.close(step)
        for job in jobs:
            self.jobs.remove(job)
            job.finish()
        for cut in cuts:
            cut.verify()
        guest.verify_closed()
        guest.open()


class Qcow2Machine(Machine):
    suffix = ".qcow2"
    sizes = ((256 << 10) + 512, (96 << 10) + 4096)


def runs(machine: type[Machine], examples: int) -> type:
    case = machine.TestCase
    case.settings = settings(
        max_examples=EXAMPLES or examples,
        stateful_step_count=40,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return pytest.mark.timeout(0 if EXAMPLES else 600)(case)


TestDisksAndSnapshots = runs(Machine, 80)
TestQcow2 = runs(Qcow2Machine, 25)

"""The part of the state machine of test_stateful.py in which things fail or hang: what is read or written below the
guest, spills, reads of snapshots, and a guest's write half-way through.
"""

from __future__ import annotations

import errno
import time
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from stateful_kit import PATIENT, Running, Setup, cut_options, soon
from stateful_model import Parked
from stateful_rules import (
    BLOCK,
    MOST_CUTS,
    DiskMachine,
    clip,
    fills,
    made,
    names,
    offsets,
    raw_changes,
    setups,
    which,
)


class FaultMachine(DiskMachine):
    # ---- faults below the guest ----

    @rule(
        number=which,
        raw=raw_changes,
        op=st.sampled_from(("read", "write", "zero", "discard", "extents")),
        nth=st.integers(1, 3),
        times=st.sampled_from((1, None)),
        short=st.booleans(),
    )
    def write_fails(self, number: int, raw: Any, op: str, nth: int, times: int | None, short: bool) -> None:
        """The source fails while it is read for saving, or while it is changed."""
        guest = self.guest(number)
        if self.is_busy(guest):
            return
        self.calm(guest)
        if short and op in ("read", "write"):
            guest.source.short(op, error=errno.EIO, nth=nth, times=times)
        else:
            guest.source.fail(op, error=errno.EIO, nth=nth, times=times)
        guest.change([made(raw, 0, guest.size)], fault=True)
        guest.source.clear()

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        action=st.sampled_from(
            ("hang", "hang after", "fail", "full", "short", "split", "slow", "no discard", "damage")
        ),
        nth=st.integers(1, 3),
        times=st.integers(1, 3),
        place=st.tuples(offsets, st.sampled_from((1, 5000, 100_000))),
    )
    def fleecing_fails(self, number: int, action: str, nth: int, times: int, place: tuple[int, int]) -> None:
        """Spills that fail are tried again: nobody notices while there is room. What somebody else wrote to the
        fleecing image is not taken for old data. A spill that hangs is waited for by nobody.
        """
        cut = self.pick_faulty(number)
        if cut is None:
            return
        image, inner = cut.scratch.faulty, cut.scratch.inner
        assert image is not None and inner is not None
        if action.startswith("hang"):
            # Only the stage is left from there on.
            if not cut.hung_spill and (cut.setup.timeout < PATIENT or cut.setup.slots >= cut.clusters):
                self.unpark(lambda parked: parked.image is not image)
                image.clear()
                image.hang("write", after=action == "hang after")
                cut.hung_spill = True
        elif action == "fail":
            image.fail("write", error=errno.EIO, nth=nth, times=times)
        elif action == "full":
            image.fail("write", error=errno.ENOSPC, nth=nth, times=times)
        elif action == "short":
            image.short("write", error=errno.EIO, nth=nth, times=times)
        elif action == "split":
            image.short("write", "read", nth=nth, times=times)
        elif action == "slow":
            image.delay("write", seconds=0.002, nth=nth, times=times)
        elif action == "no discard":
            image.fail("discard", error=errno.EOPNOTSUPP, nth=nth, times=times)
            cut.keeps = True
        else:
            offset, count = clip(*place, 0, cut.scratch.bytes - 1)
            inner.pwrite(bytes([0x5A]) * max(count, 1), offset)
            cut.damaged = True

    # ---- things that hang half-way ----

    @precondition(lambda self: self.cuts)
    @rule(
        number=which,
        offset=offsets,
        count=st.sampled_from((1, BLOCK, 3 * BLOCK, 50_000)),
        side=st.sampled_from(("source", "source", "fleecing")),
        after=st.booleans(),
    )
    def park_read(self, number: int, offset: int, count: int, side: str, after: bool) -> None:
        cut = self.pick(number)
        image = cut.guest.source if side == "source" else cut.scratch.faulty
        if image is None or cut.closed or self.is_busy(cut.guest):
            return
        self.unpark(lambda parked: parked.image is not image)
        self.free_spill(cut)
        offset, count = clip(offset, count, 0, cut.size - 1)
        image.hang("read", after=after)
        thread = Running(cut.real.pread, max(count, 1), offset)
        soon(lambda: image.hanging or not thread.runs, "a read neither ends nor hangs")
        parked = Parked(image, cut, offset, max(count, 1), thread)
        if thread.runs:
            self.parked.append(parked)
        else:
            parked.let_go()

    @rule(
        number=which,
        block=st.integers(0, 65),
        split=st.integers(1, 4095),
        fills=st.tuples(fills, fills),
        stage=st.sampled_from(("read", "read", "write")),
        after=st.booleans(),
        reads=st.booleans(),
        discards=st.booleans(),
        also=st.sampled_from(("write", "write", "cut", "close", "nothing")),
        setup=setups,
        name=names,
        other=which,
    )
    def write_hangs(
        self,
        number: int,
        block: int,
        split: int,
        fills: tuple[int, int],
        stage: str,
        after: bool,
        reads: bool,
        discards: bool,
        also: str,
        setup: Setup,
        name: str,
        other: int,
    ) -> None:
        """A guest's write hangs while it saves the old data, or while it changes the source. Meanwhile snapshots are
        read, its cluster is discarded, and another write to the same block, a cut, or the end of a snapshot waits.
        """
        guest = self.guest(number)
        if self.is_busy(guest) and also not in ("cut", "close"):
            return
        self.calm(guest)
        first = block * BLOCK % (guest.size - guest.size % BLOCK)
        last = first + BLOCK
        mine = made(("write", 0, BLOCK, fills[0]), first, first + split)
        theirs = made(("write", 0, BLOCK, fills[1]), first + split, last)
        changes = [mine, theirs] if also == "write" else [mine]
        plans = [cut.plan(changes, 2) for cut in guest.cuts]
        parts = [bytearray(guest.content[c.offset : c.end]) for c in changes]

        guest.source.hang(stage, after=after)
        threads = [Running(guest.lane, [mine], parts[0], mine.offset)]
        soon(lambda: guest.source.hanging or not threads[0].runs, "a write neither ends nor hangs")
        for plan in plans:
            cut = plan.cut
            if reads and not plan.no_room:
                cut.read(first, BLOCK)
                cut.verify_extents(first, BLOCK)
            if discards and not plan.no_room and cut.live:
                part = cut.bytes_of(first // cut.cluster, first // cut.cluster + 1)
                cut.discard(part.start, part.stop - part.start)
        ending = cutting = None
        if also == "write":
            threads.append(Running(guest.lane, [theirs], parts[1], theirs.offset))
        elif also == "close" and guest.cuts:
            ending = guest.cuts[other % len(guest.cuts)]
            closing = Running(ending.real.close)
        elif also == "cut" and len(guest.cuts) <= MOST_CUTS:
            setup = self.settle_setup(setup, guest)
            dirty = None if any(plan.no_room for plan in plans) else self.dirty_for(guest, name, setup)
            scratch = guest.prepare(setup, self.directory)
            cutting = Running(lambda: guest.disk.snapshot(**cut_options(setup, scratch, dirty)))
        if guest.source.hanging:
            time.sleep(0.003)  # they come to where they wait
        guest.source.clear()
        outcomes = [outcome for thread in threads for outcome in thread.result()]
        for change, part in zip(changes, parts):
            guest.content[change.offset : change.end] = part
        if ending is not None:
            closing.result()
            guest.cuts.remove(ending)
            ending.note_closed()
            ending.put_away()
        real = cutting.result() if cutting is not None else None
        guest.settle(plans, outcomes, False)
        if real is not None:
            guest.note_cut(real, setup, scratch, dirty)

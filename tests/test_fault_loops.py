"""Every operation fails once, at every place: the first, the second, ... of its kind on source, fleecing image and
target, until a run passes untouched. After each run loop_kit.World looks at what is left:

- the guest's data is right: what was acknowledged is on the source, what failed changed nothing beyond its range;
- each snapshot returns the bytes at the cut, or raises the right exception, with the side, the errno and the range of
  the first cause;
- a backup that succeeded is identical to the cut, and one that failed left no file;
- no file is open, no lock held, no thread running, nothing forgotten in the directory; over many runs memory is flat.

By default the loops with EIO are complete for every scenario, and the other faults hit places that are drawn with a
fixed seed. All faults at all places take some minutes: PYFLEECE_EXHAUSTIVE=1 pytest -m slow tests/test_fault_loops.py
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from loop_kit import (
    CLUSTER,
    EIO,
    FOREVER,
    GRANULARITY,
    HARMLESS,
    ONCE,
    OPS,
    POLICIES,
    SIZE,
    Fault,
    FaultyFile,
    Guest,
    World,
    check_backup,
    directory,
    run,
    run_in,
)

import pyfleece

__all__ = ["directory"]
SEED = 20260


# ---- what the guest does ----


def some_writes(guest: Guest) -> None:
    """Unaligned, over several clusters, over holes, the tail."""
    guest.write(100, 3000)
    guest.write(3 * CLUSTER - 10, 2 * CLUSTER)
    guest.write(24 * CLUSTER, CLUSTER)
    guest.write(SIZE - 700, 700)


def many_writes(guest: Guest) -> None:
    """More than the stage holds, so that it is spilled."""
    for n in range(24):
        guest.write((n * 11 % 60) * CLUSTER + n, CLUSTER // 2 + n * 150)


def all_kinds(guest: Guest) -> None:
    some_writes(guest)
    guest.write(40 * CLUSTER, 20 * CLUSTER + 5)         # in pieces: more than the stage holds
    guest.zero(12 * CLUSTER + 5, 3 * CLUSTER)
    guest.flush()
    guest.discard(16 * CLUSTER, 2 * CLUSTER)
    guest.discard(23 * CLUSTER, 20 * CLUSTER)           # a hole in the middle
    guest.zero(25 * CLUSTER, 17 * CLUSTER)
    guest.read(0, SIZE)
    guest.write(12 * CLUSTER, CLUSTER)                  # again


def more_writes(guest: Guest) -> None:
    for n in range(14):
        guest.write((n * 17 % 63) * CLUSTER + 50, 6000)


# ---- scenarios ----


def cut(world: World) -> None:
    """The cut itself touches neither source nor fleecing image, so nothing can fail. Three snapshots alive."""
    unit = world.unit
    world.arm()
    before = {side: image.seen() for side, image in unit.images.items()}
    first = unit.snapshot()
    assert before == {side: image.seen() for side, image in unit.images.items()}
    some_writes(unit.guest)
    unit.snapshot(fleecing="memory", stage_size=2 * SIZE)
    unit.guest.write(3 * CLUSTER, 9000)
    unit.guest.zero(9 * CLUSTER, 2 * CLUSTER)
    first.close()
    unit.snapshot(fleecing="memory", stage_size=2 * SIZE, cluster_size=4 * CLUSTER)
    unit.guest.write(2 * CLUSTER, 20000)


def write(world: World) -> None:
    world.unit.snapshot()
    world.arm()
    all_kinds(world.guest)
    many_writes(world.guest)


def writers(world: World) -> None:
    """Three at once, which share clusters but not bytes: each saves what the others wait for."""
    world.unit.snapshot()
    world.arm()

    def body(k: int) -> None:
        try:
            for n in range(0, 60, 4):
                world.guest.write(n * CLUSTER + k * 1300, 1200)
        except BaseException as error:
            wrong.append(error)

    wrong: list[BaseException] = []
    threads = [threading.Thread(target=body, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def read(world: World) -> None:
    """From the stage, the fleecing image and the source, in pieces that know nothing of clusters."""
    snapshot = world.unit.snapshot()
    content = world.unit.snapshots[0][1]
    many_writes(world.guest)
    world.arm()
    with snapshot.open() as file:
        for number, offset in enumerate(range(0, SIZE, 10000)):
            with world.may_fail("snapshot read", offset, min(10000, SIZE - offset)):
                file.seek(offset)
                assert file.read(10000) == content[offset : offset + 10000], world
            if number % 5 == 0:
                world.guest.write(offset, 3000)
            if number % 9 == 0:
                with world.may_fail("extents"):
                    list(snapshot.extents())
    with world.may_fail("snapshot read"):
        assert snapshot.pread(SIZE, 0) == content, world


def discard(world: World) -> None:
    """What was discarded from the snapshot is not saved; the fleecing image ends up empty."""
    snapshot = world.unit.snapshot()
    many_writes(world.guest)
    world.arm()
    for offset in range(0, SIZE, 5 * CLUSTER):
        with world.may_fail("snapshot"):
            snapshot.discard(min(4 * CLUSTER, SIZE - offset), offset)
        world.guest.write(offset + 100, 6000)
        world.guest.discard(offset + CLUSTER, CLUSTER)
        world.guest.zero(offset + 2 * CLUSTER, 500)
    world.guest.flush()
    with world.may_fail("snapshot"):
        snapshot.discard(SIZE, 0)
        wait_for(lambda: _nothing_kept(snapshot))


def _nothing_kept(snapshot: pyfleece.Snapshot) -> bool:
    stats = snapshot.stats
    return (stats.staged_bytes, stats.fleecing_bytes) == (0, 0)


def backup_to_file(world: World) -> None:
    with world.new_files():
        _backup(world, world.directory / "new-target.raw")


def backup_to_image(world: World) -> None:
    _backup(world, world.unit.images["target"])


def backup_to_file_object(world: World) -> None:
    _backup(world, FaultyFile())


def _backup(world: World, target: object) -> None:
    unit, result = world.unit, None
    snapshot = unit.snapshot()
    many_writes(unit.guest)
    world.arm(None if target is unit.images["target"] else target)
    with world.may_fail("backup"), pyfleece.Backup(snapshot, target, granularity=GRANULARITY, workers=2) as job:
        more_writes(unit.guest)
        result = job.wait(30)
    check_backup(world, unit, target, result)
    if result is not None and not result.lost:
        wait_for(lambda: _nothing_kept(snapshot))       # a write to the fleecing image may still run


def backup_again(world: World) -> None:
    """A backup that discards nothing can be made again when it failed."""
    unit, target = world.unit, world.directory / "new-target.raw"
    snapshot = unit.snapshot()
    many_writes(unit.guest)
    world.arm(target)
    with world.new_files(), world.may_fail("backup"):
        pyfleece.backup(snapshot, target, granularity=GRANULARITY, workers=2, discard_source=False)
    world.clear()
    if snapshot.broken is None:
        result = pyfleece.backup(snapshot, target, granularity=GRANULARITY, workers=2)
        check_backup(world, unit, target, result)


def chunks(world: World) -> None:
    """What an agent was given is right, whatever becomes of the rest; it holds on to some of it for a while."""
    snapshot, position, held = world.unit.snapshot(), 0, []
    cut = world.unit.snapshots[0][1]
    many_writes(world.guest)
    world.arm()
    with world.may_fail("backup"), snapshot.chunks(granularity=GRANULARITY, workers=2, buffers=4) as parts:
        for number, chunk in enumerate(parts):
            expected = cut[chunk.offset : chunk.offset + chunk.length]
            assert chunk.offset == position or world.policy == "lose-range", world
            assert expected == (bytes(chunk.length) if chunk.buffer is None else chunk.buffer), world
            position = chunk.offset + chunk.length
            held.append(chunk)
            world.guest.write(chunk.offset + 30, 200)
            if number % 3 == 2:
                while held:
                    held.pop().ack()
        while held:
            held.pop().ack()
        assert position == SIZE or parts.lost, world


def group(world: World) -> None:
    """Two disks, of which the second one's files fail: all or nothing."""
    one, two = world.units
    result, targets = None, [world.directory / f"new-target{n}.raw" for n in (1, 2)]
    world.arm(targets)
    fleecing = [unit.images["fleecing"] for unit in world.units]
    snapshots = pyfleece.snapshot_group([unit.disk for unit in world.units], fleecing, **world.options)
    for unit, snapshot in zip(world.units, snapshots):
        unit.adopt(snapshot)
        many_writes(unit.guest)
    writer = threading.Thread(target=lambda: [more_writes(unit.guest) for unit in world.units])
    writer.start()
    with world.new_files(), world.may_fail("backup"):
        result = pyfleece.backup_group(snapshots, targets, granularity=GRANULARITY, workers=2)
    writer.join()
    for index, (unit, target) in enumerate(zip((one, two), targets)):
        check_backup(world, unit, target, result and result.results[index])


def cancel(world: World) -> None:
    """In the middle: the job waits for its turn, the guest writes."""
    target = world.directory / "new-target.raw"
    snapshot = world.unit.snapshot()
    many_writes(world.guest)
    world.arm(target)
    options = {"granularity": GRANULARITY, "workers": 2, "speed": 2 * SIZE}
    with world.new_files(), pyfleece.Backup(snapshot, target, **options) as job:
        more_writes(world.guest)
        world.ended = True
        began = time.monotonic()
        assert job.cancel() and time.monotonic() - began < 1, world
        with world.may_fail("backup"):
            job.wait(30)
            raise AssertionError("it was cancelled")
    check_backup(world, world.unit, target, None)


def close(world: World) -> None:
    """The source, with everything that was made on it, while all of it is in use."""
    unit, target = world.unit, world.directory / "new-target.raw"
    snapshot = unit.snapshot()
    other = unit.snapshot(fleecing="memory", stage_size=2 * SIZE)
    many_writes(unit.guest)
    world.arm(target)
    with world.new_files():
        job = pyfleece.Backup(snapshot, target, granularity=GRANULARITY, workers=2, speed=2 * SIZE)
        job.start()
    parts = other.chunks(granularity=GRANULARITY, workers=2, buffers=4)
    with world.may_fail("backup"):
        next(parts)                                     # and never acknowledged
    writer = threading.Thread(target=more_writes, args=(unit.guest,))
    writer.start()
    time.sleep(0.001)
    world.ended = True
    unit.images["source"].close()
    writer.join()
    with world.may_fail("backup"):
        job.wait(30)
        raise AssertionError("it was closed")
    check_backup(world, unit, target, None)
    unit.guest.check(unit.now())
    assert snapshot.closed and other.closed and unit.disk.closed
    with pytest.raises(pyfleece.ClosedError):
        snapshot.pread(1, 0)


SCENARIOS: list[Callable[[World], None]] = [
    cut,
    write,
    writers,
    read,
    discard,
    backup_to_file,
    backup_to_image,
    backup_to_file_object,
    backup_again,
    chunks,
    group,
    cancel,
    close,
]
by_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
by_side = pytest.mark.parametrize("side", OPS)
by_policy = pytest.mark.parametrize("policy", POLICIES)
PLACES = [(side, op) for side, ops in OPS.items() for op in ops]


def once(scenario: Callable[[World], None], *arguments: Any) -> World:
    return run(scenario, *arguments, units=2 if scenario is group else 1)


def loop(scenario: Callable[[World], None], directory: Path, side: str, op: str, fault: Fault, policy: str) -> int:
    """At every place, until a run passes untouched. How many runs there were."""
    for nth in range(1, 1000):
        if not once(scenario, directory, side, op, fault, nth, policy).hit:
            return nth
    raise AssertionError("this does not end")


def policies(side: str, op: str, fault: Fault, every: bool = False) -> list[str]:
    """All that make a difference; where old data can't be lost by this fault: one, each in its turn."""
    if every or (fault.error and (side, op) in (("source", "read"), ("fleecing", "write"))):
        return POLICIES
    return [POLICIES[PLACES.index((side, op)) % 3]]


# ---- the loops ----


@by_side
@by_scenario
def test_every_operation_fails_once(scenario, side, directory):
    for op in OPS[side]:
        for policy in policies(side, op, EIO):
            loop(scenario, directory, side, op, EIO, policy)


@pytest.mark.parametrize("fault", [*ONCE, *FOREVER, *HARMLESS], ids=lambda fault: fault.name)
@by_scenario
def test_other_faults_here_and_there(scenario, fault, directory, counted):
    """One place of each kind of operation that the scenario has."""
    chance = random.Random(f"{SEED} {scenario.__name__} {fault.name}")
    for side, op in PLACES:
        count = counted(scenario, side, op)
        if count and fault.fits(op):
            world = once(scenario, directory, side, op, fault, chance.randint(1, count), chance.choice(POLICIES))
            assert world.hit or count > world.seen      # threads do not always need as many operations


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PYFLEECE_EXHAUSTIVE"), reason="takes minutes: set PYFLEECE_EXHAUSTIVE=1")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", [EIO, *ONCE, *FOREVER, *HARMLESS], ids=lambda fault: fault.name)
@by_scenario
def test_all_faults_at_every_place(scenario, fault, directory):
    for side, op in PLACES:
        if fault.fits(op):
            for policy in policies(side, op, fault, every=fault.error != 0):
                loop(scenario, directory, side, op, fault, policy)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """counted(scenario, side, op): how many such operations a run has that nothing happens to."""
    directory = tmp_path_factory.mktemp("counted")
    known: dict[tuple[object, str, str], int] = {}

    def count(scenario: Callable[[World], None], side: str, op: str) -> int:
        key = scenario, side, op
        if key not in known:
            known[key] = once(scenario, directory, side, op, EIO, 1 << 30, POLICIES[0]).seen
        return known[key]

    return count


# ---- other ways to suffer ----


@by_scenario
def test_a_storm_of_signals(scenario, directory):
    """A signal every half millisecond: no wait, read or write ends early."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for policy in POLICIES:
            once(scenario, directory, "source", "read", HARMLESS[0], 1 << 30, policy)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class UnluckyWorld(World):
    """Any operation fails, on all sides, now and then; always the same way for a seed, as far as threads allow."""

    def __init__(self, directory: Path, seed: int, policy: str, units: int) -> None:
        super().__init__(directory, "source", "read", EIO, 1, policy, units)
        self.seed = seed
        self.options["cbw_timeout"] = 0.3

    def arm(self, target: object = None) -> None:
        assert not self.armed
        self.armed = True
        for unit in self.units:
            for image in unit.images.values():
                self._arm(image)

    def _arm(self, image: Any) -> None:
        self._victims.append((image, image.seen(self.op)))
        image.fail(times=None, probability=0.04, seed=self.seed)
        image.short("read", "write", times=None, probability=0.1, seed=self.seed + 1)

    def failed(self, error: Any, where: str, offset: int = 0, length: int = SIZE) -> None:
        own = pyfleece.LostError if self.policy == "lose-range" else pyfleece.SnapshotBrokenError
        assert isinstance(error, (pyfleece.ImageError, own)), (self, where, error)
        assert not isinstance(error, own) or not where.startswith("guest"), (self, where, error)
        if not isinstance(error, pyfleece.LostError):
            assert error.side in OPS and error.cause in (errno.EIO, errno.ETIMEDOUT), (self, where, error)

    def _check_told(self) -> None:
        pass


@by_policy
@by_scenario
def test_bad_luck_on_all_sides(scenario, policy, directory):
    """Whatever goes wrong at the same time: the data is right, or somebody is told, and nothing is left."""
    for seed in range(4):
        run_in(scenario, lambda seed=seed: UnluckyWorld(directory, SEED + seed, policy, 2 if scenario is group else 1))


FLAT = """
import gc, pathlib, sys
sys.path.insert(0, sys.argv[1])
from loop_kit import memory
from test_fault_loops import EIO, HARMLESS, ONCE, POLICIES, SCENARIOS, once

directory = pathlib.Path(sys.argv[2])
faults = [EIO, ONCE[1], HARMLESS[0]]

def round(n):
    for number, scenario in enumerate(SCENARIOS):
        for place in range(3):
            side, op = [("source", "read"), ("fleecing", "read"), ("target", "write")][place]
            fault, nth, policy = faults[(n + number) % 3], 1 + (5 * n + number) % 17, POLICIES[(n + place) % 3]
            once(scenario, directory, side, op, fault, nth, policy)

def least(rounds):
    # Python and malloc give back memory now and then, not at once.
    seen = []
    for n in rounds:
        round(n)
        seen.append({**memory(), "objects": len(gc.get_objects())})
    return {key: min(one[key] for one in seen) for key in seen[0]}

round(0)
before = least(range(1, 4))
after = least(range(4, 10))
print(*(f"{key} {after[key] - before[key]}" for key in after))
"""


def test_memory_is_flat(directory):
    """Over some hundred runs with faults: what each snapshot or job forgets would show."""
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.pthread.stack_cache_size=0:glibc.malloc.arena_max=1"}
    command = [sys.executable, "-c", FLAT, str(Path(__file__).parent), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()
    grown = dict(zip(words[::2], map(int, words[1::2])))
    runs = 6 * 3 * len(SCENARIOS)
    assert grown["objects"] < runs, grown
    assert grown["malloc"] < 3072 * runs, grown             # a snapshot has some 4 KiB
    assert grown["mapped"] < 10240 * runs, grown            # a stage has 32 KiB, a job's buffers too
    assert grown["resident"] < 10240 * runs, grown

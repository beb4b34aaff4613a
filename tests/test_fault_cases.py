"""Faults whose outcome is known exactly: the first cause that is told, every errno, what hangs for longer than anybody
waits, and the last steps of a backup. And the examples of docs/testing-with-faults.md.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import descriptors, run_python, wait_for
from loop_kit import (
    CLUSTER,
    EIO,
    GRANULARITY,
    POLICIES,
    SIZE,
    STAGE,
    Fault,
    FaultyFile,
    Unit,
    World,
    check_backup,
    directory,
    run,
    tasks,
    wait_for_threads,
)

import pyfleece
from pyfleece.testing import FaultyImage

__all__ = ["directory"]
by_policy = pytest.mark.parametrize("policy", POLICIES)

# ---- the first cause, exactly ----

BAD_SECTOR = Fault("bad sector", "fail", errno.EIO, times=None)
NO_SPACE = Fault("no space", "fail", errno.ENOSPC, times=None)


@by_policy
def test_a_bad_sector_costs_the_cluster_that_has_it(policy, directory):
    def scenario(world: World) -> None:
        unit, snapshot, bad = world.unit, world.unit.snapshot(), 14
        world.arm()
        unit.images["source"].clear()                       # instead of all reads: one sector, for good
        unit.images["source"].fail("read", times=None, offset=bad * CLUSTER + 512, length=512)
        done = unit.guest.write(12 * CLUSTER, 4 * CLUSTER)
        assert done == (policy != "break-guest-write")
        if policy == "break-guest-write":
            assert unit.now() == unit.content               # nothing at all was written
        if policy == "break-snapshot":
            error = snapshot.broken
            assert error is not None
            assert (error.side, error.cause) == ("source", errno.EIO)
            assert (error.offset, error.length) == (bad * CLUSTER, CLUSTER)
            return
        assert snapshot.broken is None
        assert snapshot.lost == ([(bad * CLUSTER, CLUSTER, "lost")] if policy == "lose-range" else [])
        if policy == "lose-range":
            with pytest.raises(pyfleece.LostError) as caught:
                snapshot.pread(SIZE, 0)
            assert (caught.value.offset, caught.value.length) == (bad * CLUSTER, CLUSTER)
            target = FaultyFile()
            result = pyfleece.backup(snapshot, target, granularity=GRANULARITY)
            assert [extent[:2] for extent in result.lost] == [(bad * CLUSTER, CLUSTER)]
            check_backup(world, unit, target, result)

    run(scenario, directory, "source", "read", BAD_SECTOR, 1, policy)


@by_policy
def test_a_fleecing_image_that_takes_nothing(policy, directory):
    """Nobody notices while the stage has room. Then the policy decides, and the failed spill is the cause."""

    def scenario(world: World) -> None:
        unit, snapshot = world.unit, world.unit.snapshot()
        world.arm()
        room = STAGE // CLUSTER
        assert all(unit.guest.write(n * CLUSTER, CLUSTER) for n in (0, 1, 2, 3, 4, 5, 7, 8)), "the stage has room"
        snapshot.check()
        outcomes = [unit.guest.write(n * CLUSTER, CLUSTER) for n in range(11, 14)]
        assert outcomes == [policy != "break-guest-write"] * 3
        stats = snapshot.stats
        assert stats.spill_errors and stats.room_timeouts
        if policy == "break-snapshot":
            error = snapshot.broken
            assert error is not None and (error.side, error.cause) == ("fleecing", errno.ENOSPC)
            return
        assert (stats.staged_bytes, stats.fleecing_bytes) == (room * CLUSTER, 0)
        lost = [(11 * CLUSTER, 3 * CLUSTER, "lost")] if policy == "lose-range" else []
        assert snapshot.lost == lost

    run(scenario, directory, "fleecing", "write", NO_SPACE, 1, policy)


EVERY_ERRNO = """
import errno, faulthandler, os, sys
import pyfleece
from pyfleece.testing import FaultyImage

faulthandler.enable()
directory, wrong = sys.argv[1], []
SIZE = 20 * 4096
images = {}
for side in ("source", "fleecing", "target"):
    path = os.path.join(directory, side + ".raw")
    with open(path, "wb") as file:
        file.write(os.urandom(SIZE))
    images[side] = FaultyImage(pyfleece.open(path, "r+"))
disk = pyfleece.Disk(images["source"])

def attempt(number, what, side, op, call):
    images[side].fail(op, error=number, times=None)
    try:
        call()
        wrong.append((errno.errorcode[number], what, "nothing was raised"))
    except BaseException as error:
        if not isinstance(error, pyfleece.Error) or error.side != side or error.cause != number:
            cause, of = getattr(error, "cause", None), getattr(error, "side", None)
            wrong.append((errno.errorcode[number], what, f"{type(error).__name__}: {error}, cause {cause} of {of}"))
    finally:
        images[side].clear()

class Sink:
    def write(self, data):
        return len(data)

def with_snapshot(call, policy="break-snapshot"):
    with disk.snapshot(images["fleecing"], stage_size=4 * 4096, on_cbw_error=policy) as snapshot:
        call(snapshot)

def broken(number):
    def call(snapshot):
        images["source"].fail("read", error=number, times=None)
        disk.pwrite(b"new", 0)
        images["source"].clear()
        snapshot.pread(1, 0)
    return call

def from_fleecing(snapshot):
    images["fleecing"].clear()
    for n in range(20):
        disk.pwrite(b"new", n * 4096)
    images["fleecing"].fail("read", error=number, times=None)
    snapshot.pread(SIZE, 0)

def copied(snapshot, target=images["target"], **options):
    with pyfleece.Backup(snapshot, target, **options) as job:
        job.wait(5)

for number in sorted(errno.errorcode):
    print(errno.errorcode[number], flush=True)
    faulthandler.dump_traceback_later(15, exit=True)        # for this one
    for op, call in {
        "read": lambda: disk.pread(1, 0),
        "write": lambda: disk.pwrite(b"new", 0),
        "zero": lambda: disk.zero(100, 0),
        "discard": lambda: disk.discard(4096, 0),
        "flush": disk.flush,
    }.items():
        attempt(number, "guest " + op, "source", op, call)
    refused = lambda: with_snapshot(lambda snapshot: disk.pwrite(b"new", 0), "break-guest-write")
    attempt(number, "saving, break-guest-write", "source", "read", refused)
    attempt(number, "saving, break-snapshot", "source", "read", lambda: with_snapshot(broken(number)))
    attempt(number, "reading the snapshot", "fleecing", "read", lambda: with_snapshot(from_fleecing))
    attempt(number, "extents", "source", "extents", lambda: with_snapshot(lambda snapshot: list(snapshot.extents())))
    for side, op in (("source", "read"), ("source", "extents"), ("target", "write"), ("target", "flush")):
        attempt(number, f"backup, {side} {op}", side, op, lambda: with_snapshot(copied))
    to_sink = lambda: with_snapshot(lambda snapshot: copied(snapshot, Sink()))
    attempt(number, "backup to a file object", "source", "read", to_sink)
    attempt(number, "chunks", "source", "read", lambda: with_snapshot(lambda snapshot: list(snapshot.chunks())))

for line in wrong:
    print(*line, sep=" | ")
sys.stdout.flush()
os._exit(1 if wrong else 0)
"""


def test_every_errno_is_told_as_it_is(tmp_path):
    """Storage may answer with any errno. None of them is taken for something that the library says to itself: "try
    again", "it still runs", "it is not there".
    """
    run_python(EVERY_ERRNO, tmp_path, timeout=90)


# ---- what hangs ----


@pytest.mark.parametrize(
    "side, op", [("fleecing", "write"), ("source", "read"), ("target", "write"), ("target", "flush")]
)
def test_what_hangs_is_left_behind_and_freed_when_it_ends(side, op, directory):
    """Everything is closed while an operation hangs: nobody waits for it. Its files stay locked as long as it may
    still write to them.
    """
    before, threads = descriptors(), tasks()
    world = World(directory, side, op, Fault("hang", "hang"), 1, "break-snapshot")
    world.resume_hangs = False
    unit, target = world.unit, directory / "new-target.raw"
    snapshot = unit.snapshot()
    unit.guest.write(0, CLUSTER)
    world.arm(target)
    with world.new_files():
        if side == "fleecing":
            unit.guest.write(CLUSTER, 7 * CLUSTER)          # more than three quarters of the stage: it is spilled
            job = None
        else:
            job = pyfleece.Backup(snapshot, target, granularity=GRANULARITY, workers=2)
            job.start()
    hanging = world._victims[0][0]
    wait_for(lambda: hanging.hanging)

    began = time.monotonic()
    if job is not None:
        job.close()
    snapshot.close()
    unit.close()
    assert time.monotonic() - began < 4, "close() waited for what hangs"
    time.sleep(max(0, began + 2 - time.monotonic()))        # until nobody waits for it any more
    assert hanging.hanging, "nothing hung"
    assert not target.exists() and not target.with_name("new-target.raw.partial").exists()
    if side != "target":
        with pytest.raises(pyfleece.ImageLockedError):
            pyfleece.open(unit.paths[side], "r+")
    with pyfleece.open(unit.paths["source"], "r" if side == "source" else "r+", share=side == "source") as source:
        unit.guest.check(source.pread(SIZE, 0))

    hanging.resume()
    wait_for_threads(threads)
    wait_for(lambda: len(descriptors()) <= len(before))     # although we still have the job and the snapshot, closed
    for path in unit.paths.values():
        pyfleece.open(path, "r+").close()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", ["clear", "resume"])
def test_what_was_hit_is_let_go_even_before_it_hangs(how, after, directory):
    """A rule hits when the operation begins, which may be a while before it hangs."""
    with pyfleece.create(directory / "slow.raw", SIZE) as image:
        inner = FaultyImage(image)
        inner.delay("read", seconds=0.1)
        outer = FaultyImage(inner)
        outer.hang("read", after=after)
        reader = threading.Thread(target=outer.pread, args=(1, 0))
        reader.start()
        wait_for(lambda: outer.seen("read"))
        getattr(outer, how)()
        reader.join(1)
        hung = reader.is_alive()
        outer.clear()
        reader.join()
        assert not hung


ACKNOWLEDGE = """
import faulthandler, os, random, sys, threading, time
import pyfleece

faulthandler.enable()
path, seconds = os.path.join(sys.argv[1], "vm.raw"), float(sys.argv[2])
with open(path, "wb") as file:
    file.write(os.urandom(2 << 20))
wrong = []
disk = pyfleece.Disk(pyfleece.open(path, "r+"))

def body(parts):
    try:
        for chunk in parts:
            chunk.ack()
    except (pyfleece.ClosedError, pyfleece.CancelledError):
        pass
    except BaseException as error:
        wrong.append(error)

end = time.monotonic() + seconds
while time.monotonic() < end and not wrong:
    with disk.snapshot("memory", stage_size=4 << 20) as snapshot:
        parts = snapshot.chunks(granularity=4096, workers=2, buffers=64)
        threads = [threading.Thread(target=body, args=(parts,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(random.random() * 0.004)
        parts.close()
        for thread in threads:
            thread.join()
assert not wrong, wrong
"""


def test_chunks_are_acknowledged_while_they_are_closed(directory):
    """By several threads: each of them is told, or was in time."""
    run_python(ACKNOWLEDGE, directory, "3")


# ---- the last steps of a backup to a new file ----


@pytest.fixture
def unit(directory: Path) -> Iterator[Unit]:
    """A disk that nothing happens to."""
    world = World(directory, "source", "read", EIO, 1, "break-snapshot")
    yield world.unit
    world.unit.close()


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("before", [None, b"the backup of yesterday"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_it_cannot_get_its_name(number, before, unit, directory, monkeypatch):
    """What was there under that name stays, and is not locked any more."""
    target = directory / "new-target.raw"
    if before is not None:
        target.write_bytes(before)
    old = files(directory)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.backup(unit.snapshot(), target)
    assert (caught.value.side, caught.value.errno, caught.value.cause) == ("target", number, number)
    assert files(directory) == old
    if before is not None:
        assert target.read_bytes() == before
        pyfleece.open(target, "r+").close()


@pytest.mark.parametrize("before", [None, b"the backup of yesterday"])
def test_it_cannot_be_made(before, unit, directory, monkeypatch):
    target = directory / "new-target.raw"
    if before is not None:
        target.write_bytes(before)
    old = files(directory)

    def refuse(*_: object, **__: object) -> None:
        raise pyfleece.ImageError(errno.ENOSPC, "no space")

    monkeypatch.setattr(pyfleece.image, "create", refuse)
    with pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.backup(unit.snapshot(), target)
    assert (caught.value.side, caught.value.errno) == ("target", errno.ENOSPC)
    assert files(directory) == old
    if before is not None:
        pyfleece.open(target, "r+").close()


def test_its_name_may_not_be_durable(unit, directory, monkeypatch):
    """The directory can't be synced: it failed, so nothing is there under its name."""
    old, real = files(directory), os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "injected")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.backup(unit.snapshot(), directory / "new-target.raw")
    assert (caught.value.side, caught.value.cause) == ("target", errno.EIO)
    assert files(directory) == old


def test_cancelled_while_it_gets_its_name(unit, directory, monkeypatch):
    """Either it was cancelled, and nothing is there, or it came too late, and the backup is good."""
    old, target, real, inside = files(directory), directory / "new-target.raw", os.replace, threading.Event()

    def replace(*names: Any) -> None:
        real(*names)
        inside.set()
        time.sleep(0.1)

    monkeypatch.setattr(os, "replace", replace)
    with pyfleece.Backup(unit.snapshot(), target) as job:
        assert inside.wait(10)
        job.cancel()
        try:
            job.wait(10)
        except pyfleece.CancelledError:
            assert files(directory) == old
        else:
            assert target.read_bytes() == unit.content


def test_cancelled_just_before_it_gets_its_name(unit, directory, monkeypatch):
    """As above: no success without a file."""
    old, target = files(directory), directory / "new-target.raw"
    real, inside = pyfleece.Backup._make_result, threading.Event()

    def make_result(job: pyfleece.Backup) -> pyfleece.Result:
        inside.set()
        time.sleep(0.1)
        return real(job)

    monkeypatch.setattr(pyfleece.Backup, "_make_result", make_result)
    with pyfleece.Backup(unit.snapshot(), target) as job:
        assert inside.wait(10)
        job.cancel()
        try:
            job.wait(10)
        except pyfleece.CancelledError:
            assert files(directory) == old
        else:
            assert target.read_bytes() == unit.content


@pytest.mark.parametrize("which", [1, 2])
def test_one_of_a_group_cannot_get_its_name(which, directory, monkeypatch):
    """All or nothing: then the others have none either."""
    world = World(directory, "source", "read", EIO, 1, "break-snapshot", units=2)
    old, real, calls = files(directory), os.replace, []

    def replace(*names: Any) -> None:
        calls.append(names)
        if len(calls) == which:
            raise OSError(errno.EIO, "injected")
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    snapshots = [unit.snapshot() for unit in world.units]
    with pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.backup_group(snapshots, [directory / "new-target1.raw", directory / "new-target2.raw"])
    assert (caught.value.side, caught.value.cause) == ("target", errno.EIO)
    assert files(directory) == old
    for unit in world.units:
        unit.close()


# ---- the guide ----

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "testing-with-faults.md"


def test_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 4
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, GUIDE.name, "exec"), names)


def test_guide_knows_every_method():
    text = GUIDE.read_text()
    public = {name for name in vars(FaultyImage) if not name.startswith("_")}
    assert {name for name in public if f"`{name}" not in text} == set()

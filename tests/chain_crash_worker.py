"""Ends a process before each operation in turn that gives a directory of backups another state on stable storage, and
looks at what is left: after a kill, and after each power loss that could have been at that moment. See
test_chain_crash.py.

    LD_PRELOAD=SHIM chain_crash_worker.py SHIM DIRECTORY STEPS IGNORE [OLD NEW]...

STEPS: those to crash in, as in 13: 1, the first backup; 2, an incremental one; 3, making a point a full one, so that
old ones can go; 4, removing those. IGNORE: files with names that end so are not really synced. OLD, NEW: text of
pyfleece/chain.py, and what is there instead. Prints how many crashes there were and how many states they left; or what
is wrong with one, with status 1.

The process that starts all others has no threads, so that it can fork.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import random
import shutil
import sys
import time
import traceback
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyfleece

SIZE = 192 << 10
KEEP = 2
CRASHED = 77                # see tests/c/crash_shim.c
State = dict[str, bytes]    # what a directory has: names and contents


def load_chain(edits: list[str]) -> types.ModuleType:
    path = Path(pyfleece.__file__).with_name("chain.py")
    source = path.read_text()
    for old, new in zip(edits[::2], edits[1::2]):
        assert source.count(old) == 1, f"{source.count(old)} times in {path.name}: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("pyfleece.chain")
    sys.modules[module.__name__] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def name_alike(chain: types.ModuleType, first: int) -> None:
    """The same names and times in each run, so that a state that was looked at before is known again."""
    numbers = itertools.count(first)
    chain.uuid = types.SimpleNamespace(uuid4=lambda: uuid.UUID(int=next(numbers)))
    chain.time = types.SimpleNamespace(gmtime=time.gmtime, strftime=lambda *_: "2026-01-02T03:04:05Z")


# ---- what happens, and what each point must hold ----


def writes(number: int) -> Iterator[tuple[int, bytes]]:
    rng = random.Random(number)
    for _ in range(3):
        length = rng.randrange(1, 9000)
        yield rng.randrange(SIZE - length), rng.randbytes(length)


class Guest(pyfleece.Disk):
    """Writes right after each cut."""

    number = 0

    def write(self) -> None:
        for offset, data in writes(self.number):
            self.pwrite(data, offset)
        self.number += 1

    def snapshot(self, *args, **options):
        made = super().snapshot(*args, **options)
        self.write()
        return made


def contents_of_points(count: int) -> list[bytes]:
    model, found = bytearray(SIZE), []
    for number in range(2 * count):
        for offset, data in writes(number):
            model[offset : offset + len(data)] = data
        if number % 2 == 0:
            found.append(bytes(model))
    return found


POINTS = 4
CONTENTS = contents_of_points(POINTS)


def live(chain: types.ModuleType, base: Path, steps: str, arm: Callable[[bool], object]) -> None:
    """Four backups, then the oldest two are dropped: the third is made a full one, and the last stands on it. Crashes
    are tried where `arm` was called with True. What is done is counted in a file.
    """
    name_alike(chain, 1)
    done = os.open(base / "done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with pyfleece.create(base / "vm.raw", SIZE) as image, Guest(image) as disk:
        arm("1" in steps)
        repository = chain.Repository(base / "backups", create=True)
        for number in range(POINTS):
            arm({0: "1", POINTS - 1: "2"}.get(number, "none") in steps)
            disk.write()
            repository.backup(disk, fleecing="memory", granularity=4096, workers=1)
            os.write(done, b"x")
        arm("3" in steps)
        remove = repository._remove_point

        def remove_point(point) -> None:
            arm("4" in steps)
            remove(point)

        repository._remove_point = remove_point
        repository.prune(KEEP, workers=1)
        os.write(done, b"x")



# ---- what must be so after a crash ----


def check_points(chain: types.ModuleType, directory: Path, done: int) -> list[int]:
    repository = chain.Repository(directory, create=True)
    points = repository.points
    found = [point.sequence for point in points]
    for point in points:
        with repository.open(point) as image:
            held = image.pread(SIZE, 0)
        assert held == CONTENTS[point.sequence - 1], f"{point.name} is wrong"
    assert repository.verify() == []
    if done < POINTS:
        assert found in (list(range(1, done + 1)), list(range(1, done + 2))), f"after {done} backups: {found}"
    elif done == POINTS:
        left = list(range(POINTS - KEEP + 1, POINTS + 1))
        assert found[-KEEP:] == left and set(found) <= set(range(1, POINTS + 1)), f"before {left} are left: {found}"
    else:
        assert len(found) == KEEP and found[-1] == POINTS, f"after all: {found}"
    return found


def check_goes_on(chain: types.ModuleType, directory: Path, disk: Path | None) -> None:
    """Nothing is left behind; the next backup, where there is the disk, is an incremental."""
    repository = chain.Repository(directory)
    contents = {point.uuid: CONTENTS[point.sequence - 1] for point in repository.points}
    if disk is not None:
        with pyfleece.open(disk, "r+") as image, pyfleece.Disk(image) as opened:
            expected = opened.pread(SIZE, 0)
            point, _ = repository.backup(opened, fleecing="memory", granularity=4096, workers=1)
            assert point.kind == ("incremental" if contents else "full"), point.reason
            contents[point.uuid] = expected
            assert len(opened.bitmaps) == 1
    keeps = sorted({min(KEEP, len(contents)), 1}, reverse=True) if contents else []
    for keep in keeps:
        repository.prune(keep, workers=1)
        points = repository.points
        assert len(points) == keep and points[0].kind == "full"
        for point in points:
            with repository.open(point) as image:
                assert image.pread(SIZE, 0) == contents[point.uuid], f"{point.name} of {keep} that are kept is wrong"
        assert repository.verify() == []
        names = {name for p in points for name in (p.image, p.digests, f"{p.name}.json")} | {"pyfleece.json", ".lock"}
        assert set(os.listdir(directory)) == names, sorted(os.listdir(directory))


def check(chain: types.ModuleType, directory: Path, done: int, disk: Path | None) -> None:
    name_alike(chain, 1000)
    check_points(chain, directory, done)
    check_goes_on(chain, directory, disk)


# ---- states that a power loss can leave ----


def read_state(directory: Path) -> State:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


def after_power_loss(directory: Path, shadow: Path) -> Iterator[State]:
    """All that is synced is there. Of what was done to names since the directory was synced, anything may be there, but
    files have what was synced.
    """

    def content(inode: str) -> bytes:
        path = shadow / f"content.{inode}"
        return path.read_bytes() if path.exists() else b""

    def lines(name: str) -> list[list[str]]:
        path = shadow / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    if directory.exists():
        yield {path.name: content(str(path.stat().st_ino)) for path in directory.iterdir()}
    pending = lines("pending")
    assert len(pending) < 7, f"{len(pending)} changes of names at once: {pending}"
    for chosen in itertools.product((False, True), repeat=len(pending)):
        names = {name: inode for inode, name in lines("names")}
        for change in itertools.compress(pending, chosen):
            if change[0] == "rename":
                names.pop(change[2], None)
                names[change[3]] = change[1]
            else:
                names.pop(change[1], None)
        yield {name: content(inode) for name, inode in names.items()}


# ---- processes ----


def in_child(function: Callable[..., None], *arguments: Any) -> int:
    """The status that it ends with: 0, or 1 after an exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc(limit=-4)
        status = 1
    sys.stderr.flush()
    os._exit(status)


def main() -> int:
    shim_path, base_path, steps, ignore, *edits = sys.argv[1:]
    chain = load_chain(edits)
    shim = ctypes.CDLL(shim_path)
    base = Path(base_path)
    seen: set[tuple[int, bytes]] = set()
    for number in itertools.count(1):
        shutil.rmtree(base, ignore_errors=True)
        shadow, directory, scratch = base / "shadow", base / "backups", base / "scratch"
        shadow.mkdir(parents=True)

        shim.crash_watch(os.fsencode(directory), os.fsencode(shadow), ignore.encode(), ctypes.c_long(number))
        status = in_child(live, chain, base, steps, shim.crash_arm)
        shim.crash_watch(b"", b"", b"", ctypes.c_long(0))
        if status not in (0, CRASHED):
            print(f"before operation {number}: the process ended with {status}")
            return 1
        done = len((base / "done").read_bytes()) if (base / "done").exists() else 0
        states = [("a power loss", state) for state in after_power_loss(directory, shadow)]
        states.append(("a kill", read_state(directory)))
        for what, state in states:
            key = (done, hashlib.sha256(repr(sorted(state.items())).encode()).digest())
            killed = what == "a kill"
            if key in seen and not killed:
                continue
            seen.add(key)
            place = directory
            if not killed:
                place = scratch
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                for name, data in state.items():
                    (scratch / name).write_bytes(data)

            if in_child(check, chain, place, done, base / "vm.raw" if killed else None):
                print(f"{what} before operation {number}, after {done} steps, leaves {sorted(state)}")
                return 1
        if status == 0:
            print(f"{number - 1} crashes, {len(seen)} states")
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""What the tests under real faults share: a guest that knows what its disk must hold, comparing snapshots with it,
and measuring.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import MIB, descriptors, wait_for

import pyfleece
from pyfleece.fleecing import Fleecing

POLICIES = ("break-snapshot", "break-guest-write", "lose-range")
CLUSTER = 4096
STEP = 64 << 10
STAGE = MIB
# What a guest write may take beyond cbw_timeout.
SLACK = 0.2
# What closing may take, whatever hangs: about a second.
CLOSES_WITHIN = 1.5


class Guest:
    """A disk of random data that is written by one thread at a time, and `truth`: what it holds."""

    def __init__(self, source: pyfleece.Image, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.disk = pyfleece.Disk(source)
        self.size = source.size
        self.truth = bytearray(self.random.randbytes(self.size))
        self.disk.pwrite(self.truth, 0)

    @property
    def now(self) -> bytes:
        return bytes(self.truth)

    def write(self, offset: int, length: int = STEP) -> None:
        """New data. What raises is taken to have changed nothing, which `check` proves."""
        length = min(length, self.size - offset)
        data = self.random.randbytes(length)
        self.disk.pwrite(data, offset)
        self.truth[offset : offset + length] = data

    def overwrite(self, start: int, end: int, step: int = STEP) -> None:
        for offset in range(start, end, step):
            self.write(offset, min(step, end - offset))

    def check(self) -> None:
        """Every write that returned is on the source, every one that raised is not."""
        assert self.disk.pread(self.size, 0) == self.truth, "the guest's data is not what it wrote"


def cut(
    guest: Guest, fleecing: Fleecing, policy: str = "break-guest-write", timeout: float = 30.0
) -> pyfleece.Snapshot:
    return guest.disk.snapshot(
        fleecing, cluster_size=CLUSTER, stage_size=STAGE, on_cbw_error=policy, cbw_timeout=timeout
    )


def unreadable(snapshot: pyfleece.Snapshot, state: bytes, *errors: type[Exception]) -> list[int]:
    """The offsets of the clusters whose reading raises one of `errors`; all others must hold the bytes of the cut."""
    size, found = snapshot.cluster_size, []
    for offset in range(0, len(state), size):
        expected = state[offset : offset + size]
        try:
            got = snapshot.pread(len(expected), offset)
        except errors:
            found.append(offset)
        else:
            assert got == expected, f"the snapshot lies at {offset}" + (": zeros" if not any(got) else "")
    return found


def expect_empty(snapshot: pyfleece.Snapshot) -> None:
    """After a backup nothing is kept, once the write to the fleecing image that may be running has ended."""
    wait_for(lambda: snapshot.stats.fleecing_bytes == snapshot.stats.staged_bytes == 0, 2)


def timed(function: Callable[..., object], *arguments: object) -> tuple[float, BaseException | None]:
    """How long it took, and what it raised."""
    begun = time.monotonic()
    try:
        function(*arguments)
    except Exception as error:
        return time.monotonic() - begun, error
    return time.monotonic() - begun, None


class Running:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.seconds: float | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self.seconds, self.error = timed(function, *arguments)

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self.runs, f"it still runs after {seconds} s"
        if self.error is not None:
            raise self.error


def measured(attempt: Callable[[], None], times: int = 3) -> None:
    """Machines are noisy: a test of a time passes if one of its attempts does."""
    for left in reversed(range(times)):
        try:
            attempt()
        except AssertionError:
            if not left:
                raise
        else:
            break


def tasks() -> int:
    """The threads of this process, whoever made them."""
    return len(os.listdir("/proc/self/task"))


@contextmanager
def nothing_left(seconds: float = 5.0) -> Iterator[None]:
    """At the end of the block there are as many open files and threads as at its beginning, soon at least."""
    files, threads = descriptors(), tasks()
    yield
    end = time.monotonic() + seconds
    while len(descriptors()) > len(files) or tasks() > threads:
        new = sorted(path for number, path in descriptors().items() if number not in files)
        assert time.monotonic() < end, f"left behind: files {new}, {tasks() - threads} threads more"
        gc.collect()            # exceptions hold on to what was used where they were raised
        time.sleep(0.02)


@contextmanager
def make_guest(directory: Path, size: int = 16 * MIB, seed: int = 1) -> Iterator[Guest]:
    with pyfleece.create(directory / "vm.raw", size) as source:
        yield Guest(source, seed)

"""What the model and the rules of test_stateful.py share: calls in threads, what a guest does to its disk, and how a
snapshot is taken.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyfleece
from pyfleece.testing import FaultyImage

if TYPE_CHECKING:
    from stateful_model import Dirty

BREAK, FAIL, LOSE = "break-snapshot", "break-guest-write", "lose-range"
RAISES = {
    "discarded": pyfleece.DiscardedError,
    "lost": pyfleece.LostError,
    "outside": pyfleece.OutsideBitmapError,
}
READABLE = "readable"
PATIENT = 20.0  # seconds of cbw_timeout that nobody is meant to wait
USED = 1  # clusters of a fleecing image that hold something before
SOON = 15.0  # seconds within which threads in the background get done what they have to




def soon(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    end = time.monotonic() + SOON
    pause = 0.0002
    while not condition():
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or the pyfleece.Error that it raises: without its traceback, whose frames would keep what was
    called alive until the garbage collector comes.
    """
    try:
        return function(*arguments)
    except pyfleece.Error as error:
        return error.with_traceback(None)


class Running:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self.outcome = attempt(function, *arguments)
        except Exception as error:
            self.outcome = error

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> Any:
        """What it returned, or the exception that it raised."""
        self._thread.join(SOON)
        assert not self.runs, f"it still runs after {SOON} s"
        return self.outcome

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        outcome = self.end()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def runs_of(kinds: Iterable[str]) -> Iterator[tuple[int, int, str]]:
    """(first, end, kind) of the stretches of equals."""
    first, last = 0, None
    number = 0
    for number, kind in enumerate(kinds):
        if last is not None and kind != last:
            yield first, number, last
            first = number
        last = kind
    if last is not None:
        yield first, number + 1, last


# ---- what a guest does ----


@dataclass(frozen=True)
class Change:
    """A guest's write, zero or discard."""

    kind: str
    offset: int
    data: bytes  # what it makes of the range; a discard: zeros or what was there

    @property
    def count(self) -> int:
        return len(self.data)

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def run(self, disk: pyfleece.Disk) -> None:
        if self.kind == "write":
            assert disk.pwrite(self.data, self.offset) == self.count
        elif self.kind == "zero":
            disk.zero(self.count, self.offset)
        else:
            disk.discard(self.count, self.offset)


@dataclass(frozen=True)
class Outcome:
    """How a change ended."""

    change: Change
    before: bytes  # of its range
    after: bytes
    error: pyfleece.Error | None

    @property
    def whole(self) -> bool:
        """Is it certain to have been done, all of it?"""
        return self.error is None and self.change.kind != "discard"


def perform(disk: pyfleece.Disk, change: Change, lane: bytearray, base: int, calm: Callable[[], None]) -> Outcome:
    """Do it, and note in `lane`, the disk's bytes from `base` on, what became of it. `calm` ends faults, so that one
    can look.
    """
    first, last = change.offset - base, change.end - base
    before = bytes(lane[first:last])
    error = attempt(change.run, disk)
    if error is None and change.kind != "discard":
        after = change.data
    else:
        calm()
        after = disk.pread(change.count, change.offset)
        if change.kind == "discard":
            wrong = [at for at in range(change.count) if after[at] not in (0, before[at])]
            assert not wrong, f"a discard of {change.count} at {change.offset} left neither zeros nor the old data"
        else:
            # Pieces of it, in order, may have been done before the one that failed.
            done = next((at for at in range(change.count) if after[at] != change.data[at]), change.count)
            assert after[done:] == before[done:], f"{change.kind} at {change.offset} failed and left a mixture"
    lane[first:last] = after
    return Outcome(change, before, after, error)


# ---- how a snapshot is taken ----


@dataclass(frozen=True)
class Setup:
    """How a snapshot is taken. `slots` and `file_slots` are clusters, `slack` bytes more that serve nothing."""

    cluster: int
    slots: int
    place: str  # "memory", "image", "path", "directory", "fleecing_dir" or "nameless"
    file_slots: int
    limited: bool  # by fleecing_limit; else by the size of the image, where there is one
    slack: int
    policy: str
    timeout: float


class Scratch:
    """The fleecing image of a snapshot, if there is one, and its size in clusters."""

    def __init__(self, setup: Setup, directory: Path, name: str, size: int) -> None:
        self.options: dict[str, Any] = {}
        self.inner: pyfleece.Image | None = None
        self.faulty: FaultyImage | None = None
        room = setup.file_slots * setup.cluster + setup.slack
        ample = max(64 << 20, 2 * size)
        path = directory / f"{name}-fleecing"
        if setup.place == "memory":
            self.options["fleecing"] = "memory"
            self.bytes = 0
        elif setup.place in ("image", "path"):
            self.bytes = ample if setup.limited else room
            with pyfleece.create(path, self.bytes, format="raw") as made:
                made.pwrite(b"\xa5" * min(made.size, USED * setup.cluster), 0)  # what it held does not matter
            if setup.place == "image":
                self.inner = pyfleece.open(path, "r+", format="raw")
                self.faulty = FaultyImage(self.inner)
            self.options["fleecing"] = self.faulty or path
        else:
            self.bytes = ample
            if setup.place == "directory":
                self.options["fleecing"] = directory
            elif setup.place == "fleecing_dir":
                self.options["fleecing_dir"] = directory
        if setup.limited and self.bytes:
            self.options["fleecing_limit"] = room
            self.bytes = min(self.bytes, room)
        self.slots = self.bytes // setup.cluster

    def close(self) -> None:
        for image in (self.faulty, self.inner):
            if image is not None:
                image.close()


def cut_options(setup: Setup, scratch: Scratch, dirty: Dirty | None) -> dict[str, Any]:
    return {
        "cluster_size": setup.cluster,
        "stage_size": setup.slots * setup.cluster + min(setup.slack, setup.cluster - 1),
        "on_cbw_error": setup.policy,
        "cbw_timeout": setup.timeout,
        "bitmap": dirty.name if dirty is not None else None,
        **scratch.options,
    }


def initial(size: int, seed: int) -> bytes:
    """Stretches of random data, of zeros, and of blocks whose last bytes only are not zeros."""
    rng = random.Random(seed)
    parts, left = [], size
    while left:
        length = min(left, rng.choice((512, 4096, 5000, 20480, 65536)))
        kind = rng.randrange(4)
        parts.append(rng.randbytes(length) if kind > 1 else bytes(length) if kind else bytes(length - 1) + b"\x01")
        left -= length
    return b"".join(parts)

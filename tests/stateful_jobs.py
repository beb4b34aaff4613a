"""Backups beside what must come of them: `Copy` is a backup to a target, `Chunked` an agent that takes chunks. Both run
while the guest writes and others discard; see stateful_model.py for the rest of the model.
"""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

from stateful_kit import LOSE, READABLE, SOON, attempt
from stateful_model import Cut

import pyfleece
from pyfleece.testing import FaultyImage


class Job:
    """What reads a whole snapshot in the background."""

    def __init__(self, cut: Cut, discard: bool, skip: bool) -> None:
        self.cut, self.discard, self.skip = cut, discard, skip
        self.missing = set(cut.unreadable)  # at the start
        self.overtaken = False  # somebody discarded since then

    def let_go(self) -> None:
        """What hangs goes on."""

    def finish(self) -> None:
        """End it, and check how it ended."""
        raise NotImplementedError

    def check_failure(self, error: Exception, side: str | None = None) -> None:
        """`side`: where a fault was injected."""
        cut = self.cut
        if isinstance(error, pyfleece.SnapshotBrokenError):
            assert cut.broken, error
        elif isinstance(error, (pyfleece.ClosedError, pyfleece.CancelledError)):
            assert cut.closed, error
        elif isinstance(error, pyfleece.LostError):
            assert not self.skip and cut.lost - cut.outside, error
        elif isinstance(error, pyfleece.DiscardedError):
            assert not self.skip and (self.overtaken or self.missing & cut.released), error
        else:
            assert isinstance(error, pyfleece.ImageError), repr(error)
            assert error.side == side or (error.side == "fleecing" and cut.damaged), error
            assert error.errno == errno.EIO, error


KINDS = ("new", "replace", "image", "zeroed", "stream")


class Copy(Job):
    """A backup to a target of one of KINDS: a file that is made, or replaced; an image that holds something, or zeros;
    a file object. `slow`: "speed" limits it, "hang" lets the target's nth write hang.
    """

    def __init__(
        self,
        cut: Cut,
        path: Path,
        *,
        kind: str = "new",
        granules: int = 1,
        workers: int = 1,
        discard: bool = True,
        skip: bool | None = None,
        slow: str = "",
        fail: str = "",
        nth: int = 1,
    ) -> None:
        super().__init__(cut, discard, cut.setup.policy == LOSE if skip is None else skip)
        self.path, self.kind, self.side = path, kind, fail or None
        self.before = bytes(cut.size)
        self.image: FaultyImage | None = None
        self.inner: pyfleece.Image | None = None
        self.faulty: FaultyImage | None = None
        target: Any = path
        if kind == "replace":
            self.before = b"old" * 1000
            path.write_bytes(self.before)
        elif kind == "stream":
            target = self.stream = io.BytesIO()
        elif kind in ("image", "zeroed"):
            self.inner = pyfleece.create(path, cut.size + 4096 * (nth % 2))
            self.before = (b"\xee" if kind == "image" else b"\0") * self.inner.size
            self.inner.pwrite(self.before, 0)
            target = self.faulty = FaultyImage(self.inner)
            if slow == "hang":
                self.faulty.hang("write", nth=nth)
            if fail == "target":
                self.faulty.fail("write", "zero", nth=nth)
        if fail == "source":
            cut.guest.source.fail("read", nth=nth)
        self.real = pyfleece.Backup(
            cut.real,
            target,
            granularity=granules * cut.cluster,
            workers=workers,
            speed=50_000 if slow == "speed" else None,
            discard_source=discard,
            skip_lost=skip,
            target_is_zero=kind == "zeroed",
        )
        self.real.start()
        cut.discarder = discard

    def let_go(self) -> None:
        if self.faulty is not None:
            self.faulty.clear()

    def finish(self, cancel: bool = False) -> None:
        cut = self.cut
        if self.side != "target":
            self.let_go()
        if not cancel and not self.real.done and not cut.closed:
            self.real.speed = None
        if cancel:
            assert self.real.cancel(), "a backup could not be cancelled"
        outcome = attempt(self.real.wait, SOON)
        self.real.close()
        cut.discarder = False
        if self.side == "source":
            cut.guest.source.clear()
        if not isinstance(outcome, Exception):
            check_result(cut, outcome, self._content(), self.before, self.missing, self.skip)
        elif not (cancel and isinstance(outcome, pyfleece.CancelledError)):
            self.check_failure(outcome, self.side)
        self._tidy(not isinstance(outcome, Exception))
        if self.discard:
            done = not isinstance(outcome, Exception)
            cut.look_up_released(cut.inside - cut.unreadable if done else set(), cut.inside)

    def _content(self) -> bytes:
        if self.kind == "stream":
            return self.stream.getvalue()
        if self.inner is not None:
            return self.inner.pread(self.inner.size, 0)
        return self.path.read_bytes()

    def _tidy(self, good: bool) -> None:
        """Nothing is left of a backup that failed, and a file that it should have replaced is as it was."""
        assert not Path(f"{self.path}.partial").exists()
        for image in (self.faulty, self.inner):
            if image is not None:
                image.close()
        if self.kind == "new" and not good:
            assert not self.path.exists()
        elif self.kind == "replace" and not good:
            assert self.path.read_bytes() == self.before
        self.path.unlink(missing_ok=True)


def check_result(
    cut: Cut, result: pyfleece.Result, data: bytes, before: bytes, missing: set[int], skip: bool
) -> None:
    """`before`: what an image held, and keeps where nothing is copied to; else there are zeros. `missing`: clusters
    that could not be read when it started.
    """
    assert skip or not (missing or result.lost), "a backup succeeded without a part of the snapshot"
    before = before if len(before) >= cut.size else bytes(cut.size)
    expected = bytearray(before)
    for cluster in cut.inside:
        part = cut.bytes_of(cluster, cluster + 1)
        expected[part] = cut.state[part]
    end = last = None
    for offset, length, kind in result.lost:
        assert end is None or offset > end or (offset == end and kind != last), f"not merged: {result.lost}"
        end, last = offset + length, kind
        left_out = set(cut.touched(offset, length))
        assert left_out <= cut.unreadable, f"left out, but still there: {sorted(left_out - cut.unreadable)}"
        assert kind == "discarded" or left_out <= cut.lost
        expected[offset:end] = before[offset:end]
        missing = missing - left_out
    assert not missing, f"clusters {sorted(missing)} were taken to be there"
    wrong = next((at for at in range(len(expected)) if data[at] != expected[at]), None) if data != expected else None
    assert wrong is None, f"the backup is wrong at {wrong}"
    assert len(data) == len(expected)
    assert result.total == sum(len(cut.state[cut.bytes_of(c, c + 1)]) for c in cut.inside)
    assert result.total == result.data_bytes + result.zero_bytes + result.lost_bytes
    assert result.lost_bytes == sum(extent.length for extent in result.lost)


class Chunked(Job):
    """An agent that takes chunks and acknowledges them when it likes."""

    def __init__(self, cut: Cut, granules: int, workers: int, buffers: int, discard: bool) -> None:
        super().__init__(cut, discard, cut.setup.policy == LOSE)
        self.granularity, self.buffers = granules * cut.cluster, buffers
        self.released = set(cut.released)
        self.real = cut.real.chunks(self.granularity, workers, buffers, discard, ack_timeout=0.05)
        self.position = 0
        self.held: list[pyfleece.Chunk] = []
        self.over = False

    def take(self) -> None:
        if self.over:
            return
        cut = self.cut
        waits = sum(chunk.kind == "data" for chunk in self.held) >= self.buffers
        try:
            chunk = attempt(next, self.real, None)
        except TimeoutError:
            assert waits
            return
        if chunk is None:
            self._check_gap(cut.size)
        elif isinstance(chunk, Exception):
            self.check_failure(chunk)
        if not isinstance(chunk, pyfleece.Chunk):
            self.over = True
            return
        self._check_gap(chunk.offset)
        self.position = chunk.offset + chunk.length
        assert chunk.length > 0 and chunk.offset % cut.cluster == 0
        assert self.position % cut.cluster == 0 or self.position == cut.size
        touched = set(cut.touched(chunk.offset, chunk.length))
        assert not touched & (self.released | cut.outside), "a chunk of what was discarded, or outside"
        self._check_data(chunk)
        self.held.append(chunk)

    def _check_gap(self, end: int) -> None:
        cut = self.cut
        assert end >= self.position
        for cluster in cut.touched(self.position, end - self.position):
            kind = cut.kind(cluster)
            assert kind == "outside" or (self.skip and kind != READABLE), f"cluster {cluster}, {kind}, was left out"

    def _check_data(self, chunk: pyfleece.Chunk) -> None:
        expected = self.cut.state[chunk.offset : chunk.offset + chunk.length]
        if chunk.kind == "zero":
            assert chunk.buffer is None and not any(expected)
        else:
            assert chunk.buffer is not None and chunk.length <= self.granularity
            assert chunk.buffer == expected, f"the chunk at {chunk.offset} is not what the snapshot held"

    def ack(self, number: int, discard: bool) -> None:
        if not self.held:
            return
        cut, chunk = self.cut, self.held.pop(number % len(self.held))
        self._check_data(chunk)
        error = attempt(chunk.ack, discard)
        if self.real.closed:
            assert isinstance(error, pyfleece.ClosedError), error
            return
        assert error is None and chunk.buffer is None, error
        if discard and self.discard and cut.live:
            cut.note_released(cut.whole(chunk.offset, chunk.length))
        assert isinstance(attempt(chunk.ack), pyfleece.ArgumentError), "a chunk was acknowledged twice"

    def finish(self) -> None:
        self.real.close()
        while self.held:
            self.ack(0, True)

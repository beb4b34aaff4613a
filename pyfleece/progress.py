"""How far a backup is, and a bar that shows it in a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Progress:
    """How far a backup is. Sizes are bytes, durations seconds."""

    total: int              # to be visited: the disk, or what its dirty bitmap holds
    done: int               # of these, copied, or found to be zeros, or skipped
    data_bytes: int
    zero_bytes: int
    lost_bytes: int
    elapsed: float
    retries: int            # reads repeated
    fleecing_bytes: int     # old data that is kept in the fleecing image now
    finished: bool
    reflinked_bytes: int = 0        # of data_bytes: shared with the source

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 1.0

    @property
    def rate(self) -> float:
        """Bytes per second, on average."""
        return self.done / self.elapsed if self.elapsed else 0.0


def total_of(parts: list[Progress]) -> Progress:
    """The progress of several jobs that run at the same time."""
    return Progress(
        total=sum(part.total for part in parts),
        done=sum(part.done for part in parts),
        data_bytes=sum(part.data_bytes for part in parts),
        zero_bytes=sum(part.zero_bytes for part in parts),
        lost_bytes=sum(part.lost_bytes for part in parts),
        elapsed=max((part.elapsed for part in parts), default=0.0),
        retries=sum(part.retries for part in parts),
        fleecing_bytes=sum(part.fleecing_bytes for part in parts),
        finished=all(part.finished for part in parts),
        reflinked_bytes=sum(part.reflinked_bytes for part in parts),
    )


def human(count: float) -> str:
    """A size for people: 1536 is "1.5 KiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


class Bar:
    """A progress callback that draws a bar. On a terminal only, unless forced: elsewhere it writes nothing.

    The rate that it shows is that of the last seconds.
    """

    _SMOOTHING = 0.1        # how much the newest measurement counts

    def __init__(self, stream: TextIO | None = None, *, force: bool = False, label: str = "") -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._shown = force or self._stream.isatty()
        self._label = label + " " if label else ""
        self._last = (time.monotonic(), 0)
        self._rate: float | None = None

    def __call__(self, progress: Progress) -> None:
        if not self._shown:
            return
        self._measure(progress)
        # Of fixed width, so that the bar's end stays where it is.
        text = f" {progress.fraction:4.0%} {human(progress.done):>10} of {human(progress.total)}"
        text += f", {human(self._rate or 0):>10}/s, fleecing {human(progress.fleecing_bytes):>10}"
        width = min(shutil.get_terminal_size().columns - 1, 110)
        room = max(width - len(self._label) - len(text) - 2, 0)
        filled = int(room * progress.fraction)
        drawn = f"[{'=' * filled}{' ' * (room - filled)}]{text}" if room >= 5 else text.strip()
        line = self._label + drawn
        self._stream.write(f"\r{line[:width]:<{width}}" + ("\n" if progress.finished else ""))
        self._stream.flush()

    def _measure(self, progress: Progress) -> None:
        now = time.monotonic()
        then, done = self._last
        if progress.finished or self._rate is None:
            self._rate = progress.rate
        elif now > then:
            self._rate += self._SMOOTHING * ((progress.done - done) / (now - then) - self._rate)
        self._last = (now, progress.done)

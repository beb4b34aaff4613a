"""A guest for measurements: reads and writes a disk in threads of its own, and times each operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyfleece import _binding
from pyfleece._binding import Resource, call, call_code, positive, unsigned
from pyfleece._native import ffi, lib
from pyfleece.disk import Disk
from pyfleece.errors import invalid
from pyfleece.snapshot import Latency, latency_of

ORDERS = {"once": lib.FL_ORDER_ONCE, "random": lib.FL_ORDER_RANDOM, "sequential": lib.FL_ORDER_SEQUENTIAL}
_SLICE = 50_000_000                                 # ns that a wait lasts before it looks for Ctrl-C


@dataclass(frozen=True)
class LoadStats:
    """What a load did so far. Sizes are bytes, durations seconds."""

    operations: int
    bytes_read: int
    bytes_written: int
    elapsed: float
    finished: bool
    latency: Latency            # of whole operations

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.elapsed if self.elapsed else 0.0


class Load(Resource):
    """A guest that runs from now on. What it writes is noise: the disk's contents are destroyed.

    `block`: bytes of an operation. `stride`: bytes from one block's start to the next one's, at least `block` (None:
    that). `threads`: operations at once. `order`: "once": each block once, in an order that
    looks random; "random"; "sequential", and again from the beginning. The same `seed` gives the same operations.
    `read_percent` of them read. `hot`: (percent of the operations, percent of the disk that they go to), for "random".
    `rate`: operations per second; None: as fast as it goes. With a rate, latency counts from when an operation was
    due. `operations`: after so many it ends.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        block: int = 4096,
        stride: int | None = None,
        threads: int = 1,
        order: str = "random",
        read_percent: int = 0,
        hot: tuple[int, int] = (0, 0),
        rate: int | None = None,
        operations: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise invalid(f"the order of a load is {order!r}; it can be {', '.join(ORDERS)}")
        options = ffi.new("fl_load_options *")
        options.block = unsigned(block, "block", 32)
        options.stride = positive(stride, "stride")
        options.threads = unsigned(threads, "threads", 32)
        options.order = ORDERS[order]
        options.read_percent = unsigned(read_percent, "read_percent", 32)
        options.hot_percent, options.hot_space_percent = (unsigned(percent, "hot", 32) for percent in hot)
        options.rate = positive(rate, "rate")
        options.operations = positive(operations, "operations")
        options.seed = unsigned(seed, "seed")
        self._disk = disk                           # outlives the load
        self._keeps: Any = disk._handle
        self._handle = _binding.make("fl_load **", lib.fl_load_free, lib.fl_load_start, disk._handle, options)
        disk._users.add(self)

    @property
    def stats(self) -> LoadStats:
        raw = ffi.new("fl_load_stats *")
        call(lib.fl_load_stats_get, self._handle, raw)
        return LoadStats(
            raw.operations,
            raw.bytes_read,
            raw.bytes_written,
            raw.elapsed_ns / 1e9,
            bool(raw.finished),
            latency_of(raw.latency, raw.operations, raw.latency_max),
        )

    def wait(self, timeout: float) -> bool:
        """Wait until it is over. False: it still runs after `timeout` seconds. Raises the first failure."""
        left = _binding.nanoseconds(timeout, "timeout")
        while True:
            slice = min(left, _SLICE)
            if not call_code(lib.fl_load_wait, self._handle, slice, expected=(-lib.FL_ERUNNING,)):
                return True
            left -= slice
            if not left:
                return False

    def stop(self) -> LoadStats:
        """End it, wait for the operations that run, and return what it did. Raises the first failure."""
        lib.fl_load_stop(self._handle)
        while not self.wait(1.0):
            pass
        return self.stats

    def _close(self) -> None:
        lib.fl_load_stop(self._handle)
        while lib.fl_load_wait(self._handle, _SLICE, ffi.NULL) == -lib.FL_ERUNNING:
            pass                                    # a failure was for wait() and stop() to raise

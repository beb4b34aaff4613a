"""Fault injection, for tests of this library and of programs that use it.

    image = pyfleece.open("fleecing.raw", "r+")
    faulty = FaultyImage(image)
    faulty.fail("write", error=errno.ENOSPC, nth=3)         # the third write from now on fails, once
    faulty.hang("read", offset=0, length=4096)              # the next read that touches the first 4096 bytes hangs
    with disk.snapshot(fleecing=faulty) as snapshot:
        ...
        faulty.resume()

Rules are tried in the order in which they were added; the first one that hits an operation acts on it. Nothing here
costs anything when it is not used: a FaultyImage is one more image around the real one.
"""

from __future__ import annotations

import errno as _errno

from pyfleece import _binding
from pyfleece._binding import nanoseconds, unsigned
from pyfleece._native import ffi, lib
from pyfleece.errors import from_code, invalid
from pyfleece.image import Image

_OPS = {
    "read": lib.FL_OP_READ,
    "write": lib.FL_OP_WRITE,
    "zero": lib.FL_OP_ZERO,
    "discard": lib.FL_OP_DISCARD,
    "flush": lib.FL_OP_FLUSH,
    "extents": lib.FL_OP_EXTENTS,
    "any": lib.FL_OP_ANY,
}


class FaultyImage(Image):
    """An image around `image` whose operations fail, are cut short, delayed or hang, where a rule says so.

    Usable wherever an Image is: as source, fleecing image or target. `image` stays open and usable, also around it;
    it is not closed by closing this.

    All methods that add a rule take `ops`, the kinds of operations that count and are hit: "read", "write", "zero",
    "discard", "flush", "extents", or "any" (the default); and

    - `nth`: the first hit is the nth such operation from now on, counted from 1;
    - `times`: how many in a row are hit; None: all from then on;
    - `offset`, `length`: only operations that touch this range count; `length` 0: all;
    - `probability`, `seed`: below 1, each hit happens with this probability, always the same way for the same seed.
    """

    def __init__(self, image: Image) -> None:
        handle = _binding.make("fl_image **", lib.fl_image_free, lib.fl_image_faulty, image._handle)
        super().__init__(handle, f"faulty {image.name}", image.path)
        self._inner = image
        # Not dropped by close(): what the layers above left hanging can be let go after it.
        self._faults = handle

    @property
    def inner(self) -> Image:
        return self._inner

    def fail(
        self,
        *ops: str,
        error: int = _errno.EIO,
        nth: int = 1,
        times: int | None = 1,
        offset: int = 0,
        length: int = 0,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        """The operation fails with the errno `error`, and nothing is done."""
        self._add(lib.FL_FAULT_ERROR, ops, error, 0.0, nth, times, offset, length, probability, seed)

    def short(
        self,
        *ops: str,
        error: int = 0,
        nth: int = 1,
        times: int | None = 1,
        offset: int = 0,
        length: int = 0,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        """A read or write does its first half, then fails with the errno `error`; 0: the rest is done too, in a
        second go.
        """
        self._add(lib.FL_FAULT_SHORT, ops, error, 0.0, nth, times, offset, length, probability, seed)

    def delay(
        self,
        *ops: str,
        seconds: float,
        nth: int = 1,
        times: int | None = 1,
        offset: int = 0,
        length: int = 0,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        """The operation is done after `seconds`."""
        self._add(lib.FL_FAULT_DELAY, ops, 0, seconds, nth, times, offset, length, probability, seed)

    def hang(
        self,
        *ops: str,
        after: bool = False,
        nth: int = 1,
        times: int | None = 1,
        offset: int = 0,
        length: int = 0,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        """The operation waits for `resume` before it is done, or, with `after`, when it is done."""
        action = lib.FL_FAULT_HANG_AFTER if after else lib.FL_FAULT_HANG
        self._add(action, ops, 0, 0.0, nth, times, offset, length, probability, seed)

    def resume(self) -> None:
        """Let go of all operations that hang now."""
        self._check(lib.fl_fault_resume(self._faults))

    def clear(self) -> None:
        """Forget all rules, and let go of what hangs."""
        self._check(lib.fl_fault_clear(self._faults))

    def seen(self, *ops: str) -> int:
        """How many operations of these kinds there were so far, hit or not."""
        return int(lib.fl_fault_seen(self._faults, _bits(ops)))

    @property
    def hanging(self) -> int:
        """How many operations hang now."""
        return int(lib.fl_fault_hanging(self._faults))

    def _add(
        self,
        action: int,
        ops: tuple[str, ...],
        error: int,
        seconds: float,
        nth: int,
        times: int | None,
        offset: int,
        length: int,
        probability: float,
        seed: int,
    ) -> None:
        if nth < 1 or (times is not None and times < 1):
            raise invalid("nth and times count from 1")
        if not 0 < probability <= 1:
            raise invalid(f"probability is {probability}: it is above 0, and 1 at most")
        fault = ffi.new("fl_fault *")
        fault.ops = _bits(ops)
        fault.action = action
        fault.err = unsigned(error, "error", 31)
        fault.nth = nth
        fault.times = times or 0
        fault.offset = unsigned(offset, "offset")
        fault.length = unsigned(length, "length")
        fault.delay_ns = nanoseconds(seconds, "seconds")
        fault.probability = probability
        fault.seed = unsigned(seed, "seed", 64)
        _binding.call(lib.fl_fault_add, self._handle, fault)

    def _check(self, code: int) -> None:
        if code:
            raise from_code(code, ffi.new("fl_error *"))


def _bits(ops: tuple[str, ...]) -> int:
    bits = 0
    for op in ops or ("any",):
        if op not in _OPS:
            raise invalid(f"there is no kind of operation {op!r}; there are {', '.join(_OPS)}")
        bits |= _OPS[op]
    return bits


__all__ = ["FaultyImage"]

"""How Python calls the C library: errors, interrupts, buffers, and what objects that own something have in common.

Every call lets go of the GIL while it runs. A call that waits asks a hook about every 50 ms whether to go on; the
hook runs Python code in the main thread, so signal handlers run there, and what they raise (KeyboardInterrupt, say)
ends the wait and is raised from the call.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pyfleece._native import ffi, lib
from pyfleece.errors import ClosedError, OutOfRangeError, from_code, invalid

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Longer reads and writes are done in pieces of this size, so that signals are seen in between.
PIECE = 8 << 20
# The same for zeroing and discarding, which move less data.
ZERO_PIECE = 64 << 20

_ERROR_TYPE = ffi.typeof("fl_error *")
_new_memory = ffi.new_allocator(should_clear_after_alloc=False)

# ---- interrupts ----

# What a signal handler raised inside the hook; filled and emptied by the main thread only.
_raised: list[BaseException] = []


def _keep(_kind: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> int:
    _raised.append(error)
    return 1


@ffi.def_extern(name="pyfleece_interrupt", error=1, onerror=_keep)  # type: ignore[untyped-decorator, unused-ignore]
def _interrupt() -> int:
    # Pending signal handlers run when the interpreter calls a function, at the latest.
    _nothing()
    return 0


def _nothing() -> None:
    pass


def _install_hook() -> None:
    lib.fl_set_interrupt(lib.pyfleece_interrupt, threading.main_thread().ident)


_install_hook()
os.register_at_fork(after_in_child=_install_hook)


# ---- what a backup copies ----

PieceHook = Callable[[int, int, "memoryview | None"], None]
# By number, and not by address: a thread that hung in the kernel may come back when its backup is long forgotten.
_hooks: dict[int, tuple[PieceHook, list[BaseException]]] = {}
_hook_numbers = itertools.count(1)


def add_piece_hook(hook: PieceHook, failures: list[BaseException]) -> int:
    """Let `hook` see the pieces of the backup that gets the number returned as its `piece_context`. What it raises is
    added to `failures`, and ends the backup.
    """
    number = next(_hook_numbers)
    _hooks[number] = hook, failures
    return number


def drop_piece_hook(number: int) -> None:
    _hooks.pop(number, None)


@ffi.def_extern(name="pyfleece_piece", error=1)  # type: ignore[untyped-decorator, unused-ignore]
def _piece(number: int, offset: int, length: int, data: Any) -> int:
    hook, failures = _hooks.get(number, (None, []))
    if hook is None:
        return 1
    try:
        hook(offset, length, memoryview(ffi.buffer(data, length)) if data else None)
    except BaseException as error:
        failures.append(error)
        return 1
    return 0


# ---- calls ----


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Call a C function whose last parameter is an `fl_error *`; raise what it returns."""
    details = ffi.new(_ERROR_TYPE)
    code = function(*arguments, details)
    if code or _raised:
        fail(code, details)


def call_code(function: Callable[..., int], *arguments: Any, expected: tuple[int, ...]) -> int:
    """As `call`, but return 0 or one of the `expected` codes instead of raising it."""
    details = ffi.new(_ERROR_TYPE)
    code = function(*arguments, details)
    if (code and code not in expected) or _raised:
        fail(code, details)
    return code


def fail(code: int, details: Any, filename: str | None = None) -> None:
    """Raise what was raised during the call, or the exception for `code`; return when there is neither."""
    if _raised and threading.get_ident() == threading.main_thread().ident:
        error = _raised[0]
        _raised.clear()
        raise error
    if code:
        raise from_code(code, details, filename)


def make(
    pointer_type: str, free: Any, function: Callable[..., int], *arguments: Any, filename: str | None = None
) -> Any:
    """Call a C function that makes an object (its last output before the error); return the object, freed when it is
    collected.
    """
    output = ffi.new(pointer_type)
    details = ffi.new(_ERROR_TYPE)
    code = function(*arguments, output, details)
    made = ffi.gc(output[0], free) if not code else None
    if code or _raised:
        fail(code, details, filename)
    return made


# ---- arguments ----


def unsigned(value: int, name: str, bits: int = 63) -> int:
    """`value` as an int in [0, 2**bits), or a ValueError that names it."""
    number = operator.index(value)
    if number < 0:
        raise OutOfRangeError(f"{name} is negative: {number}")
    if number >> bits:
        raise OutOfRangeError(f"{name} is too large: {number}")
    return number


def positive(value: int | None, name: str, bits: int = 63) -> int:
    """As `unsigned`, for an option that may be None (0 in C: the default) but not 0."""
    if value is None:
        return 0
    number = unsigned(value, name, bits)
    if number == 0:
        raise invalid(f"{name} is 0; leave it out for the default")
    return number


def nanoseconds(seconds: float, name: str) -> int:
    """A duration for C. Not negative, not infinite, and below 2**63 ns (292 years)."""
    value = float(seconds)
    if not math.isfinite(value) or value < 0 or value >= 9.2e9:
        raise invalid(f"{name} is not a sensible number of seconds: {seconds!r}")
    return round(value * 1e9)


def check_range(count: int, offset: int, size: int) -> None:
    if offset > size or count > size - offset:
        raise OutOfRangeError(f"bytes {offset} to {offset + count} are beyond the end, {size}")


# ---- data ----


def transfer(function: Callable[..., int], handle: Any, data: Buffer, offset: int, size: int, *, into: bool) -> int:
    """Read into or write from `data`, all of it, without copying it. Returns its length in bytes."""
    # from_buffer holds on to the owner, and refuses what is read-only or not contiguous; C gets no pointer that
    # outlives `buffer`. It lets go here, not when it is collected: the traceback of a failure can become part of a
    # garbage cycle, where CPython before 3.13 crashes on a memoryview that is still in use.
    with ffi.from_buffer(data, require_writable=into) as buffer:
        count = len(buffer)
        offset = unsigned(offset, "offset")
        if count <= PIECE:
            call(function, handle, buffer, count, offset)
            return count
        check_range(count, offset, size)
        for done in range(0, count, PIECE):
            call(function, handle, buffer + done, min(PIECE, count - done), offset + done)
        return count


def read_bytes(function: Callable[..., int], handle: Any, count: int, offset: int, size: int) -> bytes:
    """The `count` bytes at `offset`."""
    count = unsigned(count, "count")
    offset = unsigned(offset, "offset")
    if count > PIECE:
        check_range(count, offset, size)            # before the memory is asked for
    memory = _new_memory("char[]", count)
    for done in range(0, count or 1, PIECE):
        call(function, handle, memory + done, min(PIECE, count - done), offset + done)
    return bytes(ffi.buffer(memory, count))


def in_pieces(function: Callable[..., int], handle: Any, count: int, offset: int, size: int) -> None:
    """Zero or discard a range."""
    count = unsigned(count, "count")
    offset = unsigned(offset, "offset")
    if count <= ZERO_PIECE:
        call(function, handle, count, offset)
        return
    check_range(count, offset, size)
    for done in range(0, count, ZERO_PIECE):
        call(function, handle, min(ZERO_PIECE, count - done), offset + done)


# ---- extents ----


class Extent(NamedTuple):
    """A range of bytes of one kind.

    `kind` is "data" (may hold anything) or "zero" (reads as zeros); for snapshots also "discarded", "lost" or
    "outside" (of the dirty bitmap), which can't be read; for dirty bitmaps "dirty" or "clean".
    """

    offset: int
    length: int
    kind: str


KINDS = {
    lib.FL_DATA: "data",
    lib.FL_ZERO: "zero",
    lib.FL_DISCARDED: "discarded",
    lib.FL_LOST: "lost",
    lib.FL_OUTSIDE: "outside",
}
_BATCH = 256
# For listing millions of extents: no attribute of a C struct is looked up, and no bytecode runs for each of them.
_EXTENT = "QQi4x"
_EXTENT_SIZE = ffi.sizeof("fl_extent")
_new = tuple.__new__
assert struct.calcsize("@" + _EXTENT) == _EXTENT_SIZE


def extents(
    function: Callable[..., int],
    handle: Any,
    offset: int,
    length: int | None,
    size: int,
    *names: Any,
    kinds: dict[int, str] = KINDS,
) -> Iterator[Extent]:
    """Describe a range, in order and without gaps; neighbours differ in kind. The first batch is fetched at once, so
    that errors show in the call that asked.
    """
    offset = unsigned(offset, "offset")
    length = unsigned(length, "length") if length is not None else max(size - offset, 0)
    check_range(length, offset, size)
    end = offset + length
    buffer = ffi.new("fl_extent[]", _BATCH)
    found = ffi.new("size_t *")

    def fetch(at: int) -> list[Extent]:
        call(function, handle, *names, at, end - at, buffer, _BATCH, found)
        flat = struct.unpack("@" + _EXTENT * found[0], ffi.buffer(buffer, found[0] * _EXTENT_SIZE))
        return list(map(_new, itertools.repeat(Extent), zip(flat[::3], flat[1::3], map(kinds.__getitem__, flat[2::3]))))

    def walk(batch: list[Extent]) -> Iterator[Extent]:
        # In a batch neighbours differ; the last one may go on in the next.
        last = batch.pop()
        while True:
            yield from batch
            at = last.offset + last.length
            if at >= end:
                break
            batch = fetch(at)
            if batch[0].kind == last.kind:
                batch[0] = Extent(last.offset, last.length + batch[0].length, last.kind)
            else:
                yield last
            last = batch.pop()
        yield last

    return walk(fetch(offset)) if length else iter(())


# ---- objects that own something ----

Self = TypeVar("Self", bound="Resource")


class Resource:
    """What can be closed: a context manager, `close()` twice does nothing, and what was made on it is closed first."""

    # The C object, freed when nobody refers to it any more: neither this nor a call that runs in another thread. So
    # closing drops it, and with it what it holds on to (files and their locks), however long this object lives on.
    _handle: Any

    def __init__(self) -> None:
        self._closed = False
        self._users: weakref.WeakSet[Resource] = weakref.WeakSet()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close what was made on this, then this. Waits for calls that run; later ones raise `ClosedError`."""
        if self._closed:
            return
        with ExitStack() as stack:      # runs all of them, whichever fails
            stack.callback(self._close)
            for user in self._list_users():
                stack.callback(user.close)
        self._closed = True
        self.__dict__.pop("_handle", None)

    def _close(self) -> None:
        """Close the C object. Not called again after it succeeded."""
        raise NotImplementedError

    if not TYPE_CHECKING:       # or a type checker would take any attribute for granted

        def __getattr__(self, name: str) -> Any:
            """The handle of what is closed."""
            if name == "_handle" and self.__dict__.get("_closed"):
                raise ClosedError(f"the {type(self).__name__} is closed")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _list_users(self) -> list[Resource]:
        while True:
            try:
                return list(self._users)
            except RuntimeError:        # another thread added one meanwhile
                continue

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            close_after(self.close, error)


def close_after(close: Callable[[], None], error: BaseException) -> None:
    """Close something because of `error`, which stays the error that is told: a failure to close is added to it."""
    try:
        close()
    except Exception as second:
        if hasattr(error, "add_note"):
            error.add_note(f"then closing failed: {type(second).__name__}: {second}")
            return
        second.__context__ = None       # it was `error` itself
        last = error
        while last.__context__ is not None:
            last = last.__context__
        last.__context__ = second

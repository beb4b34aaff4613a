"""The exceptions, and the one place that makes them from the C library's codes.

Everything that pyfleece raises on purpose is a `pyfleece.Error`. What has an errno is an `ImageError`, and so an
`OSError` as well, of the builtin class that Python itself would have raised: `except FileNotFoundError` works as for
any file.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING, Any

from pyfleece._native import ffi, lib

if TYPE_CHECKING:
    from pyfleece.group import FreezeReport

_SIDES = {lib.FL_SIDE_SOURCE: "source", lib.FL_SIDE_FLEECING: "fleecing", lib.FL_SIDE_TARGET: "target"}


class Error(Exception):
    """The base of all exceptions of pyfleece.

    `side`: where it failed: "source", "fleecing", "target", or None where that has no meaning. `offset`, `length`:
    the range in bytes that it was about, or None. `cause`: the errno (or the library's own code) of the first failure
    behind it, or None.
    """

    side: str | None = None
    offset: int | None = None
    length: int | None = None
    cause: int | None = None

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ImageError(Error, OSError):
    """Something failed with an errno. `str()` of it is the whole sentence; `errno`, `strerror` and `filename` are as
    in any OSError.
    """

    def __str__(self) -> str:
        return self.strerror or ""


class ArgumentError(ImageError, ValueError):
    """An argument that the library rejects (EINVAL)."""


class ImageLockedError(ImageError):
    """Another program, or another open in this one, has the image in use (EBUSY)."""


class TruncatedError(ImageError):
    """The image ended before its size: somebody truncated it while it was open (EIO)."""


class SnapshotBrokenError(Error):
    """Old data could not be saved, so the snapshot is worth nothing any more. `side`, `offset`, `length` and `cause`
    tell the first failure.
    """


class DiscardedError(Error):
    """This range of the snapshot was discarded: somebody said that it was not needed any more."""


class LostError(Error):
    """This range of the snapshot was lost: its old data could not be saved (policy "lose-range")."""


class OutsideBitmapError(Error):
    """This range is not in the dirty bitmap that the snapshot was taken with."""


class InconsistentBitmapError(Error):
    """The dirty bitmap may miss writes, so it is no base for an incremental: only a full backup is a backup."""


class OutOfRangeError(Error, ValueError):
    """The range is negative, or ends beyond the end of the image."""


class ClosedError(Error, ValueError):
    """The object is closed (a ValueError too, as closed files raise)."""


class ForkedError(Error, RuntimeError):
    """The object belongs to the parent process: it can't be used after a fork()."""


class FormatError(Error):
    """The format of an image is unknown, not supported, or damaged."""


class FileSystemError(Error):
    """A file system or partition table inside of an image is damaged, or of a kind that can't be read."""


class CancelledError(Error):
    """The job was cancelled."""


class FreezeError(Error):
    """The freeze hook failed or missed its deadline, so no snapshot was taken. `report` tells how each hook ended."""

    report: FreezeReport | None = None


def _with_builtin(base: type[OSError]) -> type[ImageError]:
    """ImageError that is a FileNotFoundError, ... too. In the module's namespace, so that it can be pickled."""
    name = "Image" + base.__name__
    documented = f"An ImageError that is a {base.__name__} too."
    made = type(name, (ImageError, base), {"__doc__": documented, "__module__": __name__})
    globals()[name] = made
    return made


_OWN: dict[int, type[Error]] = {
    lib.FL_EBROKEN: SnapshotBrokenError,
    lib.FL_EDISCARDED: DiscardedError,
    lib.FL_ELOST: LostError,
    lib.FL_EOUTSIDE: OutsideBitmapError,
    lib.FL_EINCONSISTENT: InconsistentBitmapError,
    lib.FL_ERANGE: OutOfRangeError,
    lib.FL_ECLOSED: ClosedError,
    lib.FL_EFORKED: ForkedError,
    lib.FL_EFORMAT: FormatError,
    lib.FL_ECANCELLED: CancelledError,
}
_OWN_WITH_ERRNO: dict[int, tuple[type[ImageError], int]] = {
    lib.FL_ELOCKED: (ImageLockedError, _errno.EBUSY),
    lib.FL_ETRUNCATED: (TruncatedError, _errno.EIO),
}
_BUILTIN = {base: _with_builtin(base) for base in {type(OSError(n, "")) for n in _errno.errorcode} - {OSError}}


def _class_for(errno: int) -> type[ImageError]:
    if errno == _errno.EINVAL:
        return ArgumentError
    return _BUILTIN.get(type(OSError(errno, "")), ImageError)


def _located(error: Error, side: str | None, offset: int | None, length: int | None, cause: int | None) -> Error:
    error.side, error.offset, error.length, error.cause = side, offset, length, cause
    return error


def from_code(code: int, details: Any, filename: str | bytes | None = None) -> Error:
    """The exception for what a C function returned and the `fl_error` that it filled (or left empty)."""
    code = abs(code)
    text = ffi.string(details.text).decode("utf-8", "replace")
    cause = details.cause if details.code else 0
    named = cause or code           # where the cause has an errno, its name ends the sentence
    if not text:
        text = ffi.string(lib.fl_strerror(code)).decode() if code >= lib.FL_EBROKEN else os.strerror(code)
    elif named < lib.FL_EBROKEN:
        text = f"{text}: {os.strerror(named)}"
    if code in _OWN:
        error: Error = _OWN[code](text)
    elif code in _OWN_WITH_ERRNO:
        kind, errno = _OWN_WITH_ERRNO[code]
        error = kind(errno, text, filename)
    elif code < lib.FL_EBROKEN:
        error = _class_for(code)(code, text, filename)
    else:
        error = Error(text)
    has_range = bool(details.code and details.length)
    return _located(
        error,
        _SIDES.get(details.side) if details.code else None,
        details.offset if has_range else None,
        details.length if has_range else None,
        cause if cause and (cause != code or cause < lib.FL_EBROKEN) else None,
    )


def from_os_error(
    error: OSError, text: str, *, side: str | None = None, offset: int | None = None, length: int | None = None
) -> ImageError:
    """The same failure as one of ours: for what Python's own calls raise."""
    errno = error.errno or _errno.EIO
    made = _class_for(errno)(errno, f"{text}: {error.strerror or error}", error.filename)
    _located(made, side, offset, length, errno)
    return made


def invalid(text: str) -> ArgumentError:
    """An argument that is rejected before C sees it."""
    return ArgumentError(_errno.EINVAL, text)


def describe(error: BaseException) -> str:
    """A failure in one line for people: which side, what, and where."""
    text = str(error)
    if isinstance(error, Error):
        if error.side is not None:
            text = f"{error.side}: {text}"
        if error.offset is not None and str(error.offset) not in text:
            text += f" (at {error.offset}, {error.length} bytes)"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__

"""Targets: where a backup goes.

A new file is written under a temporary name, `<target>.partial`, and gets its own name only when all of it is on
stable storage: a half-written backup is never taken for a good one, not even after `kill -9`.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import threading
import weakref
from typing import Any, Union

from pyfleece import image as _image
from pyfleece.errors import CancelledError, Error, ImageLockedError, from_os_error, invalid
from pyfleece.image import Image, Path

# A path, an open Image, or a binary file object: anything with a write() that takes bytes.
TargetLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", Image, Any]

_ZEROS = memoryview(bytes(1 << 20))
_REMOVAL_WAIT = 0.2         # seconds for a name to be removed; storage that hangs is not waited for


class Target:
    """What a backup needs of its target. `image` is what C copies to; None: the data comes in order, through
    `write`.
    """

    image: Image | None = None
    is_zero = False

    def write(self, offset: int, length: int, data: memoryview | None) -> None:
        """The next `length` bytes; `data` None: zeros."""
        raise NotImplementedError

    def seal(self) -> None:
        """All was written through `write`: make it durable. (C flushes an image.)"""

    def publish(self) -> None:
        """Make it visible under its own name."""

    def withdraw(self) -> None:
        """Take back the name that was just published: the group that it is part of failed."""

    def abandon(self) -> None:
        """Leave no name behind, unless it was published. By any thread, at any time, more than once; never waits for
        the target.
        """

    def release(self) -> None:
        """Close what is ours: nobody uses the target any more."""


class ImageTarget(Target):
    """An image that exists: written in place."""

    def __init__(self, image: Image, owned: bool, is_zero: bool) -> None:
        self.image: Image = image
        self._owned = owned
        self.is_zero = is_zero

    def release(self) -> None:
        if self._owned:
            self.image.close()


class NewFile(Target):
    """A raw file that gets its name when it is complete."""

    is_zero = True

    def __init__(self, path: Path, size: int) -> None:
        self._path = os.fsencode(path)
        self._partial = self._path + b".partial"
        self._lock = threading.Lock()           # protects the partial file's name: published, removed, or neither yet
        self._replaced = _lock_existing(self._path)
        try:
            self.image: Image = _create_partial(self._partial, size)
        except BaseException:
            self._close_replaced()
            raise
        # Also at the interpreter's exit, when a background backup was forgotten.
        self._removal = weakref.finalize(self, _remove, self._partial, os.getpid())

    def publish(self) -> None:
        with self._lock:
            if not self._removal.alive:
                raise CancelledError("the backup was cancelled")
            try:
                os.replace(self._partial, self._path)
                self._removal.detach()
                try:
                    _sync_directory(os.path.dirname(self._path) or b".")
                except OSError:
                    self.withdraw()             # it failed, so nothing is there that could be taken for it
                    raise
            except OSError as error:
                what = f"cannot give the backup its name, {os.fsdecode(self._path)}"
                raise from_os_error(error, what, side="target") from error

    def withdraw(self) -> None:
        _remove(self._path, os.getpid())

    def abandon(self) -> None:
        with self._lock:
            removal = self._removal.detach()
        if removal is not None:
            # In a thread of its own: on storage that hangs, so does this.
            remover = threading.Thread(target=removal[1], args=removal[2], name="pyfleece-remove", daemon=True)
            remover.start()
            remover.join(_REMOVAL_WAIT)

    def release(self) -> None:
        self.image.close()
        self._close_replaced()

    def _close_replaced(self) -> None:
        if self._replaced is not None:
            self._replaced.close()


class Stream(Target):
    """Anything with a write(): a file object, a pipe. Gets all bytes, in order; zeros are written as zeros."""

    def __init__(self, file: Any, owned: bool) -> None:
        self._file = file
        self._owned = owned
        self._name = str(getattr(file, "name", None) or f"a {type(file).__name__}")
        self._abandoned = False

    def write(self, offset: int, length: int, data: memoryview | None) -> None:
        try:
            if data is not None:
                self._write(data)
                return
            left = length
            while left:
                with _ZEROS[:left] as block:
                    self._write(block)
                    left -= len(block)
        except OSError as error:
            what = f"cannot write to {self._name}"
            raise from_os_error(error, what, side="target", offset=offset, length=length) from error

    def seal(self) -> None:
        try:
            if hasattr(self._file, "flush"):
                self._file.flush()
        except OSError as error:
            raise from_os_error(error, f"cannot write to {self._name}", side="target") from error

    def release(self) -> None:
        if self._owned:
            try:
                self._file.close()
            except OSError:
                pass                            # seal() flushed it, or it is not wanted any more

    def _write(self, data: memoryview) -> None:
        """All of it: a raw file or a pipe may take a part at a time, or nothing when it does not block."""
        done = 0
        while done < len(data):
            with data[done:] as rest:
                try:
                    taken = self._file.write(rest)
                except BlockingIOError as error:
                    taken = error.characters_written
                    if taken == 0:
                        self._wait_for_room()
                else:
                    if taken is None and isinstance(self._file, io.RawIOBase):
                        taken = 0
                        self._wait_for_room()
            if taken is None:                   # a simple write() that takes all and tells nothing
                return
            if not 0 <= taken <= len(data) - done:
                raise invalid(f"write() of {self._name} returned {taken!r} for {len(data) - done} bytes")
            done += taken

    def abandon(self) -> None:
        self._abandoned = True

    def _wait_for_room(self) -> None:
        if self._abandoned:
            raise CancelledError("the backup was cancelled")
        select.select([], [self._file], [], 0.05)


def open_target(target: TargetLike, size: int, format: str | None, target_is_zero: bool, inputs: list[Image]) -> Target:
    """The target for a snapshot of `size` bytes. `inputs`: images whose files must not be replaced."""
    if isinstance(target, Image):
        return ImageTarget(target, owned=False, is_zero=target_is_zero)
    if isinstance(target, (str, bytes, os.PathLike)):
        try:
            return _open_path(target, size, format, target_is_zero, inputs)
        except Error as error:
            error.side = "target"
            raise
    if callable(getattr(target, "write", None)):
        return Stream(target, owned=False)
    raise TypeError(f"a backup's target is a path, an Image or a writable binary file, not {type(target).__name__}")


def _open_path(path: Path, size: int, format: str | None, target_is_zero: bool, inputs: list[Image]) -> Target:
    name = os.fsdecode(path)
    try:
        existing: os.stat_result | None = os.stat(path)
    except FileNotFoundError:
        existing = None
    except OSError as error:
        raise from_os_error(error, f"cannot use the target {name}") from error
    mode = existing.st_mode if existing else 0
    if existing is not None and any(_is_same(existing, image) for image in inputs):
        raise invalid(f"the target {name} is the source or the fleecing image of this backup")
    if stat.S_ISBLK(mode):
        return ImageTarget(_image.open(path, "r+", format=format), owned=True, is_zero=target_is_zero)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            return Stream(open(path, "wb", buffering=0), owned=True)
        except OSError as error:
            raise from_os_error(error, f"cannot open {name}") from error
    if existing is not None and not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise from_os_error(OSError(code, os.strerror(code), name), f"{name} can't be the target of a backup")
    _image.check_new_format(path, format)
    return NewFile(path, size)


def _is_same(existing: os.stat_result, image: Image) -> bool:
    try:
        return image.path is not None and os.path.samestat(existing, os.stat(image.path))
    except OSError:
        return False


def _lock_existing(path: bytes) -> Image | None:
    """Hold the file that the backup will replace: nobody may have it in use, another backup, or a program that runs
    from it.
    """
    try:
        return _image.open(path, "r+", format="raw")
    except ImageLockedError:
        raise
    except Error:
        return None                             # missing, or such that it can only be replaced


def _create_partial(path: bytes, size: int) -> Image:
    try:
        return _image.create(path, size, format="raw")
    except FileExistsError:
        # What a backup left that was killed, or another one that runs: that one has a lock.
        _image.open(path, "r+", format="raw").close()
        os.unlink(path)
        return _image.create(path, size, format="raw")


def _remove(path: bytes, process: int) -> None:
    if os.getpid() == process:
        try:
            os.unlink(path)
        except OSError:
            pass


def _sync_directory(path: bytes) -> None:
    """A rename is durable when its directory is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

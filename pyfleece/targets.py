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
from dataclasses import dataclass
from typing import Any, Union

from pyfleece import _binding
from pyfleece import image as _image
from pyfleece.errors import CancelledError, Error, ImageLockedError, from_os_error, invalid
from pyfleece.image import BackingRoot, Image, Path

# A path, an open Image, or a binary file object: anything with a write() that takes bytes.
TargetLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", Image, Any]

_ZEROS = memoryview(bytes(1 << 20))
_REMOVAL_WAIT = 0.2         # seconds for a name to be removed; storage that hangs is not waited for


@dataclass(frozen=True)
class TargetOptions:
    """What a new target shall be: see `backup`."""

    format: str | None = None
    target_is_zero: bool = False
    compress: bool | str = False
    cluster_size: int | None = None
    backing: Path | None = None
    backing_format: str | None = None
    backing_root: BackingRoot = None

    def __post_init__(self) -> None:
        if self.compress not in (False, True, "zlib", "zstd"):
            raise invalid(f"compress is {self.compress!r}; it can be True, False, 'zlib' or 'zstd'")
        if (self.backing is None) != (self.backing_format is None):
            raise invalid("a target's backing file and its format are given together: nothing is guessed")

    def refuse_for(self, what: str) -> None:
        """The target is not a new image: there is nothing to choose."""
        if self.cluster_size is not None or self.backing is not None:
            raise invalid(f"target_cluster_size and backing are for new images; the target is {what}")

    def refuse_compression_for(self, what: str) -> None:
        if self.compress:
            raise invalid(f"compress needs a qcow2 image to write to; the target is {what}")


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
    """An image that gets its name when it is complete. With a backing file, zeros are written: they hide what it has.
    """

    def __init__(self, path: Path, size: int, format: str, options: TargetOptions) -> None:
        self.is_zero = options.backing is None
        self._path = os.fsencode(path)
        self._partial = self._path + b".partial"
        self._lock = threading.Lock()           # protects the partial file's name: published, removed, or neither yet
        self._replaced = _lock_existing(self._path)
        try:
            self.image: Image = _create_partial(self._partial, size, format, options)
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


def open_target(target: TargetLike, size: int, options: TargetOptions, inputs: list[Image]) -> Target:
    """The target for a snapshot of `size` bytes. `inputs`: images whose files must not be replaced."""
    if isinstance(target, Image):
        options.refuse_for("an open image")
        _check_compression(target, options)
        return ImageTarget(target, owned=False, is_zero=options.target_is_zero)
    if isinstance(target, (str, bytes, os.PathLike)):
        try:
            return _open_path(target, size, options, inputs)
        except Error as error:
            error.side = "target"
            raise
    if callable(getattr(target, "write", None)):
        options.refuse_for("a file object")
        options.refuse_compression_for("a file object")
        return Stream(target, owned=False)
    raise TypeError(f"a backup's target is a path, an Image or a writable binary file, not {type(target).__name__}")


def _open_path(path: Path, size: int, options: TargetOptions, inputs: list[Image]) -> Target:
    name = os.fsdecode(path)
    try:
        existing: os.stat_result | None = os.stat(path)
    except FileNotFoundError:
        existing = None
    except OSError as error:
        raise from_os_error(error, f"cannot use the target {name}") from error
    mode = existing.st_mode if existing else 0
    if existing is not None and any(_is_same(existing, image.path) for image in inputs):
        raise invalid(f"the target {name} is the source or the fleecing image of this backup")
    if stat.S_ISBLK(mode):
        options.refuse_for("a block device")
        image = _image.open(path, "r+", format=options.format, backing_root=options.backing_root)
        device = ImageTarget(image, owned=True, is_zero=options.target_is_zero)
        try:
            _check_compression(image, options)
        except BaseException as error:
            _binding.close_after(device.release, error)
            raise
        return device
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        options.refuse_for("a pipe or a device")
        options.refuse_compression_for("a pipe or a device")
        try:
            return Stream(open(path, "wb", buffering=0), owned=True)
        except OSError as error:
            raise from_os_error(error, f"cannot open {name}") from error
    if existing is not None and not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise from_os_error(OSError(code, os.strerror(code), name), f"{name} can't be the target of a backup")
    format = _image.new_format(path, options.format)
    if format == "raw":
        options.refuse_for("raw")
        options.refuse_compression_for("raw")
    if existing is not None and options.backing is not None:
        beside = os.path.join(os.path.dirname(os.fsencode(path)), os.fsencode(options.backing))
        if _is_same(existing, beside):
            raise invalid(f"the target {name} is its own backing file, which the backup would replace")
    return NewFile(path, size, format, options)


def _check_compression(image: Image, options: TargetOptions) -> None:
    """Compress with what the image has chosen."""
    if not options.compress:
        return
    details = image.info.qcow2
    if details is None:
        options.refuse_compression_for(f"{image.info.format}: {image.name}")
    elif isinstance(options.compress, str) and options.compress != details.compression:
        raise invalid(f"compress is {options.compress!r}, and the target {image.name} has {details.compression}")


def _is_same(existing: os.stat_result, path: Path | None) -> bool:
    try:
        return path is not None and os.path.samestat(existing, os.stat(path))
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


def _create_partial(path: bytes, size: int, format: str, options: TargetOptions) -> Image:
    def create() -> Image:
        return _image.create(
            path,
            size,
            format=format,
            cluster_size=options.cluster_size,
            backing=options.backing,
            backing_format=options.backing_format,
            compression=options.compress if isinstance(options.compress, str) else None,
            backing_root=options.backing_root,
        )

    try:
        return create()
    except FileExistsError:
        # What a backup left that was killed, or another one that runs: that one has a lock.
        _image.open(path, "r+", format="raw").close()
        os.unlink(path)
        return create()


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

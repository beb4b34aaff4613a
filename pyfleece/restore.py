"""Restore: a disk image, or a point in time of a backup, back to a file or a block device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from pyfleece import image as _image
from pyfleece.backup import ProgressLike, backup
from pyfleece.digests import in_parallel
from pyfleece.disk import Disk
from pyfleece.errors import Error, ImageLockedError, from_os_error, invalid
from pyfleece.image import Image, Path

_STEP = 1 << 20                         # bytes that are compared at a time
_BLOCK = 4096                           # what is written of them, when it differs
_LONG = 1 << 30                         # of zeros, at a time


class RestoreError(Error):
    """The target can't be written to, or is not what was restored."""


@dataclass(frozen=True)
class Restored:
    """What a restore did. Sizes are bytes."""

    size: int
    written: int            # data and zeros that were written; what was a hole already is not counted
    verified: bool


def restore(
    source: Image,
    target: Path,
    *,
    format: str | None = None,
    delta: bool = False,
    force: bool = False,
    verify: bool = True,
    workers: int | None = None,
    progress: ProgressLike = None,
) -> Restored:
    """Write the disk in `source` to `target`, a new file or a block device, sparsely and in parallel, and read it back.

    A new file gets its name when it is complete. `format`: of the target, where its suffix does not tell.
    `delta`: the target has an older or newer state: write only what differs, in place. After an interrupted delta
    restore the target is a mixture; restore again.
    `force`: replace a file that exists, write to a block device that is larger.
    `verify`: compare the target with the source afterwards; `RestoreError` names the first difference.

    Raises `ImageLockedError` for a target that is in use (also a block device that is mounted), `FileExistsError`,
    `RestoreError` for one of the wrong size, `ImageError`.
    """
    device = _check_target(source, target, format, delta, force)
    if delta:
        with _image.open(target, "r+", format=format) as image:
            written = _write_differences(source, image, workers)
            image.flush()
    else:
        with Disk(source, bitmap_file=False) as disk, disk.snapshot("memory") as snapshot:
            result = backup(snapshot, target, format=format, workers=workers, progress=progress)
            written = result.data_bytes + (result.zero_bytes if device else 0)
    if verify:
        with _image.open(target, format=format) as image:
            _compare(source, image, workers)
    return Restored(source.size, written, verify)


def _check_target(source: Image, target: Path, format: str | None, delta: bool, force: bool) -> bool:
    """Refuse what must not be written to, before anything is. Is it a block device?"""
    name = os.fsdecode(target)
    try:
        status = os.stat(target)
    except FileNotFoundError as error:
        if delta:
            raise from_os_error(error, f"there is nothing at {name} that a delta could be written to") from error
        return False
    except OSError as error:
        raise from_os_error(error, f"cannot restore to {name}") from error
    if source.path is not None and os.path.samestat(status, os.stat(source.path)):
        raise invalid(f"{name} is what is restored from")
    device = stat.S_ISBLK(status.st_mode)
    if device:
        _refuse_mounted(target, name)
    elif not delta and not force:
        raise from_os_error(FileExistsError(errno.EEXIST, "it exists", name), f"cannot restore to {name}")
    if device or delta:
        with _image.open(target, format=format) as image:       # its lock: nobody else writes it
            size = image.size
        if size < source.size or (size > source.size and not (device and force)):
            raise RestoreError(f"{name} has {size} bytes, and the disk {source.size}")
    return device


def _refuse_mounted(target: Path, name: str) -> None:
    try:
        os.close(os.open(target, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            text = f"{name} is in use: it is mounted, or part of something that is"
            raise ImageLockedError(errno.EBUSY, text, name) from error
        raise from_os_error(error, f"cannot write to {name}") from error


# ---- comparing ----


def _steps(source: Image) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is it data?)"""
    for extent in source.extents():
        step = _STEP if extent.kind == "data" else _LONG
        end = extent.offset + extent.length
        for offset in range(extent.offset, end, step):
            yield offset, min(step, end - offset), extent.kind == "data"


def _write_differences(source: Image, target: Image, workers: int | None) -> int:
    """How many bytes were written."""

    def step(work: tuple[int, int, bool]) -> int:
        offset, length, is_data = work
        if not is_data:
            return sum(_zero(target, at, count) for at, count in _data_of(target, offset, length))
        data, old = source.pread(length, offset), target.pread(length, offset)
        if data == old:
            return 0
        return sum(
            target.pwrite(data[begin:end], offset + begin) for begin, end in _different_blocks(data, old)
        )

    return sum(in_parallel(step, _steps(source), workers))


def _data_of(image: Image, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The steps of a range that do not read as zeros."""
    for extent in image.extents(offset, length):
        end = extent.offset + extent.length
        for at in range(extent.offset, end if extent.kind == "data" else extent.offset, _STEP):
            count = min(_STEP, end - at)
            if image.pread(count, at).count(0) != count:
                yield at, count


def _zero(target: Image, offset: int, length: int) -> int:
    target.zero(length, offset)
    return length


def _different_blocks(data: bytes, old: bytes) -> Iterator[tuple[int, int]]:
    """Runs of blocks that differ."""
    begin = None
    for at in range(0, len(data), _BLOCK):
        differs = data[at : at + _BLOCK] != old[at : at + _BLOCK]
        if differs and begin is None:
            begin = at
        elif not differs and begin is not None:
            yield begin, at
            begin = None
    if begin is not None:
        yield begin, len(data)


def _compare(source: Image, target: Image, workers: int | None) -> None:
    def step(work: tuple[int, int, bool]) -> int | None:
        offset, length, is_data = work
        if not is_data:
            return next((at for at, _ in _data_of(target, offset, length)), None)
        return None if source.pread(length, offset) == target.pread(length, offset) else offset

    wrong = next((offset for offset in in_parallel(step, _steps(source), workers) if offset is not None), None)
    if wrong is not None:
        error = RestoreError(f"{target.name} is not what was written to it, at or soon after {wrong}")
        error.side, error.offset = "target", wrong
        raise error



"""Where saved data goes: turning `fleecing=` into an open image.

By default it is a file without a name, so nothing is left behind even after `kill -9`, in a directory that is on a
disk: a tmpfs would take the memory that the stage was meant to bound.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Optional, Union

from pyfleece import image as _image
from pyfleece.errors import Error, FormatError, ImageError, invalid
from pyfleece.image import Image, Path

# None: a nameless file in a directory that is chosen; a path: a directory for a nameless file, or an image; "memory":
# no image.
Fleecing = Optional[Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]", Image]]

MEMORY = "memory"
_FALLBACK = "/var/tmp"
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
# A nameless file is sparse, so its size costs nothing: twice the disk, for no more than the disk is ever saved at
# once and half of the file is left to find long runs in. A file system that can't have such large files gets less.
_NAMELESS_LEAST = 64 << 20
_NAMELESS_MOST = 1 << 43


def open_fleecing(fleecing: Fleecing, directory: Path | None, source: Image) -> tuple[Image | None, bool]:
    """The fleecing image for a snapshot of `source`, and whether it is ours to close. None: there is no image, only
    the stage.
    """
    try:
        if isinstance(fleecing, Image):
            return _usable(fleecing), False
        if fleecing is not None and directory is not None:
            raise invalid("fleecing_dir says where a nameless file goes; with fleecing= there is none")
        if fleecing == MEMORY:
            return None, False
        if fleecing is not None and os.path.isdir(fleecing):
            return _nameless(fleecing, source), True
        if fleecing is not None:
            return _existing(fleecing), True
        return _nameless(directory, source) if directory is not None else _default(source), True
    except Error as error:
        error.side = "fleecing"
        raise


def _usable(image: Image) -> Image:
    info = image.info
    if not info.writable:
        raise invalid(f"the fleecing image {image.name} is open read-only")
    if info.size == 0:
        raise invalid(f"the fleecing image {image.name} is empty; its size is the cap: enlarge it (truncate -s)")
    return image


def _existing(path: Path) -> Image:
    try:
        image = _image.open(path, "r+")
    except FormatError:
        if os.path.splitext(os.fsdecode(path))[1]:
            raise
        image = _image.open(path, "r+", format="raw")       # scratch space may well have a bare name
    try:
        return _usable(image)
    except BaseException:
        image.close()
        raise


def _nameless(directory: Path, source: Image) -> Image:
    size = min(max(_NAMELESS_LEAST, 2 * source.size), _NAMELESS_MOST)
    while True:
        try:
            return _image.create_nameless(directory, size)
        except ImageError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL) or size < _NAMELESS_LEAST:
                raise
            size //= 2


def _default(source: Image) -> Image:
    """A nameless file beside the source, else in /var/tmp."""
    refused: list[str] = []
    for directory in _candidates(source):
        kind = _file_system(directory)
        if kind in _IN_MEMORY:
            refused.append(f"{directory} is a {kind}")
            continue
        try:
            return _nameless(directory, source)
        except ImageError as error:         # read-only, no room for a file, no O_TMPFILE
            refused.append(str(error))
    raise invalid(
        'no directory for a fleecing image; pass fleecing_dir=, fleecing=PATH or fleecing="memory" '
        f"({'; '.join(refused)})"
    )


def _candidates(source: Image) -> list[str]:
    candidates = [_FALLBACK]
    if source.path is not None:
        real = os.path.realpath(os.fsdecode(source.path))
        try:
            if stat.S_ISREG(os.stat(real).st_mode):
                candidates.insert(0, os.path.dirname(real))
        except OSError:                     # it was renamed or removed while open
            pass
    return candidates


def _file_system(directory: str) -> str | None:
    """The type of the file system that `directory` is on; None where /proc does not tell."""
    try:
        device = os.stat(directory).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                if before.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                    return after.split()[0]
    except (OSError, IndexError):
        pass
    return None

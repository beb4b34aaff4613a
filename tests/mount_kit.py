"""What the tests of the mount share: disks that are mounted, and what os does not offer for files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, content, missing

import pyfleece
from pyfleece import Disk, Error, Image, Mount, MountSnapshot
from pyfleece.testing import FaultyImage

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
CLUSTER = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def punch(fd: int, offset: int, length: int) -> None:
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def need_mount() -> None:
    """Skip, or fail under CI, where nothing can be mounted."""
    if not os.path.exists("/dev/fuse"):
        missing("/dev/fuse")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        missing("root, or fusermount3,")


@dataclass
class Served:
    """Disks that are mounted, and their content at the start."""

    directory: Path             # of the images; the mount point is `path`
    path: Path
    mount: Mount
    disks: dict[str, Disk]
    sources: dict[str, FaultyImage]
    images: dict[str, Image]
    content: dict[str, bytes]
    errors: list[tuple[str, Error]]

    @property
    def file(self) -> Path:
        """The first disk's."""
        return self.path / next(iter(self.disks))

    @property
    def disk(self) -> Disk:
        return next(iter(self.disks.values()))

    @property
    def source(self) -> FaultyImage:
        return next(iter(self.sources.values()))

    @property
    def data(self) -> bytes:
        return next(iter(self.content.values()))

    def cut(self, name: str = "now") -> MountSnapshot:
        """By mkdir."""
        (self.path / ".snap" / name).mkdir()
        return self.mount.snapshots[name]

    def snap(self, name: str = "now", file: str = "vm.raw") -> Path:
        return self.path / ".snap" / name / file


@contextlib.contextmanager
def serve(
    directory: Path, *names: str, size: int = 2 * MIB + 513, granularity: int = 65536, **options: Any
) -> Iterator[Served]:
    """Mount disks of random content, each on a FaultyImage. Each disk has a dirty bitmap "b"."""
    need_mount()
    path = directory / "mount"
    path.mkdir(exist_ok=True)
    disks: dict[str, Disk] = {}
    sources: dict[str, FaultyImage] = {}
    images: dict[str, Image] = {}
    contents: dict[str, bytes] = {}
    errors: list[tuple[str, Error]] = []
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names or ("vm.raw",)):
            contents[name] = content(size, number + 1)
            images[name] = stack.enter_context(pyfleece.create(directory / f"{number}.raw", size))
            for offset in range(0, size, CLUSTER):
                block = contents[name][offset : offset + CLUSTER]
                if any(block):
                    images[name].pwrite(block, offset)
            sources[name] = stack.enter_context(FaultyImage(images[name]))
            disks[name] = stack.enter_context(Disk(sources[name]))
            disks[name].bitmaps.add("b", granularity=granularity)
        options.setdefault("on_error", lambda where, error: errors.append((where, error)))
        try:
            mount = stack.enter_context(pyfleece.mount(disks, path, **options))
        except OSError as error:
            if error.errno == errno.ENOSYS:
                missing("pyfleece built with libfuse3")
            raise
        yield Served(directory, path, mount, disks, sources, images, contents, errors)
    path.rmdir()


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def attribute(path: Path, name: str) -> str:
    """user.pyfleece.NAME; "" where there is none."""
    try:
        return os.getxattr(path, f"user.pyfleece.{name}").decode()
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return ""


def holes(fd: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of each hole, as lseek tells them."""
    found = []
    at = 0
    while at < size:
        start = os.lseek(fd, at, os.SEEK_HOLE)
        if start >= size:
            break
        try:
            at = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            at = size
        found.append((start, at))
    return found


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """The errno with which a call has to fail."""
    with pytest.raises(OSError) as raised:
        yield
    assert raised.value.errno == number, raised.value

"""What a file system offers to those who list and copy files, and the window of an image that it reads from."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pyfleece.errors import FileSystemError, ImageError, from_os_error

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
# A symbolic link is no longer than this, on any file system (Linux: PATH_MAX).
MAX_LINK = 4096
# What no real file or directory reaches, and a hostile one is stopped at.
MAX_PIECES = 1 << 22
MAX_DEPTH = 2048
MAX_DIRECTORY = 4 << 30


class Source(Protocol):
    """What is read: an Image or a Snapshot."""

    @property
    def size(self) -> int: ...

    def pread(self, count: int, offset: int) -> bytes: ...


class Window:
    """A part of a source: a volume. What lies outside of it can't be read."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self._source = source
        self._offset = offset
        self.size = size

    def pread(self, count: int, offset: int) -> bytes:
        """All of it, or `FileSystemError`: the file system points to where the volume does not reach."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise FileSystemError(
                f"the file system is damaged: it refers to {count} bytes at {offset}, beyond its end at {self.size}"
            )
        return self._source.pread(count, self._offset + offset) if count else b""


@dataclass(frozen=True)
class Inode:
    """A file, directory, link or whatever. Times are nanoseconds since 1970, UTC; None: not recorded."""

    number: int             # names it within its file system
    mode: int               # type and permissions, as in st_mode
    size: int
    links: int
    uid: int | None         # None: the file system has no owners
    gid: int | None
    mtime_ns: int | None
    atime_ns: int | None = None
    ctime_ns: int | None = None
    birth_ns: int | None = None
    device: tuple[int, int] | None = None       # major, minor

    @property
    def kind(self) -> str:
        return KINDS.get(stat.S_IFMT(self.mode), "unknown")

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


class Run(NamedTuple):
    """A part of a file, in bytes: where it is on the volume; `place` UNWRITTEN: space that holds nothing yet. What no
    run covers reads as zeros.
    """

    offset: int
    length: int
    place: int


UNWRITTEN = -1


class FileSystem(ABC):
    """A file system that is read. Not for several threads at once. Inodes are named by numbers.

    All methods raise `FileSystemError` when the file system is damaged, or uses what can't be read.
    """

    kind: str                           # "ext4", "xfs", "ntfs", ...
    root: int
    label: str | None = None
    uuid: str | None = None
    warning: str | None = None          # why what is read may be older than the cut

    @abstractmethod
    def inode(self, number: int) -> Inode: ...

    @abstractmethod
    def names(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        """What is in a directory: names and inode numbers, in no order, without "." and ".."."""

    @abstractmethod
    def link(self, inode: Inode) -> bytes:
        """Where a symbolic link leads."""

    @abstractmethod
    def data(self, file: Inode) -> Iterator[tuple[int, int]]:
        """Where the file has data: (offset, length), in order, within its size. The rest of it is zeros."""

    @abstractmethod
    def pread(self, file: Inode, count: int, offset: int) -> bytes:
        """All of it: the caller stays within the size."""

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        """The first entry of that name."""
        return next((number for found, number in self.names(directory) if found == name), None)

    def close(self) -> None:
        """Free what it holds, but not the source."""
        return


class MappedFileSystem(FileSystem):
    """A file system of which we know where the data of its files is."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._last: tuple[int, list[Run], bytes | None] | None = None

    @abstractmethod
    def runs(self, file: Inode) -> Iterator[Run]:
        """Where the data is, in the order of offsets, without overlaps; it may reach beyond the size."""

    def inline(self, file: Inode) -> bytes | None:
        """The data of a file that has no runs because it is small enough for its inode."""
        return None

    def data(self, file: Inode) -> Iterator[tuple[int, int]]:
        runs, inline = self._mapping(file)
        if inline is not None:
            if inline:
                yield 0, len(inline)
            return
        for run in runs:
            if run.offset >= file.size:
                return
            yield run.offset, min(run.length, file.size - run.offset)

    def pread(self, file: Inode, count: int, offset: int) -> bytes:
        runs, inline = self._mapping(file)
        if inline is not None:
            return inline[offset : offset + count].ljust(count, b"\0")
        return gather(self.read_place, runs, count, offset)

    def read_place(self, count: int, place: int) -> bytes:
        """Bytes of the volume."""
        return self.window.pread(count, place)

    def _mapping(self, file: Inode) -> tuple[list[Run], bytes | None]:
        """The runs of the last file that was asked for are kept: it is mostly read on."""
        if self._last is None or self._last[0] != file.number:
            inline = self.inline(file)
            runs = [] if inline is not None else list(self.checked(self.runs(file)))
            self._last = file.number, runs, inline
        return self._last[1], self._last[2]

    def checked(self, runs: Iterator[Run]) -> Iterator[Run]:
        """The runs, without what is unwritten, adjacent ones joined, as long as they are in order and on the volume.

        That they are in order bounds them: a part of the map that leads back to itself comes out of order.
        """
        last, end, pieces = None, 0, 0
        for run in runs:
            if run.offset < end or run.length <= 0:
                raise damaged("the map of a file is not in order")
            end = run.offset + run.length
            if run.place != UNWRITTEN:
                if run.place < 0 or run.place + run.length > self.window.size:
                    raise damaged("a file reaches beyond the end of the volume")
                if last and last.offset + last.length == run.offset and last.place + last.length == run.place:
                    last = Run(last.offset, last.length + run.length, last.place)
                    continue
                if last:
                    yield last
                last = run
            pieces += 1
            if pieces > MAX_PIECES:
                raise damaged(f"a file is in more than {MAX_PIECES} pieces")
        if last:
            yield last


def gather(read: Callable[[int, int], bytes], runs: list[Run], count: int, offset: int) -> bytes:
    """A part of a file with this map. `read(count, place)` reads the volume."""
    parts: list[bytes] = []
    position, end = offset, offset + count
    index = max(bisect_right(runs, (offset, 1 << 63, 0)) - 1, 0)
    while position < end:
        while index < len(runs) and runs[index].offset + runs[index].length <= position:
            index += 1
        start = runs[index].offset if index < len(runs) else end
        if start > position:
            piece = min(start, end) - position
            parts.append(bytes(piece))
        else:
            run = runs[index]
            piece = min(run.offset + run.length, end) - position
            parts.append(read(piece, run.place + position - run.offset))
        position += piece
    return parts[0] if len(parts) == 1 else b"".join(parts)


def failure(code: int, path: bytes | str) -> ImageError:
    """As the system would say it: `path` inside of the image, and an errno."""
    name = path if isinstance(path, str) else os.fsdecode(path)
    return from_os_error(OSError(code, os.strerror(code), name), name)


def damaged(what: str) -> FileSystemError:
    return FileSystemError(f"the file system is damaged: {what}")

"""Files and directories inside of an image, a snapshot or a backup, read without mounting and without root.

    with pyfleece.files("vm.raw") as files:
        for entry in files.scandir("/etc"):
            print(entry.path, entry.kind, entry.size)
        files.open("/etc/hostname").read()
        files.copy("/etc", "restored", recursive=True)

A path may start with the number of a partition and a colon, as in "2:/etc". It need not where one volume only holds
anything. Names are as everywhere in Python: bytes that are not UTF-8 come as surrogates, and go back as they came.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Union

from pyfleece import image as _image
from pyfleece.errors import ClosedError, Error, FileSystemError, invalid
from pyfleece.filesystems.base import MAX_DEPTH, FileSystem, Inode, Source, Window, damaged, failure
from pyfleece.filesystems.detect import BY_TSK, UNREADABLE, detect
from pyfleece.filesystems.ext import Ext
from pyfleece.filesystems.tsk import TskFileSystem
from pyfleece.filesystems.volumes import read_table
from pyfleece.filesystems.xfs import Xfs

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from pyfleece.extract import CopyResult

InnerPath = Union[str, bytes]

# What starts in the first sector, where a partition table would be.
_AT_START = ("xfs", "fat", "ntfs", "exfat", "bitlocker", "refs", "squashfs", "luks")
_IGNORES_CASE = ("fat12", "fat16", "fat32", "exfat", "ntfs", "hfsplus")
_MAX_LINKS = 40
_NUMBERED = re.compile(rb"(\d{1,6}):")


@dataclass(frozen=True)
class Volume:
    """A partition, or the whole disk. Bytes."""

    number: int | None              # as Linux numbers partitions; None: the whole disk, which has no partition table
    offset: int
    size: int
    type: str | None                # what the partition table says
    name: str | None                # of the partition (GPT)
    content: str | None             # what it seems to hold: "ext", "xfs", "ntfs", "fat", "lvm", ...; None: not known

    def __str__(self) -> str:
        return "the disk" if self.number is None else f"volume {self.number}"


@dataclass(frozen=True)
class FileEntry:
    """A file, directory, link or whatever inside of an image."""

    path: str                       # absolute; with the volume's number in front where it needs one
    stat: Inode
    target: str | None              # where a symbolic link leads
    _filesystem: FileSystem = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """file, directory, symlink, fifo, socket, "character device", "block device"."""
        return self.stat.kind

    @property
    def size(self) -> int:
        return self.stat.size


class Files:
    """The files of an image. Made by `pyfleece.files`. Not for several threads at once.

    Methods raise, where nothing else is said: `FileSystemError` when the file system is damaged or can't be read;
    what the operating system would (FileNotFoundError, NotADirectoryError, ...); and what reading the image raises.
    Symbolic links are followed inside of their volume, whose root is their root.
    """

    def __init__(self, source: Source, name: str, owned: _image.Image | None) -> None:
        """Not for users. `owned` is closed by `close`."""
        self._source: Source | None = source
        self._owned = owned
        self.name = name
        self._filesystems: dict[int | None, FileSystem] = {}
        self.volumes = tuple(_volumes(source))

    # ---- volumes ----

    def filesystem(self, volume: Volume) -> FileSystem:
        """The file system of a volume: `kind`, `label`, `uuid`, and `warning`: why it may be older than the image."""
        if self._source is None:
            raise ClosedError(f"the files of {self.name} are closed")
        if volume.number not in self._filesystems:
            try:
                self._filesystems[volume.number] = self._open(volume)
            except FileSystemError as error:
                raise FileSystemError(f"{self.name}: {volume}: {error}") from error
        return self._filesystems[volume.number]

    def _open(self, volume: Volume) -> FileSystem:
        assert self._source is not None
        window = Window(self._source, volume.offset, volume.size)
        if volume.content == "ext":
            return Ext(window)
        if volume.content == "xfs":
            return Xfs(window)
        if volume.content in BY_TSK:
            return TskFileSystem(window, volume.content)
        if volume.content in UNREADABLE:
            raise FileSystemError(f"it holds {UNREADABLE[volume.content]}, which can't be read")
        raise FileSystemError("it holds no file system that is known")

    @property
    def default(self) -> Volume | None:
        """The volume that paths without a number are on: the only one that holds anything but swap space."""
        if len(self.volumes) == 1:
            return self.volumes[0]
        used = [volume for volume in self.volumes if volume.content not in (None, "swap")]
        return used[0] if len(used) == 1 else None

    @property
    def warnings(self) -> list[str]:
        """Why what was read so far may be older than the image."""
        found = []
        for volume in self.volumes:
            filesystem = self._filesystems.get(volume.number)
            if filesystem is not None and filesystem.warning is not None:
                found.append(f"{self.name}: {volume}: {filesystem.warning}")
        return found

    # ---- files ----

    def stat(self, path: InnerPath, *, follow: bool = True) -> FileEntry:
        """What there is about one file; `follow`: of what a symbolic link leads to."""
        return self._find(path, follow)

    def scandir(self, path: InnerPath = "/") -> Iterator[FileEntry]:
        """The entries of a directory, sorted by name. One that can't be read ends it with an exception."""
        directory = self._find(path, True)
        for _, entry in self.entries(directory):
            if isinstance(entry, Error):
                raise entry
            yield entry

    def walk(
        self, path: InnerPath = "/", *, on_error: Callable[[str, Error], None] | None = None
    ) -> Iterator[FileEntry]:
        """What is at `path`, and everything below it, parents first, names sorted. No link is followed.

        `on_error` is called with a path and the exception of what can't be read; without it, the first one is raised.
        """
        stack = [(self._find(path, False), 0)]
        seen = set()
        while stack:
            entry, depth = stack.pop()
            yield entry
            if not entry.stat.is_directory:
                continue
            try:
                if entry.stat.number in seen:
                    raise damaged("the directory is in more than one place")
                if depth == MAX_DEPTH:
                    raise damaged(f"directories are nested deeper than {MAX_DEPTH}")
                seen.add(entry.stat.number)
                found: list[tuple[FileEntry, int]] = []
                for name, child in self.entries(entry):
                    if isinstance(child, FileEntry):
                        found.append((child, depth + 1))
                    elif on_error is None:
                        raise child
                    else:
                        on_error(_join(entry.path, name), child)
                stack.extend(reversed(found))
            except FileSystemError as error:
                if on_error is None:
                    raise
                on_error(entry.path, error)

    def entries(self, directory: FileEntry) -> Iterator[tuple[bytes, FileEntry | Error]]:
        """What is in a directory that was found before: names, sorted, and entries, or why one can't be read.

        A hostile file system has names that no file may have, and the same name twice: these are errors.
        """
        filesystem = directory._filesystem
        if self._source is None:
            raise ClosedError(f"the files of {self.name} are closed")
        if not directory.stat.is_directory:
            raise failure(errno.ENOTDIR, directory.path)
        try:
            names = sorted(filesystem.names(directory.stat))
        except FileSystemError as error:
            raise FileSystemError(f"{directory.path}: {error}") from error
        last = None
        for name, number in names:
            try:
                if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                    raise damaged(f"there is a file with the name {os.fsdecode(name)!r}")
                if name == last:
                    raise damaged("there are several files with this name")
                last = name
                yield name, self._entry(filesystem, _join(directory.path, name), filesystem.inode(number))
            except FileSystemError as error:
                yield name, FileSystemError(f"{_join(directory.path, name)}: {error}")

    def readlink(self, path: InnerPath) -> str:
        """Where a symbolic link leads."""
        entry = self._find(path, False)
        if entry.target is None:
            raise failure(errno.EINVAL, entry.path)
        return entry.target

    def open(self, path: InnerPath | FileEntry) -> FileReader:
        """A read-only binary file, unbuffered; holes read as zeros."""
        entry = path if isinstance(path, FileEntry) else self._find(path, True)
        if not entry.stat.is_file:
            raise failure(errno.EISDIR if entry.stat.is_directory else errno.EINVAL, entry.path)
        return FileReader(self, entry)

    def copy(
        self,
        paths: InnerPath | list[InnerPath],
        destination: str | bytes | os.PathLike[str],
        *,
        recursive: bool = False,
        owners: bool | None = None,
        on_problem: Callable[[str, str], None] | None = None,
    ) -> CopyResult:
        """Copy files, and with `recursive` whole trees, out of the image, as `cp` would: into `destination` where that
        is a directory, else to that name.

        Modes, times, holes, symbolic links, hard links among what is copied, and `owners` (None: when we are root)
        are kept. Each file appears whole or not at all, and replaces one of its name. Nothing is ever written outside
        of `destination`, whatever the image says. What can't be copied is told to `on_problem(path, why)`, listed in
        the result, and the rest is copied. What ends it: a `destination` that is full or not writable, a snapshot
        that broke.
        """
        from pyfleece.extract import copy

        wanted = [paths] if isinstance(paths, (str, bytes)) else list(paths)
        named = [(_last_name(path), self._find(path, not recursive)) for path in wanted]
        return copy(self, named, destination, recursive, owners, on_problem)

    def close(self) -> None:
        """Free everything; the image stays open unless it was opened by path. Can be called twice."""
        self._source = None
        filesystems, self._filesystems = self._filesystems, {}
        for filesystem in filesystems.values():
            filesystem.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Files of {self.name}{' closed' if self._source is None else ''}>"

    # ---- paths ----

    def _find(self, path: InnerPath, follow: bool) -> FileEntry:
        """Walk a path from the root of its volume."""
        wanted = path if isinstance(path, bytes) else os.fsencode(path)
        volume, prefix, rest = self._volume_of(wanted)
        filesystem = self.filesystem(volume)
        try:
            trail = [(b"", filesystem.inode(filesystem.root))]
            if not trail[0][1].is_directory:
                raise damaged("its root is not a directory")
            pending = [part for part in reversed(rest.split(b"/")) if part not in (b"", b".")]
            links = 0
            while pending:
                part = pending.pop()
                if not trail[-1][1].is_directory:
                    raise failure(errno.ENOTDIR, wanted)
                if part == b"..":
                    del trail[1 if len(trail) == 1 else -1 :]
                    continue
                number = _lookup(filesystem, trail[-1][1], part)
                if number is None:
                    raise failure(errno.ENOENT, wanted)
                inode = filesystem.inode(number)
                if inode.is_symlink and (pending or follow):
                    links += 1
                    if links > _MAX_LINKS:
                        raise failure(errno.ELOOP, wanted)
                    target = filesystem.link(inode)
                    if target.startswith(b"/"):
                        del trail[1:]
                    pending += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
                else:
                    trail.append((part, inode))
            if not trail[-1][1].is_directory and rest.endswith(b"/"):
                raise failure(errno.ENOTDIR, wanted)
            found = prefix + "/" + os.fsdecode(b"/".join(name for name, _ in trail[1:]))
            return self._entry(filesystem, found, trail[-1][1])
        except FileSystemError as error:
            raise FileSystemError(f"{self.name}: {os.fsdecode(wanted)}: {error}") from error

    def _volume_of(self, path: bytes) -> tuple[Volume, str, bytes]:
        """The volume of a path, the path's prefix for it, and the rest of the path."""
        match = _NUMBERED.match(path)
        default = self.default
        if match is None:
            if default is None:
                known = "; ".join(_describe(volume) for volume in self.volumes) or "none"
                raise invalid(f"{self.name} has several volumes: say which, as in 1:/etc ({known})")
            return default, "", path
        for volume in self.volumes:
            if volume.number == int(match[1]):
                prefix = "" if volume == default else f"{volume.number}:"
                return volume, prefix, path[match.end() :]
        raise invalid(f"{self.name} has no volume {int(match[1])}")

    def _entry(self, filesystem: FileSystem, path: str, inode: Inode) -> FileEntry:
        target = os.fsdecode(filesystem.link(inode)) if inode.is_symlink else None
        return FileEntry(path, inode, target, filesystem)


class FileReader(io.RawIOBase):
    """A file inside of an image, as a read-only, seekable binary file."""

    def __init__(self, files: Files, entry: FileEntry) -> None:
        super().__init__()
        self._files = files
        self._entry = entry
        self._position = 0

    @property
    def name(self) -> str:
        return self._entry.path

    @property
    def size(self) -> int:
        return self._entry.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise invalid("the position is negative")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        if self.closed or self._files._source is None:
            raise ClosedError(f"{self.name} is closed")
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), max(self.size - self._position, 0))
            if count:
                view[:count] = self._entry._filesystem.pread(self._entry.stat, count, self._position)
        self._position += count
        return count

    def data(self) -> Iterator[tuple[int, int]]:
        """Where it has data: (offset, length); the rest is holes."""
        return self._entry._filesystem.data(self._entry.stat)


def files(source: Source | _image.Path, *, format: str | None = None, share: bool = False) -> Files:
    """The files inside of a disk: of an open `Image` or `Snapshot`, or of an image at a path, which is opened as by
    `pyfleece.open`.

    ext2, ext3, ext4 and XFS need nothing else; NTFS, FAT, exFAT, HFS+, ISO 9660 and UFS need pytsk3 (`pip install
    'pyfleece[files]'`).
    """
    if isinstance(source, (str, bytes, os.PathLike)):
        opened = _image.open(source, format=format, share=share)
        try:
            return Files(opened, opened.name, opened)
        except BaseException:
            opened.close()
            raise
    return Files(source, getattr(source, "name", None) or repr(source), None)


def _volumes(source: Source) -> Iterator[Volume]:
    whole = detect(Window(source, 0, source.size))
    table = None if whole in _AT_START else read_table(source)
    if table is None or (whole == "iso9660" and table.kind == "mbr"):       # an image for a CD and for a USB stick
        yield Volume(None, 0, source.size, None, None, whole)
        return
    for found in table.partitions:
        content = detect(Window(source, found.offset, found.size))
        yield Volume(found.number, found.offset, found.size, found.type, found.name, content)


def _last_name(path: InnerPath) -> bytes | None:
    """What a copy of this path is called, which need not be the name of what a link leads to; None: as that."""
    encoded = path if isinstance(path, bytes) else os.fsencode(path)
    name = _NUMBERED.sub(b"", encoded, count=1).rstrip(b"/").rpartition(b"/")[2]
    return name if name not in (b"", b".", b"..") else None


def _describe(volume: Volume) -> str:
    return f"{volume.number}: {volume.content or volume.type}, {volume.size} bytes"


def _join(directory: str, name: bytes) -> str:
    return (directory if directory.endswith("/") else directory + "/") + os.fsdecode(name)


def _lookup(filesystem: FileSystem, directory: Inode, name: bytes) -> int | None:
    found = filesystem.lookup(directory, name)
    if found is None and filesystem.kind in _IGNORES_CASE:
        folded = os.fsdecode(name).casefold()
        return next((n for other, n in filesystem.names(directory) if os.fsdecode(other).casefold() == folded), None)
    return found

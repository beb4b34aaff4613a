"""Copying files out of an image, which a hostile guest may have written.

Whatever it says, nothing outside of the destination is touched: every directory is opened from the destination down,
one name at a time, without following links; every file is made under a new name of ours, and renamed. So a link that
was copied a moment ago, or that somebody left in the destination, leads nowhere.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyfleece.errors import (
    ClosedError,
    Error,
    ForkedError,
    SnapshotBrokenError,
    from_os_error,
    invalid,
)
from pyfleece.filesystems.base import MAX_DEPTH, Inode, damaged, failure

if TYPE_CHECKING:
    from pyfleece.files import FileEntry, Files

_PIECE = 4 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What will not get better with the next file.
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_ENDS = (SnapshotBrokenError, ClosedError, ForkedError)

Parts = tuple[bytes, ...]                   # a path below the destination


class _Ended(Exception):
    """Going on makes no sense, because of `error`."""

    def __init__(self, error: Error) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class CopyResult:
    """What was copied. `skipped` and `failed`: (path in the image, why)."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    hard_links: int = 0                     # names of files that were copied before
    devices: int = 0                        # and fifos
    bytes: int = 0                          # of data, without holes
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def copy(
    files: Files,
    named: list[tuple[bytes | None, FileEntry]],
    destination: str | bytes | os.PathLike[str],
    recursive: bool,
    owners: bool | None,
    on_problem: Callable[[str, str], None] | None,
) -> CopyResult:
    """`Files.copy`. `named`: what is copied, and what it is called there; None: as in the image."""
    target = os.fsencode(destination)
    into = os.path.isdir(target)
    if len(named) != 1 and not into:
        raise failure(errno.ENOTDIR, target)
    for _, entry in named:
        if entry.stat.is_directory and not recursive:
            raise invalid(f"{entry.path} is a directory: it is only copied recursively")
    # The root of a volume has no name: what is in it is copied into the destination.
    if not into and not named[0][1].name:
        os.mkdir(target)
        into = True
    parent, name = (target, b"") if into else os.path.split(target.rstrip(b"/"))
    root = os.open(parent or b".", _DIRECTORY)
    try:
        job = _Copy(files, root, os.geteuid() == 0 if owners is None else owners, on_problem)
        for own, entry in named:
            called = name or own or os.fsencode(entry.name)
            job.run(entry, (called,) if called else ())
        return job.result
    except _Ended as ended:
        raise ended.error from ended.error.__cause__
    finally:
        os.close(root)


class _Copy:
    """One copy into one directory, `root`."""

    def __init__(
        self, files: Files, root: int, owners: bool, on_problem: Callable[[str, str], None] | None
    ) -> None:
        self.result = CopyResult()
        self._files = files
        self._root = root
        self._owners = owners
        self._on_problem = on_problem
        self._first: dict[tuple[int, int], Parts] = {}      # (file system, inode): where a file with links went
        self._made: list[tuple[FileEntry, Parts]] = []      # directories, parents first
        self._seen: set[tuple[int, int]] = set()            # directories, as in _first

    def run(self, top: FileEntry, base: Parts) -> None:
        """Copy `top` to the name `base` (of one part; none: into the root itself), and what is below."""
        if not top.stat.is_directory:
            with self._opened(()) as directory:
                self._guarded(top, base, directory)
            return
        self._made = []
        pending: list[tuple[FileEntry, Parts]] = []
        if base:
            with self._opened(()) as directory:
                self._guarded(top, base, directory, pending)
        else:
            pending.append((top, base))
        try:
            while pending:
                entry, parts = pending.pop()
                try:
                    self._enter(entry, parts, pending)
                except (Error, OSError) as error:
                    self._failed(entry.path, error)
        finally:
            # When all is in it: writing into a directory changes its time, and its mode may forbid it.
            for entry, parts in reversed(self._made):
                try:
                    with self._opened(parts) as directory:
                        self._attributes(directory, entry.stat)
                except OSError as error:
                    self._failed(entry.path, error)

    def _enter(self, entry: FileEntry, parts: Parts, pending: list[tuple[FileEntry, Parts]]) -> None:
        """What is in a directory. Its own directories are left in `pending`."""
        where = (id(entry._filesystem), entry.stat.number)
        if where in self._seen:
            raise damaged("the directory is in more than one place")
        if len(parts) >= MAX_DEPTH:
            raise damaged(f"directories are nested deeper than {MAX_DEPTH}")
        self._seen.add(where)
        with self._opened(parts) as directory:
            for name, child in self._files.entries(entry):
                if isinstance(child, Error):
                    self._problem(self.result.failed, f"{entry.path.rstrip('/')}/{os.fsdecode(name)}", str(child))
                else:
                    self._guarded(child, (*parts, name), directory, pending)

    def _guarded(
        self,
        entry: FileEntry,
        parts: Parts,
        directory: int,
        pending: list[tuple[FileEntry, Parts]] | None = None,
    ) -> None:
        try:
            self._one(entry, parts, directory, pending if pending is not None else [])
        except (Error, OSError) as error:
            self._failed(entry.path, error)

    def _one(
        self, entry: FileEntry, parts: Parts, directory: int, pending: list[tuple[FileEntry, Parts]]
    ) -> None:
        """Copy what is not a directory to the last of `parts` in `directory`; make and note one that is."""
        name, inode, result = parts[-1], entry.stat, self.result
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise damaged("no file may have this name")         # once more, where it matters
        if inode.is_directory:
            self._directory(name, directory)
            self._made.append((entry, parts))
            pending.append((entry, parts))
            result.directories += 1
            return
        key = (id(entry._filesystem), inode.number)
        if inode.links > 1 and key in self._first:
            self._hard_link(self._first[key], name, directory)
            result.hard_links += 1
            return
        if inode.is_file:
            self._file(entry, name, directory)
            result.files += 1
        elif inode.is_symlink:
            self._symlink(entry, name, directory)
            result.symlinks += 1
        elif inode.device is not None or stat.S_ISFIFO(inode.mode):
            if os.geteuid() != 0:
                self._problem(result.skipped, entry.path, f"a {inode.kind}: only root can make one")
                return
            self._device(inode, name, directory)
            result.devices += 1
        else:
            self._problem(result.skipped, entry.path, f"a {inode.kind}")
            return
        if inode.links > 1:
            self._first[key] = parts

    # ---- kinds ----

    def _directory(self, name: bytes, directory: int) -> None:
        """One that is there already is used, unless it is a link."""
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            os.close(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory))

    def _file(self, entry: FileEntry, name: bytes, directory: int) -> None:
        inode, filesystem = entry.stat, entry._filesystem
        if inode.size >= 1 << 63:
            raise damaged(f"the file has {inode.size} bytes")
        with self._replacing(name, directory) as temporary:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(temporary, flags, 0o600, dir_fd=directory)
            try:
                os.ftruncate(file, inode.size)
                for offset, length in filesystem.data(inode):
                    for start in range(offset, offset + length, _PIECE):
                        count = min(_PIECE, offset + length - start)
                        view = memoryview(filesystem.pread(inode, count, start))
                        while view:
                            written = os.pwrite(file, view, start + count - len(view))
                            view = view[written:]
                        self.result.bytes += count
                self._attributes(file, inode)
            finally:
                os.close(file)

    def _symlink(self, entry: FileEntry, name: bytes, directory: int) -> None:
        target = os.fsencode(entry.target or "")
        if not target or b"\0" in target:
            raise damaged("the symbolic link leads nowhere")
        with self._replacing(name, directory) as temporary:
            os.symlink(target, temporary, dir_fd=directory)
            self._owner(temporary, directory, entry.stat)
            self._times(temporary, directory, entry.stat)

    def _device(self, inode: Inode, name: bytes, directory: int) -> None:
        with self._replacing(name, directory) as temporary:
            device = os.makedev(*inode.device) if inode.device is not None else 0
            os.mknod(temporary, stat.S_IFMT(inode.mode) | 0o600, device, dir_fd=directory)
            kept = self._owner(temporary, directory, inode)
            # It is ours, and no link: nobody else knows the name.
            os.chmod(temporary, inode.mode & (0o7777 if kept else 0o1777), dir_fd=directory)
            self._times(temporary, directory, inode)

    def _hard_link(self, first: Parts, name: bytes, directory: int) -> None:
        with self._opened(first[:-1]) as other, self._replacing(name, directory) as temporary:
            os.link(first[-1], temporary, src_dir_fd=other, dst_dir_fd=directory, follow_symlinks=False)

    @contextmanager
    def _replacing(self, name: bytes, directory: int) -> Iterator[bytes]:
        """A new name, which becomes `name` in the end; it is gone if that fails."""
        temporary = b".pyfleece-" + secrets.token_hex(8).encode()
        try:
            yield temporary
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            # Renaming one hard link to another of the same file does nothing.
            try:
                os.unlink(temporary, dir_fd=directory)
            except OSError:
                pass

    # ---- attributes ----

    def _attributes(self, file: int, inode: Inode) -> None:
        """Owner, mode and times of what is open."""
        kept = False
        if self._owners and inode.uid is not None and inode.gid is not None:
            os.chown(file, inode.uid, inode.gid)
            kept = True
        # Whose file it was may run it as himself; not whoever copies it.
        os.chmod(file, inode.mode & (0o7777 if kept else 0o1777))
        if inode.mtime_ns is not None:
            _set_times(file, None, inode)

    def _owner(self, name: bytes, directory: int, inode: Inode) -> bool:
        if not self._owners or inode.uid is None or inode.gid is None:
            return False
        os.chown(name, inode.uid, inode.gid, dir_fd=directory, follow_symlinks=False)
        return True

    def _times(self, name: bytes, directory: int, inode: Inode) -> None:
        if inode.mtime_ns is not None:
            _set_times(name, directory, inode)

    # ---- ways ----

    @contextmanager
    def _opened(self, parts: Parts) -> Iterator[int]:
        """A directory below the destination."""
        current = os.dup(self._root)
        try:
            for name in parts:
                following = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    # ---- problems ----

    def _failed(self, path: str, error: Error | OSError) -> None:
        """Note a failure to go on after, or raise `_Ended`."""
        if isinstance(error, _ENDS):
            raise _Ended(error)
        if isinstance(error, Error):
            text = str(error)
        else:
            if error.errno in _HOPELESS:
                raise _Ended(from_os_error(error, f"cannot copy {path}"))
            text = f"cannot make the copy: {error.strerror or error}"
        self._problem(self.result.failed, path, text)

    def _problem(self, where: list[tuple[str, str]], path: str, text: str) -> None:
        where.append((path, text))
        if self._on_problem is not None:
            self._on_problem(path, text)


def _set_times(what: int | bytes, directory: int | None, inode: Inode) -> None:
    assert inode.mtime_ns is not None
    times = (inode.atime_ns if inode.atime_ns is not None else inode.mtime_ns, inode.mtime_ns)
    try:
        if directory is None:
            os.utime(what, ns=times)
        else:
            os.utime(what, ns=times, dir_fd=directory, follow_symlinks=False)
    except OverflowError:
        raise damaged("a file's times make no sense") from None


__all__ = ["CopyResult", "copy"]

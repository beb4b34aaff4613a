"""XFS, versions 4 and 5, with what is still in its log. Checksums are not checked."""

from __future__ import annotations

import stat
import struct
import uuid
from collections.abc import Iterator

from pyfleece.errors import FileSystemError
from pyfleece.filesystems import xfs_trees
from pyfleece.filesystems.base import MAX_DIRECTORY, MAX_LINK, Inode, MappedFileSystem, Run, Window, damaged
from pyfleece.filesystems.xfs_log import Log

_FILETYPE, _SPARSE_INODES, _META_UUID, _BIGTIME, _NEEDS_REPAIR, _NREXT64 = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_EXCHANGE, _PARENT, _METADIR = 0x40, 0x80, 0x100
_KNOWN = (
    _FILETYPE | _SPARSE_INODES | _META_UUID | _BIGTIME | _NEEDS_REPAIR | _NREXT64 | _EXCHANGE | _PARENT | _METADIR
)
_V4_FILETYPE, _V4_DIRECTORIES_2 = 0x200, 0x2000
_DEV, _LOCAL, _EXTENTS, _BTREE = 0, 1, 2, 3
_REALTIME, _INODE_BIGTIME, _INODE_NREXT64 = 0x1, 0x8, 0x10


class Xfs(MappedFileSystem):
    kind = "xfs"
    _block: int                     # bytes of one
    _group_blocks: int
    _groups: int
    _log_group: int                 # bits of a block's number that are its place in its group

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self._log: Log | None = None
        self._last_raw: tuple[int, bytes] | None = None
        log_start, log_blocks = self._read_superblock()
        if not log_start:
            self.warning = "its log is on another device and was not replayed: recent changes may be missing"
            return
        try:
            place, size = self.place(log_start), log_blocks * self._block
            self._log = Log(window, place, size, self.version, self._inode_size)
        except FileSystemError as error:
            self.warning = f"its log could not be replayed, so recent changes may be missing: {error}"
            return
        self._read_superblock()             # it may be in the log, too

    def _read_superblock(self) -> tuple[int, int]:
        """Returns the first block and the number of blocks of the log."""
        block = self.read_place(512, 0)
        if block[:4] != b"XFSB":
            raise damaged("it has no XFS superblock")
        self._block, blocks = struct.unpack_from(">IQ", block, 4)
        log_start, self.root = struct.unpack_from(">QQ", block, 48)
        self._group_blocks, self._groups, _, log_blocks, version = struct.unpack_from(">IIIIH", block, 84)
        self._inode_size, = struct.unpack_from(">H", block, 104)
        log_block, _, log_inode, self._log_per_block, self._log_group = struct.unpack_from(">5B", block, 120)
        log_directory = block[192]
        features_2, = struct.unpack_from(">I", block, 200)
        incompatible, = struct.unpack_from(">I", block, 216)
        self.version = version & 15
        if self.version not in (4, 5) or (self.version == 4 and not version & _V4_DIRECTORIES_2):
            raise FileSystemError(f"XFS of version {self.version} can't be read")
        if self.version == 5 and incompatible & ~_KNOWN:
            raise FileSystemError(f"this XFS uses unknown features ({incompatible & ~_KNOWN:#x})")
        sound = (
            9 <= log_block <= 16 and self._block == 1 << log_block
            and 8 <= log_inode <= 11 and self._inode_size == 1 << log_inode <= self._block
            and self._log_per_block == log_block - log_inode
            and log_block + log_directory <= 16
            and 0 < self._group_blocks <= 1 << self._log_group and self._log_group < 32 and self._groups
            and self._groups * self._group_blocks >= blocks > (self._groups - 1) * self._group_blocks
        )  # fmt: skip
        if not sound:
            raise damaged("its superblock makes no sense")
        if blocks * self._block > self.window.size:
            raise damaged(f"it has {blocks * self._block} bytes, and its volume only {self.window.size}")
        self.label = block[108:120].partition(b"\0")[0].decode("utf-8", "replace") or None
        self.uuid = str(uuid.UUID(bytes=block[32:48]))
        self._directory_block = self._block << log_directory
        self._with_type = bool(incompatible & _FILETYPE if self.version == 5 else features_2 & _V4_FILETYPE)
        return log_start, log_blocks

    def read_place(self, count: int, place: int) -> bytes:
        data = self.window.pread(count, place)
        return data if self._log is None else self._log.over(data, place)

    def place(self, block: int) -> int:
        """Where a block of the file system is, in bytes. Its number has the group in its upper bits."""
        group, inside = block >> self._log_group, block & (1 << self._log_group) - 1
        if group >= self._groups or inside >= self._group_blocks:
            raise damaged(f"there is no block {block}")
        return (group * self._group_blocks + inside) * self._block

    def read_block(self, block: int) -> bytes:
        return self.read_place(self._block, self.place(block))

    # ---- inodes ----

    def inode(self, number: int) -> Inode:
        raw = self._raw(number)
        mode, version, _, links_1, uid, gid, links = struct.unpack_from(">HBBHIII", raw, 2)
        size, = struct.unpack_from(">Q", raw, 56)
        big = version == 3 and bool(struct.unpack_from(">Q", raw, 120)[0] & _INODE_BIGTIME)

        def time(offset: int) -> int:
            if big:
                value: int = struct.unpack_from(">Q", raw, offset)[0]
                return value - (1 << 31) * 10**9
            seconds, nanoseconds = struct.unpack_from(">iI", raw, offset)
            return int(seconds) * 10**9 + int(nanoseconds)

        device = None
        if stat.S_IFMT(mode) in (stat.S_IFCHR, stat.S_IFBLK):
            encoded, = struct.unpack_from(">I", raw, self._fork(raw)[0])
            device = encoded >> 18, encoded & 0x3FFFF
        return Inode(
            number=number, mode=mode, size=size, links=links if version >= 2 else links_1, uid=uid, gid=gid,
            mtime_ns=time(40), atime_ns=time(32), ctime_ns=time(48), birth_ns=time(144) if version == 3 else None,
            device=device,
        )  # fmt: skip

    def _raw(self, number: int) -> bytes:
        if self._last_raw is None or self._last_raw[0] != number:
            place = self.place(number >> self._log_per_block)
            place += (number & (1 << self._log_per_block) - 1) * self._inode_size
            raw = self.read_place(self._inode_size, place)
            if raw[:2] != b"IN" or not 1 <= raw[4] <= 3:
                raise damaged(f"there is no inode {number}")
            if raw[4] == 3 and struct.unpack_from(">Q", raw, 152)[0] != number:
                raise damaged(f"in the place of inode {number} is another one")
            self._last_raw = number, raw
        return self._last_raw[1]

    def _fork(self, raw: bytes) -> tuple[int, int]:
        """Where in an inode its data, or the map of it, starts and ends."""
        start = 176 if raw[4] == 3 else 100
        end = start + raw[82] * 8 if raw[82] else len(raw)
        if end > len(raw):
            raise damaged("an inode is too small for what it holds")
        return start, end

    # ---- data ----

    def runs(self, file: Inode) -> Iterator[Run]:
        raw = self._raw(file.number)
        start, end = self._fork(raw)
        fork = raw[start:end]
        if struct.unpack_from(">H", raw, 90)[0] & _REALTIME and file.is_file:
            raise FileSystemError("the file is on a realtime device")
        if raw[5] == _BTREE:
            extents = xfs_trees.tree(self.read_block, fork, self.version)
        elif raw[5] == _EXTENTS:
            large = raw[4] == 3 and struct.unpack_from(">Q", raw, 120)[0] & _INODE_NREXT64
            count = struct.unpack_from(">Q", raw, 24)[0] if large else struct.unpack_from(">I", raw, 76)[0]
            extents = xfs_trees.records(fork, count)
        else:
            raise damaged("a file has no map")
        for logical, length, block in extents:
            yield Run(logical * self._block, length * self._block, block if block < 0 else self.place(block))

    def inline(self, file: Inode) -> bytes | None:
        raw = self._raw(file.number)
        if raw[5] != _LOCAL:
            return None
        start, end = self._fork(raw)
        if file.size > end - start:
            raise damaged("an inode is too small for what it holds")
        return raw[start : start + file.size]

    # ---- names ----

    def names(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        inline = self.inline(directory)
        if inline is not None:
            yield from xfs_trees.short_directory(inline, self._with_type)
            return
        size = self._directory_block
        done = -1
        for offset, length in list(self.data_of_directory(directory)):
            for start in range(offset // size * size, offset + length, size):
                if start > done:
                    block = self.pread(directory, size, start)
                    yield from xfs_trees.directory_block(block, self.version, self._with_type)
                    done = start

    def data_of_directory(self, directory: Inode) -> Iterator[tuple[int, int]]:
        """The part of a directory that has entries; its indices are far behind it, and beyond its size."""
        if directory.size > MAX_DIRECTORY:
            raise damaged(f"a directory has {directory.size} bytes")
        for offset, length in self.data(directory):
            if offset < xfs_trees.DIRECTORY_END:
                yield offset, min(length, xfs_trees.DIRECTORY_END - offset)

    def link(self, inode: Inode) -> bytes:
        if inode.size > MAX_LINK:
            raise damaged(f"a symbolic link has {inode.size} bytes")
        inline = self.inline(inode)
        if inline is not None:
            return inline
        if self.version == 4:
            return self.pread(inode, inode.size, 0)
        return xfs_trees.remote_link(self.read_place, self._mapping(inode)[0], inode.size)

"""ext2, ext3 and ext4, with what is still in their journal.

Directories are read from end to end: their hash trees hide in entries that look deleted. Checksums are not checked.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
from collections.abc import Iterator

from pyfleece.errors import FileSystemError
from pyfleece.filesystems.base import (
    MAX_DIRECTORY,
    MAX_LINK,
    UNWRITTEN,
    Inode,
    MappedFileSystem,
    Run,
    Window,
    damaged,
    gather,
)
from pyfleece.filesystems.ext_journal import Journal

# Features that change where things are. What is not known here may mean anything, so it can't be read.
_FILETYPE, _RECOVER, _JOURNAL_DEVICE, _META_BG, _64BIT = 0x2, 0x4, 0x8, 0x10, 0x80
_EA_INODE, _INLINE_DATA = 0x400, 0x8000
_UNREADABLE = {0x1: "compression", _JOURNAL_DEVICE: "being a journal device", 0x1000: "data in directory entries"}
_KNOWN = (
    _FILETYPE | _RECOVER | _META_BG | 0x40 | _64BIT | 0x100 | 0x200 | _EA_INODE
    | 0x2000 | 0x4000 | _INLINE_DATA | 0x10000 | 0x20000
)  # fmt: skip
_HAS_JOURNAL, _EXTENTS = 0x4, 0x40
_FLAG_ENCRYPTED, _FLAG_EXTENTS, _FLAG_INLINE = 0x800, 0x80000, 0x10000000
_ROOT, _FIRST_LEGAL = 2, 11
_XATTR_MAGIC = 0xEA020000
_INLINE_LENGTH = 60


class Ext(MappedFileSystem):
    _block: int                     # bytes of one
    _first_block: int
    _blocks_per_group: int
    _descriptor_size: int

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self.root = _ROOT
        self._journal: Journal | None = None
        self._tables: dict[int, int] = {}                   # by group: where its inodes are, in bytes
        self._last_raw: tuple[int, bytes] | None = None
        self._read_superblock()
        if self._incompatible & _RECOVER:
            self._replay()

    # ---- the whole ----

    def _read_superblock(self) -> None:
        block = bytes(self.read_place(1024, 1024))
        (self._inodes, low, _, _, _, first_block, log_block, _, blocks_per_group, _, inodes_per_group) = (
            struct.unpack_from("<11I", block)
        )
        revision, = struct.unpack_from("<I", block, 0x4C)
        compatible, incompatible, read_only = struct.unpack_from("<III", block, 0x5C) if revision else (0, 0, 0)
        self._incompatible: int = incompatible
        self._inode_size = struct.unpack_from("<H", block, 0x58)[0] if revision else 128
        self._journal_inode = struct.unpack_from("<I", block, 0xE0)[0] if compatible & _HAS_JOURNAL else 0
        self._first_meta_group, = struct.unpack_from("<I", block, 0x104)
        self._sparse = bool(read_only & 1)
        self._backups = (0, *struct.unpack_from("<II", block, 0x24C)) if compatible & 0x200 else None
        if block[0x38:0x3A] != b"\x53\xef":
            raise damaged("it has no ext superblock")
        for feature, what in _UNREADABLE.items():
            if incompatible & feature:
                raise FileSystemError(f"this ext file system uses {what}, which can't be read")
        if incompatible & ~_KNOWN:
            raise FileSystemError(f"this ext file system uses unknown features ({incompatible & ~_KNOWN:#x})")
        if log_block > 6:
            raise damaged(f"its block size is 2 to the power of {log_block + 10}")
        self._block = 1024 << log_block
        high = struct.unpack_from("<I", block, 0x150)[0] if incompatible & _64BIT else 0
        self._blocks = low | high << 32
        self._descriptor_size = struct.unpack_from("<H", block, 0xFE)[0] if incompatible & _64BIT else 32
        size_is_sound = 128 <= self._inode_size <= self._block and not self._inode_size & (self._inode_size - 1)
        if not size_is_sound or not 32 <= self._descriptor_size <= 1024 or not blocks_per_group or not inodes_per_group:
            raise damaged("its superblock makes no sense")
        if self._blocks * self._block > self.window.size:
            raise damaged(f"it has {self._blocks * self._block} bytes, and its volume only {self.window.size}")
        self._first_block = first_block
        self._inodes_per_group = inodes_per_group
        self._blocks_per_group = blocks_per_group
        self.label = block[0x78:0x88].partition(b"\0")[0].decode("utf-8", "replace") or None
        self.uuid = str(uuid.UUID(bytes=block[0x68:0x78]))
        newer = incompatible & (_64BIT | 0x40 | 0x200 | _INLINE_DATA)
        self.kind = "ext4" if newer else "ext3" if compatible & _HAS_JOURNAL else "ext2"

    def _replay(self) -> None:
        if not self._journal_inode:
            self.warning = "its journal is on another device and was not replayed: recent changes may be missing"
            return
        file = self.inode(self._journal_inode)
        if not file.is_file:
            raise damaged("its journal is not a file")
        runs, read = list(self.checked(self.runs(file))), self.window.pread
        journal = Journal(lambda count, at: gather(read, runs, count, at), file.size, self._block, self._blocks)
        self.warning = journal.warning
        self._journal = journal
        self._last_raw = None               # what was read so far is of before
        self._tables.clear()
        self._read_superblock()             # it may be in the journal, too

    def read_place(self, count: int, place: int) -> bytes:
        if self._journal is None:
            return self.window.pread(count, place)
        return self._journal.over(self.window.pread(count, place), place)

    # ---- inodes ----

    def inode(self, number: int) -> Inode:
        raw = self._raw(number)
        mode, uid, size, atime, ctime, mtime, _, gid, links = struct.unpack_from("<HHIIIIIHH", raw)
        uid |= struct.unpack_from("<H", raw, 0x78)[0] << 16
        gid |= struct.unpack_from("<H", raw, 0x7A)[0] << 16
        if stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR):
            size |= struct.unpack_from("<I", raw, 0x6C)[0] << 32
        extra = struct.unpack_from("<H", raw, 0x80)[0] if len(raw) >= 0x84 else 0

        def time(seconds: int, offset: int) -> int:
            """The signed seconds, with the fraction and two more bits of seconds at `offset` of a large inode."""
            more: int = struct.unpack_from("<I", raw, offset)[0] if 0x80 + extra >= offset + 4 <= len(raw) else 0
            signed = seconds - (1 << 32) if seconds >> 31 else seconds
            return (signed + ((more & 3) << 32)) * 10**9 + (more >> 2)

        born = struct.unpack_from("<I", raw, 0x90)[0] if 0x80 + extra >= 0x98 <= len(raw) else None
        return Inode(
            number=number, mode=mode, size=size, links=links, uid=uid, gid=gid,
            mtime_ns=time(mtime, 0x88), atime_ns=time(atime, 0x8C), ctime_ns=time(ctime, 0x84),
            birth_ns=time(born, 0x94) if born is not None else None,
            device=_device(raw) if stat.S_IFMT(mode) in (stat.S_IFCHR, stat.S_IFBLK) else None,
        )  # fmt: skip

    def _raw(self, number: int) -> bytes:
        if not 1 <= number <= self._inodes:
            raise damaged(f"there is no inode {number}")
        if self._last_raw is None or self._last_raw[0] != number:
            group, index = divmod(number - 1, self._inodes_per_group)
            if group not in self._tables:
                self._tables[group] = self._table(group)
            place = self._tables[group] + index * self._inode_size
            self._last_raw = number, self.read_place(self._inode_size, place)
        return self._last_raw[1]

    def _table(self, group: int) -> int:
        descriptor = self.read_place(self._descriptor_size, self._descriptor(group))
        table: int = struct.unpack_from("<I", descriptor, 8)[0]
        if self._descriptor_size >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        return table * self._block

    def _descriptor(self, group: int) -> int:
        """Where the descriptor of a group of blocks is, in bytes."""
        each = self._block // self._descriptor_size
        block, index = divmod(group, each)
        superblock = 1 if self._block == 1024 else 0
        where = superblock + 1 + block
        if self._incompatible & _META_BG and block >= self._first_meta_group:
            where = self._first_block + block * each * self._blocks_per_group + self._has_superblock(block * each)
            if not block and superblock != self._first_block:
                where += 1
        return where * self._block + index * self._descriptor_size

    def _has_superblock(self, group: int) -> bool:
        """Whether a group starts with a copy of the superblock."""
        if self._backups is not None:
            return group in self._backups
        if group <= 1 or not self._sparse:
            return True
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return True
        return False

    # ---- data ----

    def runs(self, file: Inode) -> Iterator[Run]:
        raw = self._raw(file.number)
        flags, = struct.unpack_from("<I", raw, 0x20)
        if flags & _FLAG_ENCRYPTED and file.is_file:
            raise FileSystemError("the file is encrypted")
        if flags & _FLAG_EXTENTS:
            yield from self._extents(raw[0x28:0x64], -1)
        else:
            yield from self._indirect(file, struct.unpack_from("<15I", raw, 0x28))

    def _extents(self, node: bytes, depth: int) -> Iterator[Run]:
        """A node of the tree, and what is below it; `depth` -1: the root, which tells its own."""
        magic, entries, _, found = struct.unpack_from("<HHHH", node)
        if magic != 0xF30A or (found > 5 if depth < 0 else found != depth) or 12 + 12 * entries > len(node):
            raise damaged("a tree of extents makes no sense")
        if not entries and depth >= 0:
            raise damaged("a tree of extents has an empty node")      # a hostile one would have no end of these
        for index in range(entries):
            entry = node[12 + 12 * index : 24 + 12 * index]
            if found:
                _, low, high = struct.unpack_from("<IIH", entry)
                yield from self._extents(self.read_place(self._block, (low | high << 32) * self._block), found - 1)
                continue
            logical, length, high, low = struct.unpack("<IHHI", entry)
            place = (low | high << 32) * self._block
            if length > 0x8000:
                length, place = length - 0x8000, UNWRITTEN
            yield Run(logical * self._block, length * self._block, place)

    def _indirect(self, file: Inode, pointers: tuple[int, ...]) -> Iterator[Run]:
        each = self._block // 4
        last = -(-file.size // self._block)
        logical = 0
        for index, pointer in enumerate(pointers):
            depth = max(index - 11, 0)
            if logical >= last:
                return
            if pointer:
                yield from self._pointers(pointer, depth, logical, last)
            logical += each**depth

    def _pointers(self, pointer: int, depth: int, logical: int, last: int) -> Iterator[Run]:
        if not depth:
            yield Run(logical * self._block, self._block, pointer * self._block)
            return
        block = self.read_place(self._block, pointer * self._block)
        if not any(block):
            raise damaged("a block of pointers is empty")               # a hostile one would have no end of these
        span = (self._block // 4) ** (depth - 1)
        for below in struct.unpack(f"<{self._block // 4}I", block):
            if logical >= last:
                return
            if below:
                yield from self._pointers(below, depth - 1, logical, last)
            logical += span

    def inline(self, file: Inode) -> bytes | None:
        raw = self._raw(file.number)
        if not struct.unpack_from("<I", raw, 0x20)[0] & _FLAG_INLINE:
            return None
        return (raw[0x28 : 0x28 + _INLINE_LENGTH] + self._inline_rest(raw))[: file.size]

    def _inline_rest(self, raw: bytes) -> bytes:
        """What does not fit is in the extended attribute system.data, in the inode as well."""
        extra = struct.unpack_from("<H", raw, 0x80)[0] if len(raw) >= 0x84 else 0
        first = 0x80 + extra + 4
        if len(raw) < first + 16 or struct.unpack_from("<I", raw, first - 4)[0] != _XATTR_MAGIC:
            return b""
        position = first
        while position + 16 <= len(raw) and raw[position : position + 4] != bytes(4):
            length, kind, start, inode, size = struct.unpack_from("<BBHII", raw, position)
            name = raw[position + 16 : position + 16 + length]
            if (kind, name) == (7, b"data"):
                if inode or first + start + size > len(raw):
                    raise damaged("a file's inline data is not in its inode")
                return raw[first + start : first + start + size]
            position += 16 + (length + 3 & ~3)
        return b""

    # ---- names ----

    def names(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        flags, = struct.unpack_from("<I", self._raw(directory.number), 0x20)
        if flags & _FLAG_ENCRYPTED:
            raise FileSystemError("the directory is encrypted")
        inline = self.inline(directory)
        if inline is not None:
            # First the number of the parent, then entries; a second part has entries of its own.
            yield from self._entries(inline[4:_INLINE_LENGTH])
            yield from self._entries(inline[_INLINE_LENGTH:])
            return
        if directory.size > MAX_DIRECTORY:
            raise damaged(f"a directory has {directory.size} bytes")
        for offset, length in list(self.data(directory)):
            for start in range(offset, offset + length, self._block):
                yield from self._entries(self.pread(directory, min(self._block, offset + length - start), start))

    def _entries(self, block: bytes) -> Iterator[tuple[bytes, int]]:
        position = 0
        while position + 8 <= len(block):
            number, length, name_length = struct.unpack_from("<IHB", block, position)
            if not self._incompatible & _FILETYPE:
                name_length |= block[position + 7] << 8
            if length in (0, 0xFFFF):
                length = 65536              # blocks of 64 KiB: the length does not fit
            if length < 8 or length % 4 or (number and 8 + name_length > length) or position + length > len(block):
                raise damaged("a directory makes no sense")
            name = block[position + 8 : position + 8 + name_length]
            if number and name not in (b".", b".."):
                yield name, number
            position += length

    def link(self, inode: Inode) -> bytes:
        if inode.size > MAX_LINK:
            raise damaged(f"a symbolic link has {inode.size} bytes")
        raw = self._raw(inode.number)
        flags, = struct.unpack_from("<I", raw, 0x20)
        if flags & _FLAG_ENCRYPTED:
            raise FileSystemError("the symbolic link is encrypted")
        if inode.size < _INLINE_LENGTH and not flags & (_FLAG_EXTENTS | _FLAG_INLINE):
            return raw[0x28 : 0x28 + inode.size]
        return self.pread(inode, inode.size, 0)


def _device(raw: bytes) -> tuple[int, int]:
    old, new = struct.unpack_from("<II", raw, 0x28)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return os.major(new), os.minor(new)

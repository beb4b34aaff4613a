"""XFS's block maps, directories and long symbolic links. Functions of bytes, without state."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from pyfleece.filesystems.base import UNWRITTEN, Run, damaged, gather

# Behind these many bytes of a directory are its indices.
DIRECTORY_END = 1 << 35
_MAX_LEVEL = 9
_LINK_HEADER = 56

Extent = tuple[int, int, int]               # logical block, count, block or UNWRITTEN


# ---- maps ----


def records(data: bytes, count: int) -> Iterator[Extent]:
    """`count` packed records: 1 bit unwritten, 54 logical block, 52 block, 21 count."""
    if count * 16 > len(data):
        raise damaged("the map of a file is larger than its place")
    for index in range(count):
        high, low = struct.unpack_from(">QQ", data, 16 * index)
        block = UNWRITTEN if high >> 63 else (high & 0x1FF) << 43 | low >> 21
        yield high >> 9 & (1 << 54) - 1, low & 0x1FFFFF, block


def tree(read_block: Callable[[int], bytes], root: bytes, version: int) -> Iterator[Extent]:
    """A tree of such records, whose root is in the inode."""
    level, count = struct.unpack_from(">HH", root)
    if not 1 <= level <= _MAX_LEVEL:
        raise damaged("the map of a file makes no sense")
    for block in _pointers(root, 4, count):
        yield from _below(read_block, block, level - 1, version)


def _below(read_block: Callable[[int], bytes], block: int, level: int, version: int) -> Iterator[Extent]:
    node = read_block(block)
    magic, header = (b"BMA3", 72) if version == 5 else (b"BMAP", 24)
    found, count = struct.unpack_from(">HH", node, 4)
    # No node is empty: a hostile map would have no end of these.
    if node[:4] != magic or found != level or not count:
        raise damaged("the map of a file makes no sense")
    if level:
        for below in _pointers(node, header, count):
            yield from _below(read_block, below, level - 1, version)
    else:
        yield from records(node[header:], count)


def _pointers(node: bytes, header: int, count: int) -> tuple[int, ...]:
    """They follow the keys, for which there is room for as many as fit."""
    room = (len(node) - header) // 16
    if count > room:
        raise damaged("the map of a file makes no sense")
    return struct.unpack_from(f">{count}Q", node, header + 8 * room)


def root_from_log(data: bytes, fork: int, version: int) -> bytes:
    """The root of a tree as it is logged, with the header that other nodes have, made what it is in an inode whose data
    fork has `fork` bytes.
    """
    header = 72 if version == 5 else 24
    if len(data) < header:
        raise damaged("its log makes no sense")
    count, = struct.unpack_from(">H", data, 6)
    pointers = struct.pack(f">{count}Q", *_pointers(data, header, count))
    room = (fork - 4) // 16
    if count > room:
        raise damaged("its log makes no sense")
    keys = data[header : header + 8 * count]
    return data[4:8] + keys.ljust(8 * room, b"\0") + pointers


# ---- directories ----


def short_directory(data: bytes, with_type: bool) -> Iterator[tuple[bytes, int]]:
    """One that fits into its inode. Numbers have 8 bytes when one of them needs them."""
    if len(data) < 6:
        raise damaged("a directory makes no sense")
    width = 8 if data[1] else 4
    position = 2 + width
    for _ in range(data[0]):
        if position + 3 > len(data):
            raise damaged("a directory makes no sense")
        start = position + 3
        end = start + data[position] + with_type
        if not data[position] or end + width > len(data):
            raise damaged("a directory makes no sense")
        yield data[start : start + data[position]], int.from_bytes(data[end : end + width], "big")
        position = end + width


def directory_block(block: bytes, version: int, with_type: bool) -> Iterator[tuple[bytes, int]]:
    """A block of a larger one. The only block of a directory has the index at its end."""
    single, several, header = (b"XDB3", b"XDD3", 64) if version == 5 else (b"XD2B", b"XD2D", 16)
    end = len(block)
    if block[:4] == single:
        count, = struct.unpack_from(">I", block, end - 8)
        end -= 8 + 8 * count
    elif block[:4] != several:
        raise damaged("a directory makes no sense")
    position = header
    while position + 8 <= end:
        if block[position : position + 2] == b"\xff\xff":
            length, = struct.unpack_from(">H", block, position + 2)
        else:
            number, name_length = struct.unpack_from(">QB", block, position)
            name = block[position + 9 : position + 9 + name_length]
            length = 9 + name_length + with_type + 2 + 7 & ~7
            if not name_length or position + length > end:
                raise damaged("a directory makes no sense")
            if name not in (b".", b".."):
                yield name, number
        if length < 8 or length % 8:
            raise damaged("a directory makes no sense")
        position += length


# ---- symbolic links ----


def remote_link(read: Callable[[int, int], bytes], runs: list[Run], size: int) -> bytes:
    """A link in blocks of its own, each extent of which starts with a header."""
    target = b""
    for run in runs:
        if len(target) >= size:
            break
        part = gather(read, runs, min(run.length, _LINK_HEADER + size), run.offset)
        offset, length = struct.unpack_from(">II", part, 4)
        if part[:4] != b"XSLM" or offset != len(target) or not 0 < length <= len(part) - _LINK_HEADER:
            raise damaged("a symbolic link makes no sense")
        target += part[_LINK_HEADER : _LINK_HEADER + length]
    if len(target) < size:
        raise damaged("a symbolic link is cut off")
    return target[:size]

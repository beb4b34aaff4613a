"""Partition tables: MBR with its logical partitions, and GPT with sectors of 512 and of 4096 bytes.

Numbers are those that Linux gives: 1 to 4 the primary partitions of an MBR, 5 and up the logical ones; in a GPT the
place in the table.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass

from pyfleece.errors import FileSystemError
from pyfleece.filesystems.base import Source

_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
# Linux's own limits are 256 and lower; a hostile table may claim any number.
_MAX_GPT, _MAX_LOGICAL = 1024, 256
MBR_TYPES = {
    0x01: "FAT12", 0x04: "FAT16", 0x06: "FAT16", 0x07: "NTFS/exFAT", 0x0B: "FAT32", 0x0C: "FAT32", 0x0E: "FAT16",
    0x82: "Linux swap", 0x83: "Linux", 0x8E: "Linux LVM", 0xEF: "EFI system", 0xFD: "Linux RAID",
}  # fmt: skip
GPT_TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (arm64)",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux boot",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
}


@dataclass(frozen=True)
class Partition:
    """A part of the disk. Bytes."""

    number: int
    offset: int
    size: int
    type: str
    name: str | None = None         # GPT only


@dataclass(frozen=True)
class Table:
    kind: str                       # "gpt", "mbr"
    partitions: tuple[Partition, ...]


def read_table(source: Source) -> Table | None:
    """The partition table of a disk; None when it has none. `FileSystemError` when it has one that makes no sense."""
    if source.size < 1024:
        return None
    for sector in (512, 4096):
        found = _gpt(source, sector, sector) or _gpt(source, sector, source.size // sector * sector - sector)
        if found is not None:
            return found
    return _mbr(source)


# ---- GPT ----


def _gpt(source: Source, sector: int, offset: int) -> Table | None:
    """The table whose header, primary or backup, is at `offset`; None if there is none that is whole."""
    if offset < sector or offset + sector > source.size:
        return None
    header = source.pread(sector, offset)
    fields = _GPT_HEADER.unpack_from(header)
    signature, length, crc, here = fields[0], fields[2], fields[3], fields[5]
    start, count, entry_size, table_crc = fields[10:]
    if signature != b"EFI PART" or not _GPT_HEADER.size <= length <= sector or here * sector != offset:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != crc:
        return None
    if not 128 <= entry_size <= 4096 or not 0 < count <= _MAX_GPT or start * sector + count * entry_size > source.size:
        return None
    table = source.pread(count * entry_size, start * sector)
    if zlib.crc32(table) != table_crc:
        return None
    partitions = []
    for index in range(count):
        kind, _, first, last, _, name = _GPT_ENTRY.unpack_from(table, index * entry_size)
        if kind == bytes(16):
            continue
        type_id = str(uuid.UUID(bytes_le=kind))
        where = _checked(source, index + 1, first * sector, (last + 1 - first) * sector)
        text = name.decode("utf-16-le", "replace").partition("\0")[0]
        partitions.append(Partition(index + 1, *where, GPT_TYPES.get(type_id, type_id), text or None))
    return Table("gpt", tuple(partitions))


# ---- MBR ----


def _mbr(source: Source) -> Table | None:
    """The sectors of an MBR are taken to be 512 bytes: nothing in it tells."""
    entries = _entries(source, 0)
    if entries is None or not any(kind for _, kind, _, _ in entries):
        return None
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        raise FileSystemError("the disk has a GPT partition table, both copies of which are damaged")
    partitions = []
    for number, (_, kind, first, count) in enumerate(entries, 1):
        if not kind:
            continue
        offset, size = _checked(source, number, first * 512, count * 512)
        if kind in _EXTENDED:
            partitions.extend(_logical(source, offset))
        else:
            partitions.append(Partition(number, offset, size, MBR_TYPES.get(kind, f"{kind:#04x}")))
    return Table("mbr", tuple(sorted(partitions, key=lambda partition: partition.number)))


def _logical(source: Source, extended: int) -> list[Partition]:
    """A chain of sectors, each of which has one partition and the next link."""
    partitions: list[Partition] = []
    seen = set()
    offset = extended
    while offset not in seen:
        seen.add(offset)
        entries = _entries(source, offset)
        if entries is None or len(partitions) == _MAX_LOGICAL:
            raise FileSystemError(f"the partition table is damaged: the logical partitions break off at {offset}")
        following = None
        for _, kind, first, count in entries[:2]:
            if kind in _EXTENDED:
                following = extended + first * 512
            elif kind and count:
                number = 5 + len(partitions)
                where = _checked(source, number, offset + first * 512, count * 512)
                partitions.append(Partition(number, *where, MBR_TYPES.get(kind, f"{kind:#04x}")))
        if following is None:
            return partitions
        offset = following
    raise FileSystemError("the partition table is damaged: the logical partitions form a loop")


def _entries(source: Source, offset: int) -> list[tuple[int, int, int, int]] | None:
    """The four entries (flag, type, start, sectors) of the table in the sector at `offset`; None if it is none."""
    if offset + 512 > source.size:
        return None
    sector = source.pread(512, offset)
    if sector[510:] != b"\x55\xaa":
        return None
    entries = [_MBR_ENTRY.unpack_from(sector, 446 + 16 * index) for index in range(4)]
    # The boot sector of a file system has code where a table has flags.
    return entries if all(flag in (0, 0x80) for flag, _, _, _ in entries) else None


def _checked(source: Source, number: int, offset: int, size: int) -> tuple[int, int]:
    if offset <= 0 or size <= 0:
        raise FileSystemError(f"the partition table is damaged: partition {number} makes no sense")
    # Of a disk that is cut off, what is left can be read.
    return offset, max(min(size, source.size - offset), 0)

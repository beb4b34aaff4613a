"""A second reader of qcow2, in plain Python, of images in memory: for tests that look at thousands of states of a
file.

It knows versions 2 and 3, all cluster sizes, zero clusters, clusters compressed by zlib and internal snapshots. A
damaged image raises ValueError, or reads as something else than it should; `qemu-img check` is the judge of structure.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from qcow2_kit import Header, parse_header

OFFSET = 0x00FFFFFFFFFFFE00
COMPRESSED, ZERO = 1 << 62, 1


@dataclass(frozen=True)
class Table:
    """An L1 table: of the image, or of an internal snapshot."""

    name: str
    offset: int
    entries: int
    size: int                           # of the disk


def tables(data: bytes | bytearray) -> Iterator[Table]:
    """That of the image first, then those of its snapshots."""
    header = parse_header(data)
    yield Table("", header.l1_offset, header.l1_size, header.size)
    offset = header.snapshots_offset
    for _ in range(header.snapshots):
        l1_offset, l1_entries, id_length, name_length = struct.unpack_from(">QIHH", data, offset)
        (extra,) = struct.unpack_from(">I", data, offset + 36)
        size = struct.unpack_from(">Q", data, offset + 48)[0] if extra >= 16 else header.size
        start = offset + 40 + extra + id_length
        name = bytes(data[start : start + name_length]).decode()
        yield Table(name, l1_offset, l1_entries, size)
        offset = -(-(start + name_length) // 8) * 8


def read(data: bytes | bytearray, table: Table, backing: bytes) -> bytearray:
    """The whole disk; `backing`: what is below."""
    header = parse_header(data)
    bits = header.cluster_bits
    cluster, per_table = 1 << bits, 1 << (bits - 3)
    disk = bytearray(backing[: table.size].ljust(table.size, b"\0"))
    for number, entry in enumerate(words(data, table.offset, table.entries)):
        if entry & OFFSET:
            guest = number * per_table * cluster
            for at, l2 in enumerate(words(data, entry & OFFSET, per_table)):
                if l2:
                    start = guest + at * cluster
                    if start < table.size:
                        length = min(cluster, table.size - start)
                        disk[start : start + length] = _cluster(data, header, l2)[:length]
                    elif l2 & (OFFSET | COMPRESSED):
                        raise ValueError(f"an entry for {start:#x}, beyond the disk")
    return disk


def words(data: bytes | bytearray, offset: int, count: int) -> tuple[int, ...]:
    if offset + 8 * count > len(data):          # what is beyond the end of the file reads as zeros
        return struct.unpack(f">{count}Q", bytes(data[offset : offset + 8 * count]).ljust(8 * count, b"\0"))
    return struct.unpack_from(f">{count}Q", data, offset)


def _cluster(data: bytes | bytearray, header: Header, entry: int) -> bytes:
    cluster = 1 << header.cluster_bits
    if entry & COMPRESSED:
        shift = 62 - (header.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        end = (offset // 512 + sectors + 1) * 512
        inflate = zlib.decompressobj(-15)
        try:
            found = inflate.decompress(bytes(data[offset:end]), cluster)
        except zlib.error as error:
            raise ValueError(f"a compressed cluster at {offset:#x}: {error}") from error
        if len(found) != cluster:
            raise ValueError(f"a compressed cluster at {offset:#x} has {len(found)} bytes")
        return found
    if header.version > 2 and entry & ZERO:
        return bytes(cluster)
    offset = entry & OFFSET
    return bytes(data[offset : offset + cluster]).ljust(cluster, b"\0") if offset else bytes(cluster)

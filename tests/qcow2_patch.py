"""Images of qemu-img whose bytes are changed one field at a time."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from conftest import run

# Fields of the header: offset, format. (Section "Header" of the qcow2 format.)
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, "B"),
}
END, BACKING_FORMAT, FEATURE_NAMES, BITMAPS = 0, 0xE2792ACA, 0x6803F857, 0x23852875


def qemu_create(path: Path, size: int | str = "1M", *options: str, backing: tuple[str, str] | None = None) -> Path:
    """`options`: of -o. `backing`: name (relative to the image) and format; it need not exist."""
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", ",".join(options)]
    if backing:
        command += ["-u", "-b", backing[0], "-F", backing[1]]
    run(*command, path, str(size))
    return path


def get(path: Path, field: str) -> int:
    offset, form = FIELDS[field]
    with path.open("rb") as file:
        file.seek(offset)
        (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
    assert isinstance(value, int)
    return value


def put(path: Path, **fields: int) -> None:
    for field, value in fields.items():
        offset, form = FIELDS[field]
        put_bytes(path, offset, struct.pack(form, value))


def put_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def get_bytes(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def extensions(path: Path) -> list[tuple[int, int, bytes]]:
    """(type, offset of the data in the file, data), without the end mark."""
    at = get(path, "header_length") if get(path, "version") >= 3 else 72
    found = []
    while True:
        kind, length = struct.unpack(">II", get_bytes(path, at, 8))
        if kind == END:
            return found
        found.append((kind, at + 8, get_bytes(path, at + 8, length)))
        at += 8 + (length + 7) // 8 * 8


def put_extensions(path: Path, *wanted: tuple[int, bytes]) -> None:
    """These and no others, and the end mark. An image with a backing file has its name behind them: not changed."""
    at = get(path, "header_length") if get(path, "version") >= 3 else 72
    data = b"".join(struct.pack(">II", kind, len(body)) + body + bytes(-len(body) % 8) for kind, body in wanted)
    end = get(path, "backing_file_offset") or 1 << get(path, "cluster_bits")
    assert at + len(data) + 8 <= end
    put_bytes(path, at, data + bytes(8))


def change_extension(path: Path, kind: int, offset: int, data: bytes) -> None:
    """Change bytes inside of one."""
    ((at, _),) = [(at, body) for found, at, body in extensions(path) if found == kind]
    put_bytes(path, at + offset, data)


def feature_name(kind: int, bit: int, name: bytes) -> bytes:
    return struct.pack(">BB46s", kind, bit, name)


def content_of(path: Path) -> tuple[bytes, os.stat_result]:
    return path.read_bytes(), path.stat()


def unchanged(path: Path, before: tuple[bytes, os.stat_result]) -> bool:
    now = path.stat()
    same = (now.st_size, now.st_mtime_ns, now.st_ino) == (before[1].st_size, before[1].st_mtime_ns, before[1].st_ino)
    return same and path.read_bytes() == before[0]

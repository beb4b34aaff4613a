"""The process in which The Sleuth Kit reads a file system. Run as a program, by tsk.py; imports nothing of pyfleece.

Standard input and output carry frames: the lengths of a JSON text and of data, and these two. We are asked one
question at a time; until it is answered, each frame of ours that says "read" is answered with a part of the volume.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import struct
import sys
from typing import Any

import pytsk3  # type: ignore[import-not-found, unused-ignore]

_FRAME = struct.Struct("<II")
_MEMORY = 4 << 30
_CACHE = 64
_FILES_OF_NTFS = 24                             # $MFT and its like have numbers below
# What The Sleuth Kit lists beside the files of FAT and exFAT.
_LABEL = b"(Volume Label Entry)"
_FILES_OF_EXFAT = (b"$ALLOC_BITMAP", b"$UPCASE_TABLE", b"$VOLUME_GUID", b"$TEX_FAT", b"$ACT")
_REPARSE, _TAG_SYMLINK, _TAG_MOUNT, _TAG_LX = 192, 0xA000000C, 0xA0000003, 0xA000001D
_TYPES = {
    "fat": pytsk3.TSK_FS_TYPE_FAT_DETECT,
    "ntfs": pytsk3.TSK_FS_TYPE_NTFS,
    "exfat": pytsk3.TSK_FS_TYPE_EXFAT,
    "hfsplus": pytsk3.TSK_FS_TYPE_HFS,
    "iso9660": pytsk3.TSK_FS_TYPE_ISO9660,
    "ufs": pytsk3.TSK_FS_TYPE_FFS_DETECT,
}
_FATS = {
    int(pytsk3.TSK_FS_TYPE_FAT12): "fat12",
    int(pytsk3.TSK_FS_TYPE_FAT16): "fat16",
    int(pytsk3.TSK_FS_TYPE_FAT32): "fat32",
}
_MODES = {
    int(pytsk3.TSK_FS_META_TYPE_REG): stat.S_IFREG,
    int(pytsk3.TSK_FS_META_TYPE_DIR): stat.S_IFDIR,
    int(pytsk3.TSK_FS_META_TYPE_LNK): stat.S_IFLNK,
    int(pytsk3.TSK_FS_META_TYPE_CHR): stat.S_IFCHR,
    int(pytsk3.TSK_FS_META_TYPE_BLK): stat.S_IFBLK,
    int(pytsk3.TSK_FS_META_TYPE_FIFO): stat.S_IFIFO,
    int(pytsk3.TSK_FS_META_TYPE_SOCK): stat.S_IFSOCK,
}


class Problem(Exception):
    """What to tell about the file system."""


# ---- frames ----


def send(message: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(message).encode()
    sys.stdout.buffer.write(_FRAME.pack(len(text), len(data)) + text + data)
    sys.stdout.buffer.flush()


def receive() -> tuple[dict[str, Any], bytes]:
    head = sys.stdin.buffer.read(_FRAME.size)
    if len(head) < _FRAME.size:
        sys.exit(0)                             # nobody asks any more
    text_length, data_length = _FRAME.unpack(head)
    return json.loads(sys.stdin.buffer.read(text_length)), sys.stdin.buffer.read(data_length)


class Volume(pytsk3.Img_Info):  # type: ignore[misc, unused-ignore]
    """The volume, as The Sleuth Kit sees it."""

    def __init__(self, size: int) -> None:
        self._size = size
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def close(self) -> None:
        pass

    def get_size(self) -> int:
        return self._size

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self._size - offset)
        if count <= 0:
            return b""
        send({"read": [count, offset]})
        answer, data = receive()
        if not answer["fine"]:
            raise OSError("the volume can't be read")
        return data


# ---- the file system ----


class Reader:
    def __init__(self, kind: str, size: int) -> None:
        self._volume = Volume(size)
        self._fs = pytsk3.FS_Info(self._volume, offset=0, type=_TYPES[kind])
        self.kind = _FATS.get(int(self._fs.info.ftype), kind)
        self.root = int(self._fs.info.root_inum)
        self._ownerless = kind in ("fat", "exfat", "ntfs", "iso9660")
        self._fat = kind in ("fat", "exfat")
        self._ntfs = kind == "ntfs"
        self._files: dict[int, Any] = {}

    def entries(self, number: int) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for file in self._fs.open_dir(inode=number):
            name, meta = file.info.name, file.info.meta
            if name is None or meta is None or int(name.flags) & int(pytsk3.TSK_FS_NAME_FLAG_UNALLOC):
                continue                        # deleted
            if name.name in (b".", b"..") or int(meta.type) not in _MODES:
                continue                        # or made up by The Sleuth Kit
            if self._fat and (name.name.endswith(_LABEL) or (name.name in _FILES_OF_EXFAT and not int(meta.mtime))):
                continue
            if self._ntfs and int(name.meta_addr) < _FILES_OF_NTFS and name.name.startswith(b"$"):
                continue
            found.append((name.name.decode("latin-1"), self.describe(file, int(name.meta_addr))))
        return found

    def file(self, number: int) -> Any:
        if number not in self._files:
            if len(self._files) >= _CACHE:
                del self._files[next(iter(self._files))]
            file = self._fs.open_meta(inode=number)
            if file.info.meta is None:
                raise Problem(f"the file system is damaged: there is no inode {number}")
            self._files[number] = file
        return self._files[number]

    def describe(self, file: Any, number: int) -> dict[str, Any]:
        meta = file.info.meta
        kind, size = _MODES.get(int(meta.type)), max(int(meta.size), 0)
        if kind is None:
            raise Problem(f"the file system is damaged: inode {number} is of no known type")
        mode = int(meta.mode) & 0o7777
        if self._ownerless:
            writable = self._ntfs or (self._fat and mode & 0o222)
            mode = 0o755 if kind == stat.S_IFDIR else 0o644 if writable else 0o444
        if self._ntfs and self.reparse(file)[0] in (_TAG_SYMLINK, _TAG_MOUNT, _TAG_LX):
            kind, mode = stat.S_IFLNK, 0o777
            size = len(self.target(number))
        return {
            "number": number,
            "mode": kind | mode,
            "size": size,
            "links": max(int(meta.nlink), 0),
            "uid": None if self._ownerless else int(meta.uid),
            "gid": None if self._ownerless else int(meta.gid),
            "mtime_ns": _time(meta.mtime, meta.mtime_nano),
            "atime_ns": _time(meta.atime, meta.atime_nano),
            "ctime_ns": _time(meta.ctime, meta.ctime_nano),
            "birth_ns": _time(meta.crtime, meta.crtime_nano),
        }

    def reparse(self, file: Any) -> tuple[int, bytes]:
        """The tag and the contents of a reparse point of NTFS; 0 for other files."""
        for attribute in file:
            if int(attribute.info.type) == _REPARSE:
                data = file.read_random(0, min(int(attribute.info.size), 16384), attribute.info.type, attribute.info.id)
                if len(data) >= 8:
                    return struct.unpack_from("<I", data)[0], data[8:]
        return 0, b""

    def target(self, number: int) -> bytes:
        file = self.file(number)
        if not self._ntfs:
            return bytes(file.info.meta.link or b"")
        tag, data = self.reparse(file)
        if tag == _TAG_LX:
            return data[4:]
        names = 12 if tag == _TAG_SYMLINK else 8
        if len(data) < names:
            raise Problem("the file system is damaged: a symbolic link makes no sense")
        _, _, start, length = struct.unpack_from("<4H", data)
        text = data[names + start : names + start + length].decode("utf-16-le", "surrogatepass")
        return text.replace("\\", "/").encode("utf-8", "surrogatepass")

    def data(self, number: int) -> list[tuple[int, int]]:
        """Where the file has data; what is compressed counts as data from end to end."""
        file = self.file(number)
        size = max(int(file.info.meta.size), 0)
        if self._ntfs:
            tag, _ = self.reparse(file)
            if tag:
                raise Problem(f"the data of the file is kept elsewhere (reparse point {tag:#x})")
        for attribute in file:
            if int(attribute.info.type) not in (1, 128) or attribute.info.name:
                continue
            flags = int(attribute.info.flags)
            if flags & int(pytsk3.TSK_FS_ATTR_ENC):
                raise Problem("the file is encrypted")
            if not flags & int(pytsk3.TSK_FS_ATTR_NONRES) or flags & int(pytsk3.TSK_FS_ATTR_COMP):
                break
            holes = int(pytsk3.TSK_FS_ATTR_RUN_FLAG_SPARSE) | int(pytsk3.TSK_FS_ATTR_RUN_FLAG_FILLER)
            block = int(self._fs.info.block_size)
            return [
                (int(run.offset) * block, int(run.len) * block)
                for run in attribute
                if not int(run.flags) & holes and int(run.offset) * block < size
            ]
        return [(0, size)] if size else []

    def read(self, number: int, count: int, offset: int) -> bytes:
        parts = []
        while count > 0:
            part = self.file(number).read_random(offset, count)
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)


def _time(seconds: Any, nanoseconds: Any) -> int | None:
    return int(seconds) * 10**9 + int(nanoseconds) if int(seconds) else None


# ---- the process ----


def confine() -> None:
    """From here on we have no privileges, few resources, and no files but the two pipes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # whoever asks us ends us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        except OSError:                                     # root in a container that maps nobody else
            pass
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def answer(reader: Reader | None, question: dict[str, Any]) -> tuple[Reader, dict[str, Any], bytes]:
    operation = question["op"]
    if reader is None:
        reader = Reader(question["kind"], question["size"])
        return reader, {"root": reader.root, "kind": reader.kind}, b""
    number = question["inode"]
    if operation == "list":
        return reader, {"entries": reader.entries(number)}, b""
    if operation == "inode":
        return reader, {"inode": reader.describe(reader.file(number), number)}, b""
    if operation == "link":
        return reader, {"target": reader.target(number).decode("latin-1")}, b""
    if operation == "data":
        return reader, {"data": reader.data(number)}, b""
    return reader, {}, reader.read(number, question["count"], question["offset"])


def main() -> None:
    confine()
    reader: Reader | None = None
    while True:
        question, _ = receive()
        try:
            reader, told, data = answer(reader, question)
        except Problem as error:
            told, data = {"error": str(error)}, b""
        except Exception as error:              # whatever The Sleuth Kit made of it
            told, data = {"error": f"the file system is damaged: {error}"}, b""
        send(told, data)


if __name__ == "__main__":
    main()

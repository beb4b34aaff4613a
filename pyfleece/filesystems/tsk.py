"""NTFS, FAT, exFAT, HFS+, ISO 9660 and UFS, read by The Sleuth Kit.

That is C code over hostile data, so it runs in a process of its own (tsk_worker.py), without privileges and without
any file: it asks us for what it reads, and has a time to answer. What it says is checked as what a guest says is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfleece.errors import Error, FileSystemError
from pyfleece.filesystems.base import MAX_LINK, FileSystem, Inode, Window, damaged

TIME_LIMIT = 300.0                              # seconds for one answer, without our own reads
_FRAME = struct.Struct("<II")
_MAX_FRAME = 1 << 30
_PIECE = 4 << 20
_LISTED, _KNOWN = 8, 10_000                     # directories and files that are remembered
_NAMES = {"fat": "FAT", "ntfs": "NTFS", "exfat": "exFAT", "hfsplus": "HFS+", "iso9660": "ISO 9660", "ufs": "UFS"}


class TskFileSystem(FileSystem):
    def __init__(self, window: Window, kind: str) -> None:
        if importlib.util.find_spec("pytsk3") is None:
            raise FileSystemError(
                f"reading {_NAMES[kind]} needs pytsk3, which is not installed: pip install 'pyfleece[files]'"
            )
        self.kind = kind
        self._window = window
        # What was listed lately: a path is found by listing what leads to it.
        self._known: dict[int, Inode] = {}
        self._listed: dict[int, list[tuple[bytes, int]]] = {}
        self._data: tuple[int, list[tuple[int, int]]] | None = None
        worker = Path(__file__).with_name("tsk_worker.py")
        # It gets our search path, so that it finds the same pytsk3, and nothing of the environment.
        start = "import sys, runpy; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", start, os.fspath(worker), *(path for path in sys.path if path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env={"TZ": "UTC", "LC_ALL": "C"},
        )  # fmt: skip
        try:
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
            answer, _ = self._ask({"op": "open", "kind": kind, "size": window.size})
            self.root, self.kind = _number(answer["root"]), str(answer["kind"])
        except BaseException:
            self.close()
            raise

    def inode(self, number: int) -> Inode:
        if number not in self._known:
            answer, _ = self._ask({"op": "inode", "inode": number})
            self._known[number] = _inode(answer["inode"])
        return self._known[number]

    def names(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        if directory.number not in self._listed:
            answer, _ = self._ask({"op": "list", "inode": directory.number})
            if len(self._listed) == _LISTED or len(self._known) > _KNOWN:
                self._listed, self._known = {}, {}
            found = []
            for name, meta in answer["entries"]:
                inode = _inode(meta)
                self._known[inode.number] = inode
                found.append((str(name).encode("latin-1"), inode.number))
            self._listed[directory.number] = found
        return iter(self._listed[directory.number])

    def link(self, inode: Inode) -> bytes:
        answer, _ = self._ask({"op": "link", "inode": inode.number})
        target = str(answer["target"]).encode("latin-1")
        if len(target) > MAX_LINK:
            raise damaged(f"a symbolic link has {len(target)} bytes")
        return target

    def data(self, file: Inode) -> Iterator[tuple[int, int]]:
        if self._data is None or self._data[0] != file.number:
            answer, _ = self._ask({"op": "data", "inode": file.number})
            extents = [(_number(offset), _number(length)) for offset, length in answer["data"]]
            end = 0
            for offset, length in extents:
                if offset < end or not length:
                    raise damaged("the map of a file is not in order")
                end = offset + length
            self._data = file.number, extents
        return iter([(offset, min(n, file.size - offset)) for offset, n in self._data[1] if offset < file.size])

    def pread(self, file: Inode, count: int, offset: int) -> bytes:
        parts = []
        while count:
            piece = min(count, _PIECE)
            _, data = self._ask({"op": "read", "inode": file.number, "count": piece, "offset": offset})
            if len(data) != piece:
                raise damaged("the data of a file is not where it should be")
            parts.append(data)
            offset, count = offset + piece, count - piece
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    # ---- the other process ----

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One question and its answer. In between it may ask us for parts of the volume."""
        failed: Error | None = None
        end = time.monotonic() + TIME_LIMIT
        try:
            if self._process.returncode is not None:
                raise ValueError(f"its reader ended with status {self._process.returncode}")
            self._send(request, b"", end)
            while True:
                answer, data = self._receive(end)
                if "read" not in answer:
                    break
                begun = time.monotonic()
                count, offset = (_number(value) for value in answer["read"])
                part, fine = b"", True
                try:
                    part = self._window.pread(min(count, 64 << 20), offset)
                except FileSystemError:
                    fine = False                # beyond the end: it may try that, and tell us what is damaged
                except Error as error:
                    failed, fine = failed or error, False
                end += time.monotonic() - begun
                self._send({"fine": fine}, part, end)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, Error):
                raise
            self.close()
            if failed is not None:
                raise failed from error
            raise FileSystemError(f"reading the file system ({self.kind}) failed: {error}") from error
        if failed is not None:
            raise failed                        # the storage's failure, whatever was made of it
        if "error" in answer:
            raise FileSystemError(str(answer["error"])[:1000])
        return answer, data

    def _send(self, message: dict[str, Any], data: bytes, end: float) -> None:
        text = json.dumps(message).encode()
        assert self._process.stdin is not None
        left = memoryview(_FRAME.pack(len(text), len(data)) + text + data)
        while left:
            self._wait(self._process.stdin.fileno(), select.POLLOUT, end)
            try:
                left = left[os.write(self._process.stdin.fileno(), left) :]
            except BrokenPipeError:
                raise ValueError(f"its reader ended with status {self._process.wait()}") from None

    def _receive(self, end: float) -> tuple[dict[str, Any], bytes]:
        text_length, data_length = _FRAME.unpack(self._take(_FRAME.size, end))
        if text_length > _MAX_FRAME or data_length > _MAX_FRAME:
            raise ValueError("its reader talks nonsense")
        answer = json.loads(self._take(text_length, end))
        if not isinstance(answer, dict):
            raise ValueError("its reader talks nonsense")
        return answer, self._take(data_length, end)

    def _take(self, count: int, end: float) -> bytes:
        assert self._process.stdout is not None
        parts = bytearray()
        while len(parts) < count:
            self._wait(self._process.stdout.fileno(), select.POLLIN, end)
            part = os.read(self._process.stdout.fileno(), min(count - len(parts), 1 << 20))
            if not part:
                raise ValueError(f"its reader ended with status {self._process.wait()}")
            parts += part
        return bytes(parts)

    def _wait(self, descriptor: int, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(end - time.monotonic(), 0) * 1000):
            raise ValueError(f"no answer within {TIME_LIMIT:g} s")


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("its reader talks nonsense")
    return value


def _inode(raw: dict[str, Any]) -> Inode:
    mtime, atime, ctime, born = (raw[name] for name in ("mtime_ns", "atime_ns", "ctime_ns", "birth_ns"))
    if not all(value is None or isinstance(value, int) for value in (mtime, atime, ctime, born)):
        raise ValueError("its reader talks nonsense")
    uid, gid = (None if raw[name] is None else _number(raw[name]) for name in ("uid", "gid"))
    number, mode, size, links = (_number(raw[name]) for name in ("number", "mode", "size", "links"))
    return Inode(number, mode, size, links, uid, gid, mtime, atime, ctime, born)

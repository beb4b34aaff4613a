"""A file system in a process of its own that can be stopped: storage that hangs in the kernel for real.

    with fuse_mount(tmp_path / "fuse") as mount:
        (mount.directory / "scratch.raw").write_bytes(...)
        mount.stop()            # SIGSTOP: from now on system calls on its files do not return
        mount.go_on()           # SIGCONT
        mount.kill()            # SIGKILL: they fail, with ECONNABORTED or ENOTCONN

The server speaks the kernel's protocol itself (linux/fuse.h, struct by struct below): it needs root and /dev/fuse, and
no library. It has one directory, keeps files in memory, sparse, and caches nothing: every stat, read, write, fallocate
and close comes to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, UNLINK, RENAME, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 10, 12, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 18, 20, 25, 26, 27, 28, 29, 30
CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, RENAME2, LSEEK, TMPFILE = 35, 36, 38, 42, 43, 45, 46, 51
NO_REPLY = (FORGET, INTERRUPT, BATCH_FORGET)

ROOT = 1
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22         # INIT
SET_MODE, SET_SIZE = 1 << 0, 1 << 3             # SETATTR
DIRECT_IO = 1                                   # OPEN: past the page cache
PUNCH_HOLE = 2
LARGEST = 256 << 10                             # bytes in one read or write


class File:
    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.fd = os.memfd_create("fuse")


class Server:
    """Answers one request after the other. Inodes live until the end: a test's worth of them is few."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.files: dict[int, File] = {}
        self.names: dict[bytes, int] = {}
        self.next_inode = ROOT + 1
        self.fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        self.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, LARGEST + (64 << 10))
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):    # ENOENT: the request was interrupted
                    continue
                return                                                          # ENODEV: unmounted
            _, opcode, unique, inode = struct.unpack_from("<IIQQ", request)
            if opcode in NO_REPLY:
                continue
            try:
                code, answer = 0, self.answer(opcode, inode, request[40:])
            except OSError as error:
                code, answer = -(error.errno or errno.EIO), b""
            with contextlib.suppress(OSError):                                  # nobody waits for it any more
                os.write(self.device, struct.pack("<IiQ", 16 + len(answer), code, unique) + answer)
            if opcode == DESTROY:
                return

    def answer(self, opcode: int, inode: int, body: bytes) -> bytes:
        if opcode == INIT:
            flags = struct.unpack_from("<4I", body)[3] & (BIG_WRITES | MAX_PAGES)
            return struct.pack("<4I2H2I2H8I", 7, 31, LARGEST, flags, 64, 48, LARGEST, 1, LARGEST >> 12, *[0] * 9)
        if opcode == LOOKUP:
            return self.entry(self.find(body))
        if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self.attributes(inode)
        if opcode == SETATTR:
            return self.set_attributes(inode, body)
        if opcode in (CREATE, TMPFILE):
            made = self.make(struct.unpack_from("<2I", body)[1])
            if opcode == CREATE:
                self.names[body[16:].rstrip(b"\0")] = made
            return self.entry(made) + self.opened()
        if opcode in (OPEN, OPENDIR):
            return self.opened()
        if opcode == UNLINK:
            self.find(body)
            del self.names[body.rstrip(b"\0")]
            return b""
        if opcode in (RENAME, RENAME2):
            old, new = body[8 if opcode == RENAME else 16 :].split(b"\0")[:2]
            self.names[new] = self.names.pop(old)
            return b""
        if opcode == STATFS:
            return struct.pack("<5Q4I6I", 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0, *[0] * 6)
        if opcode in (RELEASE, RELEASEDIR, FSYNC, FSYNCDIR, FLUSH, DESTROY):
            return b""
        if opcode == READDIR:
            return self.list(*struct.unpack_from("<8xQI", body))
        return self.data(opcode, inode, body)

    def data(self, opcode: int, inode: int, body: bytes) -> bytes:
        if opcode not in (READ, WRITE, FALLOCATE):
            raise OSError(errno.ENOSYS, "")
        offset, length = struct.unpack_from("<8xQI", body)
        file = self.files[inode]
        if opcode == READ:
            return os.pread(file.fd, length, offset)
        if opcode == WRITE:
            return struct.pack("<II", os.pwrite(file.fd, body[40 : 40 + length], offset), 0)
        length, mode = struct.unpack_from("<16xQI", body)
        if self.fallocate(file.fd, mode, offset, length):
            raise OSError(ctypes.get_errno(), "")
        return b""

    def find(self, name: bytes) -> int:
        if name.rstrip(b"\0") not in self.names:
            raise OSError(errno.ENOENT, "")
        return self.names[name.rstrip(b"\0")]

    def make(self, mode: int) -> int:
        self.next_inode += 1
        self.files[self.next_inode] = File(mode)
        return self.next_inode

    def entry(self, inode: int) -> bytes:
        return struct.pack("<QQQQII", inode, 0, 0, 0, 0, 0) + self.attributes(inode)

    def opened(self) -> bytes:
        return struct.pack("<QII", 0, DIRECT_IO, 0)

    def attributes(self, inode: int) -> bytes:
        if inode == ROOT:
            size, blocks, mode = 0, 0, stat.S_IFDIR | 0o755
        else:
            found = os.fstat(self.files[inode].fd)
            size, blocks, mode = found.st_size, found.st_blocks, self.files[inode].mode
        return struct.pack("<6Q10I", inode, size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def set_attributes(self, inode: int, body: bytes) -> bytes:
        valid, size, mode = struct.unpack_from("<I12xQ44xI", body)
        if valid & SET_SIZE:
            os.ftruncate(self.files[inode].fd, size)
        if valid & SET_MODE:
            self.files[inode].mode = mode
        return self.answer(GETATTR, inode, b"")

    def list(self, offset: int, room: int) -> bytes:
        answer = b""
        for number, (name, inode) in enumerate(sorted(self.names.items())[offset:], offset + 1):
            entry = struct.pack("<QQII", inode, number, len(name), stat.S_IFREG >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > room:
                break
            answer += entry
        return answer


def _main(directory: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)               # PR_SET_PDEATHSIG: stopped, it would outlive a test that was killed
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"pyfleece-test", directory.encode(), b"fuse", 6, options):       # MS_NOSUID | MS_NODEV
        raise OSError(ctypes.get_errno(), f"cannot mount on {directory}")
    print("mounted", flush=True)
    Server(device).serve()


# ---- for tests ----


class Mount:
    def __init__(self, directory: Path, server: subprocess.Popen[str]) -> None:
        self.directory = directory
        self._server = server

    def stop(self) -> None:
        """From now on no system call on its files returns."""
        self._server.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def go_on(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """All that hangs fails, and what comes later too."""
        self._server.kill()
        self._server.wait()


def why_not() -> str | None:
    """What is missing here; None: nothing."""
    if os.geteuid() != 0:
        return "root, to mount,"
    return None if os.path.exists("/dev/fuse") else "/dev/fuse"


@contextlib.contextmanager
def fuse_mount(directory: Path) -> Iterator[Mount]:
    """Raises OSError where mounting is not allowed. Before the end of the block no file needs to be closed."""
    directory.mkdir()
    server = subprocess.Popen([sys.executable, __file__, str(directory)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        if server.stdout.readline() != "mounted\n":
            raise OSError(errno.EPERM, "cannot mount")
        yield Mount(directory, server)
    finally:
        # First the server: the kernel then fails what hangs, and nothing is left that the unmounting could wait for.
        server.kill()
        server.wait()
        server.stdout.close()
        ctypes.CDLL(None).umount2(os.fsencode(directory), 2)        # MNT_DETACH
        directory.rmdir()


if __name__ == "__main__":
    _main(sys.argv[1])

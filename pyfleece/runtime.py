"""A private directory for as long as a process lives. What processes that were killed left is removed by the next one.

Its name is known to nobody else. A lock on a file in it, which the kernel lets go of however the process ends, tells
whether it is still in use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
import time

_PREFIX = "pyfleece-run-"
_LOCK = "lock"
_MOUNT = "mount"
_GRACE = 60.0           # seconds in which a directory without a lock may be one that is just being made


class PrivateDirectory:
    """Made when it is constructed, with an empty directory `mount` in it for whoever wants to mount there."""

    def __init__(self) -> None:
        _sweep(tempfile.gettempdir())
        self.path = tempfile.mkdtemp(prefix=_PREFIX)
        self._lock = os.open(self.inside(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.mkdir(self.inside(_MOUNT), 0o700)

    @property
    def mountpoint(self) -> str:
        return self.inside(_MOUNT)

    def inside(self, name: str) -> str:
        return os.path.join(self.path, name)

    def close(self) -> None:
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _sweep(directory: str) -> None:
    for entry in os.scandir(directory):
        try:
            about = entry.stat(follow_symlinks=False)
            if entry.name.startswith(_PREFIX) and stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                _remove_if_dead(entry.path, about.st_mtime)
        except OSError:
            pass                # somebody else was quicker


def _remove_if_dead(path: str, made: float) -> None:
    try:
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - made > _GRACE:
            _remove(path)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        pass                    # its process lives
    finally:
        os.close(lock)


def _remove(path: str) -> None:
    mountpoint = os.path.join(path, _MOUNT)
    try:
        os.listdir(mountpoint)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
            subprocess.run([*command, mountpoint], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    # Whatever is still mounted there is not ours to empty.
    if not os.path.ismount(mountpoint):
        shutil.rmtree(path, ignore_errors=True)

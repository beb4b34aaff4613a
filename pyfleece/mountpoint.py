"""Mount points: is a directory fit to be one, and who cleans up after a process that was killed."""

from __future__ import annotations

import errno
import os
import subprocess
import time
import weakref

from pyfleece.errors import ImageError, from_os_error

_TYPE = "fuse.pyfleece"
_WATCH_WAIT = 3.0       # seconds
_UNMOUNT = (["umount", "--lazy"], ["fusermount3", "-u", "-z", "-q", "--"])

# Its input ends when the process that mounted has died: then nothing serves the mount any more, which `ls` notices. A
# line says that it was unmounted properly.
_WATCH = """
trap '' HUP INT TERM
read -r line && exit
ls "$0" >/dev/null 2>&1 || umount --lazy "$0" 2>/dev/null || fusermount3 -u -z -q -- "$0"
"""


def failure(number: int, text: str) -> ImageError:
    """The exception for an errno of our own making."""
    return from_os_error(OSError(number, os.strerror(number)), text)


def check_mountpoint(path: str) -> None:
    """Raise what is wrong with it, more clearly than the kernel would. What a process that was killed left behind is
    unmounted.
    """
    try:
        os.listdir(path)            # stat() may be answered from what the kernel remembers of a mount that died
    except OSError as error:
        if error.errno != errno.ENOTCONN or not _is_ours(path):
            raise from_os_error(error, f"cannot mount on {path}") from None
        if not _watch_unmounts(path):
            _unmount(path)
    try:
        entries = os.listdir(path)
    except OSError as error:
        raise from_os_error(error, f"cannot mount on {path}") from None
    if os.path.ismount(path):
        raise failure(errno.EBUSY, f"cannot mount on {path}: something is mounted there")
    if entries:
        raise failure(errno.ENOTEMPTY, f"cannot mount on {path}: it would hide {min(entries)!r}")


def _is_ours(path: str) -> bool:
    """Is the topmost mount there one of this library's?"""
    escaped = path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    kind = ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split(" ")[4] == escaped:
                kind = after.split(" ")[0]
    return kind == _TYPE


def _watch_unmounts(path: str) -> bool:
    """Wait for the dead mount to be unmounted by the process that watches it. If we did that beside it, it could take
    what we mount next for the dead one. False: there seems to be no such process.
    """
    deadline = time.monotonic() + _WATCH_WAIT
    while _is_ours(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _unmount(path: str) -> None:
    for command in _UNMOUNT:
        try:
            if subprocess.run([*command, path], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
                return
        except OSError:
            continue


class Watch:
    """A small process that unmounts `path` when this one has died without doing so, by SIGKILL say. Where it can't
    be started, the next mount there cleans up.
    """

    def __init__(self, path: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", _WATCH, path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError:
            return
        _watches.add(self)

    def close(self) -> None:
        """It was unmounted."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            try:
                process.stdin.write(b"unmounted\n")
                process.stdin.close()
            except OSError:         # somebody killed it
                pass
            process.wait()

    def _forget(self) -> None:
        """In a forked child: only the parent's death counts."""
        if self._process is not None and self._process.stdin is not None:
            os.close(self._process.stdin.fileno())
            self._process.returncode = 0        # not ours to wait for
            self._process = None


_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


def _forget_all() -> None:
    for watch in list(_watches):
        watch._forget()


os.register_at_fork(after_in_child=_forget_all)

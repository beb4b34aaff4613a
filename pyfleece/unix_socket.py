"""A listening Unix socket with a name: made safely, and its name given back in the end.

Nobody but the owner can connect to it, at no instant: it is bound in a directory that only the owner can enter, gets
its mode there, and is then moved to its name. What has that name already is replaced only if it is a socket that
nobody listens on, such as a server leaves that was killed. Servers that start at the same time take turns, by a lock
on the directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pyfleece.errors import from_os_error, invalid
from pyfleece.image import Path

LONGEST = 107           # bytes: what sockaddr_un takes


def listen(path: Path, backlog: int = 64) -> socket.socket:
    """A socket that listens at `path`, with mode 0600. OSError (EADDRINUSE): somebody else does, or something is there
    that is no socket.
    """
    name = check(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked_directory(name), tempfile.TemporaryDirectory(dir=os.path.dirname(name), prefix=".socket-") as own:
            inner = os.open(own, os.O_PATH | os.O_DIRECTORY)
            try:
                made.bind(f"/proc/self/fd/{inner}/s")       # short, however long the path is
            finally:
                os.close(inner)
            os.chmod(os.path.join(own, "s"), 0o600)
            made.listen(backlog)
            remove_stale(name)
            os.rename(os.path.join(own, "s"), name)
    except OSError as error:
        made.close()
        raise from_os_error(error, f"cannot listen on {name}") from error
    return made


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on. OSError (EADDRINUSE): it is in use, or no socket."""
    name = os.fsdecode(path)
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "there is something that is not a socket")
    if is_listening(name):
        raise OSError(errno.EADDRINUSE, "another process listens there")
    os.unlink(name)


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True         # its queue is full (EAGAIN), or it is not ours to ask: somebody's
    return True


def check(path: Path) -> str:
    """The absolute path, if a socket can have it."""
    name = os.path.abspath(os.fsdecode(path))
    if len(os.fsencode(name)) > LONGEST:
        raise invalid(f"the path of a socket has at most {LONGEST} bytes: {name}")
    return name


def stop(listener: socket.socket, path: Path) -> None:
    """Listen no more, and remove the name, unless another socket has taken it meanwhile."""
    name = os.path.abspath(os.fsdecode(path))
    try:
        listener.shutdown(socket.SHUT_RDWR)     # wakes up who waits in accept()
    except OSError:
        pass
    listener.close()
    try:
        with _locked_directory(name):
            remove_stale(name)
    except OSError:
        pass                                    # it is somebody else's


@contextmanager
def _locked_directory(name: str) -> Iterator[None]:
    directory = os.open(os.path.dirname(name), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)

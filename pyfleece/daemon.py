"""Becoming a daemon: the command returns when the daemon is ready, with its exit status when it never was."""

from __future__ import annotations

import logging
import os
import signal
import sys
import syslog
from collections.abc import Callable

from pyfleece.image import Path


class Daemon:
    """Made by `detach`, in the process that becomes the daemon. Until `ready` it says what it has to say on the
    terminal, as any command.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Let the command return, and let go of the terminal."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        try:
            os.write(self._pipe, b"ready")
        except OSError:
            pass                            # nobody waits any more
        os.close(self._pipe)


def detach() -> Daemon:
    """Go on in a child process, in a session of its own, in /. The parent waits until it is ready, or ends, and exits.

    To be called before anything is opened and before there are threads.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ours, theirs = os.pipe()                # not inherited by programs that are run
    child = os.fork()
    if child:
        os.close(theirs)
        os._exit(_wait(ours, child))
    os.close(ours)
    os.setsid()
    os.chdir("/")
    return Daemon(theirs)


def _wait(pipe: int, child: int) -> int:
    """The exit status of the command."""
    # The terminal's Ctrl-C reaches this process only: pass it on.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    if os.read(pipe, 16) == b"ready":
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


class PidFile:
    """A file that has the process's number while it is entered."""

    def __init__(self, path: Path) -> None:
        self._path = os.path.abspath(os.fsdecode(path))

    def __enter__(self) -> None:
        with open(self._path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")

    def __exit__(self, *_: object) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass


def syslogger() -> Callable[[str], None]:
    """What a daemon without a log file tells goes to the system's log."""
    syslog.openlog("pyfleece", syslog.LOG_PID, syslog.LOG_DAEMON)
    return syslog.syslog


def file_logger(path: Path) -> Callable[[str], None]:
    """Lines with the time, appended to a file."""
    handler = logging.FileHandler(os.fsdecode(path), encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s pyfleece[%(process)d]: %(message)s"))
    logger = logging.getLogger("pyfleece.serve")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return logger.info

"""The `pyfleece` command.

It ends with status 0: done; 1: failed, with one line on stderr that says what; 2: wrong usage; 128 + the number of the
signal that interrupted it (130: Ctrl-C). Nothing half-made is left behind in any of these cases.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from types import FrameType

import pyfleece
from pyfleece.commands import backup, bench, chain, check, ctl, demo, files, image, serve
from pyfleece.commands.kit import Failure, say
from pyfleece.demo import DemoError
from pyfleece.errors import Error, FormatError, ImageLockedError, describe

OK, FAILED = 0, 1


class _Terminated(BaseException):
    """A signal asked the process to end. Not an Exception, as KeyboardInterrupt is not."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status. Wrong usage ends in SystemExit(2), as always with argparse."""
    args = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        status: int | None = args.run(args)
        if sys.stdout is not None:              # it is None where descriptor 1 is closed
            sys.stdout.flush()
    except BrokenPipeError as error:
        _drop_output()
        # Whoever read our standard output had enough, as in `pyfleece map IMAGE | head`: not worth a word.
        return _tell(error, args.debug) if isinstance(error, Error) else FAILED
    except (Error, Failure, DemoError, OSError) as error:
        _drop_output()
        return _tell(error, args.debug)
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except _Terminated as error:
        say("terminated")
        return error.status
    return status or OK


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyfleece",
        description="Consistent backups of disk images.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"pyfleece {pyfleece.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    for group in (backup, chain, image, files, check, serve, ctl, bench, demo):
        group.add(commands)
    return parser


# ---- messages ----


def _tell(error: BaseException, debug: bool) -> int:
    """One line about a failure. Returns the exit status for it."""
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    say(_sentence(error))
    return FAILED


def _sentence(error: BaseException) -> str:
    text = describe(error)
    if isinstance(error, FormatError) and "format=" in text:
        text += f" (here: {'--target-format' if error.side == 'target' else '--format'})"
    if "backing_root" in text:
        text += " (here: --backing-root)"
    if isinstance(error, ImageLockedError) and error.side in (None, "source"):
        text += " (here: --share)"
    return text


def _drop_output() -> None:
    """What can't be written to stdout is not to be tried, and complained about, once more when the interpreter ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise _Terminated(number)

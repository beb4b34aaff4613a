"""The `pyfleece` command.

It ends with status 0: done; 1: failed, with one line on stderr that says what; 2: wrong usage; 128 + the number of the
signal that interrupted it (130: Ctrl-C). Nothing half-made is left behind in any of these cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import io
import json
import os
import re
import select
import signal
import stat
import sys
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, Any

import pyfleece
from pyfleece import demo
from pyfleece.errors import Error, FormatError, ImageLockedError
from pyfleece.progress import human
from pyfleece.snapshot import POLICIES

if TYPE_CHECKING:
    from typing_extensions import Buffer

OK, FAILED = 0, 1

_F_SETPIPE_SZ = 1031                            # fcntl has it from Python 3.10 on
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class _Failure(Exception):
    """Something to tell in one line."""


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
        args.run(args)
        if sys.stdout is not None:              # it is None where descriptor 1 is closed
            sys.stdout.flush()
    except BrokenPipeError as error:
        _drop_output()
        # Whoever read our standard output had enough, as in `pyfleece map IMAGE | head`: not worth a word.
        return _tell(error, args.debug) if isinstance(error, Error) else FAILED
    except (Error, _Failure, demo.DemoError, OSError) as error:
        _drop_output()
        return _tell(error, args.debug)
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + signal.SIGINT
    except _Terminated as error:
        _say("terminated")
        return error.status
    return OK


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyfleece",
        description="Consistent backups of disk images.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"pyfleece {pyfleece.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    image = argparse.ArgumentParser(add_help=False)
    image.add_argument("--format", help="of the image; by default its suffix tells, never its content")
    image.add_argument("--share", action="store_true", help="take no lock: another program may be writing the image")
    image.add_argument("--direct", action="store_true", help="go around the page cache (O_DIRECT)")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    _add_backup(commands, [common, image])

    info = commands.add_parser("info", parents=[common, image, as_json], help="describe an image")
    info.add_argument("image", metavar="IMAGE")
    info.set_defaults(run=_info)

    extents = commands.add_parser("map", parents=[common, image, as_json], help="list where there is data, where zeros")
    extents.add_argument("image", metavar="IMAGE")
    extents.set_defaults(run=_map)

    show = commands.add_parser(
        "demo",
        parents=[common],
        help="back up a disk while it is being destroyed, and prove that the backup is whole",
        description=demo.__doc__.partition("\n\n")[2] if demo.__doc__ else None,
    )
    show.add_argument("--size", type=_size, default=demo.DEFAULT_SIZE, help="of the disk (default: 384M)")
    show.add_argument("--keep", metavar="DIR", help="work in this directory, and leave the disk and its backup there")
    show.add_argument("--speed", type=_speed, help="limit the backup, in bytes per second")
    show.set_defaults(run=_demo)
    return parser


def _add_backup(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "backup",
        parents=parents,
        help="copy an image to a target",
        description="Copy the image SOURCE, which nobody writes meanwhile, to TARGET: a new file, a block device, or - "
        "for standard output. A file is written as TARGET.partial and gets its name when it is complete and on stable "
        "storage. Sizes take the suffixes K, M, G and T (powers of 1024).",
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--target-format", metavar="FORMAT", help="of TARGET; by default its suffix tells")
    parser.add_argument("--granularity", metavar="SIZE", type=_size, help="bytes that are copied at a time")
    parser.add_argument("--workers", metavar="N", type=int, help="threads that copy")
    parser.add_argument("--speed", metavar="SIZE", type=_speed, help="limit in bytes per second")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is one on a terminal only)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON (on stderr when TARGET is -)")
    group = parser.add_argument_group(
        "options of the snapshot that is copied",
        "The same as those of Disk.snapshot() in Python. SOURCE is opened read-only here, so no write ever makes the "
        "snapshot save anything, and they cost and change nothing.",
    )
    group.add_argument("--fleecing", metavar="WHERE", default="memory", help="image, directory, or memory (default)")
    group.add_argument("--fleecing-limit", metavar="SIZE", type=_size, help="the most that the fleecing image may hold")
    group.add_argument("--stage-size", metavar="SIZE", type=_size, default=64 << 20, help="memory for old data")
    group.add_argument("--cluster-size", metavar="SIZE", type=_size, help="the unit in which old data is saved")
    group.add_argument("--on-cbw-error", choices=POLICIES, default="break-snapshot", help="when it can't be saved")
    group.add_argument("--cbw-timeout", metavar="SECONDS", type=float, default=45.0, help="a write's longest wait")
    parser.set_defaults(run=_backup)


def _size(text: str) -> int:
    """A number of bytes: "65536", "64K", "1.5G", "512MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 65536, 64K, 1.5G")
    size = float(match[1]) * _UNITS[match[2].upper()] if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]
    if size != int(size):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    if not 0 < size < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size that makes sense")
    return int(size)


def _speed(text: str) -> int:
    """As a size, with "/s" if one likes."""
    return _size(text[:-2] if text.endswith("/s") else text)


# ---- the commands ----


def _backup(args: argparse.Namespace) -> None:
    to_stdout = args.target == "-"
    target = _Stdout() if to_stdout else args.target
    if args.share:
        _say("no lock is taken: what another program writes to the source meanwhile is in the backup in part")
    with ExitStack() as stack:
        source = stack.enter_context(_open(args, args.source, "source"))
        disk = stack.enter_context(pyfleece.Disk(source))
        snapshot = stack.enter_context(
            disk.snapshot(
                args.fleecing,
                cluster_size=args.cluster_size,
                on_cbw_error=args.on_cbw_error,
                cbw_timeout=args.cbw_timeout,
                fleecing_limit=args.fleecing_limit,
                stage_size=args.stage_size,
            )
        )
        job = stack.enter_context(
            pyfleece.Backup(
                snapshot,
                target,
                granularity=args.granularity,
                workers=args.workers,
                speed=args.speed,
                progress=None if args.no_progress else "bar",
                format=args.target_format,
            )
        )
        try:
            result = job.wait()
        except BaseException:
            if isinstance(target, _Stdout):
                target.give_up()
            raise
    output = sys.stderr if to_stdout else sys.stdout
    if args.json:
        told = {"source": args.source, "target": args.target, **dataclasses.asdict(result), "rate": result.rate}
        json.dump({**told, "lost": [extent._asdict() for extent in result.lost]}, output)
        print(file=output)
    else:
        what = f"{human(result.data_bytes)} of data, {human(result.zero_bytes)} of zeros"
        where = "standard output" if to_stdout else args.target
        print(f"{where}: {what}, in {result.seconds:.2f} s: {human(result.rate)}/s", file=output)


def _info(args: argparse.Namespace) -> None:
    with _open(args, args.image) as image:
        info = image.info
    if args.json:
        print(json.dumps({"filename": args.image, **dataclasses.asdict(info)}))
        return
    rows = (
        ("image", args.image),
        ("format", f"{info.format}{', on a block device' if info.block_device else ''}"),
        ("size", f"{human(info.size)} ({info.size} bytes)"),
        ("allocated", f"{human(info.allocated)} ({info.allocated} bytes)"),
        ("cluster size", f"{info.cluster_size} bytes"),
    )
    for name, value in rows:
        print(f"{name + ':':<14}{value}")


def _map(args: argparse.Namespace) -> None:
    with _open(args, args.image) as image:
        if args.json:
            _print_array({"start": e.offset, "length": e.length, "kind": e.kind} for e in image.extents())
            return
        print(f"{'start':>18} {'length':>18}  kind")
        for extent in image.extents():
            print(f"{extent.offset:#18x} {extent.length:#18x}  {extent.kind}")


def _print_array(items: Iterable[dict[str, Any]]) -> None:
    """JSON, one item a line, as they come: an image may have millions."""
    separator = "["
    for item in items:
        print(separator + json.dumps(item), end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def _demo(args: argparse.Namespace) -> None:
    demo.run(args.size, args.keep, args.speed)


def _open(args: argparse.Namespace, path: str, side: str | None = None) -> pyfleece.Image:
    try:
        return pyfleece.open(path, format=args.format, direct=args.direct, share=args.share)
    except Error as error:
        error.side = side
        raise


# ---- standard output as a target ----


class _Stdout(io.RawIOBase):
    """Standard output, for a backup. Unlike `sys.stdout` it never waits long in one call: `give_up` ends a write, also
    when nobody reads the other end of the pipe."""

    name = "standard output"

    def __init__(self) -> None:
        super().__init__()
        self._given_up = False
        self._fd = 1
        self._most = 4096                       # what a pipe or a socket that select() says is ready takes at once
        mode = os.fstat(1).st_mode
        if os.isatty(1):
            raise _Failure("standard output is a terminal; a disk image does not go there")
        if stat.S_ISREG(mode):
            self._most = 1 << 20
        elif stat.S_ISFIFO(mode):
            self._reopen()

    def _reopen(self) -> None:
        """Open the pipe anew: that it does not block then is our affair alone, not of those that share descriptor 1."""
        try:
            self._fd = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._most = 1 << 20
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, 1 << 20)
        except OSError:
            pass                                # no /proc, or a small pipe: slower, not worse

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Buffer) -> int:
        with memoryview(data)[: self._most] as part:
            while not self._given_up:
                if select.select([], [self._fd], [], 0.05)[1]:
                    try:
                        return os.write(self._fd, part)
                    except BlockingIOError:
                        continue
        raise _Failure("the backup was given up")

    def give_up(self) -> None:
        self._given_up = True


# ---- messages ----


def _tell(error: BaseException, debug: bool) -> int:
    """One line about a failure. Returns the exit status for it."""
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    _say(_sentence(error))
    return FAILED


def _sentence(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, Error):
        if error.side is not None:
            text = f"{error.side}: {text}"
        if error.offset is not None and str(error.offset) not in text:
            text += f" (at {error.offset}, {error.length} bytes)"
        if isinstance(error, FormatError) and "format=" in text:
            text += f" (here: {'--target-format' if error.side == 'target' else '--format'})"
        if isinstance(error, ImageLockedError) and error.side in (None, "source"):
            text += " (here: --share)"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _say(text: str) -> None:
    try:
        clear = "\r\033[K" if sys.stderr.isatty() else ""       # a progress bar may be on this line
        print(f"{clear}pyfleece: {text}", file=sys.stderr, flush=True)
    except (OSError, AttributeError):
        pass                                    # nobody listens: it is full, or closed and so None


def _drop_output() -> None:
    """What can't be written to stdout is not to be tried, and complained about, once more when the interpreter ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise _Terminated(number)

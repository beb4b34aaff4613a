"""`pyfleece backup`: copy an image to a target."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import io
import json
import os
import select
import stat
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pyfleece
from pyfleece.commands.chain import add_point
from pyfleece.commands.kit import COMMON, IMAGE, Failure, backing_root, open_image, say, size, snapshot_options, speed
from pyfleece.progress import human
from pyfleece.snapshot import POLICIES

if TYPE_CHECKING:
    from typing_extensions import Buffer

_F_SETPIPE_SZ = 1031                            # fcntl has it from Python 3.10 on


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "backup",
        parents=[COMMON, IMAGE],
        help="copy an image to a target",
        description="Copy the image SOURCE, which nobody writes meanwhile, to TARGET: a new file, a block device, or - "
        "for standard output. A file is written as TARGET.partial and gets its name when it is complete and on stable "
        "storage. Sizes take the suffixes K, M, G and T (powers of 1024).",
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--target-format", metavar="FORMAT", help="of TARGET; by default its suffix tells")
    parser.add_argument("--target-cluster-size", metavar="SIZE", type=size, help="of a new qcow2 TARGET (default: 64K)")
    parser.add_argument("--backing", metavar="FILE", help="backing file of a new qcow2 TARGET: relative to TARGET")
    parser.add_argument("--backing-format", choices=("raw", "qcow2"), help="of that backing file; never guessed")
    parser.add_argument(
        "--compress",
        choices=("zlib", "zstd"),
        nargs="?",
        const=True,
        default=False,
        help="write the clusters of a qcow2 TARGET compressed (without a value: zlib)",
    )
    parser.add_argument(
        "--reflink",
        action="store_true",
        help="share blocks with SOURCE where both are raw files on one file system that can, as cp --reflink does, in "
        "place of a copy (a bad sector then hits both)",
    )
    parser.add_argument("--granularity", metavar="SIZE", type=size, help="bytes that are copied at a time")
    parser.add_argument("--workers", metavar="N", type=int, help="threads that copy")
    parser.add_argument("--speed", metavar="SIZE", type=speed, help="limit in bytes per second")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is one on a terminal only)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON (on stderr when TARGET is -)")
    group = parser.add_argument_group(
        "options of the snapshot that is copied",
        "The same as those of Disk.snapshot() in Python. SOURCE is opened read-only here, so no write ever makes the "
        "snapshot save anything, and they cost and change nothing.",
    )
    group.add_argument("--fleecing", metavar="WHERE", default="memory", help="image, directory, or memory (default)")
    group.add_argument("--fleecing-limit", metavar="SIZE", type=size, help="the most that the fleecing image may hold")
    group.add_argument("--stage-size", metavar="SIZE", type=size, default=64 << 20, help="memory for old data")
    group.add_argument("--cluster-size", metavar="SIZE", type=size, help="the unit in which old data is saved")
    group.add_argument("--on-cbw-error", choices=POLICIES, default="break-snapshot", help="when it can't be saved")
    group.add_argument("--cbw-timeout", metavar="SECONDS", type=float, default=45.0, help="a write's longest wait")
    chain = parser.add_argument_group(
        "a directory of backups",
        "With --incremental, TARGET is a directory in which each backup becomes one more point in time. See `pyfleece "
        "points`, `verify` and `restore`.",
    )
    chain.add_argument(
        "--incremental",
        action="store_true",
        help="copy only what was changed since the newest point; all, where that is not known (the reason is told)",
    )
    chain.add_argument("--keep", metavar="N", type=int, help="then drop all but the newest N points")
    chain.add_argument("--bitmap-granularity", metavar="SIZE", type=size, default=65536, help="of the dirty bitmap")
    chain.add_argument("--write-intent", action="store_true", help="the bitmap outlives a crash of the machine")
    parser.set_defaults(run=_backup)


def _backup(args: argparse.Namespace) -> None:
    if args.incremental:
        add_point(args)
        return
    if args.keep is not None:
        raise Failure("--keep is for a directory of backups: with --incremental")
    to_stdout = args.target == "-"
    target = _Stdout() if to_stdout else args.target
    if args.share:
        say("no lock is taken: what another program writes to the source meanwhile is in the backup in part")
    with ExitStack() as stack:
        source = stack.enter_context(open_image(args, args.source, "source"))
        disk = stack.enter_context(pyfleece.Disk(source))
        snapshot = stack.enter_context(disk.snapshot(**snapshot_options(args)))
        job = stack.enter_context(
            pyfleece.Backup(
                snapshot,
                target,
                granularity=args.granularity,
                workers=args.workers,
                speed=args.speed,
                progress=None if args.no_progress else "bar",
                format=args.target_format,
                compress=args.compress,
                reflink=args.reflink,
                target_cluster_size=args.target_cluster_size,
                backing=args.backing,
                backing_format=args.backing_format,
                backing_root=backing_root(args),
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
        if args.reflink:
            what = what.replace(",", f" ({human(result.reflinked_bytes)} shared with the source),", 1)
        where = "standard output" if to_stdout else args.target
        print(f"{where}: {what}, in {result.seconds:.2f} s: {human(result.rate)}/s", file=output)


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
            raise Failure("standard output is a terminal; a disk image does not go there")
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
        raise Failure("the backup was given up")

    def give_up(self) -> None:
        self._given_up = True

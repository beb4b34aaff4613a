"""`pyfleece points`, `verify` and `restore`: what is in a directory of backups, is it whole, and back to a disk."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

import pyfleece
from pyfleece.chain import Damage, Repository, split
from pyfleece.commands.kit import AS_JSON, COMMON, Failure, open_image, say, snapshot_options
from pyfleece.progress import human
from pyfleece.restore import restore

_DIRECTORY = "directory of backups, as `pyfleece backup --incremental` makes; with @POINT that point, else the latest"


def add(commands: Any) -> None:
    points = commands.add_parser("points", parents=[COMMON, AS_JSON], help="list the points in time of a backup")
    points.add_argument("directory", metavar="DIR")
    points.set_defaults(run=_points)

    verify = commands.add_parser(
        "verify",
        parents=[COMMON, AS_JSON],
        help="read a backup again and compare it with its digests",
        description="Exit status: 0 all is as it was written, 1 it could not be looked at, 2 something is wrong.",
    )
    what = "all of DIR, a point and what it stands on, or an image of it"
    verify.add_argument("what", metavar="DIR[@POINT]|IMAGE", help=what)
    verify.add_argument("--workers", metavar="N", type=int, help="threads that read")
    verify.set_defaults(run=_verify)

    back = commands.add_parser(
        "restore",
        parents=[COMMON, AS_JSON],
        help="write a point in time to a file or a block device",
        description="A new file is sparse and gets its name when it is complete. What is written is read back.",
    )
    back.add_argument("source", metavar="DIR[@POINT]", help=_DIRECTORY)
    back.add_argument("target", metavar="TARGET", help="a new file, or a block device of the disk's size")
    back.add_argument("--format", help="of TARGET; by default its suffix tells")
    back.add_argument("--delta", action="store_true", help="write only what differs on TARGET, in place")
    back.add_argument("--force", action="store_true", help="replace a file that exists; use a larger block device")
    back.add_argument("--no-verify", action="store_true", help="do not check the backup before, and TARGET after it")
    back.add_argument("--workers", metavar="N", type=int, help="threads that copy")
    back.add_argument("--no-progress", action="store_true", help="no progress bar (there is one on a terminal only)")
    back.set_defaults(run=_restore)


def add_point(args: argparse.Namespace) -> None:
    """`pyfleece backup SOURCE DIR --incremental`"""
    if args.keep is not None and args.keep < 1:
        raise Failure("--keep: at least one point is kept")
    if args.reflink:
        raise Failure("--reflink shares blocks without reading them, and --incremental needs their digests: choose one")
    if args.target == "-" or args.backing or args.granularity or args.target_cluster_size:
        raise Failure("--incremental makes the images of a directory itself: there is no --backing and the like")
    repository = Repository(args.target, create=True)
    # For writing: the dirty bitmaps of a qcow2 image are in it.
    with open_image(args, args.source, "source", "r+") as source, pyfleece.Disk(source) as disk:
        point, result = repository.backup(
            disk,
            format=args.target_format or "qcow2",
            compress=args.compress,
            granularity=args.bitmap_granularity,
            write_intent=args.write_intent,
            workers=args.workers,
            speed=args.speed,
            progress=None if args.no_progress else "bar",
            tell=lambda reason: say(f"a full backup: {reason}"),
            **snapshot_options(args),
        )
    dropped = repository.prune(args.keep, workers=args.workers) if args.keep else []
    if args.json:
        print(json.dumps({**asdict(point), "seconds": result.seconds, "rate": result.rate, "dropped": dropped}))
        return
    print(
        f"{os.path.join(args.target, point.image)}: {point.kind}, {human(result.data_bytes)} of data, "
        f"in {result.seconds:.2f} s: {human(result.rate)}/s"
    )
    if dropped:
        print(f"dropped: {', '.join(dropped)}")


def _points(args: argparse.Namespace) -> None:
    points = Repository(args.directory).points
    if args.json:
        print(json.dumps([asdict(point) for point in points], indent=2))
        return
    print(f"{'point':<24} {'kind':<12} {'time':<21} {'copied':>10}  size")
    for point in points:
        print(f"{point.name:<24} {point.kind:<12} {point.time:<21} {human(point.data_bytes):>10}  {human(point.size)}")


def _verify(args: argparse.Namespace) -> int:
    repository, which = _find(args.what)
    damages = repository.verify(which, workers=args.workers)
    if args.json:
        told = [
            {"point": one.point, "problem": one.problem, "ranges": [extent._asdict() for extent in one.ranges]}
            for one in damages
        ]
        print(json.dumps({"damages": told}))
    else:
        _tell(damages)
        if not damages:
            print("all is as it was written")
    return 2 if damages else 0


def _tell(damages: list[Damage]) -> None:
    for damage in damages:
        if damage.problem:
            print(f"{damage.point}: {damage.problem}")
        for extent in damage.ranges:
            print(f"{damage.point}: {extent.length} bytes at {extent.offset} are {extent.kind}")


def _find(what: str) -> tuple[Repository, str | None]:
    """The repository, and the point; None: all of them."""
    if os.path.isfile(what):
        return Repository(os.path.dirname(what) or "."), os.path.splitext(os.path.basename(what))[0]
    directory, which = split(what)
    return Repository(directory), None if directory == what else which


def _restore(args: argparse.Namespace) -> None:
    directory, which = split(args.source)
    repository = Repository(directory)
    point = repository.find(which)
    if not args.no_verify:
        damages = repository.verify(point, workers=args.workers)
        if damages:
            _tell(damages)
            raise Failure(f"{point.name} is damaged; with --no-verify it is restored as it is")
    with repository.open(point) as image:
        done = restore(
            image,
            args.target,
            format=args.format,
            delta=args.delta,
            force=args.force,
            verify=not args.no_verify,
            workers=args.workers,
            progress=None if args.no_progress else "bar",
        )
    if args.json:
        print(json.dumps({"point": point.name, "target": args.target, **asdict(done)}))
    else:
        checked = ", verified" if done.verified else ""
        print(f"{args.target}: {point.name}, {human(done.size)}, {human(done.written)} written{checked}")

"""`pyfleece bench`: what fleecing would cost on these disks. See pyfleece/bench.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from pyfleece import bench
from pyfleece.commands.kit import AS_JSON, COMMON, Failure, size


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[COMMON, AS_JSON],
        help="measure what fleecing would cost on your disks",
        description="Measure a guest's rate and latency without a snapshot, while everything is written for the first "
        "time after a cut, afterwards, and while a backup runs, for several cluster sizes. By default all files are "
        "made for it and removed again. Nothing that exists is written to without --destroy-contents.",
    )
    parser.add_argument("--source", metavar="PLACE", default=".", help="directory (default: this one), file or device")
    parser.add_argument("--fleecing", metavar="DIR", help="for the fleecing image (default: the source's directory)")
    parser.add_argument("--target", metavar="PLACE", help="directory, file or device (default: the fleecing directory)")
    parser.add_argument("--size", type=size, default=1 << 30, help="of the disk that is made (default: 1G)")
    parser.add_argument("--pattern", choices=tuple(bench.PATTERNS), default="randwrite", help="what the guest does")
    parser.add_argument("--profile", metavar="FILE", help="what the guest does, as a job file of fio")
    parser.add_argument("--cluster-size", metavar="SIZE", type=size, action="append", help="one of several to measure")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each phase (default: 5)")
    parser.add_argument("--rounds", type=int, default=1, help="the median of so many is told (default: 1)")
    parser.add_argument("--stage-size", metavar="SIZE", type=size, default=64 << 20, help="memory for old data")
    parser.add_argument("--workers", metavar="N", type=int, help="threads that copy")
    parser.add_argument("--direct", action="store_true", help="the guest goes around the page cache (O_DIRECT)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw it (needs matplotlib)")
    parser.add_argument(
        "--destroy-contents",
        action="store_true",
        help="overwrite a source or target that exists: ALL THAT IT HOLDS IS LOST",
    )
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    if args.seconds <= 0 or args.rounds < 1:
        raise Failure("--seconds and --rounds are positive")
    if args.plot:
        from pyfleece import bench_plot

        bench_plot.check()              # before minutes of measuring
    beside = args.source if os.path.isdir(args.source) else "/var/tmp"
    fleecing = args.fleecing or beside
    try:
        options = bench.Options(
            source=args.source,
            fleecing=fleecing,
            target=args.target or fleecing,
            size=args.size,
            pattern=bench.read_profile(args.profile) if args.profile else bench.PATTERNS[args.pattern],
            clusters=tuple(args.cluster_size or bench.CLUSTERS),
            seconds=args.seconds,
            rounds=args.rounds,
            stage_size=args.stage_size,
            workers=args.workers,
            direct=args.direct,
            destroy=args.destroy_contents,
        )
        cases = bench.run(options, _tell)
    except bench.BenchError as error:
        raise Failure(str(error)) from error
    _tell("")
    told = bench.as_json(options, cases)
    if args.plot:
        bench_plot.draw(options, cases, args.plot)
    if args.json:
        print(json.dumps(told))
        return
    for line in bench.table(cases):
        print(line)
    print(f"\nrecommended cluster size: {told['reason']}")


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

"""`pyfleece demo`: see pyfleece/demo.py."""

from __future__ import annotations

import argparse
from typing import Any

from pyfleece import demo
from pyfleece.commands.kit import COMMON, size, speed


def add(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        parents=[COMMON],
        help="back up a disk while it is being destroyed, and prove that the backup is whole",
        description=demo.__doc__.partition("\n\n")[2] if demo.__doc__ else None,
    )
    show.add_argument("--size", type=size, default=demo.DEFAULT_SIZE, help="of the disk (default: 384M)")
    show.add_argument("--keep", metavar="DIR", help="work in this directory, and leave the disk and its backup there")
    show.add_argument("--speed", type=speed, help="limit the backup, in bytes per second")
    show.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    demo.run(args.size, args.keep, args.speed)

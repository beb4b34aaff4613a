"""`pyfleece info` and `pyfleece map`: what an image is, and what is where in it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from pyfleece.commands.kit import AS_JSON, COMMON, IMAGE, open_image, print_array
from pyfleece.progress import human


def add(commands: Any) -> None:
    info = commands.add_parser("info", parents=[COMMON, IMAGE, AS_JSON], help="describe an image")
    info.add_argument("image", metavar="IMAGE")
    info.set_defaults(run=_info)

    extents = commands.add_parser("map", parents=[COMMON, IMAGE, AS_JSON], help="list where there is data, where zeros")
    extents.add_argument("image", metavar="IMAGE")
    extents.set_defaults(run=_map)


def _info(args: argparse.Namespace) -> None:
    with open_image(args, args.image) as image:
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
    with open_image(args, args.image) as image:
        if args.json:
            print_array({"start": e.offset, "length": e.length, "kind": e.kind} for e in image.extents())
            return
        print(f"{'start':>18} {'length':>18}  kind")
        for extent in image.extents():
            print(f"{extent.offset:#18x} {extent.length:#18x}  {extent.kind}")

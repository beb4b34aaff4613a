"""What the commands share: arguments, opening images, and ways to tell things."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

import pyfleece
from pyfleece.errors import Error

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Failure(Exception):
    """Something to tell in one line."""


# ---- types of arguments ----


def size(text: str) -> int:
    """A number of bytes: "65536", "64K", "1.5G", "512MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 65536, 64K, 1.5G")
    number = float(match[1]) * _UNITS[match[2].upper()] if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    if not 0 < number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size that makes sense")
    return int(number)


def speed(text: str) -> int:
    """As a size, with "/s" if one likes."""
    return size(text[:-2] if text.endswith("/s") else text)


# ---- parsers that others have as parents ----


def _parents() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    image = argparse.ArgumentParser(add_help=False)
    image.add_argument("--format", help="of the image; by default its suffix tells, never its content")
    image.add_argument("--share", action="store_true", help="take no lock: another program may be writing the image")
    image.add_argument("--direct", action="store_true", help="go around the page cache (O_DIRECT)")
    image.add_argument("--cache-size", metavar="SIZE", type=size, help="memory for the tables of a qcow2 image")
    backing = image.add_mutually_exclusive_group()
    backing.add_argument(
        "--backing-root",
        metavar="DIR",
        help="open backing files below this directory only (/: anywhere); by default, below that of the image itself",
    )
    backing.add_argument("--no-backing", action="store_true", help="open no backing files: refuse images that have one")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    return common, image, as_json


# Every command has COMMON (`main` relies on it). IMAGE is what `open_image` needs.
COMMON, IMAGE, AS_JSON = _parents()


# ---- images ----


def open_image(
    args: argparse.Namespace, path: str, side: str | None = None, mode: str = "r", *, inspect: bool = False
) -> pyfleece.Image:
    try:
        return pyfleece.open(
            path,
            mode,
            format=args.format,
            direct=args.direct,
            share=args.share,
            cache_size=args.cache_size,
            backing_root=backing_root(args),
            inspect=inspect,
        )
    except Error as error:
        error.side = side
        raise


def backing_root(args: argparse.Namespace) -> str | bool | None:
    return False if args.no_backing else args.backing_root


def snapshot_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Disk.snapshot`."""
    return {
        "fleecing": args.fleecing,
        "cluster_size": args.cluster_size,
        "on_cbw_error": args.on_cbw_error,
        "cbw_timeout": args.cbw_timeout,
        "fleecing_limit": args.fleecing_limit,
        "stage_size": args.stage_size,
    }


# ---- output ----


def print_array(items: Iterable[dict[str, Any]]) -> None:
    """JSON, one item a line, as they come: an image may have millions."""
    separator = "["
    for item in items:
        print(separator + json.dumps(item), end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def printable(text: str) -> str:
    """For a terminal, which the names in an image could otherwise send commands to."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    try:
        clear = "\r\033[K" if sys.stderr.isatty() else ""       # a progress bar may be on this line
        print(f"{clear}pyfleece: {printable(text)}", file=sys.stderr, flush=True)
    except (OSError, AttributeError):
        pass                                    # nobody listens: it is full, or closed and so None

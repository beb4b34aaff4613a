"""`pyfleece check`: is an image as it should be; exit statuses as those of `qemu-img check`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
from typing import Any

import pyfleece
from pyfleece.check import CheckResult
from pyfleece.commands.kit import AS_JSON, COMMON, say
from pyfleece.errors import ImageError

NOT_SUPPORTED = 63


def add(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        parents=[COMMON, AS_JSON],
        help="check a qcow2 image, and repair it",
        description="Check an image that is not in use. Exit status: 0 fine, or put right; 1 the check failed; "
        "2 corrupt; 3 leaks only; 63 nothing to check in images of this format.",
    )
    check.add_argument("image", metavar="IMAGE")
    check.add_argument("--format", help="of the image; by default its suffix tells, never its content")
    check.add_argument("--share", action="store_true", help="take no lock; what is being written may look damaged")
    check.add_argument(
        "--repair",
        choices=("leaks", "all"),
        help="leaks: free what nobody uses; all: put right everything that can be known",
    )
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    try:
        result = pyfleece.check(args.image, args.repair, format=args.format, share=args.share)
    except ImageError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        say(str(error))
        return NOT_SUPPORTED
    if args.json:
        print(json.dumps({"filename": args.image, **_as_json(result)}))
    else:
        _tell(result)
    return result.status


def _as_json(result: CheckResult) -> dict[str, Any]:
    """The names of `qemu-img check --output=json`, and the findings."""
    numbers = {key.replace("_", "-"): value for key, value in dataclasses.asdict(result).items() if key != "findings"}
    return {**numbers, "findings": [dataclasses.asdict(finding) for finding in result.findings]}


def _tell(result: CheckResult) -> None:
    for finding in result.findings:
        print(finding)
    if result.findings_dropped:
        print(f"... and {result.findings_dropped} more")
    fixed = [(result.corruptions_fixed, "corruptions"), (result.leaks_fixed, "leaked clusters")]
    if any(count for count, _ in fixed):
        print("repaired: " + ", ".join(f"{count} {what}" for count, what in fixed if count))
    left = [
        (result.check_errors, "errors of the check"),
        (result.corruptions, "corruptions"),
        (result.leaks, "leaked clusters"),
    ]
    print(", ".join(f"{count} {what}" for count, what in left if count) or "no errors")
    total, allocated = result.total_clusters, result.allocated_clusters
    if total:
        print(
            f"{allocated} of {total} clusters allocated ({allocated / total:.1%}), "
            f"{result.fragmented_clusters} fragmented, {result.compressed_clusters} compressed"
        )
    print(f"end of the data in the file: {result.image_end_offset}")

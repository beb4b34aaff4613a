"""`pyfleece info`, `pyfleece map` and `pyfleece create`: what an image is, what is where in it, and a new one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import pyfleece
from pyfleece.commands.kit import AS_JSON, COMMON, IMAGE, backing_root, open_image, print_array, size
from pyfleece.image_info import ImageInfo, InternalSnapshot, MapEntry, PersistentBitmap
from pyfleece.progress import human


def add(commands: Any) -> None:
    info = commands.add_parser("info", parents=[COMMON, IMAGE, AS_JSON], help="describe an image")
    info.add_argument("image", metavar="IMAGE")
    info.set_defaults(run=_info)

    extents = commands.add_parser(
        "map",
        parents=[COMMON, IMAGE, AS_JSON],
        help="list where there is data, where zeros",
        description="List where there is data and where zeros. LAYER: which image of a chain says so: 0: IMAGE, 1: its "
        "backing file, and so on; -: none, so it reads as zeros. OFFSET: where the bytes are in that image's file.",
    )
    extents.add_argument("image", metavar="IMAGE")
    extents.set_defaults(run=_map)

    create = commands.add_parser(
        "create",
        parents=[COMMON, IMAGE],
        help="make a new, empty image",
        description="Make a new, empty image of SIZE, which can be left out where there is a backing file. Sizes take "
        "the suffixes K, M, G and T (powers of 1024).",
    )
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("size", metavar="SIZE", type=size, nargs="?")
    qcow2 = create.add_argument_group("for qcow2 only")
    qcow2.add_argument("--cluster-size", metavar="SIZE", type=size, help="512 to 2M, a power of two (default: 64K)")
    qcow2.add_argument("--backing", metavar="FILE", help="backing file, as IMAGE will name it: relative to IMAGE")
    qcow2.add_argument("--backing-format", choices=("raw", "qcow2"), help="of the backing file; never guessed")
    qcow2.add_argument("--compression", choices=("zlib", "zstd"), help="of clusters that are written compressed")
    create.set_defaults(run=_create)


# ---- info ----


def _info(args: argparse.Namespace) -> None:
    with open_image(args, args.image, inspect=True) as image:
        info = image.info
        snapshots = image.internal_snapshots()
        bitmaps = image.persistent_bitmaps()
    if args.json:
        told = {"filename": args.image, **dataclasses.asdict(info)}
        told["internal_snapshots"] = [dataclasses.asdict(snapshot) for snapshot in snapshots]
        told["persistent_bitmaps"] = [dataclasses.asdict(bitmap) for bitmap in bitmaps]
        print(json.dumps(told))
        return
    for name, value in _rows(args.image, info):
        print(f"{name + ':':<17}{_shown(value)}")
    if snapshots:
        _print_snapshots(snapshots)
    if bitmaps:
        _print_bitmaps(bitmaps)


def _rows(path: str, info: ImageInfo) -> list[tuple[str, str]]:
    rows = [
        ("image", path),
        ("format", f"{info.format}{', on a block device' if info.block_device else ''}"),
        ("size", f"{human(info.size)} ({info.size} bytes)"),
        ("allocated", f"{human(info.allocated)} ({info.allocated} bytes)"),
        ("cluster size", f"{info.cluster_size} bytes"),
    ]
    if info.backing is not None:
        rows += [("backing file", info.backing), ("backing format", info.backing_format or "not told")]
    if info.qcow2 is not None:
        details = info.qcow2
        rows += [
            ("version", f"{details.version} (compat {'1.1' if details.version == 3 else '0.10'})"),
            ("compression", details.compression),
            ("refcount bits", str(details.refcount_bits)),
            ("lazy refcounts", _yes(details.lazy_refcounts)),
            ("dirty", _yes(details.dirty)),
            ("corrupt", _yes(details.corrupt)),
        ]
    return rows


def _print_snapshots(snapshots: list[InternalSnapshot]) -> None:
    print("internal snapshots:")
    print(f"    {'id':<6} {'date':<19} {'machine state':>14} {'machine clock':>14}  name")
    for snapshot in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date))
        clock = f"{snapshot.vm_clock:.3f} s"
        state = human(snapshot.vm_state_size)
        print(f"    {_shown(snapshot.id):<6} {date} {state:>14} {clock:>14}  {_shown(snapshot.name)}")


def _print_bitmaps(bitmaps: list[PersistentBitmap]) -> None:
    print("dirty bitmaps:")
    print(f"    {'granularity':>11}  {'flags':<13} name")
    for bitmap in bitmaps:
        flags = [name for name, there in (("in-use", bitmap.in_use), ("auto", bitmap.enabled)) if there]
        print(f"    {bitmap.granularity:>11}  {', '.join(flags) or '-':<13} {_shown(bitmap.name)}")


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _shown(text: str) -> str:
    """Names in an image are what somebody wrote there: nothing that moves the cursor, or that can't be printed."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ---- map ----


def _map(args: argparse.Namespace) -> None:
    with open_image(args, args.image) as image:
        if args.json:
            print_array(_entry(entry) for entry in image.map())
            return
        print(f"{'start':>18} {'length':>18}  {'kind':<10} {'layer':>5} {'offset':>18}")
        for entry in image.map():
            kind = "compressed" if entry.compressed else entry.kind
            layer = str(entry.depth) if entry.allocated else "-"
            place = "-" if entry.host_offset is None else f"{entry.host_offset:#x}"
            print(f"{entry.offset:#18x} {entry.length:#18x}  {kind:<10} {layer:>5} {place:>18}")


def _entry(entry: MapEntry) -> dict[str, Any]:
    """The words are those of `qemu-img map`, but for `kind`."""
    told: dict[str, Any] = {
        "start": entry.offset,
        "length": entry.length,
        "kind": entry.kind,
        "depth": entry.depth,
        "present": entry.allocated,
        "compressed": entry.compressed,
    }
    if entry.host_offset is not None:
        told["offset"] = entry.host_offset
    return told


# ---- create ----


def _create(args: argparse.Namespace) -> None:
    with pyfleece.create(
        args.image,
        args.size,
        format=args.format,
        direct=args.direct,
        share=args.share,
        cluster_size=args.cluster_size,
        backing=args.backing,
        backing_format=args.backing_format,
        compression=args.compression,
        cache_size=args.cache_size,
        backing_root=backing_root(args),
    ) as image:
        info = image.info
    print(f"{args.image}: {info.format}, {human(info.size)} ({info.size} bytes)")

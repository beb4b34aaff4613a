"""QEMU's commands for dirty bitmaps. A node is a disk of the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyfleece.bitmap import DirtyBitmap
from pyfleece.disk import Disk
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.qmp_wire import QmpError

_DEFAULT_GRANULARITY = 65536


def add_commands(commands: Commands, disks: Disks) -> None:
    def add(
        node: str,
        name: str,
        granularity: int = _DEFAULT_GRANULARITY,
        persistent: bool = False,
        write_intent: bool = False,
        disabled: bool = False,
    ) -> None:
        bitmaps = disks.find(node).bitmaps
        try:
            made = bitmaps.add(name, granularity, persistent=persistent, write_intent=write_intent)
        except FileExistsError:
            raise QmpError(f"Bitmap already exists: {name}") from None
        if disabled:
            made.disable()

    def merge(node: str, target: str, bitmaps: list[str]) -> None:
        for name in (target, *bitmaps):
            find(disks, node, name)
        disks.find(node).bitmaps.merge(target, *bitmaps)

    def remove(node: str, name: str) -> None:
        find(disks, node, name)
        disks.find(node).bitmaps.remove(name)

    def one_of(change: Callable[[DirtyBitmap], None]) -> Callable[..., None]:
        return lambda node, name: change(find(disks, node, name))

    one = {"node": "str", "name": "str"}
    options = {"*granularity": "int", "*persistent": "bool", "*write-intent": "bool", "*disabled": "bool"}
    commands.add("block-dirty-bitmap-add", add, {**one, **options})
    commands.add("block-dirty-bitmap-remove", remove, one)
    commands.add("block-dirty-bitmap-clear", one_of(DirtyBitmap.clear), one)
    commands.add("block-dirty-bitmap-enable", one_of(DirtyBitmap.enable), one)
    commands.add("block-dirty-bitmap-disable", one_of(DirtyBitmap.disable), one)
    commands.add("block-dirty-bitmap-merge", merge, {"node": "str", "target": "str", "bitmaps": "strs"})


def find(disks: Disks, node: str, name: str) -> DirtyBitmap:
    try:
        return disks.find(node).bitmaps[name]
    except KeyError:
        raise QmpError(f"Dirty bitmap '{name}' not found on device '{node}'") from None


def describe(disk: Disk) -> list[dict[str, Any]]:
    """For `query-named-block-nodes`."""
    told = []
    for bitmap in disk.bitmaps.values():
        try:
            told.append(_describe(bitmap))
        except FileNotFoundError:
            pass                                # it was removed meanwhile
    return told


def _describe(bitmap: DirtyBitmap) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "recording": bitmap.enabled,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
        "inconsistent": bitmap.inconsistent,
    }
    if not about["inconsistent"]:
        about["count"] = bitmap.count
    if bitmap.problem is not None:
        about["problem"] = bitmap.problem
    return about

"""QEMU's commands for dirty bitmaps. A node is a disk of the server."""

from __future__ import annotations

from typing import Any

from pyfleece.bitmap import DirtyBitmap
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.qmp_wire import QmpError

_DEFAULT_GRANULARITY = 65536


def add_commands(commands: Commands, disks: Disks) -> None:
    def add(node: str, name: str, granularity: int = _DEFAULT_GRANULARITY) -> None:
        try:
            disks.find(node).bitmaps.add(name, granularity)
        except FileExistsError:
            raise QmpError(f"Bitmap already exists: {name}") from None

    def remove(node: str, name: str) -> None:
        find(disks, node, name)
        disks.find(node).bitmaps.remove(name)

    one = {"node": "str", "name": "str"}
    commands.add("block-dirty-bitmap-add", add, {**one, "*granularity": "int"})
    commands.add("block-dirty-bitmap-remove", remove, one)


def find(disks: Disks, node: str, name: str) -> DirtyBitmap:
    try:
        return disks.find(node).bitmaps[name]
    except KeyError:
        raise QmpError(f"Dirty bitmap '{name}' not found on device '{node}'") from None


def describe(bitmap: DirtyBitmap) -> dict[str, Any]:
    """For `query-named-block-nodes`."""
    return {"name": bitmap.name, "granularity": bitmap.granularity, "count": bitmap.count}

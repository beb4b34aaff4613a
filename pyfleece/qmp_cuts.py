"""The commands for cuts of the mount: what mkdir and rmdir in `.snap` do, for those who have the socket and not the
mount, and what they cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyfleece.group import OK, SKIPPED
from pyfleece.mount import Mount
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.qmp_wire import QmpError


def add_commands(commands: Commands, disks: Disks, mount: Callable[[], Mount], suffix: str) -> None:
    """`suffix`: what the name of a disk's file in the mount has after the disk's name."""

    def create(
        name: str | None = None, devlist: list[str] | None = None, bitmap: str | None = None, full: bool = False
    ) -> dict[str, Any]:
        if full and bitmap is not None:
            raise QmpError("'full' is without a 'bitmap'")
        for device in devlist or ():
            disks.find(device)
        files = [device + suffix for device in (disks.by_name if devlist is None else devlist)]
        bitmaps = dict.fromkeys(files, bitmap) if bitmap is not None else {} if full else None
        made = mount().cut(name, disks=files, bitmaps=bitmaps)
        thaw = made.freeze_report.thaw
        return {"name": made.name, **({} if thaw in (OK, SKIPPED) else {"thaw": thaw})}

    def delete(name: str, commit: bool = False) -> None:
        if commit:
            mount().commit(name)
        mount().drop(name)

    options = {"*name": "str", "*devlist": "strs", "*bitmap": "str", "*full": "bool"}
    commands.add("snapshot-create", create, options)
    commands.add("snapshot-delete", delete, {"name": "str", "*commit": "bool"})

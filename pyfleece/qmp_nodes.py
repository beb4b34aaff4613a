"""The commands that describe the server: its disks, what it can do, its version."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pyfleece import qmp_bitmaps, qmp_wire
from pyfleece.disk import Disk
from pyfleece.errors import ClosedError
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.snapshot import Snapshot

# Snapshots that are there now: of each disk, by the name of their cut.
ListSnapshots = Callable[[], Mapping[str, Mapping[str, Snapshot]]]

# What hooks may ask for, in the words that they know. Programs look for what is true.
_SUPPORT = {
    "backup-fleecing": True,
    "backup-max-workers": True,
    "backup-several-disks-at-one-instant": True,
    "dirty-bitmaps": True,
}


def add_commands(commands: Commands, disks: Disks, snapshots: ListSnapshots) -> None:
    commands.add("query-version", qmp_wire.version)
    commands.add("query-commands", commands.describe)
    for name in ("query-backup-support", "query-proxmox-support"):
        commands.add(name, lambda: dict(_SUPPORT))
    commands.add("query-named-block-nodes", lambda: _nodes(disks, snapshots()))


def _nodes(disks: Disks, snapshots: Mapping[str, Mapping[str, Snapshot]]) -> list[dict[str, Any]]:
    nodes = [_node(name, disk, snapshots.get(name, {})) for name, disk in disks.by_name.items()]
    return nodes + [_fleecing_node(name, path) for name, path in disks.fleecing.items()]


def _node(name: str, disk: Disk, snapshots: Mapping[str, Snapshot]) -> dict[str, Any]:
    info = disk.source.info
    return {
        "node-name": name,
        "drv": info.format,
        "ro": False,
        "file": disk.source.name,
        "size": disk.size,
        "image": {
            "filename": disk.source.name,
            "format": info.format,
            "virtual-size": disk.size,
            "actual-size": info.allocated,
            "cluster-size": info.cluster_size,
        },
        "dirty-bitmaps": qmp_bitmaps.describe(disk),
        "snapshots": [_snapshot(cut, snapshot) for cut, snapshot in snapshots.items() if not snapshot.closed],
    }


def _snapshot(name: str, snapshot: Snapshot) -> dict[str, Any]:
    told: dict[str, Any] = {"name": name, "cluster-size": snapshot.cluster_size}
    try:
        stats = snapshot.stats
        told["broken"] = snapshot.broken is not None
        told["staged-bytes"], told["fleecing-bytes"] = stats.staged_bytes, stats.fleecing_bytes
    except ClosedError:
        pass                        # it ended meanwhile
    return told


def _fleecing_node(name: str, path: str) -> dict[str, Any]:
    try:
        size = os.stat(path).st_size
    except OSError:
        size = 0
    about = {"node-name": name, "drv": "file", "ro": False, "file": path, "size": size}
    return {**about, "dirty-bitmaps": [], "snapshots": []}

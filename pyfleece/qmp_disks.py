"""The disks that a server has, and the fleecing images that belong to them: looking them up by name."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping

from pyfleece import image as _image
from pyfleece.disk import Disk
from pyfleece.errors import Error, describe, invalid
from pyfleece.fleecing import MEMORY, Fleecing
from pyfleece.image import Path
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_wire import NO_DEVICE, QmpError

SUFFIX = "-fleecing"
# Firmware and TPM state: a few KiB to MiB that deserve no file, and whose fleecing image nobody would think of making.
_SMALL_STATE = ("efidisk", "tpmstate")
_PREFIX = "drive-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def uses_fleecing(name: str) -> bool:
    """Does a disk of this name get a fleecing file? EFI and TPM state never do: their old data stays in memory."""
    return not name[len(_PREFIX) if name.startswith(_PREFIX) else 0 :].startswith(_SMALL_STATE)


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise invalid(f"{name!r} is no name for a disk: letters, digits, and _ . - after the first")
    return name


class Disks:
    """Disks by name, fixed; and paths of fleecing images, by the name of their disk with -fleecing after it. Those
    may come and go.
    """

    def __init__(self, disks: Mapping[str, Disk], fleecing: Mapping[str, Path], default: Fleecing) -> None:
        self.by_name = {check_name(name): disk for name, disk in disks.items()}
        self._default = default
        self._lock = threading.Lock()           # protects _fleecing
        self._fleecing: dict[str, str] = {}
        for name, path in fleecing.items():
            self.add_fleecing(name, path)

    def find(self, name: str) -> Disk:
        disk = self.by_name.get(name)
        if disk is None:
            raise QmpError(f"Device '{name}' not found; this server has: {', '.join(self.by_name)}", NO_DEVICE)
        return disk

    def add_fleecing(self, name: str, path: Path) -> None:
        owner = name[: -len(SUFFIX)] if name.endswith(SUFFIX) else name
        if owner == name or owner not in self.by_name:
            raise QmpError(f"only fleecing images come and go, and '{name}' is no disk's name with {SUFFIX} after it")
        with self._lock:
            if name in self._fleecing:
                raise QmpError(f"there is a device '{name}' already: {self._fleecing[name]}")
            self._fleecing[name] = os.path.abspath(os.fsdecode(path))

    def remove_fleecing(self, name: str) -> None:
        with self._lock:
            if self._fleecing.pop(name, None) is None:
                raise QmpError(f"Device '{name}' not found", NO_DEVICE)

    @property
    def fleecing(self) -> dict[str, str]:
        """The paths of the fleecing images by name, as of now."""
        with self._lock:
            return dict(self._fleecing)

    def fleecing_for(self, name: str, wanted: bool) -> Fleecing:
        """Where old data of this disk goes. `wanted`: to its fleecing image, which must be there and have room."""
        if not uses_fleecing(name):
            return MEMORY
        if not wanted:
            return self._default
        device = name + SUFFIX
        path = self.fleecing.get(device)
        if path is None:
            raise QmpError(f"Device '{device}' not found: disk '{name}' has no fleecing image", NO_DEVICE)
        try:
            # No lock: the snapshot takes it. A bare name is raw, as it is for `fleecing=`.
            bare = None if os.path.splitext(path)[1] else "raw"
            with _image.open(path, format=bare, share=True) as found:
                size = found.size
        except FileNotFoundError as error:
            raise QmpError(f"Device '{device}' not found: {describe(error)}", NO_DEVICE) from error
        except (Error, OSError) as error:
            raise QmpError(f"Device '{device}' cannot be used: {describe(error)}") from error
        if size == 0:
            raise QmpError(f"Device '{device}' has no medium: {path} is empty, and its size is what it may hold")
        return path


def add_commands(commands: Commands, disks: Disks) -> None:
    def add(node_name: str, driver: str, filename: str) -> None:
        if driver not in ("file", "host_device"):
            raise QmpError("a fleecing image has driver 'file' or 'host_device'; its format is told by its suffix")
        disks.add_fleecing(node_name, filename)

    commands.add("blockdev-add", add, {"node-name": "str", "driver": "str", "filename": "str"})
    commands.add("blockdev-del", lambda node_name: disks.remove_fleecing(node_name), {"node-name": "str"})

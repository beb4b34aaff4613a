"""pyfleece: consistent backups of disk images that are being written.

    with pyfleece.open("vm.raw", "r+") as source:
        disk = pyfleece.Disk(source)                    # the guest reads and writes through it
        with disk.snapshot() as snapshot:               # one instant; the disk goes on being written
            pyfleece.backup(snapshot, "backup.raw")

Sizes and offsets are bytes, durations seconds. Every call that can block lets go of the GIL, and Ctrl-C ends it.
"""

from pyfleece._binding import Extent
from pyfleece.backup import Backup, GroupResult, Result, backup, backup_group
from pyfleece.bitmap import Bitmaps, DirtyBitmap
from pyfleece.check import CheckResult, Finding, check
from pyfleece.chunks import Chunk, Chunks
from pyfleece.disk import Disk
from pyfleece.errors import (
    ArgumentError,
    CancelledError,
    ClosedError,
    DiscardedError,
    Error,
    FileSystemError,
    ForkedError,
    FormatError,
    FreezeError,
    ImageError,
    ImageLockedError,
    InconsistentBitmapError,
    LostError,
    OutOfRangeError,
    OutsideBitmapError,
    SnapshotBrokenError,
    TruncatedError,
)
from pyfleece.extract import CopyResult
from pyfleece.files import FileEntry, Files, Volume, files
from pyfleece.group import FreezeReport, SnapshotGroup, snapshot_group
from pyfleece.image import Image, create, open
from pyfleece.image_info import ImageInfo, InternalSnapshot, MapEntry, PersistentBitmap, Qcow2Info
from pyfleece.mount import Mount, MountSnapshot, mount
from pyfleece.progress import Bar, Progress
from pyfleece.snapshot import Latency, Snapshot, SnapshotFile, Stats

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Backup",
    "Bar",
    "Bitmaps",
    "CancelledError",
    "CheckResult",
    "Chunk",
    "Chunks",
    "ClosedError",
    "CopyResult",
    "DirtyBitmap",
    "DiscardedError",
    "Disk",
    "Error",
    "Extent",
    "FileEntry",
    "FileSystemError",
    "Files",
    "Finding",
    "ForkedError",
    "FormatError",
    "FreezeError",
    "FreezeReport",
    "GroupResult",
    "Image",
    "ImageError",
    "ImageInfo",
    "ImageLockedError",
    "InconsistentBitmapError",
    "InternalSnapshot",
    "Latency",
    "LostError",
    "MapEntry",
    "Mount",
    "MountSnapshot",
    "OutOfRangeError",
    "OutsideBitmapError",
    "PersistentBitmap",
    "Progress",
    "Qcow2Info",
    "Result",
    "Snapshot",
    "SnapshotBrokenError",
    "SnapshotFile",
    "SnapshotGroup",
    "Stats",
    "TruncatedError",
    "Volume",
    "__version__",
    "backup",
    "backup_group",
    "check",
    "create",
    "files",
    "mount",
    "open",
    "snapshot_group",
]

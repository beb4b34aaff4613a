"""Which file system a volume holds. Signatures only tell what to try: the file systems check for themselves."""

from __future__ import annotations

import struct

from pyfleece.filesystems.base import Window

# What has a signature, and where; the first that matches. Those that nobody here reads are named in messages.
_SIGNATURES = (
    ("luks", 0, b"LUKS\xba\xbe"),
    ("lvm", 512, b"LABELONE"),
    ("lvm", 0, b"LABELONE"),
    ("bitlocker", 3, b"-FVE-FS-"),
    ("xfs", 0, b"XFSB"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("refs", 3, b"ReFS\0\0\0\0"),
    ("squashfs", 0, b"hsqs"),
    ("apfs", 32, b"NXSB"),
    ("ext", 1080, b"\x53\xef"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("hfsplus", 1024, b"H+"),
    ("hfsplus", 1024, b"HX"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("md-raid", 4096, b"\xfc\x4e\x2b\xa9"),
    ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("iso9660", 32769, b"CD001"),
    ("ufs", 9564, b"\x54\x19\x01\x00"),
    ("ufs", 66908, b"\x19\x01\x54\x19"),
    ("btrfs", 65600, b"_BHRfS_M"),
)
UNREADABLE = {
    "luks": "an encrypted LUKS volume",
    "lvm": "an LVM physical volume",
    "bitlocker": "an encrypted BitLocker volume",
    "refs": "a ReFS file system",
    "squashfs": "a squashfs file system",
    "apfs": "an APFS container",
    "erofs": "an EROFS file system",
    "f2fs": "an F2FS file system",
    "swap": "swap space",
    "md-raid": "a member of a Linux RAID",
    "bcachefs": "a bcachefs file system",
    "btrfs": "a btrfs file system",
}
BY_TSK = ("ntfs", "exfat", "fat", "hfsplus", "iso9660", "ufs")


def detect(window: Window) -> str | None:
    """What the volume seems to hold; None: nothing that is known."""
    start = window.pread(min(window.size, 66912), 0)
    for kind, offset, signature in _SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            return kind
    return "fat" if _is_fat(start) else None


def _is_fat(start: bytes) -> bool:
    """FAT has no signature that must be there: its parameters have to make sense."""
    if len(start) < 512 or start[510:512] != b"\x55\xaa" or start[0] not in (0xEB, 0xE9):
        return False
    sector, cluster, reserved, fats = struct.unpack_from("<HBHB", start, 11)
    powers = sector in (512, 1024, 2048, 4096) and cluster and cluster & (cluster - 1) == 0
    return bool(powers and reserved and fats in (1, 2) and start[21] in (0xF0, *range(0xF8, 0x100)))

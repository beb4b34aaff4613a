"""What the tests of pyfleece.files share: trees with everything in them, file systems made of these by the real tools,
and records of both that can be compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import random
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import MIB, missing, require, run

import pyfleece

BAD_NAME = b"not UTF-8 \xff\xfe\x1b[31m"
LONG_NAME = b"n" * 255


@dataclass(frozen=True)
class Record:
    """What is compared of a file. None: not compared."""

    mode: int | None
    owner: tuple[int | None, int | None]
    mtime_ns: int | None
    links: int | None
    size: int | None                # of files and links
    content: str                    # SHA-256 of a file, target of a link, numbers of a device


def grow(top: Path, *, files: int = 60, seed: int = 1, special: bool = True) -> None:
    """A tree in `top`, which exists: files of many sizes, holes, links, odd names, modes and times."""
    rng = random.Random(seed)
    places = [top]
    for number in range(max(files // 20, 3)):
        places.append(rng.choice(places) / f"dir{number}")
        places[-1].mkdir()
    for number in range(files):
        path = rng.choice(places) / f"file {number}"
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 59, 61, 150, 1000, 4096, 5000, 40_000])))
        path.chmod(rng.choice([0o644, 0o600, 0o755, 0o444]))
        os.utime(path, ns=(rng.randrange(10**18), rng.randrange(2 * 10**18)))
    (top / "empty directory").mkdir(mode=0o750)
    with (top / "holes").open("wb") as file:
        file.truncate(9 * MIB)
        for offset in (0, 3 * MIB, 5 * MIB + 4096):
            file.seek(offset)
            file.write(rng.randbytes(12_345))
    if special:
        encoded = os.fsencode(top)
        for name in (BAD_NAME, LONG_NAME, "ünï".encode()):
            with open(encoded + b"/" + name, "wb") as file:
                file.write(name)
        os.symlink("file 0", top / "short link")
        os.symlink("x" * 90 + "/" + "y" * 700, top / "long link")
        os.symlink("/etc/passwd", top / "absolute link")
        os.link(top / "holes", places[-1] / "another name")
        os.mkfifo(top / "fifo", 0o640)
        if os.geteuid() == 0:
            os.mknod(top / "device", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
            (top / "device").chmod(0o660)
            os.chown(top / "empty directory", 1234, 70_000)
    for place in reversed(places[1:]):
        os.utime(place, ns=(10**18, rng.randrange(2 * 10**18)))


def on_disk(top: Path) -> dict[str, Record]:
    """A tree as the operating system has it."""
    found = {}
    for directory, names, files in os.walk(os.fsencode(top)):
        for name in names + files:
            path = os.path.join(directory, name)
            about = os.lstat(path)
            content = ""
            if stat.S_ISREG(about.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            elif stat.S_ISLNK(about.st_mode):
                content = os.fsdecode(os.readlink(path))
            elif stat.S_ISBLK(about.st_mode):
                content = f"{os.major(about.st_rdev)},{os.minor(about.st_rdev)}"
            sized = stat.S_ISREG(about.st_mode) or stat.S_ISLNK(about.st_mode)
            found[os.fsdecode(path[len(os.fsencode(top)) :])] = Record(
                about.st_mode,
                (about.st_uid, about.st_gid),
                about.st_mtime_ns,
                None if stat.S_ISDIR(about.st_mode) else about.st_nlink,
                about.st_size if sized else None,
                content,
            )
    found.pop("/lost+found", None)
    return found


def inside(files: pyfleece.Files, top: str = "/") -> dict[str, Record]:
    """The same as an image has it."""
    found = {}
    for entry in files.walk(top):
        about = entry.stat
        content = entry.target or ""
        if about.is_file:
            content = hashlib.sha256(files.open(entry).read()).hexdigest()
        elif about.device is not None:
            content = f"{about.device[0]},{about.device[1]}"
        found[entry.path.partition(":")[2] or entry.path] = Record(
            about.mode,
            (about.uid, about.gid),
            about.mtime_ns,
            None if about.is_directory else about.links,
            about.size if about.is_file or about.is_symlink else None,
            content,
        )
    for name in ("/", "/lost+found"):
        found.pop(name, None)
    return found


def assert_same(found: dict[str, Record], wanted: dict[str, Record], *, unit: int = 1, plain: bool = False) -> None:
    """`unit`: of times, in nanoseconds; `plain`: without modes, owners and numbers of links."""
    assert sorted(found) == sorted(wanted)
    for path, record in wanted.items():
        got = found[path]
        assert (got.size, got.content) == (record.size, record.content), path
        assert got.mtime_ns is not None and record.mtime_ns is not None
        assert abs(got.mtime_ns - record.mtime_ns) < unit, path
        if not plain:
            assert (got.mode, got.owner, got.links) == (record.mode, record.owner, record.links), path


def make_ext(image: Path, tree: Path | None, *options: str, size: int = 64 * MIB) -> None:
    require("mke2fs")
    with image.open("wb") as file:
        file.truncate(size)
    fill = ["-d", os.fspath(tree)] if tree is not None else []
    run("mke2fs", "-q", "-F", *options, *fill, image)


def require_tsk() -> None:
    if importlib.util.find_spec("pytsk3") is None:
        missing("pytsk3")


@contextmanager
def mounted(device: str | Path, place: Path, *command: str) -> Iterator[Path]:
    """Mounted, by `mount` or another command; unmounted at the end."""
    place.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        missing("root, to mount,")
    run(*(command or ("mount",)), device, place)
    try:
        yield place
    finally:
        run("umount", place)


def power_failure(top: Path, *, flush: bool) -> None:
    """From here on nothing reaches the disk; with `flush`, the log does before."""
    goingdown, log_flush, no_log_flush = 0x8004587D, 1, 2
    directory = os.open(top, os.O_RDONLY)
    try:
        fcntl.ioctl(directory, goingdown, struct.pack("I", log_flush if flush else no_log_flush))
    finally:
        os.close(directory)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512

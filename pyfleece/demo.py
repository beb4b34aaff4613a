"""`pyfleece demo`: back up a real file system while it is being destroyed, and prove that the backup is whole.

An ext4 image is made from real files. Threads that stand for a guest write 4 KiB blocks all over it, as fast as they
can, and never stop: until the cut they write back what they read, so that it is known what has to be in the backup;
from the cut on they write random bytes over everything, superblock and all. The backup starts two seconds after the
cut, when much of what it needs exists nowhere but in the snapshot's store.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

from pyfleece.backup import Result, backup
from pyfleece.disk import Disk
from pyfleece.image import create
from pyfleece.image import open as open_image
from pyfleece.progress import Bar, human
from pyfleece.snapshot import Stats

BLOCK = 4096
LEAST_SIZE = 32 << 20
DEFAULT_SIZE = 384 << 20

_GUEST_THREADS = 4
_MEASURE, _HEAD_START = 2.0, 2.0                        # seconds
_MOST_FILES = 1000                                      # of each root
_MOST_FILE_SIZE = 32 << 20
_FILL = 0.4                                             # of the disk is filled with files, at most


class DemoError(Exception):
    """The demo can't be run here, or found that something is wrong."""


def run(size: int = DEFAULT_SIZE, keep: str | None = None, speed: int | None = None) -> None:
    """Run all of it, in a temporary directory, or in `keep`, where the disk and its backup then stay.

    `speed`: a limit for the backup in bytes per second. Raises DemoError unless everything was proved.
    """
    if size < LEAST_SIZE:
        raise DemoError(f"a disk of {human(size)} is too small for this; it takes {human(LEAST_SIZE)} at least")
    size -= size % BLOCK
    tools = _find_tools("mkfs.ext4", "e2fsck", "debugfs")
    begun = time.monotonic()
    with _directory(keep) as work:
        if shutil.disk_usage(work).free < 3 * size:
            raise DemoError(f"{work} has less than {human(3 * size)} free; pass --keep DIR or --size, or set TMPDIR")
        disk, copy = os.path.join(work, "disk.raw"), os.path.join(work, "backup.raw")
        sums = _make_disk(tools, work, disk, size)
        measured = _back_up(disk, copy, speed)
        _print_table(measured)
        _prove(tools, work, disk, copy, sums, measured)
        print(f"\nAll of it holds. {time.monotonic() - begun:.0f} s in all.")
        if keep is not None:
            print(f"\n{disk} is the disk as the guest left it, {copy} its backup. Look for yourself:")
            print(f"    e2fsck -fn {copy}\n    debugfs -R 'ls -l /' {copy}\n    pyfleece map {copy}")


# ---- the disk ----


def _make_disk(tools: dict[str, str], work: str, disk: str, size: int) -> dict[str, str]:
    """An ext4 image of real files. Returns their checksums, by their names on it."""
    _step("making an ext4 disk of real files")
    tree = os.path.join(work, "tree")
    sums: dict[str, str] = {}
    total = 0
    for path, name in _real_files(int(size * _FILL)):
        with open(path, "rb") as file:
            data = file.read()
        to = os.path.join(tree, name)
        os.makedirs(os.path.dirname(to), exist_ok=True)
        with open(to, "wb") as file:
            file.write(data)
        sums[name] = hashlib.sha256(data).hexdigest()
        total += len(data)
    create(disk, size).close()
    inodes = str(2 * len(sums) + 1024)                  # for the files, and for their directories
    status, said = _call([tools["mkfs.ext4"], "-q", "-F", "-b", str(BLOCK), "-N", inodes, "-d", tree, disk])
    if status:
        raise DemoError(f"mkfs.ext4 failed: {said}")
    shutil.rmtree(tree)
    _say("disk", f"{human(size)}, ext4 with {len(sums):,} files of this system, {human(total)}")
    return sums


def _real_files(most_bytes: int) -> Iterator[tuple[str, str]]:
    """What to put on the disk: the running Python's library, then, where there is room, the system's.
    Yields paths, and names on the disk."""
    paths = sysconfig.get_paths()
    roots = dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"], "/usr/lib", "/usr/share"])
    seen: set[str] = set()                              # of directories: one root may be inside another
    total = 0
    for number, root in enumerate(roots):
        count = 0
        for directory, subdirectories, names in os.walk(root):
            subdirectories.sort()
            if os.path.realpath(directory) in seen or count == _MOST_FILES:
                subdirectories.clear()
                continue
            seen.add(os.path.realpath(directory))
            for name in sorted(names):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                taken = -(-status.st_size // BLOCK) * BLOCK
                if not stat.S_ISREG(status.st_mode) or taken > min(_MOST_FILE_SIZE, most_bytes - total):
                    continue
                if not os.access(path, os.R_OK):
                    continue
                yield path, os.path.join(str(number), os.path.relpath(path, root))
                count += 1
                total += taken
                if total > 0.95 * most_bytes:
                    return
                if count == _MOST_FILES:
                    break


# ---- the guest ----


class _Guest:
    """Threads that read and write random blocks, as fast as they can, until the `with` block is left."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._noise = memoryview(os.urandom(256 * BLOCK))
        self._written = [0] * _GUEST_THREADS            # each changed by one thread only
        self._destroys = False
        self._stop = False
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._live, args=(n,), daemon=True) for n in range(_GUEST_THREADS)]

    def destroy(self) -> None:
        """From now on, write random bytes."""
        self._destroys = True

    @property
    def written(self) -> int:
        """Blocks written so far. Raises what ended a thread: the guest must never see an error."""
        if self._failure is not None:
            raise DemoError(f"a guest write failed: {self._failure}") from self._failure
        return sum(self._written)

    def rate(self, seconds: float) -> float:
        """Let it work for a while; returns its writes per second."""
        written, since = self.written, time.monotonic()
        time.sleep(seconds)
        return (self.written - written) / (time.monotonic() - since)

    def _live(self, number: int) -> None:
        choose = random.Random(number).randrange
        blocks = self._disk.size // BLOCK
        block = bytearray(BLOCK)
        try:
            while not self._stop:
                offset = choose(blocks) * BLOCK
                self._disk.readinto(block, offset)
                if self._destroys:
                    at = choose(256) * BLOCK
                    self._disk.pwrite(self._noise[at : at + BLOCK], offset)
                else:
                    self._disk.pwrite(block, offset)
                self._written[number] += 1
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> _Guest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()


# ---- the backup ----


@dataclass(frozen=True)
class _Measured:
    result: Result
    stats: Stats                # after the backup
    rate_before: float          # the guest's, in writes per second
    rate_meanwhile: float


def _back_up(disk: str, copy: str, speed: int | None) -> _Measured:
    with open_image(disk, "r+") as source, Disk(source) as live:
        for offset in range(0, live.size, 1 << 20):     # so that allocation and caching change nothing below
            live.pwrite(live.pread(min(1 << 20, live.size - offset), offset), offset)
        with _Guest(live) as guest:
            return _back_up_under(guest, live, copy, speed)


def _back_up_under(guest: _Guest, live: Disk, copy: str, speed: int | None) -> _Measured:
    _step(f"the guest writes: {_GUEST_THREADS} threads, random blocks of {human(BLOCK)}")
    before = guest.rate(_MEASURE)
    cut = time.perf_counter()
    with live.snapshot() as snapshot:
        cut = time.perf_counter() - cut
        guest.destroy()
        written, since = guest.written, time.monotonic()
        _say("cut", f"took {_duration(cut)}; from now on the guest overwrites everything with random bytes")
        _step("the guest overwrites the disk; the backup starts in a moment")
        time.sleep(_HEAD_START)
        _clear()
        result = backup(snapshot, copy, speed=speed, progress=Bar(label="backup"))
        meanwhile = (guest.written - written) / (time.monotonic() - since)
        return _Measured(result, snapshot.stats, before, meanwhile)


def _print_table(measured: _Measured) -> None:
    result, stats = measured.result, measured.stats
    latency = stats.latency
    share = measured.rate_meanwhile / measured.rate_before
    percentiles = f"p50 {_duration(latency.p50)}, p99 {_duration(latency.p99)}, max {_duration(latency.max)}"
    saved = f"{stats.clusters_saved:,} clusters, {human(stats.bytes_copied)}; {stats.zero_clusters:,} more were zeros"
    held = f"{human(stats.staged_peak)} in memory, {human(stats.fleecing_peak)} in the fleecing image"
    rows = (
        ("backup", f"{human(result.total)} in {result.seconds:.2f} s: {human(result.rate)}/s"),
        ("", f"{human(result.data_bytes)} of data, {human(result.zero_bytes)} of zeros"),
        ("guest without", f"{measured.rate_before:,.0f} writes/s"),
        ("guest with snapshot", f"{measured.rate_meanwhile:,.0f} writes/s, {share:.0%} of that"),
        ("added to a write", percentiles),
        ("saved from writes", saved),
        ("held at most", held),
    )
    print()
    for name, text in rows:
        _say(name, text)


# ---- the proof ----


def _prove(
    tools: dict[str, str], work: str, disk: str, copy: str, sums: dict[str, str], measured: _Measured
) -> None:
    print()
    status, said = _call([tools["e2fsck"], "-fn", copy])
    _claim(status == 0, "the backup passes e2fsck -fn", said)

    _step("reading the files back")
    restored = os.path.join(work, "restored")
    os.mkdir(restored)
    _, said = _call([tools["debugfs"], "-R", f'rdump / "{restored}"', copy])
    found = _checksums(restored)
    wrong = sorted(name for name, checksum in sums.items() if found.get(name) != checksum)
    why = f"{len(wrong)} are missing or differ, {wrong[0]} among them; {said}" if wrong else ""
    _claim(not wrong, f"{len(sums):,} files read back from it have the checksums of the originals", why)
    shutil.rmtree(restored)

    share = _difference(disk, copy)
    status, _ = _call([tools["e2fsck"], "-fn", disk])
    fails = ", and e2fsck fails on it" if status else ""
    _claim(share > 0, f"the live disk has changed: {share:.0%} of its blocks differ{fails}", "it equals its backup")

    stats = measured.stats
    left = stats.staged_bytes + stats.fleecing_bytes
    _claim(left == 0, "the fleecing image is empty", f"{human(left)} of old data is still held")
    remains = [name for name in os.listdir(work) if name not in ("disk.raw", "backup.raw")]
    remains += [name for name in _open_files() if name.startswith(os.path.realpath(work) + os.sep)]
    _claim(not remains, "and gone: it never had a name, and nobody has it open", f"left: {', '.join(remains)}")


def _checksums(top: str) -> dict[str, str]:
    sums = {}
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                sums[os.path.relpath(path, top)] = hashlib.sha256(file.read()).hexdigest()
    return sums


def _difference(one: str, other: str) -> float:
    """The share of blocks that differ."""
    with open(one, "rb") as a, open(other, "rb") as b, _mapped(a) as x, _mapped(b) as y:
        blocks = range(0, len(x), BLOCK)
        return sum(x[at : at + BLOCK] != y[at : at + BLOCK] for at in blocks) / len(blocks)


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def _open_files() -> list[str]:
    """What this process has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:                                 # it was the listing's own
            pass
    return names


# ---- around it ----


def _find_tools(*names: str) -> dict[str, str]:
    # Users who are not root often have no sbin in their PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} not found: install e2fsprogs (apt-get install e2fsprogs)")
    return {name: where for name, where in found.items() if where is not None}


@contextmanager
def _directory(keep: str | None) -> Iterator[str]:
    """Where everything happens. By default not in /tmp: that may be in memory, and this takes a few times the size."""
    if keep is not None:
        os.makedirs(keep, exist_ok=True)
        if os.listdir(keep):
            raise DemoError(f"{keep} is not empty: nothing there is overwritten")
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="pyfleece-demo-", dir=os.environ.get("TMPDIR", "/var/tmp")) as work:
        yield work


def _call(command: list[str]) -> tuple[int, str]:
    """Its exit status, and the last line that it said. One that takes very long failed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, "it took more than a minute"
    said = done.stdout.decode(errors="replace").strip().splitlines()
    return done.returncode, said[-1] if said else f"exit status {done.returncode}"


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _claim(holds: bool, what: str, why: str) -> None:
    if not holds:
        raise DemoError(f"not proved: {what} ({why})")
    _say("proved", what)


def _say(name: str, text: str) -> None:
    _clear()
    print(f"{name:<19}  {text}", flush=True)


def _step(text: str) -> None:
    """What goes on now; the next line takes its place. On a terminal only."""
    if sys.stdout.isatty():
        _clear()
        print(f"... {text}", end="", flush=True)


def _clear() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)

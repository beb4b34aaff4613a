"""The engine on qcow2 images: as source under load, as fleecing image, as target; judged by QEMU's tools, and an ext4
by e2fsck.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import c_programs
import pytest
import qcow2_kit as kit
from conftest import MIB, require, run, wait_for
from qcow2_kit import KIB, SECTOR

import pyfleece

pytestmark = pytest.mark.usefixtures("no_leaks")
POLICIES = ("break-snapshot", "break-guest-write", "lose-range")
SEED = int(os.environ.get("PYFLEECE_SEED", "1"))


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img", "qemu-io")


class Guest:
    """Threads that write to a disk, each to sectors of its own, in clusters that all of them use; and what must be on
    the disk.

    `pause()` gives the disk to the caller between two writes of each thread. Discards take whole clusters of a part of
    the disk that each thread has for itself.
    """

    def __init__(self, disk: pyfleece.Disk, *, threads: int = 3, cluster_size: int = 64 * KIB) -> None:
        self.disk, self.cluster = disk, cluster_size
        self.known = bytearray(disk.pread(disk.size, 0))
        self.failures: list[BaseException] = []
        self.writes = 0
        self._stop = threading.Event()
        self._locks = [threading.Lock() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Guest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    @contextmanager
    def pause(self) -> Iterator[None]:
        for lock in self._locks:
            lock.acquire()
        try:
            yield
        finally:
            for lock in self._locks:
                lock.release()

    def wait_for_writes(self, count: int) -> None:
        until = self.writes + count
        wait_for(lambda: self.writes >= until or self.failures, 60)

    def _work(self, number: int) -> None:
        rng = random.Random(f"{SEED} {number}")
        try:
            while not self._stop.is_set():
                with self._locks[number]:
                    self._change(rng, number)
                    self.writes += 1
                time.sleep(0)                   # a lock is not handed over in order: let the one who pauses have it
        except BaseException as error:
            self.failures.append(error)

    def _change(self, rng: random.Random, number: int) -> None:
        """The first half of the disk is for writes, in stripes of a sector; the second half for whole clusters too."""
        disk, threads, half = self.disk, len(self._locks), self.disk.size // 2
        kind = rng.random()
        if kind < 0.6:
            groups = half // (SECTOR * threads)
            offset = (rng.randrange(groups) * threads + number) * SECTOR
            data = rng.randbytes(SECTOR)
            disk.pwrite(data, offset)
            self.known[offset : offset + SECTOR] = data
            return
        part = (disk.size - half) // threads // self.cluster * self.cluster
        start = -(-half // self.cluster) * self.cluster + part * number
        length = min(rng.choice([self.cluster, 2 * self.cluster, 3000]), part - self.cluster)
        offset = start + rng.randrange(part - self.cluster - length + 1)
        if kind < 0.75:
            data = rng.randbytes(length)
            disk.pwrite(data, offset)
            self.known[offset : offset + length] = data
        elif kind < 0.85:
            disk.zero(length, offset)
            self.known[offset : offset + length] = bytes(length)
        else:
            offset = offset // self.cluster * self.cluster
            length = self.cluster * rng.choice([1, 2])
            length = min(length, start + part - self.cluster - offset)
            if length > 0:
                disk.discard(length, offset)
                self.known[offset : offset + length] = disk.pread(length, offset)       # undefined; it must stay so


def make_disk(path: Path, size: int, options: str = "", *, internal_snapshot: bool = False) -> None:
    """An image with data in every second MiB."""
    kit.tool("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, f"{size}")
    commands: list[str] = []
    for number in range(0, size // MIB, 2):
        commands += ["-c", f"write -q -P {number % 251 + 1} {number}M 1M"]
    kit.tool("qemu-io", "-f", "qcow2", *commands, path)
    if internal_snapshot:
        kit.tool("qemu-img", "snapshot", "-c", "before", path)


def check(path: Path) -> None:
    kit.tool("qemu-img", "check", "-q", "-f", "qcow2", path)


def as_qemu_reads(path: Path, *options: str) -> bytes:
    out = path.with_suffix(".out")
    kit.tool("qemu-img", "convert", *options, "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


@pytest.mark.parametrize("policy", POLICIES)
def test_backup_under_load_from_qcow2_by_qcow2_to_qcow2(policy: str, tmp_path: Path) -> None:
    """Source, fleecing image and target; the source has an internal snapshot as well, which stays."""
    source, fleecing, target = (tmp_path / name for name in ("vm.qcow2", "fleece.qcow2", "backup.qcow2"))
    size = 12 * MIB + 3 * SECTOR
    make_disk(source, size, "cluster_size=16k", internal_snapshot=True)
    before = as_qemu_reads(source, "-l", "before")
    image, store = pyfleece.open(source, "r+"), pyfleece.create(fleecing, size)
    with image, store, pyfleece.Disk(image) as disk:
        with Guest(disk, cluster_size=16 * KIB) as guest:
            for number in range(2):
                guest.wait_for_writes(40)
                with guest.pause():
                    state = bytes(guest.known)
                    # A stage of few clusters: nearly all goes through the fleecing image.
                    snapshot = disk.snapshot(store, on_cbw_error=policy, stage_size=256 * KIB, cluster_size=4 * KIB)
                with snapshot:
                    guest.wait_for_writes(150)
                    assert snapshot.pread(size, 0) == state
                    result = pyfleece.backup(snapshot, target, speed=80 * MIB if number else None)
                assert result.lost_bytes == 0
                assert as_qemu_reads(target) == state
                check(target)
        assert disk.pread(size, 0) == guest.known
        disk.flush()
    assert as_qemu_reads(source) == guest.known
    assert as_qemu_reads(source, "-l", "before") == before
    check(source)
    check(fleecing)


def test_a_qcow2_fleecing_image_gives_its_space_back(tmp_path: Path) -> None:
    """What the backup has copied is discarded, and the file of the fleecing image is punched."""
    source, fleecing = tmp_path / "vm.qcow2", tmp_path / "fleece.qcow2"
    size = 24 * MIB
    make_disk(source, size)
    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk:
        for offset in range(MIB, size, 2 * MIB):
            disk.pwrite(os.urandom(MIB), offset)
        state = disk.pread(size, 0)
        with pyfleece.create(fleecing, size) as store:
            with disk.snapshot(store, stage_size=MIB) as snapshot:
                for offset in range(0, size, MIB):
                    disk.pwrite(os.urandom(MIB), offset)
                wait_for(lambda: snapshot.stats.bytes_spilled >= 20 * MIB, 30)
                assert kit.blocks(fleecing) >= 20 * MIB
                pyfleece.backup(snapshot, tmp_path / "backup.raw")
            store.flush()
            assert kit.blocks(fleecing) < MIB, "discarded clusters still have their space"
            # The space is used again: a second round makes the file no longer.
            length = fleecing.stat().st_size
            with disk.snapshot(store, stage_size=MIB) as snapshot:
                for offset in range(0, size, MIB):
                    disk.pwrite(os.urandom(MIB), offset)
                wait_for(lambda: snapshot.stats.bytes_spilled >= 20 * MIB, 30)
                assert snapshot.pread(size, 0) != state
            store.flush()
            assert fleecing.stat().st_size < length + 2 * MIB
    assert (tmp_path / "backup.raw").read_bytes() == state
    check(fleecing)
    assert kit.blocks(fleecing) < MIB


def test_a_fleecing_image_gives_space_back_without_a_flush(tmp_path: Path) -> None:
    """Nobody flushes a fleecing image while a backup runs."""
    path = tmp_path / "fleece.qcow2"
    size = 72 * MIB
    with pyfleece.create(path, size) as image:
        for offset in range(0, size, MIB):
            image.pwrite(os.urandom(MIB), offset)
        assert kit.blocks(path) >= size
        for offset in range(0, size, MIB):
            image.discard(MIB, offset)
            time.sleep(0.002)       # a commit in the background begins on the way, and is not about all of it
        wait_for(lambda: kit.blocks(path) < size // 2, 60)
    assert kit.blocks(path) < MIB
    check(path)


def test_target_keeps_holes_and_zeros(tmp_path: Path) -> None:
    """A target takes no more space than the data, with and without compression, and stays sparse inside."""
    source = tmp_path / "vm.qcow2"
    size = 16 * MIB
    make_disk(source, size)                     # half of it; each MiB compresses well
    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk:
        disk.zero(MIB, 0)
        with disk.snapshot() as snapshot:
            state = snapshot.pread(size, 0)
            pyfleece.backup(snapshot, tmp_path / "plain.qcow2")
        with disk.snapshot() as snapshot:
            pyfleece.backup(snapshot, tmp_path / "small.qcow2", compress=True)
    for name in ("plain.qcow2", "small.qcow2"):
        assert as_qemu_reads(tmp_path / name) == state
        check(tmp_path / name)
    assert 7 * MIB <= kit.blocks(tmp_path / "plain.qcow2") < 8 * MIB
    assert kit.blocks(tmp_path / "small.qcow2") < MIB
    kinds = run("qemu-img", "map", "--output=json", tmp_path / "small.qcow2")
    assert '"compressed": true' in kinds or '"data": true' in kinds


def test_compressed_target_of_random_data_under_load(tmp_path: Path) -> None:
    """What does not get smaller is written as it is."""
    source, target = tmp_path / "vm.qcow2", tmp_path / "backup.qcow2"
    size = 6 * MIB + SECTOR
    make_disk(source, size)
    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk, Guest(disk) as guest:
        guest.wait_for_writes(100)
        with guest.pause():
            state = bytes(guest.known)
            snapshot = disk.snapshot()
        with snapshot:
            pyfleece.backup(snapshot, target, compress=True)
    assert as_qemu_reads(target) == state
    check(target)


def test_incremental_over_the_previous_backup(tmp_path: Path) -> None:
    """A chain of backups: each holds what changed, the previous one is its backing file."""
    source, size = tmp_path / "vm.qcow2", 8 * MIB
    make_disk(source, size)
    rng = random.Random(SEED)
    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk:
        disk.bitmaps.add("daily", granularity=64 * KIB)
        states = []
        with disk.snapshot(bitmap=None) as snapshot:
            states.append(snapshot.pread(size, 0))
            pyfleece.backup(snapshot, tmp_path / "0.qcow2")
        for number in range(1, 4):
            for _ in range(5):
                disk.pwrite(rng.randbytes(5000), rng.randrange(size - 5000))
            disk.zero(200 * KIB, rng.randrange(size - 200 * KIB))
            disk.discard(2 * MIB, number * MIB)
            with disk.snapshot(bitmap="daily") as snapshot:
                states.append(disk.pread(size, 0))
                path, below = tmp_path / f"{number}.qcow2", f"{number - 1}.qcow2"
                with pyfleece.create(path, size, backing=below, backing_format="qcow2") as target:
                    pyfleece.backup(snapshot, target)
    for number, state in enumerate(states):
        path = tmp_path / f"{number}.qcow2"
        check(path)
        assert as_qemu_reads(path) == state
        with pyfleece.open(path) as image:
            assert image.pread(size, 0) == state
        assert number == 0 or kit.blocks(path) < 3 * MIB, "an incremental holds what changed"


def test_discard_beside_a_write_to_the_same_cluster(tmp_path: Path) -> None:
    """With a snapshot that has to save the cluster first. Each sector then has what was written or, where the discard
    came later, zeros; never anything else, and the neighbours' sectors are what they were.
    """
    path, cluster, count = tmp_path / "vm.qcow2", 64 * KIB, 24
    make_disk(path, count * cluster, "cluster_size=64k", internal_snapshot=True)
    with pyfleece.open(path, "r+") as image, pyfleece.Disk(image) as disk:
        for round_number in range(12):
            state = disk.pread(disk.size, 0)
            barrier = threading.Barrier(3)
            failures: list[BaseException] = []

            def guarded(work: Callable[[], None], barrier: threading.Barrier, failures: list[BaseException]) -> None:
                try:
                    for _ in range(count):
                        barrier.wait(30)
                        work()
                except BaseException as error:
                    failures.append(error)
                    barrier.abort()

            mine = bytes([round_number + 1]) * 4096
            places = [iter(range(0, disk.size, cluster)) for _ in range(3)]
            works: list[Callable[[], None]] = [
                lambda mine=mine, at=places[0]: disk.pwrite(mine, next(at) + 8192),
                lambda mine=mine, at=places[1]: disk.pwrite(mine, next(at) + 20480),
                lambda at=places[2]: disk.discard(cluster, next(at)),
            ]
            with disk.snapshot(cluster_size=4096) as snapshot:
                threads = [threading.Thread(target=guarded, args=(work, barrier, failures)) for work in works]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if failures:
                    raise failures[0]
                assert snapshot.pread(disk.size, 0) == state
            now = disk.pread(disk.size, 0)
            for offset in range(0, disk.size, 4096):
                inside = offset % cluster
                allowed = {bytes(4096), state[offset : offset + 4096]}      # a discard is a hint
                if inside in (8192, 20480):
                    allowed = {bytes(4096), mine}
                assert now[offset : offset + 4096] in allowed, f"round {round_number}, offset {offset}"
            for offset in range(0, disk.size, cluster):
                disk.pwrite(os.urandom(cluster), offset)
    check(path)


RACES = [("cluster_size=4096", False), ("cluster_size=65536", True), ("compat=0.10,cluster_size=4096", False)]


@pytest.mark.parametrize("flavour", c_programs.FLAVOURS)
@pytest.mark.parametrize(("options", "backing"), RACES)
def test_many_changes_of_one_cluster_at_once(flavour: str, options: str, backing: bool, tmp_path: Path) -> None:
    """Writes, discards, zeroing, copy-on-write and, with snapshots, copy-before-write, all of one cluster."""
    for number, more in enumerate(([], ["--snapshots"])):
        path = kit.make_race_image(tmp_path / "race.qcow2", options, backing)
        before = as_qemu_reads(path, "-l", "before")
        rounds = ["--rounds", "120", "--seed", f"{SEED + number}"]
        c_programs.run(flavour, "qcow2_race", path, *rounds, *more)
        check(path)
        assert as_qemu_reads(path, "-l", "before") == before


# ---- a real file system ----


class FileSystem:
    """An ext4 in two states that are both valid, and a file in it whose blocks anybody may write at any time."""

    def __init__(self, directory: Path, size: int = 48 * MIB) -> None:
        files, path = directory / "files", directory / "one.raw"
        files.mkdir()
        rng = random.Random(SEED)
        for number in range(40):
            (files / f"file{number}").write_bytes(rng.randbytes(rng.randrange(1, 100_000)))
        (files / "victim").write_bytes(rng.randbytes(6 * MIB))
        self.text = rng.randbytes(300_000)
        (files / "precious").write_bytes(self.text)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", files, path, f"{size >> 10}k")
        other = directory / "two.raw"
        other.write_bytes(path.read_bytes())
        for number in range(12):
            more = directory / f"more{number}"
            more.write_bytes(rng.randbytes(rng.randrange(1, 200_000)))
            run("debugfs", "-w", "-R", f"write {more} more{number}", other)
            run("debugfs", "-w", "-R", f"rm file{number}", other)
        self.states = [path.read_bytes(), other.read_bytes()]
        blocks = run("debugfs", "-R", "blocks /victim", path).split()
        self.victim = [int(word) for word in blocks if word.isdigit()]
        taken = set(self.victim)
        self.differing = [
            block
            for block in range(size // 4096)
            if block not in taken and self.block(0, block) != self.block(1, block)
        ]
        assert len(self.victim) >= 1500 and len(self.differing) > 10
        for state in (path, other):
            assert_clean(state)

    def block(self, state: int, number: int) -> bytes:
        return self.states[state][number * 4096 : (number + 1) * 4096]


def assert_clean(raw: Path) -> None:
    run("e2fsck", "-fn", raw)


def test_ext4_under_load(tmp_path: Path) -> None:
    """The file system goes from one state to the other and back, in many small writes by several threads, while others
    overwrite a file, and a cut is made whenever it is in one of them. Source and backup pass e2fsck.
    """
    require("mke2fs", "e2fsck", "debugfs")
    system = FileSystem(tmp_path)
    source = tmp_path / "vm.qcow2"
    kit.tool("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=16k", tmp_path / "one.raw", source)
    kit.tool("qemu-img", "snapshot", "-c", "before", source)
    transition, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []
    transitions = 0

    def guarded(work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(f"{SEED} {seed}")
        try:
            while not stop.is_set():
                work(rng)
        except BaseException as error:
            failures.append(error)

    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk:

        def overwrite(rng: random.Random) -> None:
            block, kind = rng.choice(system.victim), rng.random()
            if kind < 0.8:
                disk.pwrite(rng.randbytes(4096), block * 4096)
            elif kind < 0.9:
                disk.zero(4096, block * 4096)
            else:
                disk.discard(4096, block * 4096)

        def change_state(rng: random.Random) -> None:
            nonlocal transitions
            with transition:
                transitions += 1
                order = rng.sample(system.differing, len(system.differing))

                def write(some: list[int]) -> None:
                    for block in some:
                        disk.pwrite(system.block(transitions % 2, block), block * 4096)

                helper = threading.Thread(target=write, args=(order[::2],))
                helper.start()
                write(order[1::2])
                helper.join()
            time.sleep(0)

        threads = [threading.Thread(target=guarded, args=(work, n)) for n, work in enumerate([overwrite, change_state])]
        threads.append(threading.Thread(target=guarded, args=(overwrite, 7)))
        for thread in threads:
            thread.start()
        try:
            for number in range(3):
                wait_for(lambda seen=transitions: transitions > seen + 2 or failures, 60)
                with transition:
                    snapshot = disk.snapshot(on_cbw_error=POLICIES[number], stage_size=MIB)
                with snapshot:
                    if number == 2:
                        pyfleece.backup(snapshot, tmp_path / "backup2.qcow2", compress=True)
                    else:
                        pyfleece.backup(snapshot, tmp_path / f"backup{number}.qcow2", speed=60 * MIB)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures, failures
    for path in [source, *(tmp_path / f"backup{number}.qcow2" for number in range(3))]:
        check(path)
        raw = path.with_suffix(".e2fsck")
        kit.tool("qemu-img", "convert", "-O", "raw", path, raw)
        assert_clean(raw)
        kit.tool("debugfs", "-R", f"dump /precious {raw}.precious", raw)
        assert Path(f"{raw}.precious").read_bytes() == system.text
    assert as_qemu_reads(source, "-l", "before") == system.states[0]

"""A long-running stress through the Python API, which shows that nothing grows.

    python tests/soak.py --seconds 600 [--seed N]

Two disks are written by several threads, whose regions share clusters but no bytes, while agents cut snapshots and
back them up in all ways there are: to files, images, streams, in chunks, as incrementals, as groups; with limits that
are too small, with targets and fleecing images that fail; and they cancel and close in the middle. Every byte that
comes back is compared with the model at the cut. The time is divided into cycles; at the end of each all is closed,
the sources are compared with the model, and memory, open files, threads, mappings and files on disk are counted. It
ends with status 0 if all was right and nothing grew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import io
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyfleece
from pyfleece.testing import FaultyImage

MIB = 1 << 20
SIZE = 6 * MIB + 513
WRITERS = 2                     # of each disk
AGENTS = 3
CYCLE = 2.0                     # seconds
# Owned bytes come in turns of so many; neither is a multiple of a cluster.
LANES = (3_000, 200_000)
# What may be added over the whole run, after the first quarter of it: noise of the allocators.
MOST_MEMORY = 2 * MIB
MOST_MAPPINGS = 8

# glibc keeps what was freed, a lot of it and in one arena for each thread; then nobody could see what we keep.
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class World:
    """A disk under load, and what it holds."""

    def __init__(self, path: Path, seed: str) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.truth = bytearray(self.random.randbytes(SIZE))
        self.path.write_bytes(self.truth)
        self.locks = [threading.Lock() for _ in range(WRITERS)]

    def open(self) -> None:
        self.source = pyfleece.open(self.path, "r+")
        self.disk = pyfleece.Disk(self.source)

    def close(self) -> None:
        self.source.close()
        assert self.path.read_bytes() == self.truth, "the source is not what its guest wrote"

    @contextlib.contextmanager
    def still(self) -> Iterator[bytes]:
        """No writes run; what the disk holds."""
        with contextlib.ExitStack() as stack:
            for lock in self.locks:
                stack.enter_context(lock)
            yield bytes(self.truth)

    def write(self, number: int, rng: random.Random) -> None:
        """One change to a range that is this writer's."""
        half = SIZE // 2
        lane = LANES[0] if rng.random() < 0.8 else LANES[1]
        base, end = (0, half) if lane == LANES[0] else (half, SIZE)
        turn = rng.randrange((end - base) // (lane * WRITERS) + 1) * WRITERS + number
        start = base + turn * lane + rng.randrange(lane)
        length = min(rng.randrange(1, lane), base + (turn + 1) * lane - start, end - start)
        if length <= 0:
            return
        kind = rng.random()
        with self.locks[number]:
            old = bytes(self.truth[start : start + length])
            new = rng.randbytes(length) if kind < 0.8 else bytes(length)
            try:
                if kind < 0.8:
                    self.disk.pwrite(new, start)
                elif kind < 0.9:
                    self.disk.zero(length, start)
                else:
                    self.disk.discard(length, start)
                    new = self.disk.pread(length, start)        # undefined, but it stays
                    assert all(n in (o, 0) for n, o in zip(new, old))
            except pyfleece.ImageError as error:                # a snapshot with "break-guest-write"
                assert error.side == "fleecing", error
                new = self.disk.pread(length, start)            # of a long write a part may have been done
                assert all(n in pair for n, *pair in zip(new, old, new))
            self.truth[start : start + length] = new


@dataclass
class Sample:
    memory: int
    mappings: int
    files: int
    threads: int


def sample() -> Sample:
    gc.collect()
    LIBC.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mappings = Path("/proc/self/maps").read_text().count("\n")
    files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    return Sample(pages * os.sysconf("SC_PAGESIZE"), mappings, files, threads)


class Agent:
    """Cuts and copies, one scenario after the other."""

    def __init__(self, worlds: list[World], directory: Path, rng: random.Random, count: Counter[str]) -> None:
        self.worlds, self.directory, self.random, self.count = worlds, directory, rng, count

    def run_one(self) -> None:
        scenario: Callable[[World], None] = self.random.choice(
            [
                self.to_file,
                self.to_image,
                self.to_stream,
                self.in_chunks,
                self.by_reading,
                self.incremental,
                self.group,
                self.cancelled,
                self.closed_in_between,
                self.too_small_a_limit,
                self.failing_fleecing,
                self.failing_target,
            ]
        )
        scenario(self.random.choice(self.worlds))
        self.count[scenario.__name__.replace("_", " ")] += 1
        left = os.listdir(self.directory)
        assert left == [], f"{scenario.__name__} left {left}"

    def options(self) -> dict[str, object]:
        cluster = self.random.choice([4096, 4096, 16384, 65536])
        return {
            "cluster_size": cluster,
            "stage_size": cluster * self.random.choice([1, 3, 20, 400]),
            "cbw_timeout": 30.0,
        }

    def cut(self, world: World, **options: object) -> tuple[pyfleece.Snapshot, bytes]:
        with world.still() as state:
            return world.disk.snapshot(**{**self.options(), **options}), state  # type: ignore[arg-type]

    def granularity(self, snapshot: pyfleece.Snapshot) -> int | None:
        return self.random.choice([None, snapshot.cluster_size, 3 * snapshot.cluster_size, 1 << 20])

    def target(self) -> Path:
        return self.directory / "backup.raw"

    def expect_target(self, state: bytes) -> None:
        assert self.target().read_bytes() == state, "the backup is not the disk at the cut"
        self.target().unlink()

    @staticmethod
    def empty(snapshot: pyfleece.Snapshot) -> None:
        """Nothing is kept, once the write to the fleecing image that may be running has ended."""
        for _ in range(200):
            stats = snapshot.stats
            if stats.fleecing_bytes == stats.staged_bytes == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"after the backup the store is not empty: {stats}")

    # ---- backups that succeed ----

    def to_file(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot:
            workers = self.random.choice([None, 1, 5])
            pyfleece.backup(snapshot, self.target(), granularity=self.granularity(snapshot), workers=workers)
            self.empty(snapshot)
        self.expect_target(state)

    def to_image(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot, pyfleece.create(self.target(), SIZE + 1000) as image:
            image.pwrite(b"\xee" * image.size, 0)
            pyfleece.backup(snapshot, image, granularity=self.granularity(snapshot))
            self.empty(snapshot)
            assert image.pread(1000, SIZE) == b"\xee" * 1000
        os.truncate(self.target(), SIZE)
        self.expect_target(state)

    def to_stream(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot, io.BytesIO() as stream:
            pyfleece.backup(snapshot, stream, granularity=self.granularity(snapshot))
            self.empty(snapshot)
            assert stream.getvalue() == state

    def in_chunks(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot, snapshot.chunks(granularity=self.granularity(snapshot), buffers=4) as chunks:
            held, at = [], 0
            for chunk in chunks:
                assert chunk.offset == at
                at += chunk.length
                if chunk.buffer is None:
                    assert not any(state[chunk.offset : at])
                else:
                    assert chunk.buffer == state[chunk.offset : at]
                held.append(chunk)
                if len(held) == 3:
                    held.pop(self.random.randrange(3)).ack()
            assert at == SIZE
            for chunk in held:
                chunk.ack()
            self.empty(snapshot)

    def by_reading(self, world: World) -> None:
        fleecing = self.random.choice([None, "memory"])
        stage = {"stage_size": 16 * MIB} if fleecing else {}
        snapshot, state = self.cut(world, fleecing=fleecing, **stage)
        with snapshot:
            discarded = bytearray(SIZE // snapshot.cluster_size + 1)
            for _ in range(100):
                offset = self.random.randrange(SIZE)
                length = min(self.random.randrange(1, 100_000), SIZE - offset)
                touched = slice(offset // snapshot.cluster_size, (offset + length - 1) // snapshot.cluster_size + 1)
                try:
                    assert snapshot.pread(length, offset) == state[offset : offset + length]
                    assert not any(discarded[touched])
                except pyfleece.DiscardedError:
                    assert any(discarded[touched])
                if self.random.random() < 0.1:
                    first = self.random.randrange(SIZE // snapshot.cluster_size)
                    snapshot.discard(snapshot.cluster_size, first * snapshot.cluster_size)
                    discarded[first] = True
            for extent in snapshot.extents():
                if extent.kind == "zero":
                    assert not any(state[extent.offset : extent.offset + extent.length])

    def incremental(self, world: World) -> None:
        name = f"agent {threading.get_ident()}"
        with world.still() as state:
            world.disk.bitmaps.add(name, 65536)
            snapshot = world.disk.snapshot(**self.options())  # type: ignore[arg-type]
        with pyfleece.create(self.target(), SIZE) as image:
            with snapshot:
                pyfleece.backup(snapshot, image)
            for _ in range(2):
                time.sleep(0.01)
                snapshot, state = self.cut(world, bitmap=name)
                with snapshot:
                    pyfleece.backup(snapshot, image, granularity=self.granularity(snapshot))
                    self.empty(snapshot)
                    snapshot.commit()
            world.disk.bitmaps.remove(name)
        self.expect_target(state)

    def group(self, world: World) -> None:
        options = self.options()
        with contextlib.ExitStack() as stack:
            states = [stack.enter_context(world.still()) for world in self.worlds]
            group = pyfleece.snapshot_group([world.disk for world in self.worlds], **options)  # type: ignore[arg-type]
        targets = [self.directory / f"{number}.raw" for number in range(len(states))]
        with group:
            pyfleece.backup_group(group, targets)
        for target, state in zip(targets, states):
            assert target.read_bytes() == state
            target.unlink()

    # ---- and those that do not ----

    def cancelled(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot:
            job = pyfleece.Backup(snapshot, self.target(), speed=20 * MIB, discard_source=False)
            with job:
                time.sleep(self.random.random() * 0.2)
                assert job.cancel()
            assert snapshot.pread(SIZE, 0) == state
            try:
                job.wait(1)
            except pyfleece.CancelledError:
                return
        self.expect_target(state)                               # it was quicker than we

    def closed_in_between(self, world: World) -> None:
        snapshot, state = self.cut(world)
        chunks = snapshot.chunks(granularity=65536, discard=False)
        with contextlib.closing(pyfleece.Backup(snapshot, self.target(), speed=20 * MIB, discard_source=False)) as job:
            job.start()
            next(chunks).ack()
            time.sleep(self.random.random() * 0.1)
            snapshot.close()
            try:
                job.wait(5)
            except (pyfleece.CancelledError, pyfleece.ClosedError):
                return
        self.expect_target(state)                               # it was quicker than we

    def too_small_a_limit(self, world: World) -> None:
        policy = self.random.choice(["break-snapshot", "break-guest-write", "lose-range"])
        snapshot, state = self.cut(
            world, cluster_size=4096, stage_size=40960, fleecing_limit=40960, on_cbw_error=policy, cbw_timeout=0.01
        )
        with snapshot:
            time.sleep(self.random.random() * 0.2)
            try:
                result = pyfleece.backup(snapshot, self.target(), speed=40 * MIB)
            except pyfleece.SnapshotBrokenError as error:
                assert policy == "break-snapshot"
                assert (error.side, error.cause) in (("fleecing", errno.ENOSPC), ("fleecing", errno.ETIMEDOUT)), error
                return
            assert snapshot.stats.fleecing_peak <= 40960
            copy, at = self.target().read_bytes(), 0
            assert not result.lost or policy == "lose-range"
            for extent in (*result.lost, pyfleece.Extent(SIZE, 0, "lost")):
                assert copy[at : extent.offset] == state[at : extent.offset], "the backup is not the disk at the cut"
                at = extent.offset + extent.length
        self.target().unlink()

    def failing_fleecing(self, world: World) -> None:
        with pyfleece.create(self.directory / "scratch.raw", 8 * MIB) as scratch, FaultyImage(scratch) as fleecing:
            seed = self.random.getrandbits(32)
            fleecing.fail("write", error=errno.ENOSPC, times=None, probability=0.3, seed=seed)
            fleecing.delay("write", seconds=0.005, times=None, probability=0.3, seed=seed)
            snapshot, state = self.cut(world, fleecing=fleecing, stage_size=20 * 65536)
            with snapshot:
                pyfleece.backup(snapshot, self.target())
                assert snapshot.stats.room_timeouts == 0
                self.empty(snapshot)
        (self.directory / "scratch.raw").unlink()
        self.expect_target(state)

    def failing_target(self, world: World) -> None:
        snapshot, state = self.cut(world)
        with snapshot, pyfleece.create(self.target(), SIZE) as inner, FaultyImage(inner) as image:
            code = self.random.choice([errno.EIO, errno.ENOSPC])
            image.fail("write", "flush", error=code, nth=self.random.randrange(1, 8), times=None)
            try:
                pyfleece.backup(snapshot, image, granularity=65536, discard_source=False)
                raise AssertionError("a backup whose target fails succeeded")
            except pyfleece.ImageError as error:
                assert (error.side, error.errno) == ("target", code), error
            image.clear()
            pyfleece.backup(snapshot, image)
        self.expect_target(state)


class Soak:
    def __init__(self, directory: Path, seed: int) -> None:
        self.directory, self.seed = directory, seed
        self.worlds = [World(directory / f"{name}.raw", f"{seed} {name}") for name in "ab"]
        self.samples: list[Sample] = []
        self.failures: list[BaseException] = []
        self.count: Counter[str] = Counter()
        self.stopping = threading.Event()

    def guarded(self, body: Callable[[], None], until: Callable[[], bool]) -> None:
        try:
            while not until() and not self.failures:
                body()
        except BaseException as error:
            self.failures.append(error)

    def cycle(self, number: int, seconds: float) -> None:
        for world in self.worlds:
            world.open()
        self.stopping.clear()
        end = time.monotonic() + seconds
        writers, agents = [], []
        for world in self.worlds:
            for writer in range(WRITERS):
                rng = random.Random(f"{self.seed} {number} {world.path.name} {writer}")
                write = self.writing(world, writer, rng)
                writers.append(threading.Thread(target=self.guarded, args=(write, self.stopping.is_set)))
        for index in range(AGENTS):
            place = self.directory / f"agent{index}"
            place.mkdir(exist_ok=True)
            agent = Agent(self.worlds, place, random.Random(f"{self.seed} {number} {index}"), self.count)
            agents.append(threading.Thread(target=self.guarded, args=(agent.run_one, lambda: time.monotonic() > end)))
        for thread in writers + agents:
            thread.start()
        for thread in agents:
            thread.join()
        self.stopping.set()
        for thread in writers:
            thread.join()
        if self.failures:
            raise self.failures[0]
        for world in self.worlds:
            world.close()

    def writing(self, world: World, number: int, rng: random.Random) -> Callable[[], None]:
        def write() -> None:
            world.write(number, rng)
            self.count["writes"] += 1

        return write

    def run(self, seconds: float) -> None:
        begun = time.monotonic()
        number = 0
        while time.monotonic() - begun < seconds:
            self.cycle(number, min(CYCLE, seconds))
            self.samples.append(self.settled())
            number += 1
            last = self.samples[-1]
            writes = self.count["writes"]
            print(
                f"{time.monotonic() - begun:6.1f} s  {last.memory / MIB:6.1f} MiB  {last.mappings} mappings"
                f"  {last.files} files  {last.threads} threads"
                f"  {sum(self.count.values()) - writes} scenarios  {writes} writes",
                flush=True,
            )
        print(", ".join(f"{count} {name}" for name, count in sorted(self.count.items())))
        self.check_flat()

    def settled(self) -> Sample:
        """Threads of the library end soon after what they worked for."""
        for _ in range(100):
            now = sample()
            if not self.samples or (now.threads <= self.samples[0].threads and now.files <= self.samples[0].files):
                break
            time.sleep(0.02)
        return now

    def check_flat(self) -> None:
        first = self.samples[0]
        for now in self.samples:
            assert now.files <= first.files, f"open files: {first.files}, then {now.files}"
            assert now.threads <= first.threads, f"threads: {first.threads}, then {now.threads}"
        warm = self.samples[len(self.samples) // 4 :]
        for what, most in (("memory", MOST_MEMORY), ("mappings", MOST_MAPPINGS)):
            growth = slope([getattr(each, what) for each in warm]) * len(warm)
            print(f"{what}: {growth:+.0f} in {len(warm)} cycles, by the slope; {most} are allowed")
            assert growth < most, f"{what} grew by {growth:.0f} in {len(warm)} cycles"


def slope(values: list[float]) -> float:
    """Of the straight line with the least squares, per step."""
    if len(values) < 3:
        return 0.0
    middle, mean = (len(values) - 1) / 2, statistics.fmean(values)
    square = sum((x - middle) ** 2 for x in range(len(values)))
    return sum((x - middle) * (y - mean) for x, y in enumerate(values)) / square


def main() -> None:
    parser = argparse.ArgumentParser(description="A long-running stress of pyfleece.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", help="where to work (default: where temporary files go)")
    arguments = parser.parse_args()
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        LIBC.mallopt(option, 128 << 10)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        Soak(Path(directory), arguments.seed).run(arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())

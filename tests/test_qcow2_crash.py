"""Power loss and kill -9 at any moment, on qcow2.

tests/c/qcow2_crash.c does random operations and records each change that the driver makes to the file, and each sync;
qcow2_replay.py makes of that what the file can look like when the power goes, at any event: all changes up to there,
those that a completed sync covers, and seeded samples of what lies between: changes missing, out of order, and in part.
On each such file `qemu-img check` may find leaks and no corruption, each sector has what was last flushed or something
later, and internal snapshots are what they were. test_qcow2_mutants.py shows that this test can fail.

PYFLEECE_CRASH_STATES: about so many states for each scenario (default 240). PYFLEECE_CRASH_KILLS: kills (default 10).
PYFLEECE_SEED: begin with another random state.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import c_programs
import pytest
import qcow2_kit as kit
import qcow2_reader as reader
from conftest import require, wait_for
from qcow2_kit import KIB, MIB, Options
from qcow2_replay import BEGIN, END, SECTOR, WRITE, Disk, Event, File, parse, play

import pyfleece

SEED = int(os.environ.get("PYFLEECE_SEED", "1"))
STATES = int(os.environ.get("PYFLEECE_CRASH_STATES", "240"))
KILLS = int(os.environ.get("PYFLEECE_CRASH_KILLS", "10"))


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img", "qemu-io")


@dataclass(frozen=True)
class Scenario:
    name: str
    options: str = "compat=1.1,cluster_size=512"
    size: int = 512 * KIB
    threads: int = 1
    operations: int = 150
    cache: int = 0                      # 0: the default
    snapshots: int = 0
    backing: bool = False
    reopen: bool = False
    grow: int = 0                       # at each of four openings; with reopen
    filled: int = 0                     # bytes that have data from the beginning, and no others
    direct: bool = False

    @property
    def final_size(self) -> int:
        return self.size + 4 * self.grow


# With 64-bit refcounts and 512-byte clusters a refcount table of one cluster is good for 2 MiB. What the internal
# snapshot has is not used again.
WIDE = "compat=1.1,cluster_size=512,refcount_bits=64"
TABLE = Scenario("refcount table grows", WIDE, size=3 * MIB, operations=70, filled=1900 * KIB, snapshots=1)

SCENARIOS = [
    Scenario("one thread"),
    Scenario("threads", threads=4, operations=200),
    Scenario("internal snapshots", snapshots=2, threads=2),
    Scenario("internal snapshots in one thread", "compat=1.1,cluster_size=1024", snapshots=3),
    Scenario("tiny cache", cache=1, threads=2),
    TABLE,
    Scenario("1-bit refcounts", "compat=1.1,cluster_size=512,refcount_bits=1"),
    Scenario("version 2", "compat=0.10,cluster_size=512", threads=2, snapshots=1),
    Scenario("version 2 with a backing file", "compat=0.10,cluster_size=4096", backing=True),
    Scenario("a backing file", "compat=1.1,cluster_size=4096", backing=True, threads=3, size=MIB),
    Scenario("preallocated", "compat=1.1,cluster_size=1024,preallocation=metadata", threads=2),
    Scenario("direct", "compat=1.1,cluster_size=8192", threads=3, direct=True, snapshots=1),
    Scenario("closed and opened", "compat=1.1,cluster_size=2048,refcount_bits=8", reopen=True),
    Scenario("grows", size=300 * KIB, snapshots=1, reopen=True, grow=1234 * SECTOR),
]


@dataclass
class Prepared:
    """An image before the operations, and what must be on it."""

    path: Path
    image: bytes
    disk: bytes
    below: bytes                        # the backing file as the image sees it
    kept: dict[str, bytes]              # internal snapshots

    def copy(self, path: Path) -> Path:
        path.write_bytes(self.image)
        return path


def prepare(scenario: Scenario, directory: Path, seed: int) -> Prepared:
    """Some data, and the internal snapshots, by QEMU's tools."""
    rng = random.Random(f"{seed} {scenario.name}")
    path, size = directory / "prepared.qcow2", scenario.size
    below, extra = bytes(size), []
    if scenario.backing:
        length = size * 3 // 4
        below = rng.randbytes(length).ljust(size, b"\0")
        (directory / "below.raw").write_bytes(below[:length])
        extra = ["-b", "below.raw", "-F", "raw"]
    kit.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", scenario.options, *extra, path, f"{size}")
    kept: dict[str, bytes] = {}
    if scenario.filled:
        kit.tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 0 {scenario.filled}", path)
    for number in range(scenario.snapshots + 1):
        commands = []
        reach = size if number < scenario.snapshots or not number else size // 3    # the other tables stay shared
        for _ in range(0 if scenario.filled else 8):
            length = rng.randrange(1, 64) * SECTOR
            offset = rng.randrange(0, reach - length, SECTOR)
            commands += ["-c", f"write -q -P {rng.randrange(1, 256)} {offset} {length}"]
        if commands:
            kit.tool("qemu-io", "-f", "qcow2", *commands, path)
        if number < scenario.snapshots:
            kit.tool("qemu-img", "snapshot", "-c", f"snap{number}", path)
            kept[f"snap{number}"] = as_qemu_reads(path)
    disk = as_qemu_reads(path).ljust(scenario.final_size, b"\0")
    return Prepared(path, path.read_bytes(), disk, below, kept)


def as_qemu_reads(path: Path) -> bytes:
    out = path.with_name("read.raw")
    kit.tool("qemu-img", "convert", "-O", "raw", path, out)
    return out.read_bytes()


def record(program: Path, scenario: Scenario, prepared: Prepared, seed: int) -> tuple[Path, Path]:
    """Run the operations on a copy; the copy, and the log."""
    image, log = prepared.copy(prepared.path.with_name("run.qcow2")), prepared.path.with_name("log")
    log.unlink(missing_ok=True)
    options = [f"--seed={seed}", f"--operations={scenario.operations}", f"--threads={scenario.threads}"]
    options += ["--direct"] if scenario.direct else []
    options += [f"--cache={scenario.cache}"] + (["--reopen", f"--grow={scenario.grow}"] if scenario.reopen else [])
    kit.tool(program, image, log, *options, timeout=60)
    return image, log


class Judge:
    """Looks at states of a file; qemu-img does so in the background. A state that was seen before is not looked at
    again.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.seen: set[int] = set()
        self.leaks = 0
        self.failures: list[str] = []
        directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._files = tempfile.TemporaryDirectory(prefix="crash-", dir=directory)
        if prepared.below.count(0) != len(prepared.below):
            Path(self._files.name, "below.raw").write_bytes(prepared.path.with_name("below.raw").read_bytes())
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1))
        self._running: list[Future[None]] = []

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._files.cleanup()

    def look(self, state: bytes, disk: Disk, what: str) -> None:
        fingerprint = hash((state, disk.flushed))
        if fingerprint in self.seen:
            return
        self.seen.add(fingerprint)
        problem = self.content(state, disk)
        if problem:
            self.failures.append(f"{what}: {problem}")
        if len(self._running) > 64:
            self._running.pop(0).result()
        self._running.append(self._pool.submit(self._structure, state, what, len(self.seen)))

    def content(self, state: bytes, disk: Disk) -> str | None:
        """What is wrong with what the image holds, and its snapshots."""
        try:
            if kit.parse_header(state).incompatible & (kit.DIRTY | kit.CORRUPT):
                return "it is marked dirty or corrupt"
            for table in reader.tables(state):
                if not table.name:
                    problem = disk.check(reader.read(state, table, self.prepared.below))
                    if problem:
                        return problem
                elif reader.read(state, table, self.prepared.below) != self.prepared.kept[table.name]:
                    return f"the internal snapshot {table.name} changed"
        except ValueError as error:
            return str(error)
        return None

    def _structure(self, state: bytes, what: str, number: int) -> None:
        path = Path(self._files.name, f"{number}.qcow2")
        path.write_bytes(state)
        done = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            lines = [line for line in done.stdout.splitlines() if not line.startswith("Leaked")][:6]
            self.failures.append(f"{what}: qemu-img check ended with {done.returncode}: {lines} {done.stderr[-300:]}")
        try:
            ours = pyfleece.check(path)
            if done.returncode != ours.status:
                self.failures.append(f"{what}: qemu-img check ended with {done.returncode}, and ours says {ours}")
        except pyfleece.Error as error:
            self.failures.append(f"{what}: {error}")
        self.leaks += done.returncode == 3
        path.unlink()

    def verdict(self) -> list[str]:
        for future in self._running:
            future.result()
        self._running.clear()
        return self.failures


def moves_table(event: Event) -> bool:
    return event.kind == WRITE and event.offset < SECTOR


def try_states(prepared: Prepared, run: Path, log: Path, wanted: int, seed: int, *, stop_early: bool = False) -> Judge:
    """Look at states after a crash at many events: all changes are there, or just the durable ones, or a sample. With
    `stop_early`: until something is wrong.
    """
    events = parse(log)
    file, disk = File(prepared.image), Disk(prepared.disk)
    changes = sum(event.kind == WRITE for event in events)
    assert changes > 50 and any(event.kind == END for event in events)
    rng = random.Random(f"{seed} states")
    share = min(1.0, wanted / 4 / changes)
    # Tables move seldom: look more closely at what comes before and after a write of the header.
    moves = {near for index, event in enumerate(events) if moves_table(event) for near in range(index - 12, index + 6)}
    with Judge(prepared) as judge:
        for index in play(events, file, disk):
            where = f"event {index} of {len(events)}"
            if rng.random() < share or index in moves:
                judge.look(file.everything(), disk, f"{where}, all there")
                if file.pending:
                    judge.look(file.nothing(), disk, f"{where}, only what is durable")
                    for sample in range(2 if index not in moves else 5):
                        judge.look(file.sample(rng), disk, f"{where}, sample {sample}")
            if stop_early and (judge.failures or (len(judge.seen) % 50 == 49 and judge.verdict())):
                break
        else:
            assert file.everything() == run.read_bytes(), "the log is not what happened to the file"
            judge.look(file.everything(), disk, "the end")
            if disk.flushed:
                assert any(event.kind == BEGIN for event in events) and file.syncs >= 2
        judge.verdict()
        return judge


@pytest.fixture(scope="module")
def program() -> Path:
    return c_programs.build("plain") / "qcow2_crash"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_power_loss(scenario: Scenario, program: Path, tmp_path: Path) -> None:
    if scenario.direct and not kit.direct_works(tmp_path):
        pytest.skip("there is no O_DIRECT on this file system")
    prepared = prepare(scenario, tmp_path, SEED)
    run, log = record(program, scenario, prepared, SEED)
    judge = try_states(prepared, run, log, STATES, SEED)
    print(f"{len(judge.seen)} states, {judge.leaks} with leaks")
    assert not judge.failures, f"{len(judge.failures)} of {len(judge.seen)} states:\n" + "\n".join(judge.failures[:10])
    assert len(judge.seen) > STATES // 3
    before, after = kit.parse_header(prepared.image), kit.header_of(run)
    assert (before.reftable_clusters < after.reftable_clusters) == bool(scenario.filled)
    assert (before.l1_offset != after.l1_offset) == bool(scenario.grow)
    kit.tool("qemu-img", "check", "-q", run)            # closed properly: not even leaks


def test_life_goes_on_after_a_crash(program: Path, tmp_path: Path) -> None:
    """A file as a crash left it is opened, written and closed, and all that was there stays."""
    scenario = Scenario("after a crash", threads=2, snapshots=1, operations=120)
    prepared = prepare(scenario, tmp_path, SEED)
    _, log = record(program, scenario, prepared, SEED)
    file, disk = File(prepared.image), Disk(prepared.disk)
    rng = random.Random(SEED)
    tried = 0
    path = tmp_path / "after.qcow2"
    for _ in play(parse(log), file, disk):
        if rng.random() > 0.06:
            continue
        path.write_bytes(file.sample(rng))
        with pyfleece.open(path, "r+") as image:
            known = bytearray(image.pread(image.size, 0))
            assert disk.check(known) is None
            for _ in range(12):
                length = rng.randrange(1, 5000)
                offset = rng.randrange(image.size - length)
                known[offset : offset + length] = data = rng.randbytes(length)
                image.pwrite(data, offset)
        kit.tool("qemu-img", "check", "-q", path, expect=(0, 3))
        assert as_qemu_reads(path) == bytes(known)
        tried += 1
    assert tried > 10


# ---- kill -9 ----


def test_kill_9(program: Path, tmp_path: Path) -> None:
    """What the process gave to the kernel is there; the next process goes on with the same image."""
    scenario = Scenario("kill", snapshots=1, size=2 * MIB, threads=3)
    prepared = prepare(scenario, tmp_path, SEED)
    image, log = prepared.copy(tmp_path / "run.qcow2"), tmp_path / "log"
    rng = random.Random(SEED)
    writes = flushes = 0
    for number in range(KILLS):
        log.unlink(missing_ok=True)
        first = f"--first-id={(number + 1) << 32}"
        options = ["--marks-only", f"--seed={SEED + number}", f"--threads={scenario.threads}", "--cache=16384", first]
        with subprocess.Popen([program, image, log, *options]) as process:
            wait_for(lambda: log.exists() and log.stat().st_size > 0, 30)
            time.sleep(rng.random() * 0.4)
            assert process.poll() is None, "it ended by itself"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        state, disk = image.read_bytes(), Disk(prepared.disk)
        for index, event in enumerate(parse(log)):
            disk.feed(index, event)
        writes, flushes = writes + disk.acknowledged, flushes + disk.flushed
        with Judge(prepared) as judge:
            judge.look(state, disk, f"kill {number}")
            assert judge.verdict() == []
        prepared.disk = bytes(reader.read(state, next(reader.tables(state)), prepared.below))
    print(f"{KILLS} kills, {writes} operations, {flushes} flushes")
    assert writes > 20 * KILLS and flushes > KILLS


# ---- the judges can be trusted ----


READABLE = [
    Options(cluster_size=512, snapshots=3, backing="chain"),
    Options(cluster_size=4 * KIB, compat="0.10", snapshots=1, backing="raw<"),
    Options(cluster_size=4 * KIB, preallocation="metadata", refcount_bits=64, snapshots=1),
]


@pytest.mark.parametrize("options", READABLE, ids=lambda options: options.id)
def test_the_second_reader_reads_as_qemu_does(options: Options, tmp_path: Path) -> None:
    subject = kit.make(tmp_path, options, SEED)
    below = bytes(subject.size)
    layers = sorted(tmp_path.glob("base*"))
    if layers:
        below = as_qemu_reads(layers[-1])[: subject.size].ljust(subject.size, b"\0")
    data = subject.path.read_bytes()
    for table in reader.tables(data):
        wanted = subject.kept[table.name] if table.name else subject.model.path
        assert reader.read(data, table, below) == wanted.read_bytes(), table.name
    assert len(list(reader.tables(data))) == options.snapshots + 1

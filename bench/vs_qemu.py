"""pyfleece beside the bare system calls and QEMU, in one run.

    python bench/vs_qemu.py [--directory DIR] [--rounds N] [--only NAME] [--scale X] [--json FILE] [--plot FILE.svg]

Prints a table in Markdown. Each round measures all sides in turn, on files that were warmed in the same way; a ratio is
taken within its round; the median over the rounds is told, with the least and the most. Nobody syncs but where it says
so. QEMU: qemu-img bench and qemu-storage-daemon, stock and with its malloc tuned. Needs gcc, fio with its nbd engine
for "busy", about 12 GiB in DIR, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import qemu
from kit import build, copy, machine, ratios, resident, resident_peak, settle, spread, timed, warm_memory

import pyfleece
from pyfleece.load import Load

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Row:
    what: str
    goal: str
    ratios: list[float]
    met: bool
    figures: str = ""


class Bench:
    def __init__(self, directory: str, rounds: int, scale: float) -> None:
        self.directory = directory
        self.rounds = rounds
        self.scale = scale
        self.rows: list[Row] = []

    def scaled(self, size: int) -> int:
        """The size of a disk to back up."""
        return max(int(size * self.scale) // MIB, 16) * MIB

    @property
    def seconds(self) -> float:
        """For which a guest runs alone."""
        return min(max(3 * self.scale, 0.3), 3)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def add(
        self,
        what: str,
        values: list[float],
        goal: float,
        *,
        least: bool = True,
        unit: str = "x",
        **figures: list[float],
    ) -> None:
        median = statistics.median(values)
        told = ", ".join(f"{name.replace('_', ' ')} {statistics.median(rates):,.4g}" for name, rates in figures.items())
        word = "at least" if least else "at most"
        met = median >= goal if least else median <= goal
        self.rows.append(Row(what, f"{word} {goal:g}{unit}", values, met, told))
        row = self.rows[-1]
        print(f"| {what} | {row.goal} | {spread(values)}{unit} | {'yes' if met else 'NO'} | {told} |", flush=True)

    def fresh(self, name: str, size: int, filled: str = "all") -> str:
        """A new file: of data ("all"), of holes ("none"), or every other MiB ("half")."""
        path = self.path(name)
        if os.path.exists(path):
            os.unlink(path)
        block = os.urandom(MIB)
        with open(path, "wb") as file:
            file.truncate(size)
            for offset in range(0, size if filled != "none" else 0, MIB if filled == "all" else 2 * MIB):
                file.seek(offset)
                file.write(block)
        return path

    @contextlib.contextmanager
    def disk(self, path: str) -> Iterator[pyfleece.Disk]:
        with pyfleece.open(path, "r+", format="raw") as image, pyfleece.Disk(image, bitmap_file=False) as disk:
            yield disk


def load(disk: pyfleece.Disk, **options: object) -> float:
    """Writes per second of a load that ends by itself."""
    with Load(disk, **options) as one:  # type: ignore[arg-type]
        while not one.wait(1):
            pass
        return one.stats.rate


# ---- first touch ----


def c_program(b: Bench) -> None:
    """Our C API against the bare system calls, one thread."""
    program = build(b.directory, "first_touch")
    for what, cluster, bare_goal in (("4 KiB cluster", 4096, None), ("64 KiB cluster", 65536, 1.4)):
        command = [program, b.path("disk.raw"), b.directory, "512", "4096", str(cluster), "64", "random"]
        output = subprocess.run([*command, str(b.rounds + 1)], check=True, capture_output=True, text=True).stdout
        runs = [json.loads(line) for line in output.splitlines()][1:]  # the first one warms up
        column = {name: [run[name] for run in runs] for name in runs[0]}
        sides = {
            "plain": "plain",
            "read_and_write": "read",
            "bare": "bare",
            "bare_two_threads": "bare_two",
            "ours": "first",
        }
        told = {name: column[of] for name, of in sides.items()}
        if bare_goal is None:
            b.add(
                "first touch, random 4 KiB, default cluster / plain write",
                ratios(column["first"], column["plain"]),
                0.85,
                **told,
            )
            b.add(
                "write to a cluster copied before / plain write", ratios(column["again"], column["plain_again"]), 0.97
            )
            b.add("write with no snapshot / plain write", ratios(column["idle"], column["plain_idle"]), 0.99)
        else:
            b.add(
                f"first touch, {what} / bare read, copy, write",
                ratios(column["first"], column["bare"]),
                bare_goal,
                **told,
            )


def qemu_load(b: Bench, source: str, count: int, depth: int, block: int, step: int) -> float:
    fleecing = b.fresh("fleecing.raw", os.path.getsize(source), "none")
    return qemu.bench(qemu.first_touch(source, fleecing), count, depth, block, step)


def snapshot_load(b: Bench, source: str, cluster: int | None, **options: object) -> float:
    with b.disk(source) as disk, disk.snapshot(b.directory, cluster_size=cluster):
        return load(disk, **options)


def first_touch(b: Bench) -> None:
    """Against QEMU in one process: one 4 KiB write in each 64 KiB cluster; and 1 MiB writes one after the other."""
    size = 512 * MIB
    source = b.fresh("source.raw", size)
    for what, depth, block, step, goals in (
        ("4 KiB, QD1", 1, 4096, 65536, (12, 4)),
        ("4 KiB, QD16", 16, 4096, 65536, (5, 2.5)),
        ("sequential 1 MiB", 1, MIB, MIB, (3, 3)),
    ):
        count = size // step
        options = {"block": block, "stride": step, "threads": depth, "order": "sequential", "operations": count}

        sides = {
            "qemu": functools.partial(qemu_load, b, source, count, depth, block, step),
            "fine": functools.partial(snapshot_load, b, source, None, **options),
            "same": functools.partial(snapshot_load, b, source, 65536, **options),
        }
        columns: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(b.rounds):
            for name, side in sides.items():
                side()  # so that each begins with the file as its own kind leaves it
                warm_memory(4 * size)
                columns[name].append(side())
        b.add(
            f"first touch, {what}, our default cluster / QEMU",
            ratios(columns["fine"], columns["qemu"]),
            goals[0],
            ours=columns["fine"],
            qemu=columns["qemu"],
        )
        b.add(
            f"first touch, {what}, 64 KiB cluster / QEMU",
            ratios(columns["same"], columns["qemu"]),
            goals[1],
            ours=columns["same"],
            qemu=columns["qemu"],
        )


# ---- backups ----


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def our_backup(source: str, target: str, **options: object) -> tuple[float, float]:
    remove(target)
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(pyfleece.open(source, format="raw"))
        disk = stack.enter_context(pyfleece.Disk(image, bitmap_file=False))
        snapshot = stack.enter_context(disk.snapshot("memory"))
        return copy(snapshot, target, **options)


def qemu_backup(b: Bench, source: str, target: str, size: int, tuned: bool) -> tuple[float, float]:
    b.fresh(os.path.basename(target), size, "none")
    with qemu.Daemon(tuned) as daemon:
        daemon.add_file("src", source)
        daemon.add_file("tgt", target)
        return with_sync(target, lambda: daemon.run_backup("src", "tgt"))


def with_sync(target: str, function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds with a sync of the target."""
    seconds = timed(function)
    return seconds, seconds + timed(lambda: subprocess.run(["sync", target], check=True))


def idle_backup(b: Bench) -> None:
    size = b.scaled(4 * GIB)
    source, target = b.fresh("half.raw", size, "half"), b.path("target.raw")

    def cp() -> tuple[float, float]:
        remove(target)
        command = ["cp", "--sparse=always", "--reflink=never", source, target]
        return with_sync(target, lambda: subprocess.run(command, check=True))

    def only_write() -> tuple[float, float]:
        """The same data, with nothing read: one file takes one write at a time, so nobody who copies is faster."""
        data = os.urandom(MIB // 4)
        b.fresh(os.path.basename(target), size, "none")
        with open(target, "r+b") as file:

            def run() -> None:
                for offset in range(0, size, 2 * MIB):
                    for part in range(offset, offset + MIB, len(data)):
                        os.pwrite(file.fileno(), data, part)

            return with_sync(target, run)

    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "cp": cp,
        "only_write": only_write,
        "ours": lambda: our_backup(source, target),
        "stock": lambda: qemu_backup(b, source, target, size, False),
        "tuned": lambda: qemu_backup(b, source, target, size, True),
    }
    copied: dict[str, list[float]] = {name: [] for name in sides}
    synced: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(b.rounds + 1):
        for name, side in sides.items():
            settle(size)
            seconds = side()
            if number:  # the first one warms up
                copied[name].append(seconds[0])
                synced[name].append(seconds[1])
    remove(target)
    what = f"idle backup, {size / GIB:.3g} GiB half holes"
    told = ratios(copied["ours"], copied["cp"])
    b.add(f"{what}, until all is copied / cp --sparse=always", told, 1.1, least=False, **copied)
    told = ratios(synced["ours"], synced["cp"])
    b.add("the same, all on stable storage / cp --sparse=always and sync", told, 1.1, least=False, **synced)
    b.add("the same, until all is copied: QEMU stock / ours", ratios(copied["stock"], copied["ours"]), 3)
    b.add("the same, until all is copied: QEMU tuned / ours", ratios(copied["tuned"], copied["ours"]), 1.6)
    b.add("the same, all on stable storage: QEMU stock and sync / ours", ratios(synced["stock"], synced["ours"]), 3)
    b.add("the same, all on stable storage: QEMU tuned and sync / ours", ratios(synced["tuned"], synced["ours"]), 1.6)
    os.unlink(source)


def direct_backup(b: Bench) -> None:
    """Around the page cache. Everybody is at the disk's speed: what differs is the processor time."""
    size = b.scaled(4 * GIB)
    source, target = b.fresh("half.raw", size, "half"), b.path("target.raw")

    def ours() -> tuple[float, float]:
        """Seconds, and seconds of processor time of all, in user mode and in the kernel. Nobody asks how far it is."""
        remove(target)
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(pyfleece.open(source, format="raw", direct=True))
            disk = stack.enter_context(pyfleece.Disk(image, bitmap_file=False))
            snapshot = stack.enter_context(disk.snapshot("memory"))
            to = stack.enter_context(pyfleece.create(target, size, direct=True))
            before = time.process_time()
            seconds = timed(lambda: pyfleece.backup(snapshot, to, target_is_zero=True))
            return seconds, time.process_time() - before

    def theirs(tuned: bool) -> tuple[float, float]:
        b.fresh(os.path.basename(target), size, "none")
        with qemu.Daemon(tuned) as daemon:
            daemon.add_file("src", source, direct=True)
            daemon.add_file("tgt", target, direct=True)
            before = daemon.cpu()
            seconds = timed(lambda: daemon.run_backup("src", "tgt"))
            return seconds, daemon.cpu() - before

    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "ours": ours,
        "stock": lambda: theirs(False),
        "tuned": lambda: theirs(True),
    }
    wall: dict[str, list[float]] = {f"{name}_wall": [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(b.rounds + 1):
        for name, side in sides.items():
            settle(size)
            seconds, used = side()
            if number:
                wall[f"{name}_wall"].append(seconds)
                cpu[name].append(used)
    what = f"O_DIRECT backup, {size / GIB:.3g} GiB half holes, seconds of CPU"
    b.add(f"{what}, ours / QEMU stock", ratios(cpu["ours"], cpu["stock"]), 0.5, least=False, **cpu, **wall)
    b.add("the same, ours / QEMU tuned", ratios(cpu["ours"], cpu["tuned"]), 0.5, least=False)
    remove(target)
    os.unlink(source)


def reflink_backup(b: Bench) -> None:
    """The idle backup again, source and target on one XFS, in a file: blocks are shared, not copied. Needs root."""
    image, mount = b.path("xfs.img"), b.path("xfs")
    os.mkdir(mount)
    with open(image, "wb") as file:
        file.truncate(16 * GIB)
    with contextlib.ExitStack() as stack:
        try:
            subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, mount], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no XFS to measure reflinks on: {error}", file=sys.stderr)
            return
        stack.callback(subprocess.run, ["umount", mount], check=True)
        source, target = b.fresh("xfs/half.raw", 4 * GIB, "half"), b.path("xfs/target.raw")
        subprocess.run(["sync", source], check=True)
        t: dict[str, list[float]] = {"ours": [], "reflink": [], "sparse": []}

        def copy(how: str) -> float:  # and sync, as our backup does
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)

            def run() -> None:
                subprocess.run(["cp", *how.split(), source, target], check=True)
                subprocess.run(["sync", target], check=True)

            return timed(run)

        for number in range(b.rounds + 1):
            row = {"ours": our_backup(source, target, reflink=True)[1]}
            row["reflink"] = copy("--reflink=always")
            row["sparse"] = copy("--reflink=never --sparse=always")
            if number:  # the first one warms up
                for name, seconds in row.items():
                    t[name].append(seconds)
        b.add(
            "idle backup that shares blocks, 4 GiB half holes, XFS, wall / cp --reflink=always and sync",
            ratios(t["ours"], t["reflink"]),
            2,
            least=False,
            ours=t["ours"],
            cp_reflink=t["reflink"],
        )
        b.add("the same: cp --sparse=always and sync / ours", ratios(t["sparse"], t["ours"]), 1, cp_sparse=t["sparse"])
    os.unlink(image)


def empty_backup(b: Bench) -> None:
    source = b.fresh("huge.raw", 0, "none")
    size = 16 << 40
    try:
        os.truncate(source, size - 4096)  # ext4 ends there
    except OSError:
        size = 8 << 40
        os.truncate(source, size)
    times = [our_backup(source, b.path("target.raw"))[1] for _ in range(b.rounds)]
    b.add(f"whole backup of an empty sparse disk of {size >> 40} TiB, seconds", times, 0.5, least=False, unit=" s")
    with b.disk(source) as disk:
        cuts, memory = [], []
        for _ in range(b.rounds):
            before = resident()
            snapshots: list[pyfleece.Snapshot] = []
            cuts.append(timed(lambda kept=snapshots: kept.append(disk.snapshot("memory"))) * 1000)  # type: ignore[misc]
            memory.append(max(resident() - before, 0) / MIB)
            snapshots[0].close()
    b.add(f"cut of a {size >> 40} TiB disk, milliseconds", cuts, 1, least=False, unit=" ms")
    b.add("memory of that cut, MiB", memory, 1, least=False, unit=" MiB")
    os.unlink(source)


@dataclass
class Busy:
    """What a guest and a backup did to each other."""

    kept: float  # of the guest's own rate
    p99: float  # of the guest's writes, microseconds
    worst: float
    copied: float  # seconds until all was copied
    synced: float  # and until the target was synced
    peak: float  # of the fleecing file, MiB
    memory: float  # ours: of the stage; QEMU: of the process. The most, MiB


def busy_backup(b: Bench) -> None:
    """A backup while a guest writes 4 KiB at random as fast as it can, one write at a time."""
    if shutil.which("fio") is None or "nbd" not in fio("--enghelp"):
        print("no fio with an nbd engine here: no guest for QEMU", file=sys.stderr)
        return
    size = b.scaled(2 * GIB)
    source, target = b.fresh("busy.raw", size), b.path("target.raw")
    runs = {"ours": busy_ours, "qemu": busy_qemu}
    sides: dict[str, list[Busy]] = {name: [] for name in runs}
    for _ in range(b.rounds):
        for name, run in runs.items():
            settle(size)
            sides[name].append(run(b, source, target, size))
    remove(target)

    def column(side: str, field: str) -> list[float]:
        return [getattr(one, field) for one in sides[side]]

    def both(*fields: str) -> dict[str, list[float]]:
        return {f"{side}_{field}": column(side, field) for field in fields for side in sides}

    def compare(field: str) -> list[float]:
        return ratios(column("ours", field), [max(figure, 1e-9) for figure in column("qemu", field)])

    what = f"backup of {size / GIB:.3g} GiB under random 4 KiB writes"
    b.add(f"{what}: what the guest keeps of its rate", column("ours", "kept"), 0.5, **both("kept"))
    told = both("p99", "worst")
    b.add("the same: p99 of the guest's writes, us, ours / QEMU", compare("p99"), 0.2, least=False, **told)
    told = both("copied", "synced")
    b.add("the same: seconds until all is copied, ours / QEMU", compare("copied"), 1, least=False, **told)
    told = both("peak", "memory")
    b.add("the same: peak of the fleecing file, MiB, ours / QEMU", compare("peak"), 1 / 16, least=False, **told)
    os.unlink(source)


def busy_ours(b: Bench, source: str, target: str, size: int) -> Busy:
    remove(target)
    with b.disk(source) as disk:
        with Load(disk, seed=1) as guest:
            guest.wait(b.seconds)
            plain = guest.stop().rate
        with disk.snapshot(b.directory) as snapshot, Load(disk, seed=2) as guest:
            copied, synced = copy(snapshot, target)
            seen, stats = guest.stop(), snapshot.stats
    longest = seen.latency.max * 1e6
    peaks = stats.fleecing_peak / MIB, stats.staged_peak / MIB
    return Busy(seen.rate / plain, seen.latency.p99 * 1e6, longest, copied, synced, *peaks)


def busy_qemu(b: Bench, source: str, target: str, size: int) -> Busy:
    """The guest is fio, over NBD."""
    fleecing, socket = b.fresh("fleecing.raw", size, "none"), b.path("nbd.sock")
    b.fresh("target.raw", size, "none")
    remove(socket)
    with qemu.Daemon(tuned=True) as daemon:
        daemon.add_file("src", source)
        daemon.add_file("flc", fleecing)
        daemon.add_file("tgt", target)
        daemon.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}})

        def export(name: str, node: str) -> list[str]:
            what = {"id": name, "type": "nbd", "node-name": node, "name": name, "writable": True}
            daemon.call("block-export-add", what)
            options = ["--name=guest", "--ioengine=nbd", f"--uri=nbd+unix:///{name}?socket={socket}", f"--size={size}"]
            options += ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--norandommap", "--invalidate=0", "--time_based"]
            return [*options, "--output-format=json"]

        plain = json_of(fio(*export("plain", "src"), f"--runtime={round(b.seconds * 1000)}ms"))["iops"]
        daemon.end_export("plain")
        daemon.add("cbw", "copy-before-write", file="src", target="flc")
        daemon.add("snap", "snapshot-access", file="cbw", discard="unmap")
        command = ["fio", *export("guest", "cbw"), "--runtime=3600"]
        guest = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            while not os.stat(fleecing).st_blocks:  # its first write has not come yet
                if guest.poll() is not None:
                    raise RuntimeError("fio ended")
                time.sleep(0.001)
            with highest(lambda: os.stat(fleecing).st_blocks * 512 / MIB) as peak:
                copied, synced = with_sync(target, lambda: daemon.run_backup("snap", "tgt", **qemu.discards()))
            guest.send_signal(signal.SIGINT)  # it tells what it did
            seen = json_of(guest.communicate()[0])
        finally:
            guest.kill()
            guest.wait()
        memory = resident_peak(daemon.process.pid) / MIB
    latency = seen["clat_ns"]
    p99, worst = latency["percentile"]["99.000000"] / 1000, latency["max"] / 1000
    return Busy(seen["iops"] / plain, p99, worst, copied, synced, peak[0], memory)


def fio(*options: str) -> str:
    return subprocess.run(["fio", *options], capture_output=True, text=True, check=True).stdout


def json_of(output: str) -> dict[str, Any]:
    """What fio says about writes."""
    told: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]["write"]
    return told


@contextlib.contextmanager
def highest(sample: Callable[[], float]) -> Iterator[list[float]]:
    """A list whose only element is the highest value so far."""
    seen, over = [sample()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen[0] = max(seen[0], sample())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    seen[0] = max(seen[0], sample())


# ---- incremental ----


def incremental(b: Bench) -> None:
    """Sparse, 1 % of the 64 KiB clusters dirty, anywhere. All sides end with the target on stable storage; QEMU does
    not sync by itself: its time without is told as well. Once more with the target in memory, where a sync costs
    nothing, so that it is not the storage that is compared.
    """
    source = b.fresh("sparse.raw", b.scaled(64 * GIB), "none")
    incremental_to(b, source, b.path("target.raw"), "")
    if os.path.isdir("/dev/shm"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            incremental_to(b, source, os.path.join(memory, "target.raw"), ", target in memory")
    os.unlink(source)


def incremental_to(b: Bench, source: str, target: str, where: str) -> None:
    size, unit = b.scaled(64 * GIB), 65536
    rng = random.Random(1)
    dirty = sorted(rng.sample(range(size // unit), size // unit // 100))
    sides = ("ours", "floor", "stock", "tuned", "stock_unsynced", "tuned_unsynced")
    t: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(b.rounds + 1):
        row = {"ours": our_incremental(b, source, target, dirty, unit)}
        expected = allocated(target)
        if not where:  # the kernel does not copy ranges between file systems
            b.fresh(target, size, "none")
            row["floor"] = timed(lambda: copy_ranges(source, target, dirty, unit))
        for name, tuned in (("stock", False), ("tuned", True)):
            row[f"{name}_unsynced"], row[name] = qemu_incremental(b, source, target, size, dirty, unit, tuned)
            assert abs(allocated(target) - expected) <= expected // 50, "QEMU copied something else"
        if number:  # the first one warms up, and allocates the source
            for name, seconds in row.items():
                t[name].append(seconds)
    what = f"incremental, {len(dirty)} clusters of {size >> 30} GiB{where}"
    if not where:
        b.add(
            f"{what}, ours / copy_file_range loop and sync",
            ratios(t["ours"], t["floor"]),
            1.1,
            least=False,
            ours=t["ours"],
            floor=t["floor"],
        )
    for name in ("stock", "tuned"):
        b.add(
            f"{what}, QEMU {name} and sync / ours",
            ratios(t[name], t["ours"]),
            1.7,
            ours=t["ours"],
            QEMU=t[name],
            QEMU_without_sync=t[f"{name}_unsynced"],
        )


def our_incremental(b: Bench, source: str, target: str, dirty: list[int], unit: int) -> float:
    block = os.urandom(unit)
    with b.disk(source) as disk:
        disk.bitmaps.add("daily", unit)
        for index in dirty:
            disk.pwrite(block, index * unit)
        disk.flush()
        assert disk.bitmaps["daily"].count == len(dirty) * unit
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            return timed(lambda: pyfleece.backup(snapshot, target))


def qemu_incremental(
    b: Bench, source: str, target: str, size: int, dirty: list[int], unit: int, tuned: bool
) -> tuple[float, float]:
    """Seconds until the job is over, and until the target is synced."""
    fleecing, socket = b.fresh("fleecing.raw", size, "none"), b.path("nbd.sock")
    b.fresh(target, size, "none")
    with qemu.Daemon(tuned) as daemon:
        daemon.add_file("src", source)
        daemon.add_file("flc", fleecing)
        daemon.add_file("tgt", target)
        daemon.call("block-dirty-bitmap-add", {"node": "src", "name": "daily", "granularity": unit})
        daemon.write_blocks("src", socket, [index * unit for index in dirty], unit)
        daemon.cut_with_bitmap("src", "flc", "snap", "daily", unit)

        def run() -> None:
            daemon.backup("snap", "tgt", sync="bitmap", bitmap="daily", **{"bitmap-mode": "never"})
            daemon.wait()

        seconds = timed(run)
        with open(target, "rb") as file:
            return seconds, seconds + timed(lambda: os.fsync(file.fileno()))


def allocated(path: str) -> int:
    return os.stat(path).st_blocks * 512


def copy_ranges(source: str, target: str, dirty: list[int], unit: int) -> None:
    with open(source, "rb") as read, open(target, "r+b") as write:
        for index in dirty:
            os.copy_file_range(read.fileno(), write.fileno(), unit, index * unit, index * unit)
        os.fsync(write.fileno())


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "c": c_program,
    "first": first_touch,
    "idle": idle_backup,
    "direct": direct_backup,
    "reflink": reflink_backup,
    "empty": empty_backup,
    "busy": busy_backup,
    "incremental": incremental,
}


def plot(rows: list[Row], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 0.5 * len(rows) + 1), layout="constrained")
    places = range(len(rows))
    medians = [statistics.median(row.ratios) for row in rows]
    least = [m - min(row.ratios) for m, row in zip(medians, rows)]
    most = [max(row.ratios) - m for m, row in zip(medians, rows)]
    colors = ["tab:green" if row.met else "tab:red" for row in rows]
    axes.barh(places, medians, xerr=[least, most], color=colors)
    axes.set_yticks(places, [f"{row.what} (goal: {row.goal})" for row in rows], fontsize="small")
    axes.set_xscale("log")
    axes.set_xlabel("median, least and most: a ratio, or the unit that the row names")
    axes.invert_yaxis()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--scale", type=float, default=1.0, help="for a quick look: smaller disks for backups")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    absent = qemu.missing()
    if absent:
        print(f"{absent} is not here: nothing to compare with", file=sys.stderr)
        return
    print(f"{machine(options.directory)}, {qemu.version()}\n")
    print("| what | goal | median (least to most) | met | medians of the sides |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bench = Bench(directory, options.rounds, options.scale)
        for name, section in SECTIONS.items():
            if not options.only or name in options.only:
                section(bench)
    if options.json:
        told = {"machine": machine(options.directory), "qemu": qemu.version()}
        told["rows"] = [asdict(row) for row in bench.rows]
        pathlib.Path(options.json).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(bench.rows, options.plot)


if __name__ == "__main__":
    main()

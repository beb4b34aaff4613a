"""pyfleece beside the bare system calls and QEMU, in one run.

    python bench/vs_qemu.py [--directory DIR] [--rounds N] [--only NAME] [--json FILE] [--plot FILE.svg]

Prints a table in Markdown. Each round measures all sides in turn, on files that were warmed in the same way; a ratio is
taken within its round; the median over the rounds is told, with the least and the most. Nobody syncs but where it says
so. QEMU: qemu-img bench and qemu-storage-daemon, stock and with its malloc tuned. Needs gcc, about 12 GiB in DIR, and a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import qemu
from kit import build, machine, ratios, spread, timed, warm_memory

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
    def __init__(self, directory: str, rounds: int) -> None:
        self.directory = directory
        self.rounds = rounds
        self.rows: list[Row] = []

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
        told = {"plain": column["plain"], "bare": column["bare"], "ours": column["first"]}
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


def first_touch(b: Bench) -> None:
    """Against QEMU in one process: one 4 KiB write in each 64 KiB cluster; and 1 MiB writes one after the other."""
    size = 512 * MIB
    source, scratch = b.fresh("source.raw", size), b.path("fleecing.raw")
    for what, depth, block, step, goals in (
        ("4 KiB, QD1", 1, 4096, 65536, (12, 4)),
        ("4 KiB, QD16", 16, 4096, 65536, (5, 2.5)),
        ("sequential 1 MiB", 1, MIB, MIB, (3, 3)),
    ):
        count = size // step
        columns: dict[str, list[float]] = {"qemu": [], "fine": [], "same": []}
        for _ in range(b.rounds):
            b.fresh("fleecing.raw", size, "none")
            warm_memory(GIB)
            columns["qemu"].append(qemu.bench(qemu.first_touch(source, scratch), count, depth, block, step))
            with b.disk(source) as disk:
                for name, cluster in (("fine", None), ("same", 65536)):
                    warm_memory(GIB)
                    with disk.snapshot(b.directory, cluster_size=cluster):
                        options = {"block": block, "stride": step, "threads": depth, "order": "sequential"}
                        columns[name].append(load(disk, operations=count, **options))
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


def our_backup(b: Bench, source: str, target: str, **options: object) -> float:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(pyfleece.open(source, format="raw"))
        disk = stack.enter_context(pyfleece.Disk(image, bitmap_file=False))
        snapshot = stack.enter_context(disk.snapshot("memory"))
        return timed(lambda: pyfleece.backup(snapshot, target, **options))  # type: ignore[arg-type]


def qemu_backup(
    b: Bench, source: str, target: str, size: int, tuned: bool, direct: bool = False
) -> tuple[float, float]:
    """Seconds, and seconds of processor time."""
    b.fresh(os.path.basename(target), size, "none")
    with qemu.Daemon(tuned) as daemon:
        daemon.add_file("src", source, direct)
        daemon.add_file("tgt", target, direct)
        before = daemon.cpu()

        def run() -> None:
            daemon.backup("src", "tgt")
            daemon.wait()

        return timed(run), daemon.cpu() - before


def idle_backup(b: Bench) -> None:
    size = 4 * GIB
    source, target = b.fresh("half.raw", size, "half"), b.path("target.raw")
    t: dict[str, list[float]] = {"cp": [], "ours": [], "stock": [], "tuned": [], "cpu": [], "qemu_cpu": []}
    for number in range(b.rounds + 1):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)

        def copy() -> None:  # and sync, as our backup does
            subprocess.run(["cp", "--sparse=always", "--reflink=never", source, target], check=True)
            subprocess.run(["sync", target], check=True)

        row = {"cp": timed(copy), "ours": our_backup(b, source, target)}
        row["stock"] = qemu_backup(b, source, target, size, False)[0]
        row["tuned"] = qemu_backup(b, source, target, size, True)[0]
        if number:  # the first one warms up
            for name, seconds in row.items():
                t[name].append(seconds)
    told = {name: t[name] for name in ("ours", "cp", "stock", "tuned")}
    b.add(
        "idle backup, 4 GiB half holes, wall / cp --sparse=always and sync",
        ratios(t["ours"], t["cp"]),
        1.1,
        least=False,
        **told,
    )
    b.add("the same: QEMU stock / ours", ratios(t["stock"], t["ours"]), 3)
    b.add("the same: QEMU tuned / ours", ratios(t["tuned"], t["ours"]), 1.6)
    for _ in range(b.rounds):
        before = resource.getrusage(resource.RUSAGE_SELF)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(pyfleece.open(source, format="raw", direct=True))
            disk = stack.enter_context(pyfleece.Disk(image, bitmap_file=False))
            snapshot = stack.enter_context(disk.snapshot("memory"))
            to = stack.enter_context(pyfleece.create(target, size, direct=True))
            pyfleece.backup(snapshot, to, target_is_zero=True)
        after = resource.getrusage(resource.RUSAGE_SELF)
        t["cpu"].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        t["qemu_cpu"].append(qemu_backup(b, source, target, size, True, direct=True)[1])
    b.add(
        "CPU of an O_DIRECT backup, ours / QEMU tuned",
        ratios(t["cpu"], t["qemu_cpu"]),
        0.5,
        least=False,
        ours=t["cpu"],
        qemu=t["qemu_cpu"],
    )
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
            row = {"ours": our_backup(b, source, target, reflink=True)}
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
    times = [our_backup(b, source, b.path("target.raw")) for _ in range(b.rounds)]
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


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def busy_backup(b: Bench) -> None:
    """A backup while a guest writes 4 KiB at random as fast as it can."""
    size = 2 * GIB
    source, target = b.fresh("busy.raw", size), b.path("target.raw")
    t: dict[str, list[float]] = {
        name: [] for name in ("kept", "seconds", "p99", "peak", "q_kept", "q_seconds", "q_peak")
    }
    for _ in range(b.rounds):
        with b.disk(source) as disk:
            with Load(disk, threads=1, seed=1) as one:
                one.wait(3)
                plain = one.stop().rate
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            with disk.snapshot(b.directory) as snapshot, Load(disk, threads=1, seed=2) as one:
                t["seconds"].append(timed(lambda: pyfleece.backup(snapshot, target)))
                stats = one.stop()
                t["peak"].append(snapshot.stats.fleecing_peak / MIB)
        t["kept"].append(stats.rate / plain)
        t["p99"].append(stats.latency.percentile(99) * 1e6)
        kept, seconds, peak = busy_qemu(b, source, target, size)
        t["q_kept"].append(kept)
        t["q_seconds"].append(seconds)
        t["q_peak"].append(peak)
    b.add(
        "backup under random 4 KiB writes: what the guest keeps of its rate",
        t["kept"],
        0.5,
        ours=t["kept"],
        qemu=t["q_kept"],
    )
    b.add(
        "the same: backup time, ours / QEMU",
        ratios(t["seconds"], t["q_seconds"]),
        1,
        least=False,
        ours=t["seconds"],
        qemu=t["q_seconds"],
    )
    b.add(
        "the same: peak of the fleecing file, ours / QEMU",
        [a / max(q, 1) for a, q in zip(t["peak"], t["q_peak"])],
        1 / 16,
        least=False,
        ours_MiB=t["peak"],
        qemu_MiB=t["q_peak"],
    )
    os.unlink(source)


def busy_qemu(b: Bench, source: str, target: str, size: int) -> tuple[float, float, float]:
    """The guest is qemu-img bench over NBD. Its share, the backup's seconds, and the peak in MiB."""
    fleecing, socket = b.fresh("fleecing.raw", size, "none"), b.path("nbd.sock")
    b.fresh("target.raw", size, "none")
    with qemu.Daemon(tuned=True) as daemon:
        daemon.add_file("src", source)
        daemon.add_file("flc", fleecing)
        daemon.add_file("tgt", target)
        daemon.add("cbw", "copy-before-write", file="src", target="flc")
        daemon.add("snap", "snapshot-access", file="cbw")
        daemon.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}})
        for name, node in (("plain", "src"), ("guest", "cbw")):
            daemon.call(
                "block-export-add", {"id": name, "type": "nbd", "node-name": node, "name": name, "writable": True}
            )
            if name == "plain":
                plain = guest_rate(socket, "plain", 3)
                daemon.call("block-export-del", {"id": "plain"})
        guest = subprocess.Popen(guest_command(socket, "guest", 10**9), stdout=subprocess.DEVNULL)
        written = daemon_writes(daemon)

        def run() -> None:
            daemon.backup("snap", "tgt")
            daemon.wait()

        seconds = timed(run)
        writes = daemon_writes(daemon) - written
        guest.kill()
        guest.wait()
    return writes / seconds / plain, seconds, os.stat(fleecing).st_blocks * 512 / MIB


def guest_command(socket: str, export: str, count: int) -> list[str]:
    options = f"driver=nbd,server.type=unix,server.path={socket},export={export}"
    return [
        "qemu-img",
        "bench",
        "-w",
        "-t",
        "writeback",
        "-c",
        str(count),
        "-d",
        "1",
        "-s",
        "4096",
        "-S",
        "69632",
        "--image-opts",
        options,
    ]


def guest_rate(socket: str, export: str, seconds: float) -> float:
    count = 20_000
    output = subprocess.run(guest_command(socket, export, count), capture_output=True, text=True, check=True).stdout
    return count / float(output.split("Run completed in ")[1].split()[0])


def daemon_writes(daemon: qemu.Daemon) -> int:
    """Writes that guests asked for, of all exports."""
    stats = daemon.call("query-blockstats", {"query-nodes": True})
    return sum(node["stats"].get("wr_operations", 0) for node in stats if node.get("node-name") == "cbw")


# ---- incremental ----


def incremental(b: Bench) -> None:
    """64 GiB, sparse, 1 % of the 64 KiB clusters dirty, anywhere."""
    size, unit = 64 * GIB, 65536
    source, target = b.fresh("sparse.raw", size, "none"), b.path("target.raw")
    rng = random.Random(1)
    dirty = sorted(rng.sample(range(size // unit), size // unit // 100))
    block = os.urandom(unit)
    t: dict[str, list[float]] = {"ours": [], "floor": []}
    with b.disk(source) as disk:
        disk.bitmaps.add("daily", unit)
        for index in dirty:
            disk.pwrite(block, index * unit)
        for number in range(b.rounds + 1):
            floor = timed(lambda: copy_ranges(source, b.fresh("target.raw", size, "none"), dirty, unit))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            with disk.snapshot("memory", bitmap="daily") as snapshot:  # not committed: as dirty as before
                ours = timed(lambda: pyfleece.backup(snapshot, target, discard_source=False))
            if number:
                t["ours"].append(ours)
                t["floor"].append(floor)
    b.add(
        "incremental, 1 % of 64 GiB, ours / copy_file_range loop and sync",
        ratios(t["ours"], t["floor"]),
        1.1,
        least=False,
        **t,
    )
    os.unlink(source)


def copy_ranges(source: str, target: str, dirty: list[int], unit: int) -> None:
    with open(source, "rb") as read, open(target, "r+b") as write:
        for index in dirty:
            os.copy_file_range(read.fileno(), write.fileno(), unit, index * unit, index * unit)
        os.fsync(write.fileno())


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "c": c_program,
    "first": first_touch,
    "idle": idle_backup,
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
    axes.invert_yaxis()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    absent = qemu.missing()
    if absent:
        print(f"{absent} is not here: nothing to compare with", file=sys.stderr)
        return
    print(f"{machine()}; {qemu.version()}; {shutil.disk_usage(options.directory).free >> 30} GiB free\n")
    print("| what | goal | median (least to most) | met | medians of the sides |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bench = Bench(directory, options.rounds)
        for name, section in SECTIONS.items():
            if not options.only or name in options.only:
                section(bench)
    if options.json:
        told = {"machine": machine(), "qemu": qemu.version(), "rows": [asdict(row) for row in bench.rows]}
        pathlib.Path(options.json).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(bench.rows, options.plot)


if __name__ == "__main__":
    main()

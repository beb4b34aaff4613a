"""The qcow2 driver beside QEMU's, in turn, in one run.

    python bench/qcow2.py [--directory DIR] [--rounds N] [--scale X] [only ...]

A table in Markdown. Each row is the same work on the same image, done by us and by QEMU in turn, so many rounds; the
first round warms up and does not count. Rates are the median, and in brackets the least and the most; "ratio" is the
median of the ratios within each round. `qemu-img bench` runs with 64 requests in flight and its default cache mode,
which like ours goes through the page cache; ours has as many threads as there are processors. Requests go to every
stride-th place of the disk, which visits it in an order that is as good as random.

Needs make, gcc, qemu-img, qemu-io, and for the last rows qemu-storage-daemon; about 6 GiB in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from kit import machine

import pyfleece

ROOT = pathlib.Path(__file__).resolve().parent.parent
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEPTH = 64
THREADS = os.cpu_count() or 1
STRIDE = 7919 * 4096  # a prime number of pages


def run(*command: str | os.PathLike[str]) -> str:
    return subprocess.run([os.fspath(word) for word in command], check=True, capture_output=True, text=True).stdout


def build(directory: pathlib.Path) -> pathlib.Path:
    program, objects = directory / "qcow2_io", directory / "objects"
    run("make", "-s", "-C", ROOT / "tests" / "c", f"BUILD={objects}", objects / "plain" / "libfleece.a")
    libraries = [name for name in ("-lz", "-lzstd") if has(directory, name)]
    source, archive = ROOT / "bench" / "qcow2_io.c", objects / "plain" / "libfleece.a"
    run("gcc", "-std=gnu11", "-O2", "-pthread", source, archive, *libraries, "-o", program)
    return program


def has(directory: pathlib.Path, library: str) -> bool:
    probe = directory / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = ["gcc", probe, library, "-o", directory / "probe"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Table:
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        print("| what | unit | pyfleece | QEMU | ratio |\n|---|---|---|---|---|")

    def row(
        self, what: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float], scale: float = 1
    ) -> None:
        """Both return seconds for the same work, which is `scale` units."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds + 1):
            for side, function in enumerate((ours, theirs)):
                os.sync()  # nobody pays for what the other one left
                times[side].append(function())
        mine, other = times[0][1:], times[1][1:]
        if unit == "ms":  # less is better
            cells = [spread([1000 * seconds for seconds in side]) for side in (mine, other)]
        else:
            cells = [spread([scale / seconds for seconds in side]) for side in (mine, other)]
        ratio = spread([b / a for a, b in zip(mine, other)])
        print(f"| {what} | {unit} | {cells[0]} | {cells[1]} | {ratio} |", flush=True)


def spread(values: list[float]) -> str:
    digits = 0 if statistics.median(values) >= 100 else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class Bench:
    def __init__(self, directory: pathlib.Path, table: Table, scale: float) -> None:
        self.directory, self.table, self.scale = directory, table, scale
        self.program = build(directory)
        self.image = directory / "disk.qcow2"

    # ---- requests ----

    def fresh(self, size: int, *, full: bool = False) -> None:
        """An empty image, or one with data in all of its clusters."""
        self.image.unlink(missing_ok=True)
        run("qemu-img", "create", "-q", "-f", "qcow2", self.image, f"{size}")
        if full:
            run("qemu-img", "bench", "-w", "-f", "qcow2", "-c", f"{size // MIB}", "-s", f"{MIB}", "-d", "4", self.image)

    def ours(self, kind: str, count: int, size: int, step: int, flush: int) -> float:
        words = [f"{count}", f"{size}", f"{step}", f"{THREADS}", f"{flush // THREADS}"]
        return float(run(self.program, self.image, kind, *words).split()[1])

    def theirs(self, kind: str, count: int, size: int, step: int, flush: int) -> float:
        options = ["-w"] if kind == "write" else []
        options += [f"--flush-interval={flush}"] if flush else []
        depth = min(DEPTH, flush) if flush else DEPTH
        words = ["-f", "qcow2", "-c", f"{count}", "-s", f"{size}", "-S", f"{step}", "-d", f"{depth}"]
        output = run("qemu-img", "bench", *options, *words, self.image)
        return float(output.rsplit("completed in", 1)[1].split()[0])

    def requests(
        self, what: str, kind: str, count: int, size: int, step: int, *, disk: int, full: bool, flush: int = 0
    ) -> None:
        count = max(64, int(count * self.scale))
        unit, units = ("MiB/s", count * size / MIB) if size >= MIB else ("requests/s", float(count))
        if full:
            self.fresh(disk, full=True)

        def side(function: Callable[[str, int, int, int, int], float]) -> Callable[[], float]:
            def once() -> float:
                if not full:
                    self.fresh(disk)
                return function(kind, count, size, step, flush)

            return once

        self.table.row(what, unit, side(self.ours), side(self.theirs), units)

    def random_writes(self) -> None:
        self.requests("4 KiB random writes, allocated", "write", 200_000, 4096, STRIDE, disk=GIB, full=True)
        self.requests("4 KiB random reads, allocated", "read", 200_000, 4096, STRIDE, disk=GIB, full=True)

    def allocating(self) -> None:
        step = 7919 * 64 * KIB
        what = "writes that allocate 64 KiB clusters"
        self.requests(f"4 KiB {what}", "write", 16_000, 4096, step, disk=GIB, full=False)
        self.requests(f"64 KiB {what}", "write", 16_000, 64 * KIB, step, disk=GIB, full=False)
        self.requests(f"4 KiB {what}, a flush every 256", "write", 4_000, 4096, step, disk=GIB, full=False, flush=256)

    def sequential(self) -> None:
        self.requests("1 MiB sequential writes, allocated", "write", 1024, MIB, MIB, disk=GIB + MIB, full=True)
        self.requests("1 MiB sequential writes, allocating", "write", 1024, MIB, MIB, disk=GIB + MIB, full=False)
        self.requests("1 MiB sequential reads", "read", 1024, MIB, MIB, disk=GIB + MIB, full=True)

    # ---- opening ----

    def opening(self) -> None:
        """In a process of its own each, as qemu-io has to be."""
        self.image.unlink(missing_ok=True)
        clusters = int(1_000_000 * min(1.0, self.scale))
        metadata = ["-o", "preallocation=metadata"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *metadata, self.image, f"{clusters * 64}K")
        run("qemu-img", "resize", "-q", self.image, "1T")

        def ours() -> float:
            begin = time.monotonic()
            run(self.program, self.image, "open")
            return time.monotonic() - begin

        def theirs() -> float:
            begin = time.monotonic()
            run("qemu-io", "-r", "-f", "qcow2", "-c", "read -q 512G 4k", self.image)
            return time.monotonic() - begin

        self.table.row(f"open 1 TiB with {clusters:,} clusters, read 4 KiB, close", "ms", ours, theirs)

    # ---- backups ----

    def half_full(self) -> int:
        size = max(64 * MIB, int(2 * GIB * min(1.0, self.scale)) // MIB * MIB)
        self.image.unlink(missing_ok=True)
        with pyfleece.create(self.image, size) as image:
            block = os.urandom(MIB)
            for offset in range(0, size, 2 * MIB):
                image.pwrite(block, offset)
        return size

    def backups(self) -> None:
        size = self.half_full()
        target = self.directory / "target.qcow2"

        def ours() -> float:
            target.unlink(missing_ok=True)
            with pyfleece.open(self.image, "r+") as image, pyfleece.Disk(image) as disk, disk.snapshot() as snapshot:
                begin = time.monotonic()
                pyfleece.backup(snapshot, target)
                return time.monotonic() - begin

        def convert() -> float:
            target.unlink(missing_ok=True)
            begin = time.monotonic()
            run("qemu-img", "convert", "-W", "-m", "16", "-f", "qcow2", "-O", "qcow2", self.image, target)
            run("sync", target)  # ours does
            return time.monotonic() - begin

        self.table.row("backup, half full, beside qemu-img convert -W -m 16", "MiB/s", ours, convert, size / MIB)
        if shutil.which("qemu-storage-daemon"):
            with storage_daemon(self.directory, self.image) as qmp:

                def blockdev_backup() -> float:
                    target.unlink(missing_ok=True)
                    run("qemu-img", "create", "-q", "-f", "qcow2", target, f"{size}")
                    file = {"driver": "file", "filename": os.fspath(target)}
                    qmp("blockdev-add", {"node-name": "target", "driver": "qcow2", "file": file})
                    begin = time.monotonic()
                    qmp("blockdev-backup", {"job-id": "j", "device": "disk", "target": "target", "sync": "full"})
                    qmp.wait_for_job("j")
                    qmp("blockdev-del", {"node-name": "target"})
                    run("sync", target)
                    return time.monotonic() - begin

                def ours_shared() -> float:
                    """The daemon keeps the image open, for reading only."""
                    target.unlink(missing_ok=True)
                    copy = pyfleece.open(self.image, "r+", share=True)
                    with copy, pyfleece.Disk(copy) as disk, disk.snapshot() as snapshot:
                        begin = time.monotonic()
                        pyfleece.backup(snapshot, target)
                        return time.monotonic() - begin

                what = "backup, half full, beside blockdev-backup"
                self.table.row(what, "MiB/s", ours_shared, blockdev_backup, size / MIB)
        target.unlink(missing_ok=True)


class Qmp:
    """A connection to a monitor."""

    def __init__(self, path: pathlib.Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.fspath(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def wait_for_job(self, job: str) -> None:
        while any(entry["id"] == job for entry in self("query-jobs")):
            time.sleep(0.002)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def storage_daemon(directory: pathlib.Path, image: pathlib.Path) -> Iterator[Qmp]:
    monitor = directory / "monitor"
    disk = f"driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={image},file.locking=off"
    chardev, mon = f"socket,id=m,path={monitor},server=on,wait=off", "chardev=m"
    command = ["qemu-storage-daemon", "--blockdev", disk, "--chardev", chardev, "--monitor", mon]
    with subprocess.Popen(command) as process:
        try:
            while not monitor.exists():
                if process.poll() is not None:
                    raise RuntimeError("qemu-storage-daemon did not start")
                time.sleep(0.01)
            qmp = Qmp(monitor)
            yield qmp
            qmp.close()
        finally:
            process.terminate()


def main() -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="this part of the work, for a quick look")
    parser.add_argument("only", nargs="*", help="random_writes, allocating, sequential, opening, backups; default: all")
    arguments = parser.parse_args()
    names = arguments.only or ["random_writes", "allocating", "sequential", "opening", "backups"]
    version = run("qemu-img", "--version").splitlines()[0]
    print(f"{machine(arguments.directory)}, {version}, {arguments.rounds} rounds\n")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        bench = Bench(pathlib.Path(name), Table(arguments.rounds), arguments.scale)
        for wanted in names:
            getattr(bench, wanted)()


if __name__ == "__main__":
    main()

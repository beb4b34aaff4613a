"""The mount beside QEMU's FUSE export and QEMU's NBD export of the same image, by fio, in one run.

    python bench/mount.py [--directory DIR] [--size 1G] [--seconds N] [--rounds N] [--json FILE]

4 KiB and 1 MiB, one request and sixteen at a time; plain, with a snapshot (the first write to each place, and the same
writes again). QEMU has its copy-before-write filter with the smallest cluster that it has. Each round measures
all sides in turn, on a file that was written completely before; the ratio to the better one of QEMU's exports is taken
within the round; the median is told, with the least and the most. Prints a table in Markdown. Needs root or
fusermount3, fio with its nbd engine, qemu-storage-daemon, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import qemu
from kit import FLAGS, ROOT, machine, ratios, settle, spread

import pyfleece

MIB = 1 << 20
GOAL = 2.0


@dataclass(frozen=True)
class Case:
    """What fio does: `pattern` is its rw=."""

    name: str
    pattern: str
    block: int
    depth: int


def cases(touch: bool) -> list[Case]:
    """With `touch` each write is to a 64 KiB cluster of its own, so that it is the first one for everybody."""
    small = ("4 KiB, one in each 64 KiB", "write:60k") if touch else ("4 KiB random", "randwrite")
    made = []
    for depth in (1, 16):
        made.append(Case(f"{small[0]}, QD{depth}", small[1], 4096, depth))
        made.append(Case(f"1 MiB sequential, QD{depth}", "write", MIB, depth))
    return made


@dataclass(frozen=True)
class Target:
    """Where fio writes: a file, or an NBD URI."""

    path: str = ""
    uri: str = ""


def fio(target: Target, case: Case, size: int, seconds: float, amount: int = 0) -> tuple[float, int]:
    """Operations per second, and the bytes that were written. `amount`: no more bytes than that."""
    command = ["fio", "--name=bench", f"--rw={case.pattern}", f"--bs={case.block}", f"--iodepth={case.depth}"]
    command += [f"--size={size}", f"--runtime={round(seconds * 1000)}ms", "--randseed=1", "--invalidate=0"]
    command.append("--output-format=json")
    if target.uri:
        command += ["--ioengine=nbd", f"--uri={target.uri}"]
    else:
        command += ["--ioengine=libaio", "--direct=1", f"--filename={target.path}"]
    if amount:
        command.append(f"--io_size={amount}")
    elif ":" not in case.pattern:
        command.append("--time_based")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    told = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    return float(told["iops"]), int(told["io_bytes"])


# ---- the sides ----


@contextlib.contextmanager
def ours(directory: str, snapshot: bool) -> Iterator[Target]:
    mountpoint = os.path.join(directory, "mount")
    os.makedirs(mountpoint, exist_ok=True)
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(pyfleece.open(os.path.join(directory, "disk.raw"), "r+"))
        disk = stack.enter_context(pyfleece.Disk(image))
        options = {"fleecing_dir": directory}
        stack.enter_context(pyfleece.mount({"disk.raw": disk}, mountpoint, snapshot_options=options))
        if snapshot:
            os.mkdir(os.path.join(mountpoint, ".snap", "bench"))
        yield Target(path=os.path.join(mountpoint, "disk.raw"))


@contextlib.contextmanager
def qemu_export(directory: str, snapshot: bool, kind: str) -> Iterator[Target]:
    with qemu.Daemon() as daemon:
        daemon.add_file("src", os.path.join(directory, "disk.raw"))
        node = "src"
        if snapshot:
            fleecing = os.path.join(directory, "fleecing.raw")
            with open(fleecing, "wb") as file:
                file.truncate(os.path.getsize(os.path.join(directory, "disk.raw")))
            daemon.add_file("flc", fleecing)
            daemon.add("cbw", "copy-before-write", file="src", target="flc")
            node = "cbw"
        export = {"id": "e", "node-name": node, "writable": True, "type": kind}
        if kind == "fuse":
            path = os.path.join(directory, "export")
            with open(path, "wb"):
                pass
            daemon.call("block-export-add", {**export, "mountpoint": path})
            try:
                yield Target(path=path)
            finally:
                daemon.end_export("e")  # it is unmounted then
            return
        socket = os.path.join(directory, "nbd.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)
        daemon.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}, "max-connections": 16})
        daemon.call("block-export-add", {**export, "name": "e"})
        yield Target(uri=f"nbd+unix:///e?socket={socket}")


@contextlib.contextmanager
def floor(directory: str) -> Iterator[Target]:
    mountpoint = os.path.join(directory, "floor")
    os.makedirs(mountpoint, exist_ok=True)
    program = os.path.join(directory, "fuse_floor")
    with subprocess.Popen([program, os.path.join(directory, "disk.raw"), mountpoint]) as process:
        try:
            while not os.path.ismount(mountpoint):
                if process.poll() is not None:
                    raise RuntimeError("fuse_floor ended")
                time.sleep(0.01)
            yield Target(path=os.path.join(mountpoint, "disk.raw"))
        finally:
            process.terminate()  # unmounts


def build_floor(directory: str) -> bool:
    told = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True)
    if told.returncode:
        return False
    source, program = ROOT / "bench" / "fuse_floor.c", os.path.join(directory, "fuse_floor")
    subprocess.run(["gcc", *FLAGS, str(source), "-o", program, *told.stdout.split()], check=True)
    return True


def sides(directory: str, snapshot: bool, without: set[str]) -> dict[str, contextlib.AbstractContextManager[Target]]:
    made: dict[str, contextlib.AbstractContextManager[Target]] = {"ours": ours(directory, snapshot)}
    if "floor" not in without:
        made["bare FUSE"] = floor(directory)
    for kind in ("fuse", "nbd"):
        if kind not in without:
            made[f"QEMU {kind.upper()}"] = qemu_export(directory, snapshot, kind)
    return made


# ---- the run ----


def missing_exports(directory: str) -> set[str]:
    """What this qemu-storage-daemon, or this fio, was built without."""
    without = set()
    for kind in ("fuse", "nbd"):
        try:
            with qemu_export(directory, False, kind) as target:
                fio(target, Case("", "write", MIB, 1), MIB, 1)
        except RuntimeError as error:
            print(f"no {kind} export of QEMU here: {str(error)[:200]}", file=sys.stderr)
            without.add(kind)
    return without


Figures = dict[str, dict[str, list[float]]]


def measure(directory: str, size: int, seconds: float, without: set[str], figures: Figures) -> None:
    """One round."""

    def note(phase: str, case: Case, side: str, rate: float) -> None:
        figures.setdefault(f"{phase}, {case.name}", {}).setdefault(side, []).append(rate)

    for case in cases(touch=False):
        for side, manager in sides(directory, False, without).items():
            settle(size)
            with manager as target:
                note("plain", case, side, fio(target, case, size, seconds)[0])
    for case in cases(touch=True):
        for side, manager in sides(directory, True, without).items():
            settle(2 * size)
            with manager as target:
                rate, written = fio(target, case, size, seconds, size // 16 if case.block == 4096 else size)
                note("first touch", case, side, rate)
                note("again", case, side, fio(target, case, size, seconds, written)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="of the disk, in MiB (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="the longest that one measurement takes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        with open(os.path.join(directory, "disk.raw"), "wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(MIB))
        without = missing_exports(directory)
        if without == {"fuse", "nbd"}:
            raise SystemExit("there is nothing to compare with")
        if not build_floor(directory):
            print("no bare FUSE here: pkg-config does not know fuse3", file=sys.stderr)
            without.add("floor")
        figures: Figures = {}
        for _ in range(options.rounds):
            measure(directory, options.size * MIB, options.seconds, without, figures)
    report(figures, options.directory)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(figures, out, indent=1)


def report(figures: Figures, directory: str) -> None:
    print(f"{machine(directory)}, {qemu.version()}\n")
    names = list(next(iter(figures.values())))
    print(f"| operations per second | {' | '.join(names)} | ours / the better one | at least {GOAL:g}? |")
    print("|---|" + "---|" * (len(names) + 2))
    for what, columns in figures.items():
        peers = [rates for side, rates in columns.items() if side.startswith("QEMU")]
        values = ratios(columns["ours"], [max(rates) for rates in zip(*peers)])
        met = "yes" if statistics.median(values) >= GOAL else "NO"
        cells = " | ".join(spread(rates, 0) for rates in columns.values())
        print(f"| {what} | {cells} | {spread(values)} | {met} |", flush=True)


if __name__ == "__main__":
    main()

"""What the benchmarks share: building the C programs, and telling medians with their spread."""

from __future__ import annotations

import math
import mmap
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyfleece

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ("-std=gnu11", "-O2", "-pthread")


def build(directory: str, name: str) -> str:
    """bench/NAME.c together with the library; the path of the program."""
    program = os.path.join(directory, name)
    sources = sorted(map(str, (ROOT / "csrc").rglob("*.c")))
    subprocess.run(["gcc", *FLAGS, str(ROOT / "bench" / f"{name}.c"), *sources, "-o", program], check=True)
    return program


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def brief(values: Sequence[float]) -> str:
    """The same with three significant digits of the median."""
    median = statistics.median(values)
    digits = 2 - math.floor(math.log10(median)) if median > 0 else 0
    return spread(values, min(max(digits, 0), 5))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what the machine did meanwhile hit both."""
    return [a / b for a, b in zip(ours, theirs)]


def warm_memory(size: int) -> None:
    """Use so much memory, and free it. A virtual machine may hand memory that was free for seconds back to its host and
    its next use costs a fault there, many times a copy: so every side begins with memory that was used a moment ago.
    """
    populate = getattr(mmap, "MAP_POPULATE", 0x8000)
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate).close()


def settle(size: int) -> None:
    """Before each side: nobody pays for what another one left to be written, nor for memory that lay idle."""
    os.sync()
    warm_memory(size)


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def copy(snapshot: pyfleece.Snapshot, target: str | pyfleece.Image, **options: Any) -> tuple[float, float]:
    """Back up. Seconds until all was copied, and until the backup was done, which is when it is on stable storage."""
    begin = time.perf_counter()
    with pyfleece.Backup(snapshot, target, **options) as job:
        while not job.done and job.progress.fraction < 1:
            time.sleep(min((time.perf_counter() - begin) / 50, 0.005))
        copied = time.perf_counter() - begin
        job.wait()
        return copied, time.perf_counter() - begin


def resident(process: int | str = "self") -> int:
    """Bytes of memory that a process has in use. Exact, unlike the kernel's counters, which lag behind."""
    with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss:"))


def resident_peak(process: int | str = "self") -> int:
    """The most that it ever had."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def machine(directory: str | os.PathLike[str] | None = None) -> str:
    """A line about what was measured on; with a directory, the file system that it is on as well."""
    model = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    told = f"{os.cpu_count()} x {model}, Linux {os.uname().release}"
    if directory is not None:
        output = subprocess.run(["df", "--output=fstype", directory], capture_output=True, text=True, check=True).stdout
        told += f", {output.split()[-1]}"
    return told

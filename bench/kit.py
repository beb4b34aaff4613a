"""What the benchmarks share: building the C programs, and telling medians with their spread."""

from __future__ import annotations

import mmap
import os
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


def build(directory: str, name: str) -> str:
    """bench/NAME.c together with the library; the path of the program."""
    program = os.path.join(directory, name)
    sources = sorted(map(str, (ROOT / "csrc").rglob("*.c")))
    flags = ["-std=gnu11", "-O2", "-pthread"]
    subprocess.run(["gcc", *flags, str(ROOT / "bench" / f"{name}.c"), *sources, "-o", program], check=True)
    return program


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what the machine did meanwhile hit both."""
    return [a / b for a, b in zip(ours, theirs)]


def warm_memory(size: int) -> None:
    """Use so much memory, and free it. A virtual machine may hand memory that was free for seconds back to its host and
    its next use costs a fault there, many times a copy: so every side begins with memory that was used a moment ago.
    """
    populate = getattr(mmap, "MAP_POPULATE", 0x8000)
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate).close()


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def machine() -> str:
    """A line about what was measured on."""
    model = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} x {model}, Linux {os.uname().release}"

"""Building and running the C test programs in tests/c."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

C = Path(__file__).resolve().parent / "c"
BUILD = C / "build"
FLAVOURS = ("plain", "asan", "tsan")

# Every report of a sanitizer ends the program with a status of its own.
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:second_deadlock_stack=1",
}


@functools.cache
def build(flavour: str) -> Path:
    """All programs in one flavour (asan: address and undefined behaviour, tsan: threads); the directory they are in."""
    command = ["make", "-s", "-C", str(C), f"-j{os.cpu_count() or 1}", f"BUILD={BUILD}", flavour]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"the {flavour} flavour does not build:\n{done.stdout}{done.stderr}")
    return BUILD / flavour


def run(flavour: str, program: str, *arguments: str | os.PathLike[str], timeout: float = 100) -> str:
    """Run a program, which must succeed; what it printed."""
    command = [os.fspath(build(flavour) / program), *map(os.fspath, arguments)]
    if flavour == "tsan" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # some kernels place memory where ThreadSanitizer wants its own
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{output[-8000:]}"
    return output


def scenarios() -> list[tuple[str, str]]:
    """The scenarios for the invariants: (program, name); from the sources, since listing must not build anything."""
    found = []
    for source in sorted(C.glob("test_invariants_*.c")):
        names = re.findall(r"^TEST\((\w+)\)", source.read_text(encoding="utf-8"), re.MULTILINE)
        found += [(source.stem, name) for name in names]
    return found

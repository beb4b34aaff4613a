"""What tests share: tools and devices that may be missing, images to work on, and a check that nothing leaks.

What is missing on a user's machine is skipped, visibly. Where the environment has CI set, it is a failure: there
everything must run.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MIB = 1 << 20


def missing(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{what} is needed here")
    pytest.skip(f"{what} is needed for this test")


def require(*tools: str) -> None:
    """Tools that a test runs."""
    for tool in tools:
        if (
            shutil.which(tool) is None
            and not os.path.exists(f"/usr/sbin/{tool}")
            and not os.path.exists(f"/sbin/{tool}")
        ):
            missing(f"the program {tool}")


def run(*command: str | os.PathLike[str], check: bool = True) -> str:
    """Run a tool; its output."""
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True, env=environment)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def run_python(script: str, *arguments: str | os.PathLike[str], timeout: float = 60) -> str:
    """Run a script in an interpreter of its own; it must end with status 0. What it printed."""
    command = [sys.executable, "-c", script, *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def content(size: int, seed: int = 1, *, hole: int = 128 << 10) -> bytes:
    """`size` bytes: stretches of random data and stretches of zeros, about `hole` bytes each."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    left = size
    while left:
        length = min(left, rng.randrange(1, 2 * hole))
        parts.append(rng.randbytes(length) if rng.random() < 0.6 else bytes(length))
        left -= length
    return b"".join(parts)


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., tuple[Path, bytes]]:
    """make_image(size, name="vm.raw", seed=1): a raw file with holes where `content` has zeros; its path and its
    content.
    """

    def make(size: int = MIB + 513, name: str = "vm.raw", seed: int = 1) -> tuple[Path, bytes]:
        path, data = tmp_path / name, content(size, seed)
        with path.open("wb") as file:
            file.truncate(size)
            for offset in range(0, size, 4096):
                block = data[offset : offset + 4096]
                if block.count(0) != len(block):
                    file.seek(offset)
                    file.write(block)
        return path, data

    return make


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """loop_device(size or path, "--read-only", ...): a loop device over a new, empty file or an existing one; its
    path.
    """
    require("losetup")
    if os.geteuid() != 0:
        missing("root, for loop devices,")
    devices: list[str] = []

    def attach(backing: int | Path, *options: str) -> str:
        if isinstance(backing, int):
            path = tmp_path / f"loop{len(devices)}.backing"
            with path.open("wb") as file:
                file.truncate(backing)
        else:
            path = backing
        try:
            done = run("losetup", "--find", "--show", *options, path, check=True)
        except pytest.fail.Exception:
            missing("a free loop device")
        devices.append(done.strip())
        return devices[-1]

    yield attach
    for device in devices:
        run("losetup", "--detach", device, check=False)


def descriptors() -> dict[str, str]:
    """The open files of this process, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # that of the listing itself
            pass
    return found


def own_threads() -> list[str]:
    """The names of the library's threads that run now."""
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
        except OSError:  # it ended meanwhile
            pass
    return [name for name in names if name.startswith("fl-")]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The test leaves no file open and no thread of the library running."""
    gc.collect()
    before, threads_before = descriptors(), len(own_threads())
    yield
    for _ in range(100):
        gc.collect()
        after, threads = descriptors(), own_threads()
        if len(after) <= len(before) and len(threads) <= threads_before:
            return
        time.sleep(0.02)
    new = {number: path for number, path in after.items() if number not in before}
    pytest.fail(f"left behind: files {new}, threads {threads}")

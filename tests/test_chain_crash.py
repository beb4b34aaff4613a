"""Directories of backups, crashed before each operation that counts: every point that is listed can be read and passes
its verification, no point that was there is missing, and after a kill the next backup is an incremental. And chain.py
broken on purpose, a piece of text at a time: each mutant must be noticed, or nothing is proven.

What chain_crash_worker.py tries, with tests/c/crash_shim.c: a directory is made, gets four backups, and loses two.
Before each rename, unlink and sync the process ends, and the directory is looked at as a kill leaves it, and as any
power loss can: all that was synced, and of the changes of names since then any.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import require

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    name: str
    steps: str                      # to crash in, see the worker
    edits: tuple[str, ...] = ()     # old, new, old, new, ...; each old one occurs once
    ignored_sync: str = ""          # of files with names that end so


FIRST, INCREMENTAL, FULL, REMOVE = "1234"

MUTANTS = [
    # ---- the manifest is written last, after all else is complete and synced ----
    Mutant(
        "manifest_before_the_image",
        FIRST,
        (
            "                result = backup(cut, path, workers=workers, speed=speed, progress=progress, **options)\n"
            "                point = addition.finish(result)\n",
            "                point = addition.finish(Result(*9 * [0]))\n"
            "                result = backup(cut, path, workers=workers, speed=speed, progress=progress, **options)\n",
        ),
    ),
    Mutant("image_is_not_synced", FIRST, ignored_sync=".qcow2.partial"),
    Mutant(
        "manifest_before_the_digests",
        FIRST,
        (
            '        self._publish(f"{name}{suffix}", data)\n',
            '        self._late = f"{name}{suffix}", data\n',
            '        self._publish(f"{point.name}.json", _dump(asdict(point)))\n',
            '        self._publish(f"{point.name}.json", _dump(asdict(point)))\n        self._publish(*self._late)\n',
        ),
    ),
    Mutant("manifest_and_digests_are_not_synced", FIRST, ("                os.fsync(file.fileno())\n", "")),
    Mutant(
        "names_are_not_synced",
        FIRST,
        (
            '            os.replace(f"{path}.partial", path)\n            self._sync()\n',
            '            os.replace(f"{path}.partial", path)\n',
        ),
    ),
    Mutant(
        "manifest_is_written_in_place",
        FIRST,
        (
            '            with open(f"{path}.partial", "wb") as file:\n',
            '            with open(path, "wb") as file:\n',
            '            os.replace(f"{path}.partial", path)\n',
            "",
        ),
    ),
    # ---- dirty bitmaps ----
    Mutant(
        "old_bitmap_goes_before_the_manifest",
        INCREMENTAL,
        (
            "                result = backup(cut, path, workers=workers, speed=speed, progress=progress, **options)\n"
            "                point = addition.finish(result)\n",
            "                result = backup(cut, path, workers=workers, speed=speed, progress=progress, **options)\n"
            "            self._remove_bitmaps(disk, keep=addition.bitmap)\n"
            "            point = addition.finish(result)\n",
        ),
    ),
    Mutant(
        "new_bitmap_comes_after_the_cut",
        INCREMENTAL,
        (
            "            disk.bitmaps.add(bitmap, granularity, persistent=persistent,"
            " write_intent=persistent and write_intent)\n",
            "",
            "        self._time = time.strftime(",
            "        self.disk.bitmaps.add(self.bitmap, self.granularity, persistent=True)\n"
            "        self._time = time.strftime(",
        ),
    ),
    # ---- dropping old points ----
    Mutant(
        "points_go_before_what_stands_on_them",
        REMOVE,
        ("            for point in reversed(old):", "            for point in old:"),
    ),
    Mutant(
        "image_goes_before_the_manifest",
        REMOVE,
        (
            'for name in (f"{point.name}.json", point.digests, point.image):',
            'for name in (point.image, point.digests, f"{point.name}.json"):',
        ),
    ),
    Mutant(
        "removals_are_not_synced_one_by_one",
        REMOVE,
        (
            '                raise from_os_error(error, f"cannot remove {self._path(name)}") from error\n'
            "            self._sync()\n",
            '                raise from_os_error(error, f"cannot remove {self._path(name)}") from error\n'
            "        self._sync()\n",
        ),
    ),
    Mutant(
        "manifest_goes_before_the_oldest_is_full",
        FULL,
        (
            "                if point.parent in going:\n                    self._make_full(point, workers)\n",
            "                if point.parent in going:\n"
            '                    os.unlink(self._path(f"{old[-1].name}.json"))\n'
            "                    self._make_full(point, workers)\n",
        ),
    ),
    Mutant(
        "full_one_has_its_manifest_first",
        FULL,
        (
            "        os.replace(temporary, path)\n"
            "        self._sync()\n        self._publish_point(Point(**changed))\n",
            "        self._publish_point(Point(**changed))\n"
            "        os.replace(temporary, path)\n        self._sync()\n",
        ),
    ),
    Mutant("full_one_is_not_synced", FULL, ignored_sync=".qcow2.full.partial"),
    Mutant(
        "digests_are_replaced_in_place",
        FULL,
        (
            '        written = self._write_digests(point.name, collector, ".full-digests")\n',
            "        written = self._write_digests(point.name, collector)\n",
            "        with suppress(FileNotFoundError):\n            os.unlink(self._path(point.digests))\n",
            "",
        ),
    ),
    Mutant(
        "what_a_crash_left_stays",
        REMOVE,
        ("            if half or dropped or replaced:\n", "            if half:\n"),
    ),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("gcc")
    library = tmp_path_factory.mktemp("shim") / "crash_shim.so"
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, TESTS / "c" / "crash_shim.c", "-o", library, "-ldl"], check=True)
    return library


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """Where things are crashed: in memory if there is such a place. What is on stable storage is simulated."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        yield Path(directory) / "base"


def crash(shim: Path, directory: Path, mutant: Mutant) -> subprocess.CompletedProcess[str]:
    worker = TESTS / "chain_crash_worker.py"
    command = [sys.executable, worker, shim, directory, mutant.steps, mutant.ignored_sync, *mutant.edits]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_every_crash_is_survived(shim: Path, base: Path) -> None:
    done = crash(shim, base, Mutant("none", FIRST + INCREMENTAL + FULL + REMOVE))
    assert done.returncode == 0, done.stdout + done.stderr
    crashes, states = (int(word) for word in done.stdout.split() if word.isdigit())
    assert crashes > 40 and states > 40, done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_is_noticed(mutant: Mutant, shim: Path, base: Path) -> None:
    done = crash(shim, base, mutant)
    assert done.returncode == 1 and " leaves " in done.stdout, f"nobody notices: {done.stdout}{done.stderr}"

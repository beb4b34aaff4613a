"""Dirty bitmaps as Python sees them: persistent ones above all. The orders behind them are proven in C, in
tests/c/test_invariants_bitmaps.c (kills, damage) and test_invariants_power.c (power losses).

PYFLEECE_KILLS=200 in the environment: so many times. PYFLEECE_SEED: begin with another random state.
"""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bitmap_worker import NAMES, UNIT, UNITS
from conftest import MIB, missing, require, run, wait_for

import pyfleece
from pyfleece.testing import FaultyImage

KILLS = int(os.environ.get("PYFLEECE_KILLS", "10"))
SEED = int(os.environ.get("PYFLEECE_SEED", "1"))
WORKER = Path(__file__).with_name("bitmap_worker.py")
ROOT = WORKER.parent.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    pyfleece.create(path, UNITS * UNIT).close()
    return path


def dirty_units(bitmap: pyfleece.DirtyBitmap) -> set[int]:
    return {
        unit
        for extent in bitmap.extents()
        if extent.kind == "dirty"
        for unit in range(extent.offset // UNIT, -(-(extent.offset + extent.length) // UNIT))
    }


# ---- the API ----


def test_clear_merge_enable(image: Path) -> None:
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)
        daily, fine = disk.bitmaps.add("daily"), disk.bitmaps.add("fine", 4096)
        disk.pwrite(b"x", UNIT)
        daily.disable()
        disk.pwrite(b"x", 3 * UNIT)
        assert (daily.enabled, daily.count, fine.count) == (False, UNIT, 8192)
        daily.enable()
        daily.merge("fine")
        assert daily.enabled and dirty_units(daily) == {1, 3}
        fine.merge(daily)
        assert fine.count == 2 * UNIT
        daily.clear()
        assert daily.count == 0
        disk.bitmaps.merge("daily", "fine", "daily")
        assert daily.count == 2 * UNIT
        with pytest.raises(FileNotFoundError):
            daily.merge("fine", "none")
        assert not daily.persistent and not daily.write_intent and not daily.busy
        assert daily.uuid is None and daily.problem is None
        with pytest.raises(ValueError, match="bitmap_mode"):
            disk.snapshot(bitmap="daily", bitmap_mode="sometimes")


@pytest.mark.parametrize("mode", ["on-success", "always", "never"])
def test_modes(image: Path, mode: str) -> None:
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)
        bitmap = disk.bitmaps.add("daily")
        for end in ("commit", "abort", "close"):
            bitmap.clear()
            disk.pwrite(bytes(2 * UNIT), 0)
            with disk.snapshot("memory", bitmap="daily", bitmap_mode=mode) as snapshot:
                assert bitmap.busy
                with pytest.raises(pyfleece.ImageError, match="uses"):
                    bitmap.clear()
                snapshot.discard(UNIT, 0)
                if end != "close":
                    getattr(snapshot, end)()
                    with pytest.raises(pyfleece.ArgumentError):
                        getattr(snapshot, "abort" if end == "commit" else "commit")()
            expected = {"on-success": {0, 1}, "always": {1}, "never": {0, 1}}[mode]
            if end == "commit" and mode != "never":
                expected = set()
            assert dirty_units(bitmap) == expected, end


# ---- the file ----


def test_persistent(image: Path, no_leaks: None) -> None:
    file = Path(f"{image}.fleece-bitmaps")
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)
        assert disk.bitmaps.file == str(file) and not file.exists()
        disk.bitmaps.add("in memory")
        assert not file.exists()
        daily = disk.bitmaps.add("daily", persistent=True)
        intent = disk.bitmaps.add("intent", 1 << 20, write_intent=True)
        uuid = daily.uuid
        disk.pwrite(b"x", 5 * UNIT)
        assert (daily.persistent, daily.write_intent) == (True, False)
        assert (intent.persistent, intent.write_intent) == (True, True)
    assert file.stat().st_blocks * 512 < 256 << 10              # sparse
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)
        assert sorted(disk.bitmaps) == ["daily", "intent"]
        daily = disk.bitmaps["daily"]
        assert (daily.uuid, dirty_units(daily), disk.bitmaps["intent"].count) == (uuid, {5}, 1 << 20)
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            snapshot.commit()
        disk.bitmaps.remove("intent")
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        assert {name: bitmap.count for name, bitmap in disk.bitmaps.items()} == {"daily": 0}
        disk.bitmaps.remove("daily")
    assert not file.exists()


def test_choices_of_the_file(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    with pyfleece.open(image, "r+") as source:
        with pyfleece.Disk(source, bitmap_file=other) as disk:
            disk.bitmaps.add("daily", persistent=True)
            disk.pwrite(b"x", 0)
        assert other.exists() and not Path(f"{image}.fleece-bitmaps").exists()
        with pyfleece.Disk(source) as disk:
            assert not disk.bitmaps
        with pyfleece.Disk(source, bitmap_file=False) as disk:
            assert disk.bitmaps.file is None
            with pytest.raises(pyfleece.ArgumentError, match="bitmap_file"):
                disk.bitmaps.add("daily", persistent=True)
        with pyfleece.Disk(source, bitmap_file=other) as disk:
            assert disk.bitmaps["daily"].count == UNIT
            disk.bitmaps["daily"].disable()
    with pyfleece.open(image) as source, pyfleece.Disk(source, bitmap_file=other) as disk:       # read-only
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            snapshot.commit()
        assert disk.bitmaps["daily"].count == 0
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source, bitmap_file=other) as disk:
        assert not disk.bitmaps["daily"].inconsistent and disk.bitmaps["daily"].count == 0
    other.write_bytes(b"something else")
    with pyfleece.open(image, "r+") as source:
        with pytest.raises(pyfleece.FormatError, match="not a file of dirty bitmaps"):
            pyfleece.Disk(source, bitmap_file=other)
        pyfleece.Disk(source, bitmap_file=False).close()         # the failure left nothing in the way
        assert other.read_bytes() == b"something else"


def test_a_nameless_image_has_no_file(tmp_path: Path) -> None:
    with pyfleece.image.create_nameless(tmp_path, MIB) as source, pyfleece.Disk(source) as disk:
        with pytest.raises(pyfleece.ArgumentError, match="bitmap_file"):
            disk.bitmaps.add("daily", persistent=True)
        disk.bitmaps.add("daily")


def test_inconsistent(image: Path) -> None:
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        disk.bitmaps.add("daily", persistent=True)
    image.write_bytes(image.read_bytes())
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        bitmap = disk.bitmaps["daily"]
        assert bitmap.inconsistent and bitmap.problem is not None and "another program" in bitmap.problem
        for use in (
            lambda: bitmap.count,
            lambda: list(bitmap.extents()),
            lambda: disk.snapshot("memory", bitmap="daily"),
            bitmap.disable,
        ):
            with pytest.raises(pyfleece.InconsistentBitmapError, match="another program.*full backup"):
                use()
        bitmap.clear()
        disk.pwrite(b"x", 0)
        assert (bitmap.inconsistent, bitmap.problem, bitmap.count) == (False, None, UNIT)


def test_failed_flush_leaves_the_file_in_use(image: Path) -> None:
    """What is not flushed is not recorded as clean; nothing is lost by that, since the bits are there."""
    with pyfleece.open(image, "r+") as raw, FaultyImage(raw) as source:
        disk = pyfleece.Disk(source)
        disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 0)
        source.fail("flush", error=errno.EIO)
        with pytest.raises(pyfleece.ImageError, match="Input/output"):
            disk.close()
        disk.close()
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        assert dirty_units(disk.bitmaps["daily"]) == {0}


def test_group(tmp_path: Path) -> None:
    """The bitmaps of several disks are frozen at one instant, and each survives in its own file."""
    sources = [pyfleece.create(tmp_path / f"{n}.raw", MIB) for n in range(2)]
    disks = [pyfleece.Disk(source) for source in sources]
    for disk in disks:
        disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 0)
    with pyfleece.snapshot_group(disks, "memory", bitmap="daily") as group:
        disks[0].pwrite(b"x", UNIT)
        group[1].commit()
    for source in sources:
        source.close()
    counts = []
    for n in range(2):
        with pyfleece.open(tmp_path / f"{n}.raw", "r+") as source, pyfleece.Disk(source) as disk:
            counts.append(disk.bitmaps["daily"].count)
    assert counts == [2 * UNIT, 0]


def test_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "vm.qcow2"
    pyfleece.create(path, 64 * MIB).close()
    for number in range(3):
        with pyfleece.open(path, "r+") as source:
            disk = pyfleece.Disk(source)
            bitmap = disk.bitmaps["daily"] if number else disk.bitmaps.add("daily", persistent=True)
            assert bitmap.problem is None and dirty_units(bitmap) == set(range(number))
            disk.pwrite(b"x", number * UNIT)
            disk.discard(MIB, 32 * MIB)
            bitmap.clear()
            disk.pwrite(bytes((number + 1) * UNIT), 0)
    with pyfleece.open(path, "r+") as source:
        source.pwrite(b"around the disk", 0)
        source.flush()
    with pyfleece.open(path, "r+") as source, pyfleece.Disk(source) as disk:
        assert disk.bitmaps["daily"].inconsistent


# ---- kill -9 ----


def test_kill_9(image: Path) -> None:
    """Whenever it is killed: what was acknowledged since a bitmap was last cleared is dirty in it."""
    rng = random.Random(SEED)
    required: dict[str, set[int]] = {name: set() for name in NAMES}
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        for name in NAMES:
            disk.bitmaps.add(name, UNIT, persistent=True)
    writes = 0
    for number in range(KILLS):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, WORKER, image, f"{SEED} {number}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            time.sleep(rng.random() * 0.1)
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        for line in lines:
            what, _, argument = line.strip().partition(" ")
            if what == "wrote":
                writes += 1
                for units in required.values():
                    units.add(int(argument))
            elif what == "drop":
                required[argument] = set()
        with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
            for name, units in required.items():
                assert disk.bitmaps[name].problem is None
                assert units <= dirty_units(disk.bitmaps[name]), f"kill {number}, {name}"
    assert writes > KILLS


# ---- storage ----


@pytest.fixture
def small_file_system(tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[Path]:
    require("mkfs.ext4", "mount")
    device, directory = loop_device(8 * MIB), tmp_path / "small"
    run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", device)
    directory.mkdir()
    if "mount:" in run("mount", device, directory, check=False):
        missing("permission to mount")
    yield directory
    wait_for(lambda: run("umount", directory, check=False) == "", 10)


def test_no_space_for_the_file(tmp_path: Path, small_file_system: Path) -> None:
    """The guest's writes go on, the bitmap is right in memory, says what is wrong, and is stored when there is room."""
    path, file = tmp_path / "large.raw", small_file_system / "bitmaps"
    far = 4096 << 15                            # what a page of bits stands for
    pyfleece.create(path, 64 * far).close()
    with pyfleece.open(path, "r+") as source:
        disk = pyfleece.Disk(source, bitmap_file=file)
        bitmap = disk.bitmaps.add("fine", 4096, persistent=True)
        disk.pwrite(b"x", 0)
        filler = small_file_system / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as out:
            while True:
                out.write(bytes(4096))
        for page in range(64):
            disk.pwrite(b"x", page * far + 8192)
        assert bitmap.count == 65 * 4096 and not bitmap.inconsistent
        assert bitmap.problem is not None and "could not be noted" in bitmap.problem
        filler.unlink()
    with pyfleece.open(path, "r+") as source, pyfleece.Disk(source, bitmap_file=file) as disk:
        assert disk.bitmaps["fine"].count == 65 * 4096


def test_block_device(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    device, file = loop_device(4 * MIB), tmp_path / "bitmaps"

    def look(problem: str | None) -> None:
        with pyfleece.open(device, "r+") as source:
            assert pyfleece.Disk(source).bitmaps.file is None           # no default
        with pyfleece.open(device, "r+") as source, pyfleece.Disk(source, bitmap_file=file) as disk:
            bitmap = disk.bitmaps["daily"]
            assert re.search(problem or "None", str(bitmap.problem))
            bitmap.clear()
            disk.pwrite(b"x", 0)

    with pyfleece.open(device, "r+") as source, pyfleece.Disk(source, bitmap_file=file) as disk:
        disk.bitmaps.add("daily", persistent=True)
    look(None)
    look(None)
    with open(device, "r+b") as raw:
        raw.write(b"y" * 4096)
    look("another program wrote")
    other = loop_device(4 * MIB)
    with pyfleece.open(other, "r+") as source, pyfleece.Disk(source, bitmap_file=file) as disk:
        assert "another file or device" in str(disk.bitmaps["daily"].problem)


# ---- listing ----


def test_many_extents(image: Path) -> None:
    """Every other unit; batches join without a gap, and neighbours differ."""
    path = image.with_name("large.raw")
    pyfleece.create(path, 1 << 40).close()
    with pyfleece.open(path, "r+") as source, pyfleece.Disk(source) as disk:
        bitmap = disk.bitmaps.add("fine", 4096)
        for unit in range(0, 20000, 2):
            disk.discard(1, unit * 4096)
        extents = list(bitmap.extents())
        assert len(extents) == 20000 and extents[-1].kind == "clean"
        end = 0
        for number, (offset, length, kind) in enumerate(extents):
            assert offset == end and kind == ("clean" if number % 2 else "dirty")
            end = offset + length
        assert end == 1 << 40

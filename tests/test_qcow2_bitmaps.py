"""Dirty bitmaps in qcow2 images: QEMU reads ours, we read QEMU's, and neither trusts what may miss a write."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, require, run, wait_for
from test_bitmaps import dirty_units

import pyfleece

UNIT = 65536
SIZE = 64 * MIB
ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("qemu")


@pytest.fixture
def qemu() -> None:
    require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.qcow2"
    pyfleece.create(path, SIZE).close()
    return path


def sidecar(image: Path) -> Path:
    return Path(f"{image}.fleece-bitmaps")


def check(image: Path, *statuses: int) -> None:
    done = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert done.returncode in (statuses or (0,)), done.stdout + done.stderr
    if not statuses:
        assert pyfleece.check(image).status == 0


def qemu_bitmaps(image: Path) -> dict[str, tuple[int, list[str]]]:
    """As `qemu-img info` lists them: granularity and flags by name. Also while we have the image open."""
    text = run("qemu-img", "info", "-U", "--output=json", image)
    info: Any = json.JSONDecoder().raw_decode(text[text.index("{") :])[0]       # it warns, behind it, of void bitmaps
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: (bitmap["granularity"], sorted(bitmap["flags"])) for bitmap in found}


def qemu_dirty(image: Path, name: str, unit: int = UNIT) -> set[int]:
    """The dirty units, as QEMU's server exports them."""
    socket = image.with_name("socket")
    command = ["qemu-nbd", "-r", "-f", "qcow2", "-A", "-B", name, "-t", "-k", socket, image]
    with subprocess.Popen(command) as server:
        try:
            wait_for(socket.exists, 20)
            text = run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", f"nbd+unix:///?socket={socket}")
        finally:
            server.terminate()
    socket.unlink(missing_ok=True)
    dirty = [extent for extent in json.loads(text) if extent["type"] & 1]
    return {
        number
        for extent in dirty
        for number in range(extent["offset"] // unit, -(-(extent["offset"] + extent["length"]) // unit))
    }


def qemu_write(image: Path, *units: int, end: str = "") -> None:
    commands = [word for unit in units for word in ("-c", f"write -P 7 {unit * UNIT} 4k")]
    run("qemu-io", "-f", "qcow2", *commands, *(["-c", end] if end else []), image, check=not end)


def test_qemu_reads_ours(image: Path) -> None:
    written = set(random.Random(1).sample(range(SIZE // UNIT), 50))
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)
        disk.bitmaps.add("daily", persistent=True)
        disk.bitmaps.add("coarse", 1 << 20, persistent=True).disable()
        disk.bitmaps.add("nothing", write_intent=True)
        disk.bitmaps["nothing"].disable()
        disk.bitmaps.add("in memory")
        for unit in written:
            disk.pwrite(b"x", unit * UNIT)
        disk.bitmaps["coarse"].merge("daily")
        everything = disk.bitmaps.add("everything", 4096, persistent=True)
        disk.bitmaps.add("all", 4096)
        for offset in range(0, SIZE, MIB):
            disk.discard(MIB, offset)
        assert everything.count == SIZE
        disk.bitmaps["daily"].clear()
        for unit in written:
            disk.pwrite(b"x", unit * UNIT)
    check(image)
    assert qemu_bitmaps(image) == {
        "daily": (UNIT, ["auto"]),
        "coarse": (1 << 20, []),
        "nothing": (UNIT, []),
        "everything": (4096, ["auto"]),
    }
    assert qemu_dirty(image, "daily") == written
    assert qemu_dirty(image, "coarse", 1 << 20) == {unit // 16 for unit in written}
    assert qemu_dirty(image, "nothing") == set()
    assert qemu_dirty(image, "everything") == set(range(SIZE // UNIT))


def test_we_read_qemus(tmp_path: Path) -> None:
    image = tmp_path / "vm.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE + 512))
    run("qemu-img", "bitmap", "--add", "-g", "64k", "-f", "qcow2", image, "daily")
    run("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", image, "fine")
    qemu_write(image, 1, 7, 1023)
    run("qemu-img", "bitmap", "--disable", "-f", "qcow2", image, "fine")
    qemu_write(image, 9)
    with pyfleece.open(image, "r+") as source:
        disk = pyfleece.Disk(source)    # makes the file, since a write makes void what is in the image
        daily, fine = disk.bitmaps["daily"], disk.bitmaps["fine"]
        assert dirty_units(daily) == {1, 7, 9, 1023} and daily.persistent and daily.enabled
        assert (dirty_units(fine), fine.granularity, fine.enabled) == ({1, 7, 1023}, 4096, False)
        uuid = daily.uuid
        disk.pwrite(b"x", SIZE + 511)
        disk.pwrite(b"x", 2 * UNIT)
        with disk.snapshot("memory", bitmap="fine") as snapshot:
            snapshot.commit()
    check(image)
    assert qemu_dirty(image, "daily") == {1, 2, 7, 9, 1023, 1024}
    assert qemu_dirty(image, "fine") == set()
    qemu_write(image, 100)                                      # it maintains them
    assert qemu_dirty(image, "daily") == {1, 2, 7, 9, 100, 1023, 1024}
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        daily = disk.bitmaps["daily"]
        assert not daily.inconsistent and dirty_units(daily) == {1, 2, 7, 9, 100, 1023, 1024}
        assert daily.uuid != uuid                               # what else QEMU did to it nobody knows
    check(image)
    run("qemu-img", "bitmap", "--clear", "-f", "qcow2", image, "daily")
    run("qemu-img", "bitmap", "--remove", "-f", "qcow2", image, "fine")
    check(image)
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        assert disk.bitmaps["daily"].count == 0
        assert disk.bitmaps["fine"].inconsistent                # of the sidecar; the image was changed since
        disk.bitmaps.remove("fine")
        disk.bitmaps.remove("daily")
    assert not sidecar(image).exists() and qemu_bitmaps(image) == {}
    check(image)


def test_qemu_crashed(image: Path) -> None:
    """What QEMU had in use when it crashed is not trusted."""
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        disk.bitmaps.add("daily", persistent=True)
    qemu_write(image, 3, end="abort")
    assert "in-use" in qemu_bitmaps(image)["daily"][1]
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        assert disk.bitmaps["daily"].inconsistent
        disk.pwrite(b"x", 0)
        disk.bitmaps["daily"].clear()
        disk.pwrite(b"x", UNIT)
    check(image)
    assert qemu_dirty(image, "daily") == {1}


CRASH = """
import os, pyfleece, sys
disk = pyfleece.Disk(pyfleece.open(sys.argv[1], "r+"))
for unit in map(int, sys.argv[2:]):
    disk.pwrite(b"y", unit * 65536)
disk.flush()
os.kill(os.getpid(), 9)
"""


def test_we_crashed(image: Path) -> None:
    """In the image they are void then; ours survives, and the next clean close stores it."""
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 0)
    assert qemu_dirty(image, "daily") == {0}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CRASH, image, "5", "6"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    check(image, 0, 3)
    assert qemu_bitmaps(image) == {}
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        assert dirty_units(disk.bitmaps["daily"]) == {0, 5, 6}
    assert qemu_dirty(image, "daily") == {0, 5, 6}


def test_writes_around_the_disk_make_them_void(image: Path) -> None:
    with pyfleece.open(image, "r+") as source:
        with pyfleece.Disk(source) as disk:
            disk.bitmaps.add("daily", persistent=True)
        assert list(qemu_bitmaps(image)) == ["daily"]
        source.pwrite(b"x", 0)
        source.flush()
        assert not qemu_bitmaps(image)
    assert qemu_bitmaps(image) == {}
    check(image)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=2M", "refcount_bits=1", "compat=0.10"])
def test_kinds_of_images(tmp_path: Path, options: str) -> None:
    """Also with a backing file, whose name QEMU puts right where the extension has to go."""
    base, image = tmp_path / "base.raw", tmp_path / "vm.qcow2"
    base.write_bytes(b"b" * MIB)
    backing = ["-b", base, "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, image, str(SIZE))
    for number in range(3):
        with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
            assert disk.pread(4, 4096) == b"bbbb"
            if number == 0:
                disk.bitmaps.add("daily", 4096, persistent=True)
            assert dirty_units(disk.bitmaps["daily"]) == set(range(number))
            disk.pwrite(b"x", number * UNIT)
        check(image)
        assert f"backing file: {base}" in run("qemu-img", "info", image)
        if options == "compat=0.10":
            assert not qemu_bitmaps(image)
        else:
            assert qemu_dirty(image, "daily") == set(range(number + 1))


def test_damaged_bitmaps(image: Path) -> None:
    """They are not taken over; the disk opens all the same, and its refcounts stay right."""
    with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
        disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 0)
    data = bytearray(image.read_bytes())
    at = data.index(struct.pack(">II", 0x23852875, 24)) + 8
    (directory,) = struct.unpack_from(">Q", data, at + 16)
    (table,) = struct.unpack_from(">Q", data, directory)
    for entry in (1 << 9, UNIT | 1, 1 << 50, 1 << 60):
        struct.pack_into(">Q", data, table, entry)
        image.write_bytes(data)
        sidecar(image).unlink(missing_ok=True)
        with pyfleece.open(image, "r+") as source, pyfleece.Disk(source) as disk:
            assert not disk.bitmaps
            disk.pwrite(b"x", 0)
        check(image, 0, 3)

"""Backups that share blocks with the source, on real file systems in files: what is shared, that it is right under a
guest that writes, and what happens where nothing can be shared.

What a clone that is overtaken by the guest must not leave behind is proven in tests/c/test_invariants_clone.c, where
the order of things is fixed.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MIB, content, missing, require, run, wait_for

import pyfleece
from pyfleece.cli import main

KIB = 1 << 10
SIZE = 24 * MIB + 513
MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "ext4": ("mkfs.ext4", "-q"),
}
SHARING = ("xfs", "btrfs")


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[Path]:
    """A directory on a file system of its own, of the kind that the test is parametrized with."""
    kind = request.param
    require(MAKE[kind][0], "mount")
    device = loop_device(512 * MIB)
    run(*MAKE[kind], device)
    directory = tmp_path / kind
    directory.mkdir()
    refused = run("mount", "-t", kind, device, directory, check=False)
    if "unknown filesystem" in refused:
        missing(f"a kernel that knows {kind}")
    if refused:
        missing("permission to mount")
    yield directory
    wait_for(lambda: run("umount", directory, check=False) == "", 10)


def on(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", kinds, indirect=True)


def make_source(path: Path, seed: int = 1) -> bytes:
    """A file with data and holes, of many lengths; what is in it."""
    data = content(SIZE, seed, hole=MIB)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(0, SIZE, 4 * KIB):
            block = data[offset : offset + 4 * KIB]
            if block.count(0) != len(block):
                file.seek(offset)
                file.write(block)
    return data


def back_up(source: Path, target: object, *, direct: bool = False, **options: object) -> pyfleece.Result:
    with ExitStack() as stack:
        image = stack.enter_context(pyfleece.open(source, format="raw", direct=direct))
        disk = stack.enter_context(pyfleece.Disk(image))
        snapshot = stack.enter_context(disk.snapshot("memory"))
        return pyfleece.backup(snapshot, target, reflink=True, **options)  # type: ignore[arg-type]


def extents(path: Path) -> list[str]:
    """Those with data, as filefrag tells them."""
    require("filefrag")
    os.sync()
    return [line for line in run("filefrag", "-v", path).splitlines() if line.strip()[:1].isdigit()]


def unshared(path: Path) -> list[str]:
    return [line for line in extents(path) if "shared" not in line]


# ---- what is shared ----


@on(*SHARING)
def test_data_is_shared_and_holes_stay_holes(place: Path) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    data = make_source(source)
    os.sync()
    before = os.statvfs(place).f_bfree
    result = back_up(source, target)
    os.sync()
    taken = (before - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize
    assert target.read_bytes() == data
    assert result.data_bytes + result.zero_bytes == result.total == SIZE
    # What is shorter than 64 KiB is copied: ends of extents that are in a granule with others.
    assert 0 <= result.data_bytes - result.reflinked_bytes < result.data_bytes / 8
    assert taken < 2 * MIB + result.data_bytes - result.reflinked_bytes
    assert len(extents(target)) - len(unshared(target)) > 5
    # Either is written to without the other one.
    with source.open("r+b") as file:
        file.write(bytes(SIZE))
    assert target.read_bytes() == data
    with target.open("r+b") as file:
        file.write(data[::-1])
    assert source.read_bytes() == bytes(SIZE)


@on(*SHARING)
def test_data_without_holes_is_shared_to_the_last_byte(place: Path) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    data = random.Random(1).randbytes(SIZE)
    source.write_bytes(data)
    result = back_up(source, target)
    assert target.read_bytes() == data
    assert result.reflinked_bytes == result.data_bytes == SIZE
    assert unshared(target) == []


@on("xfs")
@pytest.mark.parametrize("whole", [False, True])
def test_an_incremental_shares_what_it_holds(place: Path, whole: bool) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    make_source(source)
    with pyfleece.open(source, "r+", format="raw") as image, pyfleece.Disk(image, bitmap_file=False) as disk:
        disk.bitmaps.add("daily", 64 * KIB)
        disk.pwrite(b"1" * (2 * MIB), 4 * MIB)
        disk.pwrite(b"2" * (64 * KIB), 20 * MIB)
        with disk.snapshot("memory", bitmap="daily", whole=whole) as snapshot:
            disk.pwrite(b"3" * (64 * KIB), 4 * MIB)  # saved: this much is copied
            disk.pwrite(b"4" * (64 * KIB), 10 * MIB)
            result = pyfleece.backup(snapshot, target, reflink=True, granularity=64 * KIB)
    assert result.total == 2 * MIB + 64 * KIB
    assert result.reflinked_bytes == 2 * MIB
    expected = bytearray(SIZE)
    expected[4 * MIB : 6 * MIB] = b"1" * (2 * MIB)
    expected[20 * MIB : 20 * MIB + 64 * KIB] = b"2" * (64 * KIB)
    assert target.read_bytes() == expected


@on("xfs")
def test_an_image_that_is_longer_and_not_empty(place: Path) -> None:
    """Zeros of the disk are zeroed there, and what is behind the disk's end stays."""
    source, target = place / "vm.raw", place / "there.raw"
    data = make_source(source)
    target.write_bytes(b"x" * (SIZE + MIB))
    with pyfleece.open(target, "r+") as image:
        result = back_up(source, image)
    assert result.reflinked_bytes > 0
    assert target.read_bytes() == data + b"x" * MIB


@on("xfs")
def test_a_source_with_direct_io(place: Path) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    data = make_source(source)
    assert back_up(source, target, direct=True).reflinked_bytes > 0
    assert target.read_bytes() == data


@on("xfs")
def test_a_speed_limit_counts_what_is_shared(place: Path) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    source.write_bytes(random.Random(1).randbytes(2 * MIB))
    result = back_up(source, target, speed=4 * MIB)
    assert result.reflinked_bytes == 2 * MIB
    assert result.seconds > 0.25


# ---- a guest that writes ----


class Guest:
    """Changes anything anywhere, as fast as it can, until told to stop."""

    def __init__(self, disk: pyfleece.Disk, seed: int) -> None:
        self._disk = disk
        self._random = random.Random(seed)
        self._stop = False
        self.changes = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop:
                self._change()
        except BaseException as error:
            self.error = error

    def _change(self) -> None:
        length = self._random.choice((512, 4096, 5000, 70_000, 300_000))
        offset = self._random.randrange(SIZE - length + 1)
        what = self._random.random()
        if what < 0.8:
            self._disk.pwrite(self._random.randbytes(length), offset)
        elif what < 0.9:
            self._disk.zero(length, offset)
        else:
            self._disk.discard(length, offset)
        self.changes += 1

    def stop(self) -> None:
        self._stop = True
        self._thread.join()
        if self.error is not None:
            raise self.error


@on(*SHARING)
@pytest.mark.parametrize("direct", [False, True])
def test_the_target_is_the_disk_at_the_cut(place: Path, direct: bool) -> None:
    source = place / "vm.raw"
    make_source(source)
    shared = 0
    with pyfleece.open(source, "r+", format="raw", direct=direct) as image, pyfleece.Disk(image) as disk:
        for number in range(6):
            target = place / f"backup{number}.raw"
            granularity = random.Random(number).choice((64 * KIB, 256 * KIB, MIB))
            expected = disk.pread(SIZE, 0)
            with disk.snapshot(place) as snapshot:
                guests = [Guest(disk, 10 * number + index) for index in range(2)]
                try:
                    wait_for(lambda guests=guests: all(guest.changes > 5 or guest.error for guest in guests), 60)
                    result = pyfleece.backup(snapshot, target, reflink=True, workers=4, granularity=granularity)
                finally:
                    for guest in guests:
                        guest.stop()
            assert target.read_bytes() == expected
            shared += result.reflinked_bytes
            assert result.data_bytes + result.zero_bytes == SIZE
            assert result.lost_bytes == 0
    assert shared > 0


# ---- where nothing can be shared ----


@on("ext4")
def test_a_file_system_that_cannot_share(place: Path) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    data = make_source(source)
    assert back_up(source, target).reflinked_bytes == 0
    assert target.read_bytes() == data


@on("xfs")
def test_two_file_systems(place: Path, tmp_path: Path) -> None:
    source, target = place / "vm.raw", tmp_path / "backup.raw"
    data = make_source(source)
    assert back_up(source, target).reflinked_bytes == 0
    assert target.read_bytes() == data


@on("xfs")
def test_targets_that_cannot_share(place: Path, loop_device: Callable[..., str]) -> None:
    """A qcow2 image, one with direct I/O, a block device and a stream: all of them get copies."""
    source = place / "vm.raw"
    data = make_source(source)
    assert back_up(source, place / "backup.qcow2").reflinked_bytes == 0
    with pyfleece.open(place / "backup.qcow2") as image:
        assert image.pread(SIZE, 0) == data
    with pyfleece.create(place / "direct.raw", SIZE, direct=True) as image:
        assert back_up(source, image).reflinked_bytes == 0
    assert (place / "direct.raw").read_bytes() == data
    with (place / "stream.raw").open("wb") as file:
        assert back_up(source, file).reflinked_bytes == 0
    assert (place / "stream.raw").read_bytes() == data
    device = loop_device(32 * MIB)
    assert back_up(source, device, format="raw").reflinked_bytes == 0
    with open(device, "rb") as file:
        assert file.read(SIZE) == data


def test_what_needs_the_bytes_is_refused(make_image: Callable[..., tuple[Path, bytes]], tmp_path: Path) -> None:
    path, _ = make_image()
    with pytest.raises(pyfleece.Error, match="on_piece needs their bytes"):
        back_up(path, tmp_path / "x.raw", on_piece=lambda offset, length, data: None)
    with pytest.raises(pyfleece.Error, match="compress needs their bytes"):
        back_up(path, tmp_path / "x.qcow2", compress=True)
    assert not (tmp_path / "x.raw").exists()


# ---- the command ----


@on("xfs")
def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = place / "vm.raw", place / "backup.raw"
    data = make_source(source)
    assert main(["backup", "--reflink", str(source), str(target)]) == 0
    assert "shared with the source" in capsys.readouterr().out
    assert target.read_bytes() == data
    assert main(["backup", "--reflink", "--json", str(source), str(target)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["reflinked_bytes"] <= told["data_bytes"]
    assert main(["backup", "--reflink", "--incremental", str(source), str(place / "points")]) != 0
    assert "digests" in capsys.readouterr().err
    assert not (place / "points").exists()

"""Chains of backups: incrementals, the reasons for full ones, verify, prune, restore. test_chain_kill.py kills them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MIB, require, run

import pyfleece
from pyfleece import digests
from pyfleece.chain import ChainError, Repository, split
from pyfleece.restore import RestoreError, restore

SIZE = 4 * MIB + 513
CYCLES = int(os.environ.get("PYFLEECE_CHAIN_CYCLES", "30"))
CLI = [sys.executable, "-m", "pyfleece"]


class Guest:
    """A disk with a model, and its backups."""

    def __init__(self, directory: Path, size: int = SIZE, name: str = "vm.raw") -> None:
        self.path = directory / name
        self.image = pyfleece.create(self.path, size)
        self.model = bytearray(self.image.size)
        self.disk = pyfleece.Disk(self.image)
        self.rng = random.Random(7)

    def write(self, length: int = 9000, offset: int | None = None) -> None:
        data = self.rng.randbytes(length)
        at = self.rng.randrange(len(self.model) - length) if offset is None else offset
        self.disk.pwrite(data, at)
        self.model[at : at + length] = data

    def zero(self, count: int, offset: int) -> None:
        self.disk.zero(count, offset)
        self.model[offset : offset + count] = bytes(count)

    def reopen(self) -> None:
        self.close()
        self.image = pyfleece.open(self.path, "r+")
        self.disk = pyfleece.Disk(self.image)

    def close(self) -> None:
        self.disk.close()
        self.image.close()


@pytest.fixture
def guest(tmp_path):
    made = Guest(tmp_path)
    yield made
    made.close()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "backups", create=True)


def content(repository: Repository, point) -> bytes:
    with repository.open(point) as image:
        return image.pread(point.size, 0)


def backed_up(repository: Repository, guest: Guest, **options):
    point, result = repository.backup(guest.disk, fleecing="memory", **options)
    assert content(repository, point) == guest.model
    return point, result


# ---- backups ----


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("compress", [False, True])
def test_each_point_is_what_the_disk_was(guest, repository, format, compress):
    require("qemu-img")
    states = []
    for number in range(5):
        for _ in range(5):
            guest.write()
        guest.zero(200_000, 1 * MIB + number * 300_000)
        point, result = backed_up(repository, guest, format=format, compress=compress)
        assert point.kind == ("full" if number == 0 else "incremental")
        assert result.total <= SIZE if number == 0 else result.total < SIZE // 2
        states.append((point, bytes(guest.model)))
    assert [p.sequence for p in repository.points] == [1, 2, 3, 4, 5]
    for point, state in states:
        assert content(repository, point) == state
        raw = repository._path("by-qemu.raw")
        run("qemu-img", "convert", "-O", "raw", repository._path(point.image), raw)
        held = Path(raw).read_bytes()
        assert held[:SIZE] == state and not any(held[SIZE:])
        if point.format == "qcow2":
            run("qemu-img", "check", repository._path(point.image))
        os.unlink(raw)
    assert repository.verify() == []


def test_zeroed_again(guest, repository):
    """Zeros over data of the backup before are zeros, not that data."""
    guest.write(MIB, 0)
    backed_up(repository, guest)
    guest.zero(MIB, 0)
    point, result = backed_up(repository, guest)
    assert point.kind == "incremental" and result.data_bytes == 0
    assert repository.verify() == []


def test_survives_the_process(guest, repository):
    guest.write()
    backed_up(repository, guest)
    guest.write()
    guest.reopen()
    guest.write()
    point, _ = backed_up(repository, guest)
    assert point.kind == "incremental"


def test_two_destinations(guest, tmp_path):
    """Each has its own bitmap, so each gets all that changed since its own last backup."""
    one, two = (Repository(tmp_path / name, create=True) for name in ("one", "two"))
    for _ in range(3):
        guest.write()
        backed_up(one, guest)
        guest.write()
        backed_up(one, guest)
        backed_up(two, guest)
    assert [p.kind for p in two.points] == ["full", "incremental", "incremental"]
    assert len(guest.disk.bitmaps) == 2


def test_failed_backup_forgets_nothing(guest, repository, monkeypatch):
    guest.write()
    backed_up(repository, guest)
    guest.write()
    monkeypatch.setattr(digests.Collector, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        repository.backup(guest.disk, fleecing="memory")
    monkeypatch.undo()
    assert len(guest.disk.bitmaps) == 1 and len(repository.points) == 1
    assert not [name for name in os.listdir(repository.directory) if "000002" in name]
    guest.write()
    point, _ = backed_up(repository, guest)
    assert point.kind == "incremental"


def reasons(repository, guest, **options):
    told: list[str] = []
    point, _ = backed_up(repository, guest, tell=told.append, **options)
    assert point.kind == "full" and point.reason == told[0]
    return told[0]


def test_reasons_for_a_full_backup(guest, repository, tmp_path):
    guest.write()
    assert "no backup yet" in reasons(repository, guest)
    # without its bitmap
    guest.disk.bitmaps.remove(repository.points[-1].bitmap)
    assert "no dirty bitmap" in reasons(repository, guest)
    # the newest point deleted by hand: its bitmap is not relative to the one before
    guest.write()
    point, _ = backed_up(repository, guest)
    guest.write()
    repository._remove_point(point)
    assert "no dirty bitmap" in reasons(repository, guest)
    # the image of the last point is gone
    os.unlink(repository._path(repository.points[-1].image))
    assert "can't be built upon" in reasons(repository, guest)
    # somebody else wrote to the disk
    guest.close()
    with open(guest.path, "r+b") as file:
        file.seek(100_000)
        file.write(b"around us")
    guest.model[100_000 : 100_000 + 9] = b"around us"
    guest.reopen()
    assert "can't be trusted" in reasons(repository, guest)
    # and asked for
    point, _ = backed_up(repository, guest, incremental=False)
    assert (point.kind, point.reason) == ("full", "asked for")
    # another size
    larger = Guest(tmp_path, SIZE + MIB, "larger.raw")
    assert "bytes now" in reasons(repository, larger)
    larger.close()


def test_what_was_interrupted_is_tidied(guest, repository):
    guest.write()
    backed_up(repository, guest)
    old = "20260101T000000Z"
    for name in (f"000002-{old}.qcow2", "000001-x.keep", f"000003-{old}.digests.partial", "mine.txt"):
        Path(repository._path(name)).write_bytes(b"x")
    guest.write()
    point, _ = backed_up(repository, guest)
    assert point.sequence == 2 and point.kind == "incremental"
    left = set(os.listdir(repository.directory))
    assert {"000001-x.keep", "mine.txt"} <= left and not [name for name in left if "20260101" in name]


def test_random_cycles(tmp_path, repository):
    """Writes, backups, failures, restarts, prunes, two disks' worth of bitmaps: every point that is left is right."""
    rng = random.Random(1)
    guest = Guest(tmp_path)
    other = Repository(tmp_path / "other", create=True)
    states: dict[tuple[str, int], bytes] = {}
    for _ in range(CYCLES):
        for _ in range(rng.randrange(6)):
            guest.write(rng.choice((1, 512, 5000, 65536, 200_000)))
        if rng.random() < 0.3:
            guest.zero(rng.randrange(1, MIB), rng.randrange(3 * MIB))
        if rng.random() < 0.3:
            guest.reopen()
        chosen = rng.choice((repository, repository, other))
        if rng.random() < 0.2:
            guest.write()
            with pytest.raises(KeyError), pytest.MonkeyPatch.context() as patch:
                patch.setattr(digests.Collector, "__call__", lambda *_: {}[0])
                chosen.backup(guest.disk, fleecing="memory", incremental=rng.random() < 0.7)
        point, _ = backed_up(chosen, guest, compress=rng.random() < 0.3, granularity=rng.choice((4096, 65536)))
        states[chosen.directory, point.sequence] = bytes(guest.model)
        if rng.random() < 0.25:
            keep = rng.randint(1, 5)
            chosen.prune(keep)
            assert len(chosen.points) <= keep
    for one in (repository, other):
        assert one.verify() == []
        for point in one.points:
            assert content(one, point) == states[one.directory, point.sequence]
            assert point.reason in ("", "there is no backup yet", "the points before it were dropped")
    guest.close()


# ---- verify ----


def three_points(guest, repository):
    for _ in range(3):
        guest.write(100_000)
        backed_up(repository, guest)
    return repository.points


def test_verify_names_the_ranges(guest, repository):
    points = three_points(guest, repository)
    with pyfleece.open(repository._path(points[1].image), "r+") as image:
        entry = next(e for e in image.map() if e.depth == 0 and e.kind == "data")
        byte = image.pread(1, entry.offset + 10)[0]
        image.pwrite(bytes([byte ^ 1]), entry.offset + 10)
    damages = repository.verify()
    wrong = [d for d in damages if d.point == points[1].name]
    assert len(wrong) == 1 and not wrong[0].problem
    assert any(e.kind == "wrong" and e.offset <= entry.offset + 10 < e.offset + e.length for e in wrong[0].ranges)
    assert repository.verify(points[0]) == []
    assert [d.point for d in repository.verify(points[2]) if d.point == points[1].name]


@pytest.mark.parametrize("suffix", [".digests", ".qcow2", ".json"])
def test_verify_tells_of_damaged_files(guest, repository, suffix):
    point = three_points(guest, repository)[1]
    path = Path(repository._path(point.name + suffix))
    data = bytearray(path.read_bytes())
    data[5] ^= 0x40
    path.write_bytes(data)
    if suffix == ".json":
        with pytest.raises(pyfleece.FormatError, match=point.name):
            repository.verify()
    else:
        damages = repository.verify()
        assert point.name in [d.point for d in damages if d.problem]


def test_verify_tells_of_missing_files(guest, repository):
    point = three_points(guest, repository)[0]
    os.unlink(repository._path(point.image))
    assert {d.point for d in repository.verify()} == {p.name for p in repository.points}


HOSTILE = [
    {"image": "../../etc/passwd"},
    {"image": "/etc/passwd"},
    {"digests": "000001-20260101T000000Z/x"},
    {"size": -1},
    {"size": 1 << 63},
    {"size": True},
    {"version": 2},
    {"kind": "odd"},
    {"parent": "itself"},
    {"sequence": 0},
    {"format": "vmdk"},
    {"uuid": None},
    {"surprise": 1},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_manifests(guest, repository, change):
    point, _ = backed_up(repository, guest)
    path = Path(repository._path(point.name + ".json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(pyfleece.FormatError, match=point.name):
        Repository(repository.directory).find()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, " " * (2 << 20), "\x00"])
def test_manifests_that_are_none(guest, repository, text):
    point, _ = backed_up(repository, guest)
    Path(repository._path(point.name + ".json")).write_text(text)
    with pytest.raises(pyfleece.FormatError):
        Repository(repository.directory).find()


def test_chain_that_loops(guest, repository):
    points = three_points(guest, repository)
    path = Path(repository._path(points[1].name + ".json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "parent": points[2].uuid}))
    with pytest.raises(ChainError, match="not there"):
        repository.chain(repository.points[2])


def test_damaged_digests():
    records = [digests.Record(0, 10, b"x" * 32), digests.Record(10, 1 << 40, None)]
    data = digests.encode("sha256", records)
    assert digests.decode(data, 1 << 41, "name") == ("sha256", records)
    for bad in (b"", data[:-1], b"x" + data, digests.encode("sha256", records[::-1])):
        with pytest.raises(pyfleece.FormatError):
            digests.decode(bad, 1 << 41, "name")
    with pytest.raises(pyfleece.FormatError):
        digests.decode(data, 1 << 20, "name")


# ---- prune ----


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_prune(guest, repository, keep):
    states = {}
    for _ in range(4):
        guest.write()
        point, _ = backed_up(repository, guest)
        states[point.uuid] = bytes(guest.model)
    gone = repository.prune(keep)
    points = repository.points
    assert len(points) == min(keep, 4) and len(gone) == 4 - len(points)
    assert points[0].kind == "full" and all(p.kind == "incremental" for p in points[1:])
    for point in points:
        assert content(repository, point) == states[point.uuid]
    assert repository.verify() == []
    files = [name for name in os.listdir(repository.directory) if name[0].isdigit()]
    assert len(files) == 3 * len(points)
    guest.write()
    assert backed_up(repository, guest)[0].kind == "incremental"


# ---- restore ----


def test_find(guest, repository):
    points = three_points(guest, repository)
    assert repository.find() == points[2] == repository.find("latest")
    for which in ("000002", points[1].uuid[:13], points[1].name):
        assert repository.find(which) == points[1]
    for bad in ("0", "nothing", ""):
        with pytest.raises(ChainError):
            repository.find(bad)
    assert split("dir@000001") == ("dir", "000001") and split("dir") == ("dir", "latest")


@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_restore_to_a_new_file(guest, repository, tmp_path, suffix):
    point = three_points(guest, repository)[1]
    state = content(repository, point)
    target = tmp_path / f"restored.{suffix}"
    with repository.open(point) as image:
        done = restore(image, target)
        assert done.verified and done.size == image.size
        with pytest.raises(FileExistsError):
            restore(image, target)
        restore(image, target, force=True)
    with pyfleece.open(target) as image:
        assert image.pread(SIZE, 0) == state
        assert image.info.allocated < SIZE // 2


def test_delta_restore_writes_what_differs(guest, repository, tmp_path):
    points = three_points(guest, repository)
    target = tmp_path / "restored.raw"
    with repository.open(points[0]) as image:
        restore(image, target)
    with pyfleece.open(target, "r+") as image:
        image.pwrite(b"changed", 2 * MIB)
        image.zero(5000, 3 * MIB)
    with repository.open(points[2]) as image:
        done = restore(image, target, delta=True)
        assert target.read_bytes()[:SIZE] == content(repository, points[2])
        assert 0 < done.written < 400_000
        assert restore(image, target, delta=True).written == 0


def test_restore_refuses(guest, repository, tmp_path):
    three_points(guest, repository)
    small = tmp_path / "small.raw"
    pyfleece.create(small, MIB).close()
    with repository.open() as image:
        with pytest.raises(RestoreError, match="has 1048576 bytes"):
            restore(image, small, delta=True)
        with pytest.raises(FileNotFoundError):
            restore(image, tmp_path / "none.raw", delta=True)
        with pytest.raises(pyfleece.ImageLockedError):
            restore(image, guest.path, force=True)
        with pytest.raises(pyfleece.ArgumentError):
            restore(image, image.path, force=True)
    assert small.read_bytes() == bytes(MIB)
    assert Path(guest.path).read_bytes() == guest.model


def test_restore_to_a_device(guest, repository, loop_device, tmp_path):
    three_points(guest, repository)
    exact, larger = loop_device((SIZE + 511) // 512 * 512), loop_device(8 * MIB)
    with repository.open() as image:
        restore(image, exact)
        with pyfleece.open(exact) as device:
            assert device.pread(SIZE, 0) == guest.model
        with pytest.raises(RestoreError, match="has 8388608 bytes"):
            restore(image, larger)
        restore(image, larger, force=True)
        restore(image, exact, delta=True)


def test_mounted_device_is_refused(guest, repository, loop_device, tmp_path):
    require("mkfs.ext4", "mount")
    three_points(guest, repository)
    device = loop_device(8 * MIB)
    run("mkfs.ext4", "-q", device)
    (tmp_path / "mnt").mkdir()
    run("mount", device, str(tmp_path / "mnt"))
    try:
        with repository.open() as image, pytest.raises(pyfleece.ImageLockedError, match="mounted"):
            restore(image, device, force=True)
    finally:
        run("umount", str(tmp_path / "mnt"))


# ---- the command line ----


def cli(*arguments, check=True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*CLI, *map(os.fspath, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_commands(tmp_path):
    source, directory, target = tmp_path / "vm.raw", tmp_path / "backups", tmp_path / "back.raw"
    data = random.Random(3).randbytes(MIB)
    with pyfleece.create(source, SIZE) as image:
        image.pwrite(data, MIB)
    done = cli("backup", source, directory, "--incremental")
    assert "no backup yet" in done.stderr and "full" in done.stdout
    with pyfleece.open(source, "r+") as image, pyfleece.Disk(image) as disk:
        disk.pwrite(b"new", 2 * MIB)
    told = json.loads(cli("backup", source, directory, "--incremental", "--keep", "5", "--json").stdout)
    assert (told["kind"], told["data_bytes"], told["dropped"]) == ("incremental", 4096, [])
    assert len(json.loads(cli("points", directory, "--json").stdout)) == 2
    assert told["image"][:-6] in cli("points", directory).stdout
    assert "as it was" in cli("verify", directory).stdout
    cli("verify", f"{directory}@000001")
    cli("verify", directory / told["image"])
    cli("restore", directory, target)
    assert target.read_bytes()[:SIZE] == source.read_bytes()
    cli("restore", f"{directory}@000001", target, "--delta")
    assert target.read_bytes()[2 * MIB : 2 * MIB + 3] == bytes(3)
    done = cli("restore", directory, target, check=False)
    assert done.returncode == 1 and "exists" in done.stderr

    # damage: verify says where, restore refuses
    image = directory / told["image"]
    raw = bytearray(image.read_bytes())
    at = raw.index(b"new")
    raw[at] ^= 1
    image.write_bytes(raw)
    done = cli("verify", directory, check=False)
    assert done.returncode == 2 and f"4096 bytes at {2 * MIB} are wrong" in done.stdout
    shutil.copy(target, tmp_path / "before.raw")
    done = cli("restore", directory, target, "--force", check=False)
    assert done.returncode == 1 and "damaged" in done.stderr
    assert target.read_bytes() == (tmp_path / "before.raw").read_bytes()
    assert cli("verify", tmp_path, check=False).returncode == 1
    assert cli("backup", source, tmp_path, "--incremental", check=False).returncode == 1

"""qcow2 as the target of a backup: new images that get their name when they are complete, compressed by all workers at
once, and overlays of the backup before. qemu-img checks and compares every one of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MIB, content, require, run
from qcow2_patch import qemu_create
from test_cli import pyfleece as command

import pyfleece
from pyfleece import targets, testing

KIB = 1024


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img", "qemu-io")


def assert_is(path: Path, data: bytes | bytearray, work: Path) -> None:
    """A sound image that holds this, zeros up to whole sectors behind it."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)
    expected = work / "expected.raw"
    expected.write_bytes(bytes(data) + bytes(-len(data) % 512))
    assert "Images are identical" in run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, expected)
    with pyfleece.open(path) as image:
        assert image.pread(len(data), 0) == bytes(data)


def their_map(path: Path) -> list[dict]:
    return json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))


def allocated(path: Path) -> int:
    """Bytes that the top image itself has."""
    return sum(e["length"] for e in their_map(path) if e["depth"] == 0 and e["present"])


@pytest.fixture
def source(make_image, tmp_path):
    """A disk with data and holes of odd places, and one byte more than sectors."""
    path, data = make_image(3 * MIB + 513)
    with pyfleece.open(path, "r+") as image, pyfleece.Disk(image) as disk:
        yield disk, bytearray(data)


COMPRESSIONS: list[bool | str] = [False, True, "zlib", "zstd"]


# ---- full backups ----


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("cluster", [None, 512, 4096, 2 * MIB])
def test_full(source, tmp_path, compress, cluster):
    disk, data = source
    path = tmp_path / "backup.qcow2"
    with disk.snapshot("memory") as snapshot:
        disk.pwrite(b"changed" * 100, 5000)
        result = pyfleece.backup(snapshot, path, target_cluster_size=cluster, compress=compress)
    assert_is(path, data, tmp_path)
    assert result.total == len(data) == result.data_bytes + result.zero_bytes
    with pyfleece.open(path) as image:
        info = image.info
        assert info.cluster_size == (cluster or 64 * KIB) and info.backing is None
        assert info.qcow2 is not None and info.qcow2.compression == ("zstd" if compress == "zstd" else "zlib")
        if not compress:
            assert not any(entry.compressed for entry in image.map())
    assert not (tmp_path / "backup.qcow2.partial").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_zeros_stay_unallocated(tmp_path, compress):
    """Holes, written zeros, and zeros inside of clusters that hold data too: none of the first two takes anything."""
    with ExitStack() as stack:
        disk = stack.enter_context(
            pyfleece.Disk(stack.enter_context(pyfleece.create(tmp_path / "vm.raw", 64 * MIB)))
        )
        disk.pwrite(b"x" * 100 * KIB, 10 * MIB)
        disk.pwrite(bytes(4 * MIB), 20 * MIB)
        disk.pwrite(b"end", 64 * MIB - 3)
        snapshot = stack.enter_context(disk.snapshot("memory"))
        pyfleece.backup(snapshot, tmp_path / "b.qcow2", compress=compress)
        data = disk.pread(64 * MIB, 0)
    assert_is(tmp_path / "b.qcow2", data, tmp_path)
    present = [(e["start"], e["length"]) for e in their_map(tmp_path / "b.qcow2") if e["present"]]
    merged = sum(length for _, length in present)
    assert merged == 3 * 64 * KIB, present


def test_compression_makes_it_smaller(tmp_path):
    with ExitStack() as stack:
        image = stack.enter_context(pyfleece.create(tmp_path / "vm.raw", 8 * MIB))
        disk = stack.enter_context(pyfleece.Disk(image))
        rng = random.Random(1)
        disk.pwrite(b"".join(b"line %06d\n" % rng.randrange(1000) for _ in range(4 * MIB // 12)), 0)
        disk.pwrite(rng.randbytes(MIB), 6 * MIB)
        data = disk.pread(8 * MIB, 0)
        sizes = {}
        for compress in COMPRESSIONS:
            path = tmp_path / f"{compress}.qcow2"
            with disk.snapshot("memory") as snapshot:
                pyfleece.backup(snapshot, path, compress=compress, workers=4)
            assert_is(path, data, tmp_path)
            sizes[compress] = path.stat().st_blocks * 512
            with pyfleece.open(path) as backup:
                compressed = [entry for entry in backup.map() if entry.compressed]
                plain = [entry for entry in backup.map() if entry.kind == "data" and not entry.compressed]
            assert bool(compressed) == bool(compress)
            assert any(entry.offset >= 6 * MIB for entry in plain), "what does not get smaller is not compressed"
    assert sizes[True] == sizes["zlib"] < sizes[False] * 2 // 3
    assert sizes["zstd"] < sizes[False] * 2 // 3


def test_backup_under_load_compressed(make_image, tmp_path):
    """The bytes at the cut, whoever writes meanwhile."""
    path, data = make_image(16 * MIB)
    with pyfleece.open(path, "r+") as image, pyfleece.Disk(image) as disk:
        stop = threading.Event()

        def write() -> None:
            rng = random.Random(5)
            while not stop.is_set():
                disk.pwrite(rng.randbytes(4096), rng.randrange(0, 16 * MIB - 4096))

        with disk.snapshot("memory", stage_size=32 * MIB) as snapshot:
            writer = threading.Thread(target=write)
            writer.start()
            try:
                pyfleece.backup(snapshot, tmp_path / "b.qcow2", compress="zstd", workers=4)
            finally:
                stop.set()
                writer.join()
    assert_is(tmp_path / "b.qcow2", data, tmp_path)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_from_qcow2(make_image, tmp_path, format):
    """A qcow2 disk with compressed clusters and a backing file, to either format."""
    path, data = make_image(2 * MIB)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", path, tmp_path / "base.qcow2")
    qemu_create(tmp_path / "vm.qcow2", "3M", backing=("base.qcow2", "qcow2"))
    target = tmp_path / f"backup.{format}"
    with pyfleece.open(tmp_path / "vm.qcow2", "r+") as image, pyfleece.Disk(image) as disk:
        disk.pwrite(b"new" * 1000, 100)
        data = data[:100] + b"new" * 1000 + data[3100:] + bytes(MIB)
        with disk.snapshot("memory") as snapshot:
            disk.discard(MIB, 0)
            pyfleece.backup(snapshot, target)
    if format == "qcow2":
        assert_is(target, data, tmp_path)
    else:
        assert target.read_bytes() == data
    run("qemu-img", "check", "-q", tmp_path / "vm.qcow2")


# ---- incrementals ----


@pytest.mark.parametrize("compress", [False, "zstd"])
@pytest.mark.parametrize("cluster", [None, 4096])
def test_chain_of_incrementals(tmp_path, compress, cluster):
    """Each of five backups is an overlay of the one before, and holds no more than what changed."""
    size = 8 * MIB
    rng = random.Random(11)
    with pyfleece.create(tmp_path / "vm.raw", size) as image, pyfleece.Disk(image) as disk:
        data = bytearray(content(size, 3))
        disk.pwrite(data, 0)
        bitmap = disk.bitmaps.add("daily", granularity=64 * KIB)
        options = {"compress": compress, "target_cluster_size": cluster}
        with disk.snapshot("memory") as snapshot:
            pyfleece.backup(snapshot, tmp_path / "0.qcow2", **options)
        assert_is(tmp_path / "0.qcow2", data, tmp_path)
        for number in range(1, 5):
            for _ in range(5):
                offset, length = rng.randrange(0, size - 100000), rng.randrange(1, 100000)
                fill = rng.randbytes(length) if rng.random() < 0.6 else bytes(length)
                disk.pwrite(fill, offset)
                data[offset : offset + length] = fill
            changed = bitmap.count
            path = tmp_path / f"{number}.qcow2"
            with disk.snapshot("memory", bitmap="daily") as snapshot:
                before = bytes(data)
                disk.pwrite(b"after the cut", 0)
                data[:13] = b"after the cut"
                result = pyfleece.backup(
                    snapshot, path, backing=f"{number - 1}.qcow2", backing_format="qcow2", **options
                )
                assert result.total == changed
            assert_is(path, before, tmp_path)
            assert allocated(path) <= changed
            with pyfleece.open(path) as overlay:
                assert (overlay.info.backing, overlay.info.backing_format) == (f"{number - 1}.qcow2", "qcow2")
    (tmp_path / "3.qcow2").unlink()
    with pytest.raises(FileNotFoundError):
        pyfleece.open(tmp_path / "4.qcow2")


def test_zeros_hide_what_the_backing_file_has(tmp_path):
    """As entries that say zero, which take no space."""
    with pyfleece.create(tmp_path / "vm.raw", 4 * MIB) as image, pyfleece.Disk(image) as disk:
        disk.pwrite(b"x" * 4 * MIB, 0)
        disk.bitmaps.add("daily", granularity=64 * KIB)
        with disk.snapshot("memory") as snapshot:
            pyfleece.backup(snapshot, tmp_path / "full.qcow2")
        disk.zero(2 * MIB, MIB)
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            pyfleece.backup(snapshot, tmp_path / "inc.qcow2", backing="full.qcow2", backing_format="qcow2")
    assert_is(tmp_path / "inc.qcow2", b"x" * MIB + bytes(2 * MIB) + b"x" * MIB, tmp_path)
    with pyfleece.open(tmp_path / "inc.qcow2") as overlay:
        (entry,) = [e for e in overlay.map() if e.kind == "zero"]
        assert (entry.offset, entry.length, entry.allocated, entry.depth) == (MIB, 2 * MIB, True, 0)
        assert entry.host_offset is None
    assert (tmp_path / "inc.qcow2").stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("compress", [False, True])
def test_bitmap_finer_than_the_clusters_of_the_target(tmp_path, compress):
    """What is left of a cluster comes from the backing file; it can't be compressed."""
    data = bytearray(content(4 * MIB, 9))
    with pyfleece.create(tmp_path / "vm.raw", 4 * MIB) as image, pyfleece.Disk(image) as disk:
        disk.pwrite(data, 0)
        disk.bitmaps.add("fine", granularity=4096)
        with disk.snapshot("memory") as snapshot:
            pyfleece.backup(snapshot, tmp_path / "full.raw")
        for offset in (0, 5 * 4096, 64 * KIB - 4096, MIB + 4096, 3 * MIB - 8192):
            disk.pwrite(b"fine" * 1024, offset)
            data[offset : offset + 4096] = b"fine" * 1024
        disk.zero(4096, 2 * MIB + 4096)
        data[2 * MIB + 4096 : 2 * MIB + 8192] = bytes(4096)
        disk.pwrite(b"w" * 128 * KIB, 3 * MIB)
        data[3 * MIB : 3 * MIB + 128 * KIB] = b"w" * 128 * KIB
        with disk.snapshot("memory", bitmap="fine", cluster_size=4096) as snapshot:
            result = pyfleece.backup(
                snapshot, tmp_path / "inc.qcow2", backing="full.raw", backing_format="raw", compress=compress
            )
        assert result.total == 6 * 4096 + 128 * KIB
    assert_is(tmp_path / "inc.qcow2", data, tmp_path)
    with pyfleece.open(tmp_path / "inc.qcow2") as overlay:
        assert sum(e.length for e in overlay.map() if e.compressed) == (128 * KIB if compress else 0)


def test_group_of_overlays(tmp_path):
    with ExitStack() as stack:
        disks = []
        for name in ("a", "b"):
            disk = pyfleece.Disk(stack.enter_context(pyfleece.create(tmp_path / f"{name}.raw", 2 * MIB)))
            stack.enter_context(disk)
            disk.pwrite(name.encode() * 2 * MIB, 0)
            disk.bitmaps.add("daily", granularity=64 * KIB)
            disks.append(disk)
        with pyfleece.snapshot_group(disks, fleecing="memory") as group:
            pyfleece.backup_group(group, [tmp_path / "a0.qcow2", tmp_path / "b0.qcow2"], compress=True)
        disks[0].pwrite(b"changed", MIB)
        with pyfleece.snapshot_group(disks, fleecing="memory", bitmap="daily") as group:
            options = {"backing": ["a0.qcow2", "b0.qcow2"], "backing_format": "qcow2"}
            pyfleece.backup_group(group, [tmp_path / "a1.qcow2", tmp_path / "b1.qcow2"], **options)
            with pytest.raises(pyfleece.ArgumentError, match="backing must be one for each of the 2"):
                pyfleece.backup_group(group, [tmp_path / "x", tmp_path / "y"], backing=["a0.qcow2"])
        for disk, name in zip(disks, ("a", "b")):
            assert_is(tmp_path / f"{name}0.qcow2", name.encode() * 2 * MIB, tmp_path)
            assert_is(tmp_path / f"{name}1.qcow2", disk.pread(2 * MIB, 0), tmp_path)


# ---- targets that exist ----


def test_open_image(source, tmp_path):
    """Zeros are written to it, unless it is said that it has nothing else."""
    disk, data = source
    with pyfleece.create(tmp_path / "t.qcow2", len(data)) as target:
        target.pwrite(b"old" * 100000, 0)
        with disk.snapshot("memory") as snapshot:
            pyfleece.backup(snapshot, target)
    assert_is(tmp_path / "t.qcow2", data, tmp_path)
    with pyfleece.create(tmp_path / "u.qcow2", len(data), compression="zstd") as target:
        with disk.snapshot("memory") as snapshot:
            with pytest.raises(pyfleece.ArgumentError, match="compress is 'zlib', and the target .* has zstd"):
                pyfleece.backup(snapshot, target, compress="zlib")
            pyfleece.backup(snapshot, target, compress=True, target_is_zero=True)
        assert any(entry.compressed for entry in target.map())
    assert_is(tmp_path / "u.qcow2", data, tmp_path)


def test_target_larger_than_the_disk(source, tmp_path):
    """The disk's last cluster is not the target's last: it is not whole, and so not compressed."""
    disk, data = source
    with pyfleece.create(tmp_path / "t.qcow2", 5 * MIB) as target, disk.snapshot("memory") as snapshot:
        pyfleece.backup(snapshot, target, compress=True, target_is_zero=True)
    assert_is(tmp_path / "t.qcow2", bytes(data) + bytes(5 * MIB - len(data)), tmp_path)


def test_existing_file_is_replaced_when_the_new_one_is_complete(source, tmp_path):
    disk, data = source
    path = tmp_path / "backup.qcow2"
    path.write_bytes(b"the backup before")
    with disk.snapshot("memory") as snapshot:
        pyfleece.backup(snapshot, path)
    assert_is(path, data, tmp_path)
    with pyfleece.open(path, "r+"), disk.snapshot("memory") as snapshot:
        with pytest.raises(pyfleece.ImageLockedError) as caught:
            pyfleece.backup(snapshot, path)
        assert caught.value.side == "target"
    assert_is(path, data, tmp_path)
    (tmp_path / "backup.qcow2.partial").write_bytes(b"left behind by a backup that was killed")
    with disk.snapshot("memory") as snapshot:
        pyfleece.backup(snapshot, path, compress=True)
    assert_is(path, data, tmp_path)
    assert not (tmp_path / "backup.qcow2.partial").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_it_is_complete_when_it_gets_its_name(source, tmp_path, monkeypatch, compress):
    """Tables included: nothing is written to it after that, when it is closed."""
    disk, data = source
    then = {}
    replace = os.replace

    def look(partial: bytes, path: bytes) -> None:
        then[path] = Path(os.fsdecode(partial)).read_bytes()
        replace(partial, path)

    monkeypatch.setattr(targets.os, "replace", look)
    path = tmp_path / "b.qcow2"
    with disk.snapshot("memory") as snapshot:
        pyfleece.backup(snapshot, path, compress=compress)
    assert then == {os.fsencode(path): path.read_bytes()}
    assert_is(path, data, tmp_path)


# ---- failures ----


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("nth", [1, 3, 8])
def test_failing_target(source, tmp_path, compress, nth):
    """Compressed writes too: the first failure is told, with its side and place."""
    disk, data = source
    with pyfleece.create(tmp_path / "t.qcow2", len(data)) as inner, testing.FaultyImage(inner) as target:
        target.fail("write", error=28, nth=nth)
        with disk.snapshot("memory") as snapshot:
            with pytest.raises(OSError, match="injected fault") as caught:
                pyfleece.backup(snapshot, target, compress=compress, target_is_zero=True, workers=2)
            assert (caught.value.errno, caught.value.side) == (28, "target")
    run("qemu-img", "check", "-q", tmp_path / "t.qcow2")


def test_cancelled_backup_leaves_nothing(source, tmp_path):
    disk, _ = source
    with disk.snapshot("memory") as snapshot:
        job = pyfleece.Backup(snapshot, tmp_path / "b.qcow2", compress=True, speed=64 * KIB)
        job.start()
        assert job.cancel()
        with pytest.raises(pyfleece.CancelledError):
            job.wait()
        job.close()
    assert not list(tmp_path.glob("b.qcow2*"))


WRONG = [
    ("b.raw", {"compress": True}, "compress needs a qcow2 image to write to; the target is raw"),
    ("b.raw", {"target_cluster_size": 4096}, "are for new images; the target is raw"),
    ("b.raw", {"backing": "vm.raw", "backing_format": "raw"}, "are for new images; the target is raw"),
    ("b.qcow2", {"compress": "lz4"}, "compress is 'lz4'"),
    ("b.qcow2", {"backing": "vm.raw"}, "are given together"),
    ("b.qcow2", {"backing_format": "raw"}, "are given together"),
    ("b.qcow2", {"target_cluster_size": 1000}, "cluster size is 1000"),
    ("b.qcow2", {"compress": True, "granularity": 4096}, "not a multiple of the target's cluster size, 65536"),
    ("b.qcow2", {"backing": "/etc/passwd", "backing_format": "raw"}, "is not below"),
    ("b.qcow2", {"backing": "missing.raw", "backing_format": "raw"}, "cannot be found"),
    ("b.vmdk", {}, "format="),
]


@pytest.mark.parametrize(("name", "options", "what"), WRONG)
def test_what_makes_no_sense(source, tmp_path, name, options, what):
    disk, _ = source
    with disk.snapshot("memory", cluster_size=4096) as snapshot, pytest.raises(pyfleece.Error, match=what):
        pyfleece.backup(snapshot, tmp_path / name, **options)
    assert not list(tmp_path.glob("b.*"))


def test_target_that_is_its_own_backing_file(source, tmp_path):
    disk, data = source
    with disk.snapshot("memory") as snapshot:
        pyfleece.backup(snapshot, tmp_path / "b.qcow2", discard_source=False)
        with pytest.raises(pyfleece.ArgumentError, match="is its own backing file"):
            pyfleece.backup(snapshot, tmp_path / "b.qcow2", backing="b.qcow2", backing_format="qcow2")
    assert_is(tmp_path / "b.qcow2", data, tmp_path)


def test_options_for_what_is_no_new_image(source, tmp_path):
    disk, data = source
    with disk.snapshot("memory") as snapshot, pyfleece.create(tmp_path / "t.raw", len(data)) as target:
        for options in ({"target_cluster_size": 4096}, {"backing": "a", "backing_format": "raw"}, {"compress": True}):
            with pytest.raises(pyfleece.ArgumentError, match="the target is"):
                pyfleece.backup(snapshot, target, **options)
            what = "the target is a file object"
            with open(os.devnull, "wb") as stream, pytest.raises(pyfleece.ArgumentError, match=what):
                pyfleece.backup(snapshot, stream, **options)


# ---- the command line ----


def test_command(make_image, tmp_path):
    path, data = make_image(3 * MIB)
    full, inc = tmp_path / "full.qcow2", tmp_path / "inc.qcow2"
    out, _ = command("backup", path, full, "--compress", "zstd", "--target-cluster-size", "4K", "--json")
    assert json.loads(out)["total"] == 3 * MIB
    assert_is(full, data, tmp_path)
    command("backup", full, inc, "--backing", "full.qcow2", "--backing-format", "qcow2", "--compress")
    assert_is(inc, data, tmp_path)
    assert stat.S_IMODE(full.stat().st_mode) == stat.S_IMODE(inc.stat().st_mode)
    _, err = command("backup", path, tmp_path / "x.raw", "--compress", status=1)
    assert "compress needs a qcow2 image" in err


def test_commands_create_info_and_map(tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    out, _ = command("create", base, "64M", "--cluster-size", "4K", "--compression", "zstd")
    assert out == f"{base}: qcow2, 64.0 MiB ({64 * MIB} bytes)\n"
    command("create", top, "--backing", "base.qcow2", "--backing-format", "qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 64k", "-c", "write -c -P 1 2M 4k", base)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 8M 64k", "-c", "write -z 16M 64k", top)
    run("qemu-img", "snapshot", "-c", "clean \u00e4", base)
    run("qemu-img", "bitmap", "--add", "-g", "128k", top, "daily")

    info = json.loads(command("info", "--json", top)[0])
    assert (info["size"], info["backing"], info["backing_format"]) == (64 * MIB, "base.qcow2", "qcow2")
    assert info["qcow2"]["version"] == 3 and info["qcow2"]["bitmaps"] == 1
    assert info["persistent_bitmaps"] == [
        {"name": "daily", "granularity": 128 * KIB, "in_use": False, "enabled": True, "extra": False}
    ]
    text, _ = command("info", top)
    assert "backing file:    base.qcow2" in text and "daily" in text and "auto" in text and "compat 1.1" in text
    text, _ = command("info", base, env={**os.environ, "PYTHONUTF8": "1"})
    assert "zstd" in text and "clean \u00e4" in text and "internal snapshots:" in text

    ours = json.loads(command("map", "--json", top)[0])
    keys = ("start", "length", "depth", "present")
    data = [tuple(e[key] for key in keys) for e in ours if e["kind"] == "data"]
    assert data == [tuple(e[key] for key in keys) for e in their_map(top) if e["data"]]
    lines = command("map", top)[0].splitlines()
    assert lines[0].split() == ["start", "length", "kind", "layer", "offset"]
    words = {tuple(line.split()[2:4]) for line in lines[1:]}
    assert words == {("data", "0"), ("zero", "0"), ("data", "1"), ("compressed", "1"), ("zero", "-")}

    _, err = command("map", top, "--no-backing", status=1)
    assert "backing files were not allowed" in err
    _, err = command("create", tmp_path / "x.qcow2", status=1)
    assert "needs a size, or a backing file" in err
    (tmp_path / "sub").mkdir()
    create = ("create", tmp_path / "sub" / "x.qcow2", "--backing", "../base.qcow2", "--backing-format", "qcow2")
    _, err = command(*create, status=1)
    assert "(here: --backing-root)" in err
    command(*create, "--backing-root", tmp_path)
    command("map", tmp_path / "sub" / "x.qcow2", "--backing-root", tmp_path)
    text, _ = command("info", tmp_path / "sub" / "x.qcow2")
    assert "../base.qcow2" in text, "to look at, no backing file is opened"


def test_example_of_the_guide(tmp_path, monkeypatch):
    guide = Path(__file__).resolve().parent.parent / "docs" / "qcow2.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    qemu_create(Path("vm.qcow2"), "4M")
    exec(compile(example, "docs/qcow2.md", "exec"), {})
    assert_is(Path("monday.qcow2"), bytes(4 * MIB), tmp_path)
    assert_is(Path("tuesday.qcow2"), b"what changed" + bytes(4 * MIB - 12), tmp_path)
    assert allocated(Path("tuesday.qcow2")) == 64 * KIB


def test_names_in_an_image_do_not_reach_the_terminal(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M")
    run("qemu-img", "snapshot", "-c", "\x1b[31mred", path)
    out, _ = command("info", path)
    assert "\x1b" not in out and "\\x1b[31mred" in out

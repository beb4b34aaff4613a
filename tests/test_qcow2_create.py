"""New qcow2 images, ours and qemu-img's, in all combinations of options: each side accepts the other's, and says the
same about it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from conftest import MIB, require, run
from qcow2_patch import FEATURE_NAMES, extensions, get, qemu_create

import pyfleece

KIB = 1024
CLUSTERS = [1 << bits for bits in range(9, 22)]


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img", "qemu-io")


def check(path: Path) -> None:
    """qemu-img finds no corruption, no leak."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


def their_info(path: Path) -> dict:
    """It warns about void bitmaps, so what it says on stderr is left out."""
    command = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout)


def assert_same_info(path: Path, **options) -> None:
    """What `Image.info` and its lists say is what qemu-img says."""
    theirs = their_info(path)
    details = theirs["format-specific"]["data"]
    with pyfleece.open(path, **options) as image:
        info, snapshots, bitmaps = image.info, image.internal_snapshots(), image.persistent_bitmaps()
    ours = info.qcow2
    assert ours is not None
    assert (info.format, info.size, info.cluster_size) == ("qcow2", theirs["virtual-size"], theirs["cluster-size"])
    assert info.allocated == theirs["actual-size"]
    assert info.backing == theirs.get("backing-filename")
    assert info.backing_format == theirs.get("backing-filename-format")
    assert ours.version == (3 if details["compat"] == "1.1" else 2)
    assert ours.refcount_bits == details["refcount-bits"]
    assert ours.compression == details["compression-type"]
    assert ours.dirty == theirs["dirty-flag"]
    assert (ours.lazy_refcounts, ours.corrupt) == (details.get("lazy-refcounts", False), details.get("corrupt", False))
    assert [(s.id, s.name, s.vm_state_size) for s in snapshots] == [
        (s["id"], s["name"], s["vm-state-size"]) for s in theirs.get("snapshots", [])
    ]
    for snapshot, their in zip(snapshots, theirs.get("snapshots", [])):
        assert abs(snapshot.date - their["date-sec"] - their["date-nsec"] / 1e9) < 1e-3
        assert snapshot.icount == their.get("icount")
    assert [(b.name, b.granularity, b.in_use, b.enabled) for b in bitmaps] == [
        (b["name"], b["granularity"], "in-use" in b["flags"], "auto" in b["flags"]) for b in details.get("bitmaps", [])
    ]


# ---- ours ----


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_ours(tmp_path, cluster):
    (tmp_path / "base.raw").write_bytes(b"base" * (MIB // 4))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "base.raw", tmp_path / "base.qcow2")
    backings = [(None, None), ("base.raw", "raw"), ("base.qcow2", "qcow2")]
    sizes = [0, 512, cluster, 3 * MIB + 512]
    for number, (size, (backing, format)) in enumerate(itertools.product(sizes, backings)):
        path = tmp_path / f"{number}.qcow2"
        compression = [None, "zlib", "zstd", "zstd"][number % 4]
        options = {"cluster_size": cluster, "compression": compression}
        with pyfleece.create(path, size, backing=backing, backing_format=format, **options) as image:
            assert (image.size, image.cluster_size, image.info.writable) == (size, cluster, True)
            assert all(extent.kind == "zero" for extent in image.extents()) or backing
        check(path)
        assert_same_info(path)
        assert path.stat().st_size <= max(5 * cluster, MIB), "nothing is allocated that is not needed"


def test_ours_written_by_both(tmp_path):
    path, expected = tmp_path / "vm.qcow2", bytearray(2 * MIB)
    rng = random.Random(7)
    pyfleece.create(path, 2 * MIB, cluster_size=4096).close()
    for turn in range(12):
        offset = rng.randrange(0, 2 * MIB - 70000) & ~511
        length = rng.randrange(1, 70000) & ~511 or 512
        byte = turn + 1
        if turn % 2:
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {byte} {offset} {length}", path)
        else:
            with pyfleece.open(path, "r+") as image:
                image.pwrite(bytes([byte]) * length, offset)
        expected[offset : offset + length] = bytes([byte]) * length
        check(path)
        with pyfleece.open(path) as image:
            assert image.pread(2 * MIB, 0) == bytes(expected)
    (tmp_path / "expected.raw").write_bytes(expected)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "expected.raw")


@pytest.mark.parametrize(("size", "rounded"), [(1, 512), (511, 512), (513, 1024), (3 * MIB + 1, 3 * MIB + 512)])
def test_sizes_are_rounded_up_to_sectors(tmp_path, size, rounded):
    """QEMU would cut off the last part of a sector."""
    with pyfleece.create(tmp_path / "vm.qcow2", size) as image:
        assert image.size == rounded
    assert their_info(tmp_path / "vm.qcow2")["virtual-size"] == rounded


@pytest.mark.parametrize("size", [1 << 40, 64 << 40])
def test_large_disks_cost_nothing(tmp_path, size):
    path = tmp_path / "vm.qcow2"
    with pyfleece.create(path, size) as image:
        image.pwrite(b"end", size - 3)
    assert path.stat().st_blocks * 512 < 64 << 20
    check(path)
    with pyfleece.open(path) as image:
        assert image.pread(3, size - 3) == b"end"


def test_largest_disk_of_each_cluster_size(tmp_path):
    for cluster in CLUSTERS:
        most = (4 << 20) * cluster * (cluster // 8)
        path = tmp_path / f"{cluster}.qcow2"
        if most > (1 << 63) - 513:
            most = ((1 << 63) - 1) // 512 * 512 - 512
        with pytest.raises(pyfleece.Error, match="are the most|is the most|too large"):
            pyfleece.create(path, most + 513, cluster_size=cluster)
        assert not path.exists()
        pyfleece.create(path, most, cluster_size=cluster).close()
        if cluster <= 4096:
            check(path)
        path.unlink()


def test_names_of_features_are_told(tmp_path):
    pyfleece.create(tmp_path / "vm.qcow2", MIB).close()
    ((body),) = [body for kind, _, body in extensions(tmp_path / "vm.qcow2") if kind == FEATURE_NAMES]
    names = {(body[i], body[i + 1]): body[i + 2 : i + 48].rstrip(b"\0") for i in range(0, len(body), 48)}
    assert names[0, 0] == b"dirty bit" and names[0, 3] == b"compression type" and names[2, 0] == b"bitmaps"


def test_smallest_clusters_with_the_longest_names(tmp_path):
    """A cluster of 512 bytes: the header, the format and a name, as long as there is room."""
    for length in (200, 376, 377, 500):
        name = "./" * ((length - 200) // 2) + "x" * (200 + length % 2)
        assert len(name) == length
        (tmp_path / name).write_bytes(bytes(4096))
        path = tmp_path / f"{length}.qcow2"
        options = {"cluster_size": 512, "backing": name, "backing_format": "raw"}
        if length <= 376:
            pyfleece.create(path, 4096, **options).close()
            check(path)
            assert_same_info(path)
        else:
            with pytest.raises(pyfleece.ArgumentError, match=f"has {length} bytes, and there is room for 376 in"):
                pyfleece.create(path, 4096, **options)
            assert not path.exists()


# ---- what is refused; nothing is left behind then ----

WRONG = [
    ({"cluster_size": 256}, "cluster size is 256"),
    ({"cluster_size": 4 * MIB}, "cluster size is 4194304"),
    ({"cluster_size": 1000}, "cluster size is 1000, not a power of two"),
    ({"cluster_size": 0}, "cluster_size is 0"),
    ({"compression": "lzma"}, "compression is 'lzma', neither zlib nor zstd"),
    ({"compression": ""}, "compression is ''"),
    ({"backing": "base.raw"}, "the format of its backing file 'base.raw' was not given; nothing is guessed"),
    ({"backing": "base.raw", "backing_format": ""}, "was not given"),
    ({"backing": "base.raw", "backing_format": "vmdk"}, "'vmdk', neither raw nor qcow2"),
    ({"backing_format": "raw"}, "a format of a backing file, 'raw', and no backing file"),
    ({"backing": "x" * 1024, "backing_format": "raw"}, "has 1024 bytes; 1023 are the most"),
    ({"backing": "a\0b", "backing_format": "raw"}, "null character"),
    ({"compression": "zlib\0"}, "null character"),
    ({"cache_size": 0}, "cache_size is 0"),
    ({"backing_root": True}, "backing_root"),
]


@pytest.mark.parametrize(("options", "what"), WRONG)
def test_options_that_make_no_sense(tmp_path, options, what):
    path = tmp_path / "vm.qcow2"
    with pytest.raises(ValueError, match=what):
        pyfleece.create(path, MIB, **options)
    assert not list(tmp_path.iterdir())


def test_raw_images_have_nothing_to_choose(tmp_path):
    for options in ({"cluster_size": 4096}, {"backing": "x", "backing_format": "raw"}, {"compression": "zlib"}):
        with pytest.raises(pyfleece.ArgumentError, match="a raw image has no cluster size"):
            pyfleece.create(tmp_path / "vm.raw", MIB, **options)
    assert not list(tmp_path.iterdir())


def test_backing_file_that_can_not_be_opened(tmp_path):
    path = tmp_path / "vm.qcow2"
    with pytest.raises(FileNotFoundError, match="missing.raw"):
        pyfleece.create(path, MIB, backing="missing.raw", backing_format="raw")
    (tmp_path / "base.raw").write_bytes(bytes(4096))
    with pytest.raises(pyfleece.FormatError, match="not a qcow2 image"):
        pyfleece.create(path, MIB, backing="base.raw", backing_format="qcow2")
    with pytest.raises(PermissionError, match="backing_root"):
        pyfleece.create(path, MIB, backing="/etc/passwd", backing_format="raw")
    with pytest.raises(PermissionError, match="not allowed"):
        pyfleece.create(path, MIB, backing="base.raw", backing_format="raw", backing_root=False)
    assert not path.exists()


def test_existing_files_are_left_alone(tmp_path):
    path = tmp_path / "vm.qcow2"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        pyfleece.create(path, MIB)
    assert path.read_bytes() == b"mine"


def test_size_of_the_backing_file(tmp_path):
    (tmp_path / "base.raw").write_bytes(bytes(3 * MIB))
    with pyfleece.create(tmp_path / "a.qcow2", None, backing="base.raw", backing_format="raw") as image:
        assert image.size == 3 * MIB
    with pyfleece.create(tmp_path / "b.qcow2", None, backing="a.qcow2", backing_format="qcow2") as image:
        assert image.size == 3 * MIB
    with pytest.raises(pyfleece.ArgumentError, match="needs a size, or a backing file"):
        pyfleece.create(tmp_path / "c.qcow2", None)


# ---- theirs ----

PREALLOCATIONS = ["off", "metadata", "falloc", "full"]


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_theirs(tmp_path, cluster, compat):
    data = random.Random(cluster).randbytes(300 * KIB)
    for number, bits in enumerate([1, 2, 4, 8, 16, 32, 64] if compat == "1.1" else [16]):
        lazy, compression = ["off", "on"][number % 2], ["zlib", "zstd"][number // 2 % 2]
        preallocation = PREALLOCATIONS[(number + cluster.bit_length() // 2) % len(PREALLOCATIONS)]
        path = tmp_path / f"{number}.qcow2"
        options = [f"compat={compat}", f"cluster_size={cluster}", f"preallocation={preallocation}"]
        if compat == "1.1":
            options += [f"refcount_bits={bits}", f"lazy_refcounts={lazy}", f"compression_type={compression}"]
        qemu_create(path, MIB, *options)
        assert_same_info(path)
        with pyfleece.open(path, "r+") as image:
            image.pwrite(data, 123 * 512)
            assert image.pread(MIB, 0) == bytes(123 * 512) + data + bytes(MIB - 123 * 512 - len(data))
        check(path)
        assert_same_info(path)
        path.unlink()


def test_theirs_with_snapshots_and_bitmaps(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-img", "bitmap", "--add", "-g", "128k", path, "daily")
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "64k", path, "weekly")
    assert_same_info(path)
    with pyfleece.open(path, "r+") as image:
        image.pwrite(b"new", 0)
        assert image.persistent_bitmaps() == [], "nobody keeps them up to date: void from the first write on"
        assert image.info.qcow2 is not None and image.info.qcow2.bitmaps == 0
    check(path)                                 # what the bitmaps had is free again
    assert_same_info(path)
    run("qemu-img", "convert", "-q", "-l", "before", "-O", "raw", path, tmp_path / "before.raw")
    assert (tmp_path / "before.raw").read_bytes() == b"\x01" * MIB + bytes(3 * MIB), "the snapshot was not written"


def test_opened_for_writing_and_not_written_keeps_its_bitmaps(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "4M")
    run("qemu-img", "bitmap", "--add", path, "daily")
    before = path.read_bytes()
    with pyfleece.open(path, "r+") as image:
        image.pread(4096, 0)
        image.flush()
    assert path.read_bytes() == before


def test_refused_backing_file_leaves_a_dirty_image_as_it_is(tmp_path):
    """It would be repaired when it is opened for writing; but not if it can't be opened."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    path = qemu_create(tmp_path / "vm.qcow2", "1M", "lazy_refcounts=on", backing=("base.raw", "raw"))
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", path, check=False)
    assert get(path, "incompatible") == 1
    before = path.read_bytes()
    with pytest.raises(PermissionError):
        pyfleece.open(path, "r+", backing_root=False)
    assert path.read_bytes() == before
    with pyfleece.open(path, "r+"):
        pass
    assert get(path, "incompatible") == 0
    check(path)


# ---- chains, maps, growth, compressed writes ----


def their_map(path: Path) -> list[tuple]:
    return [
        (e["start"], e["length"], e["data"], e["present"], e["depth"], e.get("offset"))
        for e in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path))
        if e["length"]
    ]


def our_map(path: Path) -> list[tuple]:
    """As qemu-img says it: without a place for zeros that are only a flag, and with depth 0 for what nobody has."""
    with pyfleece.open(path) as image:
        return [(e.offset, e.length, e.kind == "data", e.allocated, e.depth, e.host_offset) for e in image.map()]


def spread(entries: list[tuple], size: int, unit: int = 4096) -> list[tuple]:
    """Entry by unit, so that it does not matter where one ends and the next one continues it."""
    found = []
    for start, length, data, present, depth, offset in entries:
        for at in range(start, start + length, unit):
            found.append((data, present, depth if present else 0, None if offset is None else offset + at - start))
    assert len(found) == -(-size // unit)
    return found


def test_map_of_a_chain_agrees_with_qemu_img(tmp_path):
    base, middle, top = tmp_path / "base.raw", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    with base.open("wb") as file:
        file.truncate(2 * MIB)
        file.write(b"base" * (256 * KIB))
    pyfleece.create(middle, 3 * MIB, backing="base.raw", backing_format="raw").close()
    pyfleece.create(top, 4 * MIB, backing="middle.qcow2", backing_format="qcow2", cluster_size=4096).close()
    for command in ("write -P 2 512k 128k", "write -z 1M 64k", "write -c -P 9 2M 64k"):
        run("qemu-io", "-f", "qcow2", "-c", command, middle)
    with pyfleece.open(top, "r+") as image:
        image.pwrite(b"t" * 8192, 700 * KIB)
        image.zero(64 * KIB, 0)
        image.pwrite(b"t", 4 * MIB - 1)
    ours, theirs = our_map(top), their_map(top)
    assert spread(ours, 4 * MIB) == spread(theirs, 4 * MIB)
    with pyfleece.open(top) as image:
        entries = list(image.map())
        assert {e.depth for e in entries if e.allocated} == {0, 1, 2}
        assert [(e.offset, e.length, e.depth) for e in entries if e.compressed] == [(2 * MIB, 64 * KIB, 1)]
        assert [e for e in entries if not e.allocated and e.kind == "data"] == []
        assert list(image.map(4096, 4096)) == [e._replace(offset=4096, length=4096) for e in entries[:1]]
        with pytest.raises(pyfleece.OutOfRangeError):
            image.map(4 * MIB, 1)
        kinds = [extent.kind for extent in image.extents(0, 64 * KIB)]
        assert kinds == ["zero"]


def test_growth(tmp_path):
    path = tmp_path / "vm.qcow2"
    with pyfleece.create(path, MIB, cluster_size=512) as image:
        image.pwrite(b"x" * MIB, 0)
        image.grow(100 * MIB)
        assert image.size == image.info.size == 100 * MIB
        assert image.pread(4096, MIB) == bytes(4096)
        image.pwrite(b"end", 100 * MIB - 3)
        with pytest.raises(pyfleece.ArgumentError, match="cannot shrink"):
            image.grow(MIB)
        image.grow(100 * MIB)
    check(path)
    assert their_info(path)["virtual-size"] == 100 * MIB
    with pyfleece.open(path) as image:
        assert image.pread(MIB, 0) == b"x" * MIB and image.pread(3, 100 * MIB - 3) == b"end"
        with pytest.raises(OSError, match="reading only"):
            image.grow(200 * MIB)
    with pyfleece.create(tmp_path / "vm.raw", MIB) as raw, pytest.raises(OSError, match="cannot grow"):
        raw.grow(2 * MIB)


def test_growth_waits_for_nobody_who_uses_the_image(tmp_path):
    with pyfleece.create(tmp_path / "vm.qcow2", MIB) as image:
        with pyfleece.Disk(image), pytest.raises(pyfleece.ImageError, match="source of a disk"):
            image.grow(2 * MIB)
        image.grow(2 * MIB)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MIB])
def test_compressed_writes(tmp_path, compression, cluster):
    """Read back by us and by qemu-img; the last cluster is short."""
    path = tmp_path / "vm.qcow2"
    size = 5 * cluster + 512
    rng = random.Random(3)
    parts = [b"compress me " * (cluster // 8), rng.randbytes(cluster), b"\0" * cluster, b"a" * cluster]
    data = (b"".join(part[:cluster] for part in parts) + b"tail of the disk" * cluster)[:size]
    with pyfleece.create(path, size, cluster_size=cluster, compression=compression) as image:
        assert image.write_compressed(data[: 2 * cluster], 0) == 2 * cluster
        assert image.write_compressed(data[2 * cluster :], 2 * cluster) == size - 2 * cluster
        assert image.pread(size, 0) == data
        with pytest.raises(pyfleece.ArgumentError, match="only whole clusters"):
            image.write_compressed(b"x" * 512, 0 if cluster > 512 else 256)
    check(path)
    (tmp_path / "expected.raw").write_bytes(data)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "expected.raw")
    if cluster >= 65536:
        assert path.stat().st_blocks * 512 < 3 * cluster + MIB // 2
    with pyfleece.open(path, "r+") as image:
        image.pwrite(b"over", 10)
        data = data[:10] + b"over" + data[14:]
        assert image.pread(size, 0) == data
    check(path)


def test_compression_of_theirs_is_read(tmp_path):
    raw, data = tmp_path / "vm.raw", b"".join(bytes([i % 251]) * 3000 for i in range(600))
    raw.write_bytes(data[: len(data) & ~511])
    for compression in ("zlib", "zstd"):
        path = tmp_path / f"{compression}.qcow2"
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression}", raw, path)
        with pyfleece.open(path) as image:
            assert image.pread(image.size, 0) == raw.read_bytes()
            assert any(entry.compressed for entry in image.map())


def test_raw_images_are_not_compressed(tmp_path):
    with pyfleece.create(tmp_path / "vm.raw", MIB) as image, pytest.raises(OSError, match="has no compression"):
        image.write_compressed(bytes(4096), 0)


def test_cache_size(tmp_path):
    """Any size will do: a small one is slower."""
    path = tmp_path / "vm.qcow2"
    with pyfleece.create(path, 64 * MIB, cluster_size=512, cache_size=1) as image:
        for offset in range(0, 64 * MIB, MIB):
            image.pwrite(offset.to_bytes(8, "big"), offset)
    check(path)
    with pyfleece.open(path, cache_size=1 << 40) as image:
        assert all(image.pread(8, offset) == offset.to_bytes(8, "big") for offset in range(0, 64 * MIB, MIB))


def test_block_device(tmp_path, loop_device):
    """With the format said out loud; the file's length is the device's."""
    require("qemu-img")
    device = loop_device(8 * MIB)
    run("qemu-img", "create", "-q", "-f", "qcow2", device, "4M")
    with pyfleece.open(device, "r+", format="qcow2") as image:
        image.pwrite(b"x" * MIB, MIB)
        assert image.info.block_device
    check(Path(device))
    with pyfleece.open(device, format="qcow2") as image:
        assert image.pread(3 * MIB, 0) == bytes(MIB) + b"x" * MIB + bytes(MIB)


def test_direct(tmp_path):
    path = tmp_path / "vm.qcow2"
    try:
        image = pyfleece.create(path, 4 * MIB, direct=True)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    with image:
        image.pwrite(b"odd", 12345)
        assert image.pread(5, 12344) == b"\0odd\0"
    check(path)
    assert os.path.getsize(path) % 512 == 0

"""Disks as files: every operation of the mount against os.* calls with a model, snapshots, incrementals, names,
programs that read files, and that reads and writes go on while snapshots are cut.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, run_python, wait_for
from mount_kit import (
    CLUSTER,
    KEEP_SIZE,
    ZERO_RANGE,
    Served,
    attribute,
    fails,
    fallocate,
    holes,
    opened,
    punch,
    serve,
)

import pyfleece


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


# ---- the guest's view ----


def test_every_operation_does_what_a_model_does(served: Served) -> None:
    model = bytearray(served.data)
    size = len(model)
    rng = random.Random(5)
    with opened(served.file) as fd:
        for _ in range(400):
            offset = rng.randrange(size)
            count = min(rng.choice([1, 511, 512, 4096, 70000, 300000, 1500000]), size - offset)
            if rng.random() < 0.5:
                offset = offset // CLUSTER * CLUSTER
            kind = rng.choice(["write", "write", "read", "punch", "zero", "sync"])
            if kind == "write":
                data = rng.randbytes(count)
                assert os.pwrite(fd, data, offset) == count
                model[offset : offset + count] = data
            elif kind == "read":
                assert os.pread(fd, count, offset) == model[offset : offset + count]
            elif kind == "sync":
                os.fsync(fd)
            else:
                fallocate(fd, 3 if kind == "punch" else rng.choice([ZERO_RANGE, ZERO_RANGE | KEEP_SIZE]), offset, count)
                model[offset : offset + count] = bytes(count)
        for start, end in holes(fd, size):
            assert not any(model[start:end])
    assert served.file.read_bytes() == model
    assert served.disk.pread(size, 0) == model


def test_holes_are_where_the_source_has_them(served: Served) -> None:
    size = len(served.data)
    expected = [(e.offset, e.offset + e.length) for e in served.images["vm.raw"].extents() if e.kind == "zero"]
    assert expected
    with opened(served.file) as fd:
        assert holes(fd, size) == expected
        punch(fd, 0, size)
        assert holes(fd, size) == [(0, size)]
        with fails(errno.ENXIO):
            os.lseek(fd, 0, os.SEEK_DATA)
        with fails(errno.ENXIO):
            os.lseek(fd, size, os.SEEK_HOLE)
        os.pwrite(fd, b"x", size - 1)
        assert os.lseek(fd, size - 1, os.SEEK_DATA) == size - 1
    assert os.stat(served.file).st_blocks * 512 < size


def test_the_end_of_a_disk_is_that_of_a_block_device(served: Served) -> None:
    size = len(served.data)
    with opened(served.file) as fd:
        assert os.pread(fd, 4096, size) == b""
        assert os.pread(fd, 4096, size - 3) == served.data[-3:]
        assert os.pwrite(fd, b"abcdef", size - 3) == 3
        with fails(errno.ENOSPC):
            os.pwrite(fd, b"x", size)
        with fails(errno.ENOSPC):
            fallocate(fd, ZERO_RANGE, size - 10, 20)
        punch(fd, size - 4096, 1 << 30)         # as on any file: what is beyond the end does not matter
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, size - 10, 20)
        with fails(errno.EOPNOTSUPP):
            fallocate(fd, 0, 0, 4096)
        assert os.fstat(fd).st_size == size
    with opened(served.file, os.O_WRONLY | os.O_APPEND) as fd, fails(errno.ENOSPC):
        os.write(fd, b"x")
    assert served.disk.pread(4096, size - 4096) == bytes(4096)


def test_what_cannot_be_done_is_not_permitted(served: Served) -> None:
    size = len(served.data)
    with opened(served.file) as fd:
        os.ftruncate(fd, size)
        for wrong in (0, size - 1, size + 1):
            with fails(errno.EPERM):
                os.ftruncate(fd, wrong)
    with fails(errno.EPERM):
        os.open(served.file, os.O_RDWR | os.O_TRUNC)
    with fails(errno.EPERM):
        os.open(served.path / "new", os.O_RDWR | os.O_CREAT)
    with fails(errno.EPERM):
        os.mkdir(served.path / "new")
    with fails(errno.EPERM):
        os.unlink(served.file)
    with fails(errno.EPERM):
        os.rename(served.file, served.path / "other")
    with fails(errno.EPERM):
        os.symlink("x", served.path / "link")
    with fails(errno.EPERM):
        os.link(served.file, served.path / "link")
    with fails(errno.EPERM):
        os.mkfifo(served.path / "pipe")
    with fails(errno.EPERM):
        os.rmdir(served.path / ".snap")
    with fails(errno.ENOENT):
        os.stat(served.path / "other")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(served.file, "user.pyfleece.commit", b"1")
    assert served.file.read_bytes() == served.data


def test_attributes(served: Served) -> None:
    found = os.stat(served.file)
    assert (found.st_size, stat.S_IMODE(found.st_mode), found.st_uid) == (len(served.data), 0o600, os.geteuid())
    assert stat.S_ISREG(found.st_mode)
    assert sorted(os.listdir(served.path)) == [".snap", "vm.raw"]
    assert os.statvfs(served.path).f_blocks == -(-len(served.data) // 4096)
    os.chmod(served.file, 0o640)
    os.chmod(served.path / ".snap", 0o700)
    if os.geteuid() == 0:
        os.chown(served.file, 12, 34)
    served.cut()
    for path in (served.file, served.snap()):
        found = os.stat(path)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert os.geteuid() != 0 or (found.st_uid, found.st_gid) == (12, 34)
    assert stat.S_IMODE(os.stat(served.snap().parent).st_mode) == 0o700
    with fails(errno.EPERM):
        os.chmod(served.snap(), 0o666)


def test_a_write_changes_the_time_of_the_disk_and_not_of_its_snapshots(served: Served) -> None:
    served.cut()
    os.utime(served.file)                       # allowed, as `touch` and `cp` do it, and without effect
    before, cut = os.stat(served.file).st_mtime_ns, os.stat(served.snap()).st_mtime_ns
    with opened(served.file) as fd:
        os.pwrite(fd, b"x", 0)
        assert os.fstat(fd).st_mtime_ns >= before
        wait_for(lambda: os.pwrite(fd, b"x", 0) and os.fstat(fd).st_mtime_ns > before)
    assert os.stat(served.snap()).st_mtime_ns == cut


def test_synchronous_writes_are_flushed(served: Served) -> None:
    with opened(served.file, os.O_RDWR | os.O_DSYNC) as fd:
        before = served.source.seen("flush")
        os.pwrite(fd, b"x", 0)
        assert served.source.seen("flush") > before
    with opened(served.file) as fd:
        before = served.source.seen("flush")
        os.pwrite(fd, b"x", 0)
        assert served.source.seen("flush") == before
        os.fdatasync(fd)
        assert served.source.seen("flush") > before


def test_private_mappings_work(served: Served) -> None:
    import mmap

    served.cut()
    with opened(served.snap(), os.O_RDONLY) as fd:
        mapped = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        assert mapped[:] == served.data
        mapped.close()


def test_large_and_small_requests_side_by_side(served: Served) -> None:
    """Large ones call helpers, which rest when they meet a small one."""
    size = len(served.data)
    models = [bytearray(served.data[start : start + size // 4]) for start in range(0, size // 4 * 4, size // 4)]

    def use(part: int) -> None:
        """A quarter of the disk each."""
        rng, start, model = random.Random(part), part * (size // 4), models[part]
        with opened(served.file) as fd:
            for turn in range(150):
                count = len(model) if turn % 3 else rng.randrange(1, 5000)
                offset = rng.randrange(len(model) - count + 1)
                if rng.random() < 0.5:
                    data = rng.randbytes(count)
                    assert os.pwrite(fd, data, start + offset) == count
                    model[offset : offset + count] = data
                assert os.pread(fd, count, start + offset) == model[offset : offset + count]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert served.file.read_bytes()[: size // 4 * 4] == b"".join(models)


# ---- snapshots ----


def test_mkdir_cuts_all_disks_and_rmdir_ends_it(tmp_path: Path) -> None:
    with serve(tmp_path, "vm.raw", "data.qcow2") as served:
        assert os.listdir(served.path / ".snap") == []
        made = served.cut("now")
        assert sorted(os.listdir(served.snap().parent)) == ["data.qcow2", "vm.raw"]
        assert list(served.mount.snapshots) == ["now"] == os.listdir(served.path / ".snap")
        for name, disk in served.disks.items():
            disk.pwrite(b"\xff" * 100000, 5000)
            assert served.snap("now", name).read_bytes() == served.content[name] == made[name].pread(made[name].size, 0)
        served.cut("later")
        for name, disk in served.disks.items():
            assert served.snap("later", name).read_bytes() == disk.pread(disk.size, 0)
        with fails(errno.EEXIST):
            os.mkdir(served.path / ".snap" / "now")
        os.rmdir(served.path / ".snap" / "now")
        with fails(errno.ENOENT):
            os.rmdir(served.path / ".snap" / "now")
        with fails(errno.ENOENT):
            os.stat(served.snap("now"))
        assert list(served.mount.snapshots) == ["later"] == os.listdir(served.path / ".snap")
        assert all(snapshot.closed for snapshot in made.values())


def test_cuts_by_the_api_are_the_same(tmp_path: Path) -> None:
    with serve(tmp_path, "vm.raw", "data.raw") as served:
        made = served.mount.cut("one", disks=["data.raw"], cluster_size=65536)
        assert os.listdir(served.path / ".snap" / "one") == ["data.raw"] == list(made)
        assert made["data.raw"].cluster_size == 65536
        assert served.snap("one", "data.raw").read_bytes() == served.content["data.raw"]
        named = served.mount.cut()
        assert (served.path / ".snap" / named.name).is_dir()
        with pytest.raises(FileExistsError, match="there is a snapshot 'one' already"):
            served.mount.cut("one")
        with pytest.raises(pyfleece.ArgumentError, match=r"no disk 'x'; there are vm.raw, data.raw"):
            served.mount.cut("two", disks=["x"])
        with pytest.raises(pyfleece.ArgumentError, match="no disk 'x'"):
            served.mount.cut("two", bitmaps={"x": "b"})
        with pytest.raises(FileNotFoundError, match="no dirty bitmap"):
            served.mount.cut("two", bitmaps={"vm.raw": "none"})
        os.rmdir(served.path / ".snap" / "one")
        assert made["data.raw"].closed
        served.mount.drop(named.name)
        with pytest.raises(FileNotFoundError):
            served.mount.drop(named.name)
        assert os.listdir(served.path / ".snap") == []
        assert served.mount.cut("one").name == "one"


def test_a_snapshot_can_only_be_read_and_discarded(served: Served) -> None:
    made = served.cut()["vm.raw"]
    size = len(served.data)
    with opened(served.snap()) as fd:
        with fails(errno.EROFS):
            os.pwrite(fd, b"x", 0)
        with fails(errno.EROFS):
            fallocate(fd, ZERO_RANGE | KEEP_SIZE, 0, CLUSTER)
        with fails(errno.EPERM):
            os.ftruncate(fd, 0)
        os.fsync(fd)
        punch(fd, 0, 3 * CLUSTER)
        punch(fd, 5 * CLUSTER + 1, CLUSTER)             # no whole cluster: nothing
        assert made.stats.clusters_discarded == 3
        with fails(errno.ENODATA):
            os.pread(fd, 1, 0)
        assert "discarded" in attribute(served.snap(), "error")
        assert os.pread(fd, size, 3 * CLUSTER) == served.data[3 * CLUSTER :]
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0       # not a hole: it would read as zeros
        punch(fd, 0, 1 << 40)
        assert [extent.kind for extent in made.extents()] == ["discarded"]
    assert served.errors == [], "reading what one discarded is a mistake, and no failure"


def test_holes_of_a_snapshot_are_those_of_the_cut(served: Served) -> None:
    size = len(served.data)
    expected = [(e.offset, e.offset + e.length) for e in served.images["vm.raw"].extents() if e.kind == "zero"]
    served.cut()
    with opened(served.snap()) as fd:
        served.disk.pwrite(b"\xff" * (size - 8192), 0)
        assert holes(fd, size) == expected
        assert holes(fd, size) == expected, "also when it has been looked at before"
        for start, end in expected[:20]:
            for at in (start, (start + end) // 2, end - 1):
                assert os.lseek(fd, at, os.SEEK_HOLE) == at
    assert os.stat(served.snap()).st_blocks * 512 < size


def test_statistics(served: Served) -> None:
    served.cut()
    served.disk.pwrite(b"x" * 10 * CLUSTER, 0)
    told = json.loads(attribute(served.snap(), "stats"))
    stats = served.mount.snapshots["now"]["vm.raw"].stats
    assert told["state"] == "live" and told["size"] == len(served.data) and not told["incremental"]
    assert told["clusters_saved"] + told["zero_clusters"] == 10
    assert told["bytes_copied"] == stats.bytes_copied
    assert os.listxattr(served.snap()) == []            # so that `cp -a` and `rsync -X` leave them behind
    assert attribute(served.file, "stats") == attribute(served.path, "error") == ""


def test_an_incremental_has_two_files(tmp_path: Path) -> None:
    with serve(tmp_path, bitmaps={"vm.raw": "b"}) as served:
        size = len(served.data)
        bitmap = served.disk.bitmaps["b"]
        served.disk.pwrite(b"new" * 1000, 65600)
        served.disk.zero(65536, 5 * 65536)
        served.disk.pwrite(b"end", size - 3)
        inside = [(e.offset, e.offset + e.length) for e in bitmap.extents() if e.kind == "dirty"]
        assert inside == [(65536, 131072), (5 * 65536, 6 * 65536), (size - size % 65536, size)]
        expected = bytearray(size)
        for start, end in inside:
            expected[start:end] = served.disk.pread(end - start, start)
        whole = served.disk.pread(size, 0)
        served.cut()
        assert bitmap.count == 0
        assert sorted(os.listdir(served.snap().parent)) == ["vm.changed", "vm.raw"]
        served.disk.pwrite(b"\xff" * 300000, 0)
        assert served.snap("now", "vm.changed").read_bytes() == expected
        dirty = sum(end - start for start, end in inside)
        assert os.stat(served.snap("now", "vm.changed")).st_blocks <= dirty // 512 + 1
        with opened(served.snap("now", "vm.changed")) as fd:
            for start, end in holes(fd, size):
                assert not any(expected[start:end])
            assert os.lseek(fd, 0, os.SEEK_DATA) == 65536
            assert served.snap().read_bytes() == whole, "all of it, whatever was written since"
            punch(fd, 0, 5 * 65536)
            with fails(errno.ENODATA):
                os.pread(fd, 1, 65536)
            assert os.pread(fd, 65536, 0) == bytes(65536)
        with opened(served.snap()) as fd:
            for start, end in holes(fd, size):
                assert not any(whole[start:end])
            with fails(errno.ENODATA):
                os.pread(fd, 4096, 65536)
            assert os.pread(fd, 65536, 0) == whole[:65536], "a hole of vm.changed is nothing that anybody has"
            punch(fd, 0, 65536)
            with fails(errno.ENODATA):
                os.pread(fd, 4096, 0)
        full = served.mount.cut("full", bitmaps={})
        assert os.listdir(served.path / ".snap" / "full") == ["vm.raw"] == list(full)


def test_an_incremental_of_nothing_but_its_bitmap(tmp_path: Path) -> None:
    with serve(tmp_path, bitmaps={"vm.raw": "b"}, snapshot_options={"whole": False}) as served:
        size = len(served.data)
        served.disk.pwrite(b"new", 65536)
        expected = served.disk.pread(65536, 65536)
        served.cut()
        with opened(served.snap()) as fd:
            with fails(errno.ENODATA):
                os.pread(fd, 4096, 0)
            assert os.lseek(fd, 0, os.SEEK_DATA) == 0, "what is not known is no hole"
            assert "dirty bitmap" in attribute(served.snap(), "error")
            assert os.pread(fd, 65536, 65536) == expected
        assert served.snap("now", "vm.changed").read_bytes() == bytes(65536) + expected + bytes(size - 131072)


def test_an_incremental_counts_only_when_it_is_committed(tmp_path: Path) -> None:
    with serve(tmp_path, bitmaps={"vm.raw": "b"}) as served:
        bitmap = served.disk.bitmaps["b"]
        served.disk.pwrite(b"x", 0)
        served.cut("failed")
        os.rmdir(served.path / ".snap" / "failed")
        assert bitmap.count == 65536, "the backup did not say that it was good"
        served.cut("good")
        os.setxattr(served.path / ".snap" / "good", "user.pyfleece.commit", b"1")
        os.rmdir(served.path / ".snap" / "good")
        assert bitmap.count == 0
        served.disk.pwrite(b"x", 0)
        served.mount.cut("by the API")
        served.mount.commit("by the API")
        served.mount.drop("by the API")
        assert bitmap.count == 0


def test_the_changed_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = ["vm.raw", "vm.qcow2", "data", ".hidden", "a.b.raw"]
    with serve(tmp_path, *names, size=65536, bitmaps=dict.fromkeys(names, "b")) as served:
        served.cut()
        changed = {"vm.raw.changed", "vm.qcow2.changed", "data.changed", ".hidden.changed", "a.b.changed"}
        assert set(os.listdir(served.snap().parent)) == {*names, *changed}


# ---- changes ----


class Changes:
    """What `on_change` of a mount saw."""

    def __init__(self) -> None:
        self.seen: queue.Queue[dict[str, bool]] = queue.Queue()
        self.mount: pyfleece.Mount | None = None

    def __call__(self) -> None:
        assert self.mount is not None
        snapshots = self.mount.snapshots
        self.seen.put({name: made["vm.raw"].broken is not None for name, made in snapshots.items()})

    def until(self, wanted: dict[str, bool]) -> None:
        """Only what is told counts: nobody looks meanwhile."""
        while self.seen.get(timeout=20) != wanted:
            pass


def test_changes_are_told(tmp_path: Path) -> None:
    changes = Changes()
    options = {"fleecing": "memory", "stage_size": 65536, "cbw_timeout": 0.0}
    with serve(tmp_path, on_change=changes, snapshot_options=options) as served:
        changes.mount = served.mount
        served.cut("now")
        changes.until({"now": False})
        served.mount.cut("more")
        changes.until({"now": False, "more": False})
        os.rmdir(served.path / ".snap" / "more")
        changes.until({"now": False})
        served.disk.pwrite(b"\xff" * MIB, 0)
        changes.until({"now": True})
        served.mount.drop("now")
        changes.until({})


def test_nothing_waits_for_who_is_told(tmp_path: Path) -> None:
    """`on_change` hangs, and then raises: reads, writes and cuts go on, and the next one is told."""
    called, go_on, again = threading.Event(), threading.Event(), threading.Event()

    def on_change() -> None:
        if called.is_set():
            again.set()
        else:
            called.set()
            go_on.wait(60)
            raise ValueError("told badly")

    with serve(tmp_path, on_change=on_change) as served:
        served.cut("one")
        assert called.wait(20)
        for number in range(100):
            served.cut(str(number))
            assert served.snap(str(number)).read_bytes() == served.data
            os.rmdir(served.path / ".snap" / str(number))
        with opened(served.file) as fd:
            os.pwrite(fd, b"new", 0)
        assert served.snap("one").read_bytes() == served.data
        assert not again.is_set()
        go_on.set()
        assert again.wait(20)


def test_who_is_told_may_close_the_mount(tmp_path: Path) -> None:
    closed = threading.Event()
    made: list[pyfleece.Mount] = []

    def on_change() -> None:
        made[0].close()
        closed.set()

    with serve(tmp_path, on_change=on_change) as served:
        made.append(served.mount)
        served.mount.cut("now")
        assert closed.wait(20) and served.mount.closed


# ---- names ----


ODD = [b"a b", b"\xff\xfe", "schön".encode(), b"-rf", b"x\ny", b"'\"$(x)", b"n" * 255, b"..."]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_work(served: Served, name: bytes) -> None:
    path = os.fsencode(served.path / ".snap") + b"/" + name
    os.mkdir(path)
    assert os.listdir(os.fsencode(served.path / ".snap")) == [name]
    assert list(served.mount.snapshots) == [os.fsdecode(name)]
    with open(path + b"/vm.raw", "rb") as file:
        assert file.read() == served.data
    os.rmdir(path)
    assert served.mount.snapshots == {}
    served.mount.cut(os.fsdecode(name))
    assert os.path.exists(path + b"/vm.raw")
    served.mount.drop(os.fsdecode(name))
    assert not os.path.exists(path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "n" * 256, "ö" * 128])
def test_bad_names_are_rejected(served: Served, name: str) -> None:
    with pytest.raises(pyfleece.ArgumentError, match="cannot be the name of a snapshot"):
        served.mount.cut(name)
    assert served.mount.snapshots == {}


def test_names_that_are_too_long(served: Served) -> None:
    for name in ("n" * 256, "n" * 1000):
        with fails(errno.ENAMETOOLONG):
            os.mkdir(served.path / ".snap" / name)
        with fails(errno.ENAMETOOLONG):
            os.rmdir(served.path / ".snap" / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([""], "cannot be the name"),
        (["a/b"], "cannot be the name"),
        ([".."], "cannot be the name"),
        ([".snap"], "cannot be the name"),
        (["a\0b"], "cannot be the name"),
        (["n" * 256], "cannot be the name"),
        (["n" * 250], "its incremental could not be called"),
        (["a.raw", "a.changed", "a.raw.changed"], "its incremental could not be called"),
        ([], "one disk at least"),
    ],
)
def test_bad_names_of_disks(names: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with pyfleece.create(tmp_path / "vm.raw", MIB) as image, pyfleece.Disk(image) as disk:
        with pytest.raises(pyfleece.ArgumentError, match=message):
            pyfleece.mount(dict.fromkeys(names, disk), tmp_path / "mount")
        assert not os.path.ismount(tmp_path / "mount")


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with pyfleece.create(tmp_path / "vm.raw", MIB) as image, pyfleece.Disk(image) as disk:
        with pytest.raises(TypeError, match="is to be a Disk, not a str"):
            pyfleece.mount({"vm.raw": "x"}, tmp_path / "mount")  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="no 'cluster'"):
            pyfleece.mount({"vm.raw": disk}, tmp_path / "mount", snapshot_options={"cluster": 4096})
        for bad in ({"threads": 0}, {"threads": 257}, {"freeze_timeout": -1}, {"bitmaps": {"x": "b"}}):
            with pytest.raises(pyfleece.ArgumentError):
                pyfleece.mount({"vm.raw": disk}, tmp_path / "mount", **bad)  # type: ignore[arg-type]
        assert not os.path.ismount(tmp_path / "mount")


# ---- many at once ----


def test_snapshots_of_two_disks_are_of_one_instant(tmp_path: Path) -> None:
    """Threads write a counter to one disk and then to the other: no snapshot has it on the second one only."""
    stop = threading.Event()
    writers = 3

    with serve(tmp_path, "a.raw", "b.raw", size=MIB) as served:

        def write(number: int) -> None:
            with opened(served.path / "a.raw") as a, opened(served.path / "b.raw") as b:
                counter = 1
                while not stop.is_set():
                    stamp = counter.to_bytes(8, "little") * 512
                    os.pwrite(a, stamp, number * CLUSTER)
                    os.pwrite(b, stamp, number * CLUSTER)
                    counter += 1

        for disk in served.disks.values():
            disk.zero(disk.size, 0)
        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        try:
            for round_ in range(10):
                served.cut(f"{round_}")
                a, b = (served.snap(f"{round_}", name).read_bytes() for name in ("a.raw", "b.raw"))
                for number in range(writers):
                    place = slice(number * CLUSTER, number * CLUSTER + CLUSTER)
                    assert len({a[place][i : i + 8] for i in range(0, CLUSTER, 8)}) == 1, "a torn write"
                    first, second = (int.from_bytes(data[place][:8], "little") for data in (a, b))
                    assert second <= first <= second + 1
                    if round_ == 9:
                        assert first > 0
                os.rmdir(served.path / ".snap" / f"{round_}")
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_many_threads_at_once(served: Served) -> None:
    """Each writes, reads and punches its own part, while others list, cut and end."""
    size = MIB // 4
    problems: list[BaseException] = []
    done = threading.Event()

    def guest(number: int) -> None:
        rng = random.Random(number)
        base = number * size
        model = bytearray(served.data[base : base + size])
        with opened(served.file) as fd:
            for _ in range(150):
                offset, count = rng.randrange(size - 5000), rng.randrange(1, 5000)
                if rng.random() < 0.2:
                    punch(fd, base + offset, count)
                    model[offset : offset + count] = bytes(count)
                else:
                    data = rng.randbytes(count)
                    os.pwrite(fd, data, base + offset)
                    model[offset : offset + count] = data
                assert os.pread(fd, count, base + offset) == model[offset : offset + count]
            assert os.pread(fd, size, base) == model

    def watch(number: int) -> None:
        while not done.is_set():
            name = f"watch{number}"
            os.mkdir(served.path / ".snap" / name)
            with opened(served.snap(name), os.O_RDONLY) as fd:
                once = os.pread(fd, 2 * MIB, 0)
                holes(fd, len(served.data))
                assert os.pread(fd, 2 * MIB, 0) == once
            assert name in os.listdir(served.path / ".snap")
            os.rmdir(served.path / ".snap" / name)

    def run_it(function, number: int) -> None:  # type: ignore[no-untyped-def]
        try:
            function(number)
        except BaseException as error:
            problems.append(error)

    guests = [threading.Thread(target=run_it, args=(guest, number)) for number in range(8)]
    watchers = [threading.Thread(target=run_it, args=(watch, number)) for number in range(2)]
    for thread in guests + watchers:
        thread.start()
    for thread in guests:
        thread.join()
    done.set()
    for thread in watchers:
        thread.join()
    assert problems == []
    assert served.errors == []


# ---- programs ----


def test_cp_keeps_holes(served: Served, tmp_path: Path) -> None:
    served.cut()
    served.disk.pwrite(b"\xff" * MIB, 0)
    for how in ("always", "auto"):
        target = tmp_path / f"{how}.raw"
        run("cp", f"--sparse={how}", served.snap(), target)
        assert target.read_bytes() == served.data
        assert os.stat(target).st_blocks * 512 < len(served.data)
    run("cp", "-a", served.snap(), tmp_path / "archive.raw")
    assert os.listxattr(tmp_path / "archive.raw") == []


def test_qemu_img_reads_and_writes(tmp_path: Path) -> None:
    require("qemu-img")
    with serve(tmp_path, size=2 * MIB) as served:
        served.cut()
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.snap(), tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == served.data
        (tmp_path / "new.raw").write_bytes(os.urandom(2 * MIB))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "new.raw", served.file)
        assert served.file.read_bytes() == (tmp_path / "new.raw").read_bytes()
        assert served.snap().read_bytes() == served.data
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", served.snap()))
        for extent in mapped:
            start = extent["start"]
            assert extent["data"] or not any(served.data[start : start + extent["length"]])


def test_rsync_copies_a_snapshot(served: Served, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        missing("rsync")
    served.cut()
    served.disk.pwrite(b"\xff" * MIB, 0)
    run("rsync", "-aSX", f"{served.snap().parent}/", tmp_path / "copy/")
    assert (tmp_path / "copy" / "vm.raw").read_bytes() == served.data


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path):
        pass                                    # or skip
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parent.parent / "docs" / "mount.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "mount.md", "exec"), {})
    assert (tmp_path / "backup.raw").stat().st_size == 1 << 30


# ---- the end ----


def test_it_is_a_context_manager_and_closes_twice(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert served.mount.mountpoint == str(served.path)
        assert served.mount.disks == served.disks
        assert os.path.ismount(served.path)
        assert served.mount.wait(0.01) is False
        made = served.cut()
        served.mount.close()
        served.mount.close()
        assert served.mount.closed and made["vm.raw"].closed and not served.disk.closed
        assert served.mount.wait() is True
        assert not os.path.ismount(served.path)
        for call in (served.mount.cut, lambda: served.mount.open_files):
            with pytest.raises(pyfleece.ClosedError):
                call()
        assert served.mount.snapshots == {}
        with pyfleece.mount(served.disks, served.path):
            assert served.file.read_bytes() == served.data


def test_closing_a_disk_closes_the_mount(served: Served) -> None:
    served.disk.close()
    assert served.mount.closed
    assert not os.path.ismount(served.path)


def test_it_flushes_the_disks(served: Served) -> None:
    with opened(served.file) as fd:
        os.pwrite(fd, b"x", 0)
    before = served.source.seen("flush")
    served.mount.close()
    assert served.source.seen("flush") == before + 1


def test_the_end_of_the_interpreter_unmounts(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with serve(tmp_path):
        pass                                    # or skip
    (tmp_path / "mount").mkdir()
    script = """
import os, sys, pyfleece
image = pyfleece.create(sys.argv[1], 1 << 20)
mount = pyfleece.mount({"vm.raw": pyfleece.Disk(image)}, sys.argv[2])
os.mkdir(sys.argv[2] + "/.snap/now")
print(os.path.ismount(sys.argv[2]))
"""
    assert run_python(script, tmp_path / "new.raw", tmp_path / "mount") == "True\n"
    assert not os.path.ismount(tmp_path / "mount")
    os.rmdir(tmp_path / "mount")

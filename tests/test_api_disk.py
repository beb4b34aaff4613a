"""Disks as Python sees them: reads, writes, options of a cut, bitmaps, groups with freeze hooks, what closes what."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MIB, content, missing, run, wait_for

import pyfleece
from pyfleece import fleecing as fleecing_module
from pyfleece.testing import FaultyImage

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def disk(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as source:
        yield pyfleece.Disk(source)


def all_of(thing):
    return thing.pread(thing.size, 0)


# ---- the guest's view ----


def test_reads_and_writes(disk):
    data = bytearray(all_of(disk))
    assert disk.pwrite(b"hello", MIB + 508) == 5
    data[MIB + 508 :] = b"hello"
    disk.zero(100, 4000)
    data[4000:4100] = bytes(100)
    disk.flush()
    assert all_of(disk) == data
    buffer = bytearray(50)
    assert disk.readinto(buffer, 4090) == 50
    assert buffer == data[4090:4140]
    disk.discard(4096, 65536)
    assert disk.pread(65536, 0) == data[:65536]
    with pytest.raises(pyfleece.OutOfRangeError):
        disk.pwrite(b"hello", MIB + 509)
    assert disk.source.pread(65536, 0) == data[:65536]


def test_a_disk_is_made_on_an_image():
    with pytest.raises(TypeError, match=r"pyfleece\.open"):
        pyfleece.Disk("vm.raw")


def test_snapshots_of_different_times_are_each_right(disk):
    states, snapshots = [], []
    for seed in range(4):
        states.append(all_of(disk))
        snapshots.append(disk.snapshot(cluster_size=4096, stage_size=64 << 10))
        disk.pwrite(content(300_000, seed), seed * 100_001)
        disk.zero(10_001, 900_000 + seed)
    for snapshot, state in zip(snapshots, states):
        assert all_of(snapshot) == state
    snapshots[1].close()
    disk.pwrite(bytes([7]) * disk.size, 0)
    assert all_of(snapshots[0]) == states[0]
    assert all_of(snapshots[3]) == states[3]


def test_closing_the_image_closes_all_that_was_made_on_it(make_image):
    path, _ = make_image()
    source = pyfleece.open(path, "r+")
    disk = pyfleece.Disk(source)
    snapshot = disk.snapshot()
    chunks = snapshot.chunks()
    file = snapshot.open()
    source.close()
    assert disk.closed and snapshot.closed and chunks.closed
    for call in (
        lambda: disk.pwrite(b"x", 0),
        lambda: snapshot.pread(1, 0),
        lambda: next(chunks),
        lambda: file.read(1),
    ):
        with pytest.raises(pyfleece.ClosedError):
            call()
    pyfleece.open(path, "r+").close()


def test_closing_while_others_write_and_read(make_image):
    path, _ = make_image()
    source = pyfleece.open(path, "r+")
    disk = pyfleece.Disk(source)
    snapshot = disk.snapshot(cluster_size=4096)
    unexpected = []

    def until_closed(call):
        try:
            while True:
                call()
        except pyfleece.ClosedError:
            pass
        except BaseException as error:
            unexpected.append(error)

    calls = [lambda: disk.pwrite(b"x" * 10_000, 5), lambda: disk.pread(10_000, 5), lambda: snapshot.pread(10_000, 5)]
    threads = [threading.Thread(target=until_closed, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    source.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert not unexpected


def test_a_snapshot_without_references_goes_away(disk, no_leaks):
    disk.snapshot()
    disk.pwrite(b"x", 0)


# ---- the fleecing image ----


def fill_up(disk, snapshot):
    """Overwrite everything; the snapshot still has what was there before."""
    before = all_of(disk)
    disk.pwrite(b"\xff" * disk.size, 0)
    assert all_of(snapshot) == before


def test_default_is_a_nameless_file_beside_the_source(disk, tmp_path):
    with disk.snapshot(cluster_size=4096, stage_size=64 << 10) as snapshot:
        assert str(tmp_path) in snapshot.fleecing.name
        fill_up(disk, snapshot)
        assert snapshot.stats.bytes_spilled > 0
    assert os.listdir(tmp_path) == ["vm.raw"]
    assert snapshot.fleecing.closed


def test_default_is_not_a_tmpfs(disk, monkeypatch, tmp_path):
    monkeypatch.setattr(
        fleecing_module, "_file_system", lambda directory: "tmpfs" if directory == str(tmp_path) else "ext4"
    )
    with disk.snapshot() as snapshot:
        assert "/var/tmp" in snapshot.fleecing.name
    monkeypatch.setattr(fleecing_module, "_file_system", lambda directory: "ramfs")
    with pytest.raises(pyfleece.ArgumentError, match=r"ramfs.*ramfs") as caught:
        disk.snapshot()
    assert caught.value.side == "fleecing"
    with disk.snapshot(fleecing_dir=tmp_path):
        pass


def test_a_tmpfs_is_recognized():
    if not os.path.ismount("/dev/shm"):
        missing("a tmpfs at /dev/shm")
    assert fleecing_module._file_system("/dev/shm") == "tmpfs"


def test_fleecing_is_a_directory(disk, tmp_path):
    directory = tmp_path / "scratch"
    directory.mkdir()
    with disk.snapshot(directory, stage_size=64 << 10) as snapshot:
        assert str(directory) in snapshot.fleecing.name
        fill_up(disk, snapshot)
    with disk.snapshot(fleecing_dir=directory) as snapshot:
        assert str(directory) in snapshot.fleecing.name
    with pytest.raises(ValueError, match="fleecing_dir"):
        disk.snapshot(fleecing="memory", fleecing_dir=directory)


@pytest.mark.parametrize("name", ["fleece.raw", "fleece"])
def test_fleecing_is_a_path(disk, tmp_path, name):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 4 * MIB)
    with disk.snapshot(path, cluster_size=4096, stage_size=64 << 10) as snapshot:
        fill_up(disk, snapshot)
        assert snapshot.stats.fleecing_bytes > 0
        with pytest.raises(pyfleece.ImageLockedError):
            pyfleece.open(path, "r+", format="raw")
    pyfleece.open(path, "r+", format="raw").close()


def test_fleecing_is_an_open_image(disk, tmp_path):
    with pyfleece.create(tmp_path / "fleece.raw", 4 * MIB) as image:
        with disk.snapshot(image, stage_size=64 << 10) as snapshot:
            assert snapshot.fleecing is image
            fill_up(disk, snapshot)
            with pytest.raises(pyfleece.ImageError) as caught:
                disk.snapshot(image)
            assert caught.value.errno == errno.EBUSY
        assert not image.closed
        disk.snapshot(image).close()


def test_a_fleecing_image_can_be_used_again_at_once(disk, tmp_path):
    """Once close() returns, it is free, with its lock: nobody has to try again."""
    path = tmp_path / "fleece.raw"
    with pyfleece.create(path, 4 * MIB) as image:
        for _ in range(20):
            with disk.snapshot(image, stage_size=64 << 10):
                disk.pwrite(content(disk.size, 8, hole=disk.size), 0)
    for _ in range(20):
        with disk.snapshot(path, stage_size=64 << 10):
            disk.pwrite(content(disk.size, 8, hole=disk.size), 0)


def test_fleecing_is_a_block_device(disk, loop_device):
    with disk.snapshot(loop_device(4 * MIB), stage_size=64 << 10) as snapshot:
        assert snapshot.fleecing.info.block_device
        fill_up(disk, snapshot)


def test_fleecing_is_memory(disk):
    with disk.snapshot("memory") as snapshot:
        assert snapshot.fleecing is None
        fill_up(disk, snapshot)


def test_fleecing_images_that_will_not_do(disk, tmp_path):
    empty = tmp_path / "empty.raw"
    empty.touch()
    with pyfleece.create(tmp_path / "readonly.raw", MIB):
        pass
    with pyfleece.open(tmp_path / "readonly.raw") as read_only:
        for fleecing, kind, text in (
            (tmp_path / "missing.raw", FileNotFoundError, "missing.raw"),
            (tmp_path / "missing", FileNotFoundError, "missing"),
            (empty, ValueError, "empty.raw is empty"),
            (read_only, ValueError, "readonly.raw is open read-only"),
            (disk.source, pyfleece.ImageError, "is the source"),
            (disk.source.path, pyfleece.ImageLockedError, "vm.raw"),
            (tmp_path / "x.backup", pyfleece.Error, "x.backup"),
        ):
            with pytest.raises(kind, match=text) as caught:
                disk.snapshot(fleecing)
            assert caught.value.side == "fleecing", fleecing
    disk.pwrite(b"the disk goes on", 0)


def test_read_only_fleecing_device(disk, loop_device, make_image):
    device = loop_device(make_image(4 * MIB, "fleece.raw")[0], "--read-only")
    with pytest.raises(OSError, match=device):
        disk.snapshot(device)


@pytest.mark.parametrize(
    "options",
    [
        {"cbw_timeout": math.nan},
        {"cbw_timeout": math.inf},
        {"cbw_timeout": -1},
        {"cbw_timeout": 1e10},
        {"cluster_size": 5000},
        {"cluster_size": 0},
        {"cluster_size": 1 << 40},
        {"stage_size": 0},
        {"stage_size": -1},
        {"fleecing_limit": 0},
        {"on_cbw_error": "panic"},
    ],
)
def test_options_that_make_no_sense(disk, options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        disk.snapshot(**options)
    disk.pwrite(b"the disk goes on", 0)


# ---- policies ----


@pytest.fixture
def full(disk):
    """full(policy): a snapshot whose memory is used up; the next write has no room. And the disk's state at the cut."""
    made = []

    def make(policy, timeout=0.05):
        disk.pwrite(content(disk.size, 5, hole=disk.size), 0)
        disk.pwrite(b"\x01" * (8 << 12), 0)
        state = all_of(disk)
        made.append(
            disk.snapshot("memory", cluster_size=4096, stage_size=4 << 12, cbw_timeout=timeout, on_cbw_error=policy)
        )
        disk.pwrite(b"new" * 100, 0)
        for cluster in range(1, 4):
            disk.pwrite(b"new", cluster << 12)
        return made[-1], state

    yield make
    for snapshot in made:
        snapshot.close()


def test_break_snapshot(disk, full):
    snapshot, _ = full("break-snapshot")
    assert snapshot.broken is None
    disk.pwrite(b"goes through", 4 << 12)
    assert disk.pread(12, 4 << 12) == b"goes through"
    with pytest.raises(pyfleece.SnapshotBrokenError) as caught:
        snapshot.pread(1, 0)
    assert caught.value.side == "fleecing"
    assert caught.value.cause is not None
    assert isinstance(snapshot.broken, pyfleece.SnapshotBrokenError)
    for call in (snapshot.check, snapshot.open, snapshot.chunks, lambda: list(snapshot.extents())):
        with pytest.raises(pyfleece.SnapshotBrokenError):
            call()


def test_break_guest_write(disk, full):
    snapshot, state = full("break-guest-write")
    with pytest.raises(OSError) as caught:
        disk.pwrite(b"refused", 4 << 12)
    assert isinstance(caught.value, pyfleece.ImageError)
    assert caught.value.side == "fleecing"
    assert disk.pread(7, 4 << 12) == b"\x01" * 7
    assert all_of(snapshot) == state
    snapshot.discard(1 << 12, 0)
    disk.pwrite(b"accepted", 4 << 12)
    assert snapshot.pread(1 << 12, 4 << 12) == state[4 << 12 : 5 << 12]


def test_lose_range(disk, full):
    snapshot, state = full("lose-range")
    disk.pwrite(b"goes through", 4 << 12)
    with pytest.raises(pyfleece.LostError) as caught:
        snapshot.pread(1, 4 << 12)
    assert (caught.value.offset, caught.value.length) == (4 << 12, 1 << 12)
    assert snapshot.lost == [pyfleece.Extent(4 << 12, 1 << 12, "lost")]
    assert snapshot.pread(4 << 12, 0) == state[: 4 << 12]
    assert snapshot.broken is None


def test_the_wait_for_room_is_as_long_as_was_asked(disk, full):
    full("break-guest-write", timeout=0.3)
    begun = time.monotonic()
    with pytest.raises(OSError):
        disk.pwrite(b"refused", 4 << 12)
    assert 0.25 < time.monotonic() - begun < 1.0


def test_a_source_that_cannot_be_read_breaks_the_snapshot_only(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as source:
        disk = pyfleece.Disk(source)
        with disk.snapshot(cluster_size=4096) as snapshot:
            source.fail("read", offset=8192, length=4096)
            disk.pwrite(b"x", 8192)
            assert disk.pread(1, 8192) == b"x"
            with pytest.raises(pyfleece.SnapshotBrokenError) as caught:
                snapshot.pread(1, 0)
            assert (caught.value.side, caught.value.cause, caught.value.offset) == ("source", errno.EIO, 8192)


# ---- dirty bitmaps ----


def test_bitmaps(disk):
    assert len(disk.bitmaps) == 0
    bitmap = disk.bitmaps.add("daily", granularity=65536)
    assert (bitmap.name, bitmap.granularity, bitmap.count) == ("daily", 65536, 0)
    disk.pwrite(b"x", 65535)
    disk.pwrite(b"x", disk.size - 1)
    disk.bitmaps.add("other")
    assert sorted(disk.bitmaps) == ["daily", "other"]
    assert disk.bitmaps["daily"].count == 65536 + 513
    assert disk.bitmaps["other"].count == 0
    assert [(e.offset, e.length, e.kind) for e in disk.bitmaps["daily"].extents()] == [
        (0, 65536, "dirty"),
        (65536, MIB - 65536, "clean"),
        (MIB, 513, "dirty"),
    ]
    assert "weekly" not in disk.bitmaps
    with pytest.raises(KeyError):
        disk.bitmaps["weekly"]
    with pytest.raises(FileExistsError):
        disk.bitmaps.add("daily")
    with pytest.raises(FileNotFoundError):
        disk.bitmaps.remove("weekly")
    for name in ("", "a\0b", "x" * 300):
        with pytest.raises(ValueError, match="name"):
            disk.bitmaps.add(name)
    disk.bitmaps.remove("daily")
    assert list(disk.bitmaps) == ["other"]
    with pytest.raises(FileNotFoundError):
        bitmap.count  # noqa: B018


def test_incremental(disk):
    disk.bitmaps.add("daily")
    disk.pwrite(b"changed", 200_000)
    state = all_of(disk)
    with disk.snapshot(bitmap="daily") as snapshot:
        assert disk.bitmaps["daily"].count == 0
        disk.pwrite(b"later", 200_000)
        assert snapshot.pread(65536, 196_608) == state[196_608:262_144]
        with pytest.raises(pyfleece.OutsideBitmapError):
            snapshot.pread(1, 0)
        assert [extent.kind for extent in snapshot.extents()].count("outside") == 2
    assert disk.bitmaps["daily"].count == 65536  # merged back: nobody said that the backup was good
    with disk.snapshot(bitmap="daily") as snapshot:
        snapshot.commit()
    assert disk.bitmaps["daily"].count == 0
    with pytest.raises(FileNotFoundError):
        disk.snapshot(bitmap="weekly")


def test_a_whole_incremental_can_be_read_everywhere(disk):
    disk.bitmaps.add("daily")
    inside = slice(196_608, 262_144)
    disk.pwrite(b"changed!" * 8192, inside.start)
    state = all_of(disk)
    with disk.snapshot(bitmap="daily", whole=True) as snapshot:
        for offset in range(0, disk.size - 4096, 16384):
            disk.pwrite(b"later" * 100, offset)
        assert snapshot.pread(disk.size, 0) == state == snapshot.open().readall()
        kinds = [(extent.offset, extent.length) for extent in snapshot.extents() if extent.kind != "outside"]
        assert kinds == [(inside.start, inside.stop - inside.start)]
        assert {extent.kind for extent in snapshot.extents(readable=True)} <= {"data", "zero"}
        with snapshot.chunks(granularity=1 << 20) as chunks:            # hands out the incremental, and discards that
            for chunk in chunks:
                assert (chunk.offset, chunk.length) == kinds[0] and bytes(chunk.buffer) == state[inside]
                chunk.ack()
        with pytest.raises(pyfleece.DiscardedError):
            snapshot.pread(1, inside.start)
        assert snapshot.pread(inside.start, 0) == state[: inside.start]
        assert snapshot.pread(disk.size - inside.stop, inside.stop) == state[inside.stop :]
        snapshot.commit()
    with disk.snapshot(whole=True) as snapshot:                         # a full one is whole in any case
        assert snapshot.pread(disk.size, 0) == all_of(disk)


# ---- groups ----


@pytest.fixture
def disks(make_image):
    with (
        pyfleece.open(make_image(name="a.raw", seed=1)[0], "r+") as a,
        pyfleece.open(make_image(name="b.raw", seed=2)[0], "r+") as b,
    ):
        yield [pyfleece.Disk(a), pyfleece.Disk(b)]


def test_a_group_is_cut_at_one_instant(disks):
    """A writer counts on one disk and then on the other: at any instant the second one is equal, or one behind."""
    a, b = disks
    for disk in disks:
        disk.pwrite(bytes(8), 0)
    stop = threading.Event()

    def count():
        number = 0
        while not stop.is_set():
            number += 1
            a.pwrite(number.to_bytes(8, "big"), 0)
            b.pwrite(number.to_bytes(8, "big"), 0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(30):
            with pyfleece.snapshot_group(disks) as (snapshot_a, snapshot_b):
                first = int.from_bytes(snapshot_a.pread(8, 0), "big")
                second = int.from_bytes(snapshot_b.pread(8, 0), "big")
                assert first - second in (0, 1)
    finally:
        stop.set()
        thread.join()


def test_a_group_keeps_all_writers_out_while_it_waits_for_one(make_image):
    """The write that it waits for is of the first disk, whose gate is closed first; those of the second must not go on
    meanwhile: on a busy machine they would take the processors from it.
    """
    with (
        pyfleece.open(make_image(name="a.raw", seed=1)[0], "r+") as inner,
        FaultyImage(inner) as a,
        pyfleece.open(make_image(name="b.raw", seed=2)[0], "r+") as b,
        pyfleece.Disk(a) as first,
        pyfleece.Disk(b) as second,
        ThreadPoolExecutor(3) as pool,
    ):
        written, stop = [0], threading.Event()

        def write():
            while not stop.is_set():
                second.pwrite(b"busy", 0)
                written[0] += 1

        def is_still():
            before = written[0]
            time.sleep(0.2)
            return written[0] == before > 0

        a.hang("write")
        try:
            hanging = pool.submit(first.pwrite, b"slow", 0)
            wait_for(lambda: a.hanging == 1)
            pool.submit(write)
            cut = pool.submit(pyfleece.snapshot_group, [first, second])
            wait_for(is_still)
            assert not cut.done() and not hanging.done()
        finally:
            stop.set()
            a.clear()
        with cut.result(timeout=30) as (snapshot, _):
            assert snapshot.pread(4, 0) == b"slow"


def test_a_group_is_a_sequence_that_closes_all(disks):
    group = pyfleece.snapshot_group(disks)
    assert len(group) == 2
    assert [snapshot.disk for snapshot in group] == disks
    assert group[:1] == (group[0],)
    assert group.freeze_report.ok
    group.close()
    assert all(snapshot.closed for snapshot in group)
    group.close()


def test_options_of_a_group_per_disk(disks, tmp_path):
    a, b = disks
    for name in ("one.raw", "two.raw"):
        pyfleece.create(tmp_path / name, MIB).close()
    a.bitmaps.add("daily")
    with pyfleece.snapshot_group(disks, [tmp_path / "one.raw", "memory"], bitmap={a: "daily"}) as group:
        assert group[0].fleecing.path == tmp_path / "one.raw"
        assert group[1].fleecing is None
        with pytest.raises(pyfleece.OutsideBitmapError):
            group[0].pread(1, 0)
        group[1].pread(1, 0)
    with pyfleece.snapshot_group(disks, {b: tmp_path / "two.raw"}) as group:
        assert group[0].fleecing.path is None
        assert group[1].fleecing.path == tmp_path / "two.raw"
    directory = tmp_path / "scratch"
    directory.mkdir()
    with pyfleece.snapshot_group(disks, directory) as group:
        assert all(str(directory) in snapshot.fleecing.name for snapshot in group)


def test_groups_that_make_no_sense(disks, tmp_path):
    with pyfleece.create(tmp_path / "one.raw", MIB) as one:
        for arguments in (
            ([],),
            ([disks[0], disks[0]],),
            (disks, one),
            (disks, ["memory"]),
            (disks, tmp_path / "one.raw"),
            (disks[:1], {disks[1]: "memory"}),
        ):
            with pytest.raises(ValueError):
                pyfleece.snapshot_group(*arguments)


def test_one_failure_and_nothing_is_cut(disks, tmp_path):
    with pytest.raises(FileNotFoundError):
        pyfleece.snapshot_group(disks, [None, tmp_path / "missing.raw"])
    disks[0].pwrite(b"x", 0)


def test_freeze_and_thaw_run_around_the_cut(disks):
    calls = []
    with pyfleece.snapshot_group(
        disks,
        freeze=lambda: (calls.append("freeze"), disks[0].pwrite(b"frozen", 0)),
        thaw=lambda: (calls.append("thaw"), disks[0].pwrite(b"thawed", 0)),
    ) as group:
        assert calls == ["freeze", "thaw"]
        assert group[0].pread(6, 0) == b"frozen"
        assert (group.freeze_report.freeze, group.freeze_report.thaw) == ("ok", "ok")


def test_commands_as_hooks(disks, tmp_path):
    log = tmp_path / "log"
    with pyfleece.snapshot_group(
        disks, freeze=["sh", "-c", f"echo freeze >>{log}"], thaw=["sh", "-c", f"echo thaw >>{log}"]
    ) as group:
        assert group.freeze_report.ok
    assert log.read_text().split() == ["freeze", "thaw"]


@pytest.mark.parametrize(
    "freeze, told",
    [
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
        (["sh", "-c", "echo no such guest; exit 3"], "exit status 3: no such guest"),
        (["/nonexistent/command"], "failed"),
        (["sleep", "30"], "timed out"),
        (lambda: time.sleep(1), "timed out"),
    ],
)
def test_freezing_fails(disks, freeze, told):
    thawed = []
    begun = time.monotonic()
    with pytest.raises(pyfleece.FreezeError, match=told) as caught:
        pyfleece.snapshot_group(disks, freeze=freeze, thaw=lambda: thawed.append(True), freeze_timeout=0.2)
    assert time.monotonic() - begun < 0.9
    assert thawed
    assert told in caught.value.report.freeze
    assert caught.value.report.thaw == "ok"


def test_a_freeze_that_ends_too_late_is_thawed_again(disks):
    calls = []

    def freeze():
        time.sleep(0.4)
        calls.append("freeze")

    with pytest.raises(pyfleece.FreezeError):
        pyfleece.snapshot_group(disks, freeze=freeze, thaw=lambda: calls.append("thaw"), freeze_timeout=0.1)
    assert calls == ["thaw"]
    time.sleep(0.6)
    assert calls == ["thaw", "freeze", "thaw"]


def test_thaw_is_called_when_the_cut_fails(disks, tmp_path):
    calls = []
    with pytest.raises(FileNotFoundError):
        pyfleece.snapshot_group(
            disks,
            [None, tmp_path / "missing.raw"],
            freeze=lambda: calls.append("freeze"),
            thaw=lambda: calls.append("thaw"),
        )
    assert calls == ["freeze", "thaw"]


def test_a_thaw_that_fails_is_told_and_the_cut_is_kept(disks):
    with pytest.warns(RuntimeWarning, match="thawing"):
        group = pyfleece.snapshot_group(disks, freeze=lambda: None, thaw=["false"])
    with group:
        assert group.freeze_report.thaw == "failed: exit status 1"
        assert not group.freeze_report.ok
        group[0].pread(1, 0)


def test_a_loop_device_as_source(loop_device):
    device = loop_device(2 * MIB)
    run("blockdev", "--getsize64", device)
    with pyfleece.open(device, "r+") as source:
        disk = pyfleece.Disk(source)
        with disk.snapshot() as snapshot:
            assert "/var/tmp" in snapshot.fleecing.name
            fill_up(disk, snapshot)

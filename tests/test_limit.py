"""fleecing_limit: what the policies do where it is far too small, how a backup succeeds all the same, and that in the
end nothing is kept.

A backup copies first what fills the stage: straight from memory, before it would have to be spilled. So a guest may
overwrite the whole disk while it is backed up with a few per cent of it to keep old data in; it waits for the backup
now and then.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, wait_for
from fault_kit import CLUSTER, POLICIES, STEP, Guest, Running, expect_empty, make_guest, nothing_left, timed, unreadable

import pyfleece


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with make_guest(tmp_path) as guest:
        yield guest


# ---- too small a limit ----


@pytest.mark.parametrize("policy", POLICIES)
def test_a_limit_far_below_what_the_guest_overwrites(guest: Guest, policy: str, tmp_path: Path) -> None:
    limit, stage, state = MIB, MIB // 4, guest.now
    with nothing_left(), guest.disk.snapshot(
        cluster_size=CLUSTER, stage_size=stage, fleecing_limit=limit, on_cbw_error=policy, cbw_timeout=0.2
    ) as snapshot:
        refused = []
        for offset in range(0, guest.size, STEP):
            _, error = timed(guest.write, offset)
            if error is not None:
                refused.append((offset, error))
        guest.check()
        stats = snapshot.stats
        assert stats.fleecing_peak == limit
        assert stats.staged_peak <= stage
        assert stats.room_timeouts == 1                 # nobody waits again where nothing has changed
        if policy == "break-snapshot":
            assert snapshot.broken is not None
            assert (snapshot.broken.side, snapshot.broken.cause) == ("fleecing", errno.ENOSPC)
            assert f"{limit} bytes" in str(snapshot.broken)
        if policy == "break-guest-write":
            assert [offset for offset, _ in refused] == list(range(limit + stage, guest.size, STEP))
            for _, error in refused:
                assert isinstance(error, pyfleece.ImageError)
                assert (error.side, error.errno) == ("fleecing", errno.ENOSPC)
            assert unreadable(snapshot, state) == []
        else:
            assert refused == []
        if policy == "lose-range":
            lost = unreadable(snapshot, state, pyfleece.LostError)
            assert lost == list(range(limit + stage, guest.size, CLUSTER))
            result = pyfleece.backup(snapshot, tmp_path / "backup.raw")
            assert result.lost == [pyfleece.Extent(limit + stage, guest.size - limit - stage, "lost")]
            assert (tmp_path / "backup.raw").read_bytes()[: limit + stage] == state[: limit + stage]


def test_a_refused_guest_write(guest: Guest) -> None:
    """What needs room for one piece is refused whole; of a longer one, whose first pieces had room, these went through.
    Either way the snapshot lives, and nothing else changed.
    """
    with guest.disk.snapshot(
        "memory", cluster_size=CLUSTER, stage_size=MIB // 4, on_cbw_error="break-guest-write", cbw_timeout=0.1
    ) as snapshot:
        state = guest.now
        new = os.urandom(MIB)
        with pytest.raises(pyfleece.ImageError):
            guest.disk.pwrite(new, 0)
        found = guest.disk.pread(guest.size, 0)
        written = next(at for at in range(0, MIB, CLUSTER) if found[at : at + CLUSTER] != new[at : at + CLUSTER])
        assert written == MIB // 4                  # as much as the stage holds
        assert found[written:] == state[written:]
        with pytest.raises(pyfleece.ImageError):
            guest.disk.pwrite(new[:CLUSTER], MIB)
        assert guest.disk.pread(guest.size, 0) == found
        assert unreadable(snapshot, state) == []


def test_room_that_is_freed_is_used_again(guest: Guest) -> None:
    """The limit is for what is kept at a time, not for what was ever kept."""
    limit, stage, state = MIB, MIB // 4, guest.now
    with guest.disk.snapshot(
        cluster_size=CLUSTER, stage_size=stage, fleecing_limit=limit, on_cbw_error="break-guest-write", cbw_timeout=30.0
    ) as snapshot:
        for start in range(0, guest.size, MIB):
            guest.overwrite(start, start + MIB)
            assert snapshot.pread(MIB, start) == state[start : start + MIB]
            snapshot.discard(MIB, start)
        expect_empty(snapshot)
        stats = snapshot.stats
        assert stats.fleecing_peak <= limit
        assert stats.clusters_saved == guest.size // CLUSTER
    guest.check()


def test_a_limit_that_makes_no_sense(guest: Guest) -> None:
    for limit in (0, CLUSTER - 1, -1):
        with pytest.raises(pyfleece.Error):
            guest.disk.snapshot(fleecing_limit=limit, cluster_size=CLUSTER)


# ---- and success all the same ----


def overwrite_all(guest: Guest, order: str) -> None:
    offsets = list(range(0, guest.size, STEP if order != "small, anywhere" else CLUSTER))
    length = offsets[1]
    if order != "from the front":
        offsets.reverse()
    if order.endswith("anywhere"):
        random.Random(1).shuffle(offsets)
    for offset in offsets:
        guest.write(offset, length)


@pytest.mark.parametrize(
    ("target", "order"),
    [
        ("file", "from the front"),
        ("file", "from the end"),
        ("file", "anywhere"),
        ("file", "small, anywhere"),
        ("image", "anywhere"),
        ("image with old data", "small, anywhere"),
    ],
)
def test_a_guest_that_overwrites_the_whole_disk(tmp_path: Path, target: str, order: str) -> None:
    """With 2 % of the disk as the limit, and another 2 % as the stage, and a backup that is slower than the guest."""
    with make_guest(tmp_path) as guest, nothing_left():
        limit = stage = guest.size // 50 // CLUSTER * CLUSTER
        state, path = guest.now, tmp_path / "backup.raw"
        image = None if target == "file" else pyfleece.create(path, guest.size)
        if image is not None and target == "image with old data":
            image.pwrite(b"\xee" * guest.size, 0)
        with guest.disk.snapshot(
            cluster_size=CLUSTER,
            stage_size=stage,
            fleecing_limit=limit,
            on_cbw_error="break-guest-write",
            cbw_timeout=60.0,
        ) as snapshot:
            with pyfleece.Backup(snapshot, image or path, granularity=STEP, speed=16 * MIB) as job:
                writing = Running(overwrite_all, guest, order)
                result = job.wait(60)
                writing.join(60)
            stats = snapshot.stats
            print(
                f"{order}, to {target}: {stats.clusters_saved * CLUSTER / guest.size:.0%} of the disk saved, "
                f"limit {limit}, peak {stats.fleecing_peak} in the fleecing image and {stats.staged_peak} in memory, "
                f"{stats.bytes_spilled} spilled in all, {stats.room_waits} waits, the guest held up for "
                f"{stats.latency.max * 1e3:.0f} ms at most"
            )
            assert stats.fleecing_peak == result.fleecing_peak <= limit
            assert stats.staged_peak <= stage
            assert stats.room_timeouts == 0
            expect_empty(snapshot)
            assert stats.clusters_saved * CLUSTER > limit + stage           # it would not have fitted
        guest.check()
        if image is not None:
            image.close()
        assert path.read_bytes() == state


def test_a_guest_that_overwrites_the_whole_disk_under_agents(tmp_path: Path) -> None:
    """Chunks come in order, so a guest that writes at the end of the disk waits until they get there: it takes
    longer, and succeeds.
    """
    with make_guest(tmp_path) as guest:
        limit = stage = guest.size // 50 // CLUSTER * CLUSTER
        state, copy = guest.now, bytearray(guest.size)
        with guest.disk.snapshot(
            cluster_size=CLUSTER,
            stage_size=stage,
            fleecing_limit=limit,
            on_cbw_error="break-guest-write",
            cbw_timeout=60.0,
        ) as snapshot:
            writing = Running(overwrite_all, guest, "anywhere")
            wait_for(lambda: snapshot.stats.room_waits)
            with snapshot.chunks(granularity=STEP) as chunks:
                for chunk in chunks:
                    if chunk.buffer is not None:
                        copy[chunk.offset : chunk.offset + chunk.length] = chunk.buffer
                    chunk.ack()
            writing.join(60)
            assert snapshot.stats.fleecing_peak <= limit
            expect_empty(snapshot)
        assert copy == state
        guest.check()


# ---- empty in the end ----

COMBINATIONS = [
    (cluster, granularity)
    for cluster in (4096, 16 << 10, 64 << 10, MIB)
    for granularity in (cluster, 3 * cluster, 64 << 10, 1_000 * 4096, None)
    if granularity is None or granularity % cluster == 0
]


def empty_in_the_end(guest: Guest, fleecing: pyfleece.Image, directory: Path) -> None:
    """All combinations of cluster and granularity, one after the other, with one fleecing image."""
    for number, (cluster, granularity) in enumerate(dict.fromkeys(COMBINATIONS)):
        state, path = guest.now, directory / "backup.raw"
        with guest.disk.snapshot(
            fleecing, cluster_size=cluster, stage_size=4 * cluster, on_cbw_error="break-guest-write", cbw_timeout=30.0
        ) as snapshot:
            for offset in range(number * 1111, guest.size - 5000, 150_000):
                guest.write(offset, 5000)
            assert snapshot.stats.fleecing_bytes > 0, (cluster, granularity)
            with pyfleece.Backup(snapshot, path, granularity=granularity) as job:
                for offset in range(0, guest.size, 200_000):
                    guest.write(offset, 100)
                job.wait(60)
            expect_empty(snapshot)
            if not fleecing.info.block_device:
                wait_for(lambda: fleecing.info.allocated == 0)          # and what it occupied is given back
        assert path.read_bytes() == state, (cluster, granularity)
    guest.check()


ODD = 5 * MIB + 513


def test_empty_in_the_end(tmp_path: Path) -> None:
    with make_guest(tmp_path, ODD) as guest, pyfleece.create(tmp_path / "scratch.raw", 16 * MIB) as fleecing:
        empty_in_the_end(guest, fleecing, tmp_path)


def test_empty_in_the_end_past_the_page_cache(tmp_path: Path) -> None:
    with make_guest(tmp_path, ODD) as guest:
        try:
            fleecing = pyfleece.create(tmp_path / "scratch.raw", 16 * MIB, direct=True)
        except pyfleece.ImageError:
            missing("a file system with O_DIRECT")
        with fleecing:
            empty_in_the_end(guest, fleecing, tmp_path)


@pytest.mark.parametrize("block", [1024, 4096])
def test_empty_in_the_end_on_file_systems(tmp_path: Path, loop_device: Callable[..., str], block: int) -> None:
    require("mkfs.ext4", "mount")
    device, directory = loop_device(32 * MIB), tmp_path / "small"
    run("mkfs.ext4", "-q", "-b", str(block), device)
    directory.mkdir()
    if "mount:" in run("mount", device, directory, check=False):
        missing("permission to mount")
    try:
        with make_guest(tmp_path, ODD) as guest, pyfleece.create(directory / "scratch.raw", 16 * MIB) as fleecing:
            assert fleecing.cluster_size == block
            empty_in_the_end(guest, fleecing, tmp_path)
    finally:
        wait_for(lambda: run("umount", directory, check=False) == "", 10)


@pytest.mark.parametrize("sector", [512, 4096])
def test_empty_in_the_end_on_devices(tmp_path: Path, loop_device: Callable[..., str], sector: int) -> None:
    device = loop_device(16 * MIB, "--sector-size", str(sector))
    with make_guest(tmp_path, ODD) as guest, pyfleece.open(device, "r+", direct=True) as fleecing:
        assert fleecing.cluster_size == sector
        empty_in_the_end(guest, fleecing, tmp_path)

"""Backups through the control socket while guests write: what they copy, what they tell, how they fail."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, wait_for
from fuse_kit import fuse_mount, why_not
from serve_kit import BLOCK, SIZE, Client, Guest, disk, served_disk, server

import pyfleece
from pyfleece.chain import Repository
from pyfleece.qmp_disks import uses_fleecing
from pyfleece.serve import Server

__all__ = ["disk", "server"]        # fixtures

# Slow enough that a backup still runs when a test looks at it; a test that waits for its end lifts it.
SLOW = 256 << 10


@pytest.fixture
def client(server, tmp_path):
    with Client(tmp_path / "control") as client:
        yield client


def contents(disk: pyfleece.Disk) -> bytes:
    return disk.pread(disk.size, 0)


def names(events: list[dict]) -> list[str]:
    return [event["data"].get("status", event["event"]) for event in events]


# ---- backups ----


def test_backup_is_the_state_at_the_cut_while_a_guest_writes(client, disk, tmp_path):
    """The guest writes numbered blocks in a fixed order, so the backup has a prefix of them and nothing later."""
    order = [(7919 * i % (SIZE // BLOCK)) * BLOCK for i in range(SIZE // BLOCK)]
    written = 0
    stop = threading.Event()

    def write() -> None:
        nonlocal written
        for number, offset in enumerate(order):
            if stop.is_set():
                return
            disk.pwrite(number.to_bytes(8, "little") * (BLOCK // 8), offset)
            written = number + 1

    before = contents(disk)
    guest = threading.Thread(target=write)
    guest.start()
    wait_for(lambda: written > 100)
    first = written
    target = str(tmp_path / "b.raw")
    uuid = client.execute("backup", devlist="vm", target=target, speed=8 * MIB, max_workers=2)["UUID"]
    last = written
    assert client.end_of(uuid)["status"] == "done"
    stop.set()
    guest.join()
    backup = (tmp_path / "b.raw").read_bytes()
    numbers = [number.to_bytes(8, "little") * (BLOCK // 8) for number in range(len(order))]
    cut = sum(backup[offset : offset + BLOCK] == numbers[i] for i, offset in enumerate(order))
    expected = bytearray(before)
    for number, offset in enumerate(order[:cut]):
        expected[offset : offset + BLOCK] = numbers[number]
    assert first <= cut <= last + 1 and backup == bytes(expected)
    assert written > cut


def test_backup_to_qcow2(client, disk, tmp_path):
    require("qemu-img")
    (tmp_path / "out").mkdir()
    uuid = client.execute("backup", backup_dir=str(tmp_path / "out"), format="qcow2", compress=True)["UUID"]
    assert client.end_of(uuid)["status"] == "done"
    run("qemu-img", "check", tmp_path / "out" / "vm.qcow2")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "out" / "vm.qcow2", tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == contents(disk)
    assert "compress" in client.refusal("backup", target=str(tmp_path / "c.raw"), compress=True)[1]


def test_events_of_a_backup_in_their_order(client, tmp_path):
    uuid = client.execute("backup", target=str(tmp_path / "b.raw"))["UUID"]
    client.end_of(uuid)
    client.execute("query-version")
    states = [e["data"]["status"] for e in client.events if e["event"] == "JOB_STATUS_CHANGE"]
    assert states == ["created", "running", "waiting", "pending", "concluded", "null"]
    order = [e["event"] for e in client.events]
    assert order[-4:] == ["BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE", "BACKUP_STATUS_CHANGE"]
    end = client.event("BLOCK_JOB_COMPLETED")["data"]
    assert end == {"type": "backup", "device": "vm", "len": SIZE, "offset": SIZE, "speed": 0}
    assert client.events[-1]["data"] == {"uuid": uuid, "status": "done"}
    stamps = [(e["timestamp"]["seconds"], e["timestamp"]["microseconds"]) for e in client.events]
    assert stamps == sorted(stamps)


def test_query_backup_tells_how_far_it_is(client, tmp_path):
    assert client.execute("query-backup") == {}
    uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
    status = client.execute("query-backup")
    assert (status["uuid"], status["status"], status["total"]) == (uuid, "active", SIZE)
    assert status["transferred"] < SIZE and status["backup-file"] == str(tmp_path / "b.raw")
    assert abs(status["start-time"] - time.time()) < 60 and "end-time" not in status
    client.execute("block-job-set-speed", device="vm", speed=0)
    status = client.end_of(uuid)
    assert (status["status"], status["transferred"]) == ("done", SIZE) and status["end-time"] >= status["start-time"]
    assert status["zero-bytes"] == SIZE // 2 and status["lost-bytes"] == 0
    assert [(d["device"], d["target"]) for d in status["devices"]] == [("vm", str(tmp_path / "b.raw"))]
    assert client.execute("query-backup") == status == client.execute("query-backup", uuid=uuid)
    assert "no backup 1234" in client.refusal("query-backup", uuid="1234")[1]


def test_cancelled_backup_leaves_nothing(client, disk, tmp_path):
    with Guest(disk.pwrite, SIZE) as guest:
        uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
        assert (tmp_path / "b.raw.partial").exists()
        client.execute("backup-cancel")
        status = client.end_of(uuid)
        assert (status["status"], status["errmsg"]) == ("error", "backup cancelled")
        order = [name for name in names(client.events) if name != "active"]
        assert order == ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null", "error"]
        assert not list(tmp_path.glob("b.raw*"))
        assert client.execute("query-block-jobs") == []
        assert client.execute("backup-cancel") == {}
        guest.goes_on()
    # The disk is free for the next one.
    uuid = client.execute("backup", target=str(tmp_path / "b.raw"))["UUID"]
    assert client.end_of(uuid)["status"] == "done" and (tmp_path / "b.raw").read_bytes() == contents(disk)


def test_block_jobs_are_listed_slowed_down_and_cancelled(client, tmp_path):
    client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)
    (job,) = client.execute("query-block-jobs")
    assert (job["type"], job["device"], job["len"], job["speed"]) == ("backup", "vm", SIZE, SLOW)
    assert (job["status"], job["paused"], job["ready"], job["io-status"]) == ("running", False, False, "ok")
    client.execute("block-job-set-speed", device="vm", speed=2 * SLOW)
    assert client.execute("query-block-jobs")[0]["speed"] == 2 * SLOW
    assert "0 (no limit) or more" in client.refusal("block-job-set-speed", device="vm", speed=-1)[1]
    client.execute("block-job-cancel", device="vm", force=True)
    client.event("BLOCK_JOB_CANCELLED", device="vm")
    for command in ("block-job-cancel", "block-job-set-speed"):
        arguments = {"speed": 1} if "speed" in command else {}
        client.event("JOB_STATUS_CHANGE", id="vm", status="null")
        assert client.refusal(command, device="vm", **arguments) == ("DeviceNotActive", "Block job 'vm' not found")


def test_speed_is_kept(client, disk, tmp_path):
    begun = time.monotonic()
    uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=4 * MIB)["UUID"]
    assert client.end_of(uuid)["status"] == "done"
    assert time.monotonic() - begun > 0.6 * (SIZE // 2) / (4 * MIB)


def test_several_disks_at_one_instant(tmp_path):
    """A guest writes each number to one disk, then to the other: no cut has the second write without the first."""
    (tmp_path / "out").mkdir()
    with served_disk(tmp_path / "a.raw", 4 * MIB) as a, served_disk(tmp_path / "b.raw", 4 * MIB) as b:
        stop, number = threading.Event(), 0

        def write() -> None:
            nonlocal number
            while not stop.is_set():
                number += 1
                for disk in (a, b):
                    disk.pwrite(number.to_bytes(8, "little"), 0)

        guest = threading.Thread(target=write)
        guest.start()
        try:
            with (
                Server({"a": a, "b": b}, control=tmp_path / "control", log=lambda _: None),
                Client(tmp_path / "control") as client,
            ):
                for turn in range(5):
                    devices = ["a", "b"] if turn % 2 else "b;a"
                    uuid = client.execute("backup", devlist=devices, backup_dir=str(tmp_path / "out"))["UUID"]
                    assert client.end_of(uuid)["status"] == "done"
                    at = [int.from_bytes((tmp_path / f"out/{n}.raw").read_bytes()[:8], "little") for n in "ab"]
                    assert at[0] - at[1] in (0, 1), at
                    os.unlink(tmp_path / "out" / "a.raw")
        finally:
            stop.set()
            guest.join()


def test_one_failing_target_fails_the_backup_of_all(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        served_disk(tmp_path / "a.raw", 4 * MIB) as a,
        served_disk(tmp_path / "b.raw", 4 * MIB) as b,
        Server({"a": a, "b": b}, control=tmp_path / "control", log=lambda _: None),
        Client(tmp_path / "control") as client,
        Guest(a.pwrite, a.size) as guest,
    ):
        uuid = client.execute("backup", backup_dir=str(tmp_path / "out"), speed=SLOW)["UUID"]
        # Somebody removes the file that b's backup is in: it cannot get its name any more.
        os.unlink(tmp_path / "out" / "b.raw.partial")
        for name in "ab":
            client.execute("block-job-set-speed", device=name, speed=0)
        status = client.end_of(uuid)
        assert status["status"] == "error" and "b.raw" in status["errmsg"]
        assert os.listdir(tmp_path / "out") == []
        guest.goes_on()


def test_broken_snapshot_is_told_and_fails_the_backup(client, server, disk, tmp_path):
    with Guest(disk.pwrite, SIZE) as guest:
        server._jobs._options.update(stage_size=64 << 10, cbw_timeout=0.01, on_cbw_error="break-snapshot")
        server._disks._default = "memory"
        uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
        status = client.end_of(uuid)
        assert status["status"] == "error" and "fleecing" in status["errmsg"]
        broken = client.event("SNAPSHOT_BROKEN")["data"]
        assert (broken["device"], broken["snapshot"], broken["side"]) == ("vm", uuid, "fleecing")
        assert broken["length"] > 0 and broken["errmsg"]
        order = names(client.events)
        assert order.index("SNAPSHOT_BROKEN") < order.index("BLOCK_JOB_COMPLETED")
        assert order.count("SNAPSHOT_BROKEN") == 1
        end = client.event("BLOCK_JOB_COMPLETED")["data"]
        assert end["device"] == "vm" and "fleecing" in end["error"]
        assert not list(tmp_path.glob("b.raw*"))
        guest.goes_on()


def test_lost_ranges_are_counted(client, server, disk, tmp_path):
    server._jobs._options.update(stage_size=64 << 10, cbw_timeout=0.01, on_cbw_error="lose-range")
    server._disks._default = "memory"
    with Guest(disk.pwrite, SIZE):
        uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
        wait_for(lambda: server._jobs.snapshots[0][2].stats.clusters_lost, 30)
        client.execute("block-job-set-speed", device="vm", speed=0)
        status = client.end_of(uuid)
    assert status["status"] == "done" and status["lost-bytes"] > 0


@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_a_target_that_hangs_holds_up_its_backup_only(client, disk, tmp_path, mode):
    reason = why_not()
    if reason:
        missing(reason)
    with fuse_mount(tmp_path / "fuse") as storage:
        target = storage.directory / "b.raw"
        if mode == "existing":
            target.write_bytes(bytes(SIZE))
        with Guest(disk.pwrite, SIZE) as guest, Client(tmp_path / "control") as other:
            uuid = client.execute("backup", target=str(target), mode=mode, speed=2 * MIB)["UUID"]
            wait_for(lambda: client.execute("query-backup")["transferred"])
            storage.stop()
            guest.goes_on()
            assert other.execute("query-named-block-nodes")
            client.execute("backup-cancel", uuid=uuid)
            assert client.end_of(uuid)["errmsg"] == "backup cancelled"
            # The next one goes elsewhere, while the first still hangs.
            uuid = other.execute("backup", target=str(tmp_path / "b.raw"))["UUID"]
            assert other.end_of(uuid)["status"] == "done"
            guest.goes_on()
        storage.go_on()
        if mode != "existing":
            wait_for(lambda: os.listdir(storage.directory) == [], 20)


# ---- incrementals ----


def test_bitmap_commands(client, disk):
    client.execute("block-dirty-bitmap-add", node="vm", name="daily", granularity=65536)
    disk.pwrite(b"x", 5 * 65536)
    (node,) = client.execute("query-named-block-nodes")
    (bitmap,) = node["dirty-bitmaps"]
    assert (bitmap["name"], bitmap["granularity"], bitmap["count"]) == ("daily", 65536, 65536)
    assert client.refusal("block-dirty-bitmap-add", node="vm", name="daily")[1] == "Bitmap already exists: daily"
    assert "granularity" in client.refusal("block-dirty-bitmap-add", node="vm", name="x", granularity=5000)[1]
    assert client.refusal("block-dirty-bitmap-add", node="no", name="x")[0] == "DeviceNotFound"
    assert bitmap["recording"] and not bitmap["busy"] and not bitmap["persistent"] and not bitmap["inconsistent"]
    assert "1 to 255 bytes" in client.refusal("block-dirty-bitmap-add", node="vm", name="")[1]
    client.execute("block-dirty-bitmap-remove", node="vm", name="daily")
    error = client.refusal("block-dirty-bitmap-remove", node="vm", name="daily")
    assert error == ("GenericError", "Dirty bitmap 'daily' not found on device 'vm'")
    assert client.execute("query-named-block-nodes")[0]["dirty-bitmaps"] == []


def test_bitmaps_are_cleared_disabled_and_merged(client, disk):
    def count(name: str) -> int:
        (node,) = client.execute("query-named-block-nodes")
        return {bitmap["name"]: bitmap["count"] for bitmap in node["dirty-bitmaps"]}[name]

    unit = 65536
    client.execute("block-dirty-bitmap-add", node="vm", name="a")
    client.execute("block-dirty-bitmap-add", node="vm", name="b", disabled=True)
    client.execute("block-dirty-bitmap-add", node="vm", name="c", granularity=4096)
    disk.pwrite(b"x", 0)
    assert (count("a"), count("b"), count("c")) == (unit, 0, 4096)
    client.execute("block-dirty-bitmap-enable", node="vm", name="b")
    client.execute("block-dirty-bitmap-disable", node="vm", name="a")
    disk.pwrite(b"x", 3 * unit)
    assert (count("a"), count("b"), count("c")) == (unit, unit, 2 * 4096)
    client.execute("block-dirty-bitmap-merge", node="vm", target="b", bitmaps=["a", "c"])
    assert count("b") == 2 * unit
    client.execute("block-dirty-bitmap-clear", node="vm", name="b")
    assert count("b") == 0
    for command in ("clear", "enable", "disable", "remove"):
        assert "'no' not found" in client.refusal(f"block-dirty-bitmap-{command}", node="vm", name="no")[1]
    for target, source in (("no", "a"), ("a", "no")):
        arguments = {"node": "vm", "target": target, "bitmaps": [source]}
        assert "Dirty bitmap 'no' not found" in client.refusal("block-dirty-bitmap-merge", **arguments)[1]


def test_incrementals_bring_a_copy_up_to_date(client, disk, tmp_path):
    copy = str(tmp_path / "copy.raw")
    client.execute("block-dirty-bitmap-add", node="vm", name="daily")
    assert client.end_of(client.execute("backup", target=copy)["UUID"])["status"] == "done"
    for turn in range(3):
        with Guest(disk.pwrite, SIZE, seed=turn) as guest:
            wait_for(lambda guest=guest: guest.writes > 20)
        expected = contents(disk)
        dirty = disk.bitmaps["daily"].count
        uuid = client.execute("backup", target=copy, bitmap="daily", mode="existing")["UUID"]
        status = client.end_of(uuid)
        assert status["status"] == "done", status
        assert status["total"] == (dirty if turn else status["total"])
        assert Path(copy).read_bytes() == expected
        assert disk.bitmaps["daily"].count == 0


def test_directories_of_backups(tmp_path):
    """Each backup of several disks adds a point to the directory of each, of one instant, while guests write."""
    out = tmp_path / "out"
    out.mkdir()
    with (
        served_disk(tmp_path / "a.raw", 4 * MIB) as a,
        served_disk(tmp_path / "b.raw", 4 * MIB) as b,
        Server({"a": a, "b": b}, control=tmp_path / "control", log=lambda _: None),
        Client(tmp_path / "control") as client,
    ):
        expected = []
        for turn in range(4):
            with Guest(a.pwrite, 2 * MIB, seed=turn) as one, Guest(b.pwrite, 2 * MIB, seed=turn + 9) as two:
                wait_for(lambda one=one, two=two: one.writes > 20 and two.writes > 20)
            expected.append((contents(a), contents(b)))
            uuid = client.execute("backup", backup_dir=str(out), incremental=True, compress=turn == 1)["UUID"]
            # What is written now is in the next one.
            for disk in (a, b):
                disk.pwrite(bytes([turn + 1]) * BLOCK, 3 * MIB + turn * BLOCK)
            status = client.end_of(uuid)
            assert status["status"] == "done", status
            assert [device["kind"] for device in status["devices"]] == ["incremental" if turn else "full"] * 2
            if turn == 2:
                # One that is cancelled, or fails, is no point, and forgets nothing.
                uuid = client.execute("backup", backup_dir=str(out), incremental=True, speed=64 << 10)["UUID"]
                client.execute("backup-cancel", uuid=uuid)
                assert client.end_of(uuid)["errmsg"] == "backup cancelled"
        for index, name in enumerate(("a", "b")):
            repository = Repository(out / name)
            assert [point.kind for point in repository.points] == ["full", *["incremental"] * 3]
            assert repository.verify() == []
            for point, disks in zip(repository.points, expected):
                with repository.open(point) as image:
                    assert image.pread(4 * MIB, 0) == disks[index], point.name
        assert len(a.bitmaps) == len(b.bitmaps) == 1
        client.execute("block-dirty-bitmap-remove", node="a", name=next(iter(a.bitmaps)))
        status = client.end_of(client.execute("backup", backup_dir=str(out), incremental=True)["UUID"])
        kinds = {device["device"]: device for device in status["devices"]}
        assert kinds["a"]["kind"] == "full" and "no dirty bitmap" in kinds["a"]["reason"]
        assert kinds["b"]["kind"] == "incremental"
        (tmp_path / "precious" / "a").mkdir(parents=True)
        (tmp_path / "precious" / "a" / "file").touch()
        desc = client.refusal("backup", backup_dir=str(tmp_path / "precious"), devlist="a", incremental=True)[1]
        assert "is no directory of backups" in desc
        desc = client.refusal("backup", target=str(tmp_path / "x.raw"), devlist="a", incremental=True)[1]
        assert desc == "'incremental' is with 'backup-dir', and without 'bitmap' and 'mode'"
        options = {"backup_dir": str(out), "incremental": True}
        assert "'keep' is with 'incremental'" in client.refusal("backup", **options, keep=0)[1]
        assert "'keep' is with 'incremental'" in client.refusal("backup", backup_dir=str(out), keep=2)[1]
        status = client.end_of(client.execute("backup", **options, keep=2)["UUID"])
        assert status["status"] == "done" and "prune-errmsg" not in status
        for name, disk in (("a", a), ("b", b)):
            repository = Repository(out / name)
            assert len(repository.points) == 2 and repository.verify() == []
            with repository.open() as image:
                assert image.pread(4 * MIB, 0) == contents(disk)
        assert client.execute("query-block-jobs") == []


def test_a_failed_incremental_forgets_nothing(client, disk, tmp_path):
    client.execute("block-dirty-bitmap-add", node="vm", name="daily")
    with Guest(disk.pwrite, SIZE) as guest:
        wait_for(lambda: guest.writes > 500)
    dirty = disk.bitmaps["daily"].count
    uuid = client.execute("backup", target=str(tmp_path / "i.raw"), bitmap="daily", speed=SLOW)["UUID"]
    disk.pwrite(b"after the cut", 0)
    assert "a snapshot uses" in client.refusal("block-dirty-bitmap-remove", node="vm", name="daily")[1]
    client.execute("backup-cancel", uuid=uuid)
    client.end_of(uuid)
    assert disk.bitmaps["daily"].count >= dirty
    uuid = client.execute("backup", target=str(tmp_path / "i.raw"), bitmap="daily", bitmap_mode="never")["UUID"]
    assert client.end_of(uuid)["status"] == "done"
    assert disk.bitmaps["daily"].count >= dirty


# ---- what operators are told ----


def test_errors_of_backup(client, tmp_path):
    (tmp_path / "old.raw").write_bytes(b"x")
    target = str(tmp_path / "b.raw")
    cases = [
        ({"devlist": "drive-scsi7", "target": target}, "DeviceNotFound", "Device 'drive-scsi7' not found; this server"),
        ({"devlist": ["vm", "nope"], "target": target}, "DeviceNotFound", "Device 'nope' not found"),
        ({"devlist": "vm,vm", "target": target}, "GenericError", "Device 'vm' is in devlist twice"),
        ({"devlist": ",", "target": target}, "GenericError", "names no device"),
        ({"devlist": "vm"}, "GenericError", "one of 'backup-dir' and 'target' is needed"),
        ({"target": target, "backup-dir": str(tmp_path)}, "GenericError", "and not both"),
        ({"target": "b.raw"}, "GenericError", "'target' must be an absolute path: b.raw"),
        ({"target": "/dev/null"}, "GenericError", "the target /dev/null is neither a file nor a block device"),
        ({"target": str(tmp_path)}, "GenericError", "is neither a file nor a block device"),
        ({"backup-dir": "."}, "GenericError", "'backup-dir' must be an absolute path"),
        ({"backup-dir": str(tmp_path / "no")}, "GenericError", "No such file or directory"),
        ({"backup-dir": str(tmp_path / "old.raw")}, "GenericError", "is not a directory"),
        ({"backup-dir": str(tmp_path)}, "GenericError", "target: the target"),       # vm.raw is the source
        ({"target": str(tmp_path / "no" / "b.raw")}, "GenericError", "No such file or directory"),
        ({"target": str(tmp_path / "b.odd")}, "GenericError", "the suffix '.odd' does not tell the format"),
        ({"target": target, "format": "vmdk"}, "GenericError", "there is no format 'vmdk'"),
        ({"target": target, "speed": -1}, "GenericError", "Parameter 'speed' expects a value of 0"),
        ({"target": target, "max-workers": 0}, "GenericError", "Parameter 'max-workers' expects"),
        ({"target": target, "max-workers": 100_000}, "GenericError", "workers"),
        ({"target": target, "bitmap": "daily"}, "GenericError", "Dirty bitmap 'daily' not found on device 'vm'"),
        ({"target": target, "bitmap-mode": "x"}, "GenericError", "Parameter 'bitmap-mode' does not accept value 'x'"),
        ({"target": target, "mode": "x"}, "GenericError", "it can be absolute-paths or existing"),
        ({"target": target, "mode": "existing"}, "GenericError", "No such file or directory"),
        ({"target": target, "fleecing": True}, "DeviceNotFound", "Device 'vm-fleecing' not found: disk 'vm' has"),
    ]  # fmt: skip
    for arguments, kind, text in cases:
        answer = client.ask({"execute": "backup", "arguments": arguments})
        assert answer["error"]["class"] == kind and text in answer["error"]["desc"], (arguments, answer)
    assert sorted(os.listdir(tmp_path)) == ["control", "old.raw", "vm.raw"]
    # Nothing of all that is in the way of a good one.
    assert client.end_of(client.execute("backup", target=target)["UUID"])["status"] == "done"


def test_an_incremental_does_not_replace_a_backup(client, tmp_path):
    client.execute("block-dirty-bitmap-add", node="vm", name="daily")
    (tmp_path / "full.raw").write_bytes(b"precious")
    desc = client.refusal("backup", target=str(tmp_path / "full.raw"), bitmap="daily")[1]
    assert "an incremental does not replace it" in desc and "'existing'" in desc
    assert (tmp_path / "full.raw").read_bytes() == b"precious"


def test_one_backup_at_a_time_for_each_disk(client, tmp_path):
    uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
    kind, desc = client.refusal("backup", target=str(tmp_path / "c.raw"))
    assert (kind, desc) == ("GenericError", f"Device 'vm' is in use: backup {uuid} has not finished")
    client.execute("backup-cancel", uuid=uuid)


# ---- fleecing images ----


@pytest.mark.parametrize("name", ["drive-efidisk0", "efidisk0", "drive-tpmstate0-backup", "tpmstate0"])
def test_firmware_and_tpm_state_get_no_fleecing_file(name):
    assert not uses_fleecing(name) and uses_fleecing("drive-scsi0") and uses_fleecing("x" + name)


def test_fleecing_images(tmp_path):
    image, empty = tmp_path / "scratch.raw", tmp_path / "empty.raw"
    image.write_bytes(bytes(4 * MIB))
    empty.write_bytes(b"")
    names = ("drive-scsi0", "drive-efidisk0")
    with (
        served_disk(tmp_path / "a.raw", 8 * MIB) as a,
        served_disk(tmp_path / "e.raw", MIB) as e,
        Server(
            dict(zip(names, (a, e))),
            control=tmp_path / "control",
            fleecing_images={"drive-scsi0-fleecing": empty},
            snapshot_options={"stage_size": 256 << 10},
            log=lambda _: None,
        ) as server,
        Client(tmp_path / "control") as client,
    ):
        os.mkdir(tmp_path / "out")
        options = {"backup_dir": str(tmp_path / "out"), "fleecing": True}
        desc = client.refusal("backup", **options)[1]
        said = f"{empty} is empty, and its size is what it may hold"
        assert desc == f"Device 'drive-scsi0-fleecing' has no medium: {said}"
        empty.unlink()
        kind, desc = client.refusal("backup", **options)
        assert kind == "DeviceNotFound" and "Device 'drive-scsi0-fleecing' not found" in desc and str(empty) in desc
        nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes")}
        assert set(nodes) == {*names, "drive-scsi0-fleecing"}
        assert nodes["drive-scsi0-fleecing"]["file"] == str(empty)
        client.execute("blockdev-del", node_name="drive-scsi0-fleecing")
        assert client.refusal("blockdev-del", node_name="drive-scsi0-fleecing")[0] == "DeviceNotFound"
        assert "has no fleecing image" in client.refusal("backup", **options)[1]
        add = {"node_name": "drive-scsi0-fleecing", "driver": "file", "filename": str(image)}
        client.execute("blockdev-add", **add)
        assert "there is a device" in client.refusal("blockdev-add", **add)[1]
        assert "only fleecing images" in client.refusal("blockdev-add", **{**add, "node_name": "other"})[1]
        with Guest(a.pwrite, a.size) as guest:
            uuid = client.execute("backup", **options, speed=SLOW)["UUID"]
            snapshots = {name: snapshot for _, name, snapshot in server._jobs.snapshots}
            assert snapshots["drive-scsi0"].fleecing.name == str(image)
            assert snapshots["drive-efidisk0"].fleecing is None
            wait_for(lambda: snapshots["drive-scsi0"].stats.fleecing_peak, 30)
            guest.goes_on()
            client.execute("backup-cancel", uuid=uuid)
        client.end_of(uuid)


# ---- hooks ----


def test_freeze_and_thaw_are_run_around_the_cut(disk, tmp_path):
    log = tmp_path / "hooks"
    hooks = {word: [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{word} ')"] for word in ("freeze", "thaw")}
    with (
        Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None, **hooks),
        Client(tmp_path / "control") as client,
    ):
        uuid = client.execute("backup", target=str(tmp_path / "b.raw"))["UUID"]
        assert log.read_text() == "freeze thaw "
        client.end_of(uuid)


@pytest.mark.filterwarnings("ignore:thawing the guest did not work")
def test_hooks_that_fail_or_hang(disk, tmp_path):
    log = tmp_path / "hooks"
    thaw = ["sh", "-c", f"echo thaw >> {log}; exit 3"]
    failing, hanging = ["sh", "-c", "echo no >&2; exit 1"], ["sleep", "60"]
    for freeze, told in ((failing, "failed: exit status 1: no"), (hanging, "timed out")):
        with (
            Server(
                {"vm": disk}, control=tmp_path / "control", log=lambda _: None,
                freeze=freeze, thaw=thaw, freeze_timeout=0.5,
            ),
            Client(tmp_path / "control") as client,
        ):  # fmt: skip
            desc = client.refusal("backup", target=str(tmp_path / "b.raw"))[1]
            assert "freezing the guest did not work" in desc and told in desc and "nothing was cut" in desc
    assert log.read_text() == "thaw\nthaw\n"
    with (
        Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None, thaw=thaw),
        Client(tmp_path / "control") as client,
    ):
        answer = client.execute("backup", target=str(tmp_path / "b.raw"))
        assert answer["thaw"] == "failed: exit status 3"
        assert client.end_of(answer["UUID"])["status"] == "done"


def test_cuts_with_hooks_take_turns(tmp_path):
    """A thaw never runs between another cut's freeze and thaw."""
    order: list[str] = []
    with served_disk(tmp_path / "a.raw", MIB) as a, served_disk(tmp_path / "b.raw", MIB) as b:

        def cut(disk: pyfleece.Disk) -> None:
            for _ in range(10):
                freeze = lambda: (order.append("freeze"), time.sleep(0.001))                    # noqa: E731
                with pyfleece.snapshot_group([disk], freeze=freeze, thaw=lambda: order.append("thaw")):
                    pass

        threads = [threading.Thread(target=cut, args=(disk,)) for disk in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert order == ["freeze", "thaw"] * 20

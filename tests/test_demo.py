"""`pyfleece demo` proves what it says: it ends well when all is well, and is not fooled when something is not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time

import pytest
from conftest import MIB, require, run, wait_for
from test_cli import LATE, pyfleece, start

from pyfleece import demo

PROOFS = ("e2fsck -fn", "files read back", "has changed", "is empty", "gone")


@pytest.fixture(autouse=True)
def tools() -> None:
    require("mkfs.ext4", "e2fsck", "debugfs")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """In this process, on a small disk, in no time."""
    monkeypatch.setattr(demo, "_MEASURE", 0.2)
    monkeypatch.setattr(demo, "_HEAD_START", 0.5)
    monkeypatch.setattr(demo, "_MOST_FILES", 100)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return lambda **options: demo.run(**{"size": 32 * MIB, **options})


def test_it_proves_the_backup_and_cleans_up(tmp_path):
    out, err = pyfleece("demo", "--size", "64M", env={**os.environ, "TMPDIR": str(tmp_path)})
    proved = [line for line in out.splitlines() if line.startswith("proved ")]
    assert len(proved) == len(PROOFS) and all(proof in line for proof, line in zip(PROOFS, proved))
    files = re.search(r"([\d,]+) files read back", out)
    assert files and int(files[1].replace(",", "")) > 100
    rows = ("backup", "guest without", "guest with snapshot", "added to a write", "saved from writes", "held at most")
    for row in rows:
        assert re.search(rf"^{row}  +\S", out, re.MULTILINE), row
    assert re.search(r"p50 \S+ \S+, p99 \S+ \S+, max \S+ \S+", out)
    assert "All of it holds" in out and err == ""
    assert list(tmp_path.iterdir()) == []


def test_keep_leaves_the_disk_and_its_backup(quick, tmp_path, capsys):
    kept = tmp_path / "kept"
    quick(keep=str(kept))
    assert sorted(file.name for file in kept.iterdir()) == ["backup.raw", "disk.raw"]
    run("e2fsck", "-fn", kept / "backup.raw")
    assert "Look for yourself" in capsys.readouterr().out
    with pytest.raises(demo.DemoError, match="not empty"):
        quick(keep=str(kept))


def test_a_copy_of_the_live_disk_is_no_backup(quick, monkeypatch, capsys):
    real = demo.backup

    def copy_of_the_live_disk(snapshot, target, **options):
        result = real(snapshot, target, **options)
        shutil.copyfile(snapshot.disk.source.path, target)
        return result

    monkeypatch.setattr(demo, "backup", copy_of_the_live_disk)
    with pytest.raises(demo.DemoError, match="not proved"):
        quick()
    assert "All of it holds" not in capsys.readouterr().out


def test_one_wrong_block_of_a_file_is_found(quick, monkeypatch, tmp_path):
    """In the middle of a file's data, where no file system check looks."""
    real = demo.backup

    def damaged(snapshot, target, **options):
        result = real(snapshot, target, **options)
        blocks = re.findall(r"\((\d+)(?:-\d+)?\):(\d+)", run("debugfs", "-R", f"stat {name()}", target))
        offset = int(blocks[0][1]) * demo.BLOCK
        with open(target, "r+b") as file:
            file.seek(offset)
            before = file.read(1)
            file.seek(offset)
            file.write(bytes([before[0] ^ 1]))
        return result

    def name() -> str:
        return next(path for path in sums if sums[path] != EMPTY)

    sums: dict[str, str] = {}
    made = demo._make_disk
    monkeypatch.setattr(demo, "_make_disk", lambda *args: sums.update(made(*args)) or sums)
    monkeypatch.setattr(demo, "backup", damaged)
    with pytest.raises(demo.DemoError, match=r"not proved: .* checksums .*1 are missing or differ"):
        quick()
    assert list(tmp_path.iterdir()) == []


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_old_data_that_is_still_held_is_found(quick, monkeypatch):
    real = demo.backup
    monkeypatch.setattr(demo, "backup", lambda *args, **options: real(*args, **options, discard_source=False))
    with pytest.raises(demo.DemoError, match="not proved: the fleecing image is empty"):
        quick()


def test_a_guest_that_sees_an_error_is_told(quick, monkeypatch):
    monkeypatch.setattr(demo.Disk, "readinto", lambda *args: 1 // 0)
    with pytest.raises(demo.DemoError, match="a guest write failed: integer division"):
        quick()


def test_interrupted_demo_leaves_nothing(tmp_path):
    # While the disk is made, and while the backup runs.
    for moment in ("tree", "backup.raw.partial"):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with start("demo", "--size", "64M", "--speed", "4M", env=environment) as process:
            wait_for(lambda moment=moment: list(tmp_path.glob(f"*/{moment}")), 30)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            assert time.monotonic() - begun < LATE
        assert (process.returncode, err) == (130, b"pyfleece: interrupted\n")
        assert list(tmp_path.iterdir()) == []


def test_missing_tools_are_named_with_their_package(monkeypatch):
    monkeypatch.setattr(demo.shutil, "which", lambda name, path: None if name == "debugfs" else f"/sbin/{name}")
    with pytest.raises(demo.DemoError, match=r"^debugfs not found: .*apt-get install e2fsprogs"):
        demo.run()


def test_too_small_a_disk_and_too_little_room(tmp_path, monkeypatch):
    _, err = pyfleece("demo", "--size", "1M", status=1)
    assert "too small" in err
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(demo.DemoError, match="free"):
        demo.run(size=64 * MIB, keep=str(tmp_path))

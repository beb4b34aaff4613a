"""kill -9 at random moments of a backup under load.

Afterwards the source has every write that was acknowledged; the target, if there is one of that name, is complete and
equals its cut; nothing is left of the fleecing file, and no lock; and the next backup to the same target just works,
and removes what the killed one left: `<target>.partial`, as the README says.

PYFLEECE_KILLS=200 in the environment: so many times. PYFLEECE_SEED: begin with another random state.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, wait_for
from kill_worker import BLOCK, BLOCKS, WORDS, Journal, content

import pyfleece

KILLS = int(os.environ.get("PYFLEECE_KILLS", "20"))
SEED = int(os.environ.get("PYFLEECE_SEED", "1"))
WORKER = Path(__file__).with_name("kill_worker.py")


class Victim:
    """A disk, its journal, and a process that is killed while it backs the disk up."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.directory, self.scratch = directory, scratch
        self.source, self.target = directory / "vm.raw", directory / "backup.raw"
        self.partial = directory / "backup.raw.partial"
        journal = directory / "journal"
        journal.write_bytes(bytes(8 * WORDS))
        self.journal = Journal(journal)
        with pyfleece.create(self.source, BLOCKS * BLOCK) as image:
            image.pwrite(b"".join(content(block, 0) for block in range(BLOCKS)), 0)
        self.killed_midway = 0
        self.checked: tuple[int, list[int]] = (0, [])           # the last good target: its cut, and the versions in it

    def kill(self, seed: str, seconds: float) -> None:
        arguments = [self.source, self.directory / "journal", self.target, self.scratch, seed]
        with subprocess.Popen([sys.executable, WORKER, *arguments], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"started\n"
                time.sleep(seconds)
                assert process.poll() is None, "it ended by itself"
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL

    def check_files(self) -> None:
        assert os.listdir(self.scratch) == []
        known = {"vm.raw", "journal", "backup.raw", "backup.raw.partial"}
        if self.scratch.parent == self.directory:
            known.add(self.scratch.name)
        assert set(os.listdir(self.directory)) <= known

    def check_source(self) -> None:
        """Every acknowledged write is there; of a write that was running each block may be there or not."""
        with pyfleece.open(self.source, "r+") as image:         # no lock is left
            data = image.pread(image.size, 0)
        for block in range(BLOCKS):
            got = data[block * BLOCK : (block + 1) * BLOCK]
            least, most = self.journal.acknowledged[block], self.journal.intended[block]
            assert least <= most <= least + 1
            found = [version for version in (least, most) if got == content(block, version)]
            assert found, f"block {block} has neither version {least} nor {most}: {got[:16]!r}"
            self.journal.acknowledged[block] = self.journal.intended[block] = found[-1]

    def check_target(self) -> None:
        """The name tells a complete backup of the last cut, or of the one before whose backup was the last to return.

        """
        self.killed_midway += self.partial.exists()
        if not self.target.exists():
            assert self.journal.complete == 0
            return
        data = self.target.read_bytes()
        cuts = [
            cut
            for cut in range(self.journal.complete, self.journal.intended[0] + 1)
            if data[:BLOCK] == content(0, cut)
        ]
        assert cuts, f"this is not the backup that was complete, {self.journal.complete}"
        if cuts[0] != self.checked[0]:          # the journal has the versions of the last cuts only
            self.checked = (cuts[0], list(self.journal.at_cut(cuts[0])))
        versions = self.checked[1]
        for block in range(BLOCKS):
            got = data[block * BLOCK : (block + 1) * BLOCK]
            assert got == content(block, versions[block]), f"cut {cuts[0]}, block {block}"

    def back_up_again(self) -> None:
        """The next backup just works."""
        with pyfleece.open(self.source, "r+") as image:
            disk = pyfleece.Disk(image)
            cut = self.journal.intended[0] + 1
            disk.pwrite(content(0, cut), 0)
            self.journal.acknowledged[0] = self.journal.intended[0] = self.journal.complete = cut
            self.journal.at_cut(cut)[:] = self.journal.acknowledged
            with disk.snapshot(fleecing_dir=self.scratch) as snapshot:
                pyfleece.backup(snapshot, self.target)
        assert not self.partial.exists()
        assert self.target.read_bytes() == self.source.read_bytes()


def test_kill_9(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    victim = Victim(tmp_path, scratch)
    rng = random.Random(SEED)
    writes = 0
    for number in range(KILLS):
        before = sum(victim.journal.acknowledged)
        victim.kill(f"{SEED} {number}", rng.random() * 0.6)
        writes += sum(victim.journal.acknowledged) - before
        victim.check_files()
        victim.check_source()
        victim.check_target()
        if rng.random() < 0.7:
            victim.back_up_again()
        if rng.random() < 0.3 and victim.target.exists():
            victim.target.unlink()
            victim.journal.complete = 0
    cuts = victim.journal.intended[0]
    print(
        f"{KILLS} kills, {victim.killed_midway} of them with a half-written target; "
        f"{cuts} cuts, {writes} acknowledged blocks"
    )
    victim.back_up_again()
    assert victim.killed_midway > KILLS // 4
    assert writes > KILLS * 100


@pytest.fixture
def file_system(tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[Path]:
    """One of our own, whose free space nobody else changes."""
    require("mkfs.ext4", "mount")
    device, directory = loop_device(64 * MIB), tmp_path / "own"
    run("mkfs.ext4", "-q", "-m", "0", device)
    directory.mkdir()
    if "mount:" in run("mount", device, directory, check=False):
        missing("permission to mount")
    (directory / "lost+found").rmdir()
    yield directory
    wait_for(lambda: run("umount", directory, check=False) == "", 10)


def test_kill_9_gives_the_space_of_the_fleecing_file_back(tmp_path: Path, file_system: Path) -> None:
    def free() -> int:
        os.sync()
        return os.statvfs(file_system).f_bfree

    victim = Victim(tmp_path, file_system)
    before = free()
    for number in range(4):
        victim.kill(f"{SEED} space {number}", 0.3)
        wait_for(lambda: free() == before)
        assert os.listdir(file_system) == []

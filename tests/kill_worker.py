"""What test_kill.py kills: writers that keep a journal, and backups in a loop.

    kill_worker.py SOURCE JOURNAL TARGET SCRATCH_DIRECTORY SEED

The disk consists of blocks, each of which tells its number and its version; the journal is shared memory that
outlives the process. It has of each block the version that a write was begun for, the version that was acknowledged
(the write returned), and the versions at the last cuts.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys
import threading
from pathlib import Path

import pyfleece

BLOCK = 4096
BLOCKS = 2048
WRITERS = 3
CUTS = 3                        # the versions of so many are kept: the one that runs, the complete one, and a spare
WORDS = 1 + (2 + CUTS) * BLOCKS


def content(block: int, version: int) -> bytes:
    """Now and then a version is zeros."""
    return bytes(BLOCK) if version % 16 == 15 else struct.pack("<QQ", block, version) * (BLOCK // 16)


class Journal:
    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 8 * WORDS)).cast("Q")
        self.intended = self.words[1 : 1 + BLOCKS]
        self.acknowledged = self.words[1 + BLOCKS : 1 + 2 * BLOCKS]

    @property
    def complete(self) -> int:
        """The last cut whose backup returned."""
        return self.words[0]

    @complete.setter
    def complete(self, cut: int) -> None:
        self.words[0] = cut

    def at_cut(self, cut: int) -> memoryview:
        """The versions at that cut."""
        start = 1 + (2 + cut % CUTS) * BLOCKS
        return self.words[start : start + BLOCKS]


class Worker:
    def __init__(self, source: str, journal: str, target: str, scratch: str, seed: str) -> None:
        self.journal = Journal(Path(journal))
        self.disk = pyfleece.Disk(pyfleece.open(source, "r+"))
        self.target, self.scratch = target, scratch
        self.random = random.Random(seed)
        self.locks = [threading.Lock() for _ in range(WRITERS)]

    def write(self, first: int, count: int) -> None:
        journal, blocks = self.journal, range(first, first + count)
        for block in blocks:
            journal.intended[block] += 1
        self.disk.pwrite(b"".join(content(block, journal.intended[block]) for block in blocks), first * BLOCK)
        for block in blocks:
            journal.acknowledged[block] = journal.intended[block]

    def writer(self, number: int) -> None:
        """Writes to its own part of the disk. Block 0 is nobody's: it has the number of the cut."""
        mine = random.Random(self.random.random())
        first, end = max(1, number * BLOCKS // WRITERS), (number + 1) * BLOCKS // WRITERS
        while True:
            count = mine.randrange(1, 9)
            with self.locks[number]:
                self.write(mine.randrange(first, end - count), count)

    def backup(self) -> None:
        for lock in self.locks:
            lock.acquire()
        cut = self.journal.intended[0] + 1
        self.write(0, 1)
        self.journal.at_cut(cut)[:] = self.journal.acknowledged
        snapshot = self.disk.snapshot(fleecing_dir=self.scratch, stage_size=self.random.choice([1 << 18, 1 << 26]))
        for lock in self.locks:
            lock.release()
        with snapshot:
            speed = self.random.choice([None, 20 << 20, 60 << 20])
            pyfleece.backup(snapshot, self.target, speed=speed, granularity=1 << 16)
        self.journal.complete = cut

    def run(self) -> None:
        for number in range(WRITERS):
            threading.Thread(target=self.writer, args=(number,), daemon=True).start()
        print("started", flush=True)
        while True:
            self.backup()


if __name__ == "__main__":
    Worker(*sys.argv[1:]).run()

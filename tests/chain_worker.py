"""A program that writes a disk and backs it up, over and over, until it is killed: see test_chain_kill.py.

    chain_worker.py SOURCE DIRECTORY CUTS SEED

At each cut it leaves the disk's state of that instant as CUTS/SEQUENCE, where SEQUENCE is that of the point that the
backup will be, if it gets that far.
"""

from __future__ import annotations

import os
import random
import sys
import threading

import pyfleece
from pyfleece.chain import Repository


class RecordingDisk(pyfleece.Disk):
    """Knows what it holds; writes and cuts take turns, so that the model is exact at the cut."""

    def prepare(self, model: bytearray, cuts: str, repository: Repository) -> None:
        self.model, self.cuts, self.repository = model, cuts, repository
        self.turn = threading.Lock()

    def write(self, data: bytes, offset: int) -> None:
        with self.turn:
            self.pwrite(data, offset)
            self.model[offset : offset + len(data)] = data

    def snapshot(self, *args, **options):
        points = self.repository.points
        sequence = points[-1].sequence + 1 if points else 1
        with self.turn:
            with open(os.path.join(self.cuts, str(sequence)), "wb") as file:
                file.write(self.model)
            return super().snapshot(*args, **options)


def main() -> None:
    source, directory, cuts, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    repository = Repository(directory, create=True)
    with pyfleece.open(source, "r+") as image, RecordingDisk(image) as disk:
        disk.prepare(bytearray(image.pread(image.size, 0)), cuts, repository)
        print("ready", flush=True)

        def guest() -> None:
            own = random.Random(rng.random())
            while True:
                length = own.choice((512, 4096, 10_000, 65536))
                disk.write(own.randbytes(length), own.randrange(disk.size - length))

        threading.Thread(target=guest, daemon=True).start()
        while True:
            repository.backup(disk, fleecing="memory", granularity=4096, workers=2)
            if rng.random() < 0.2:
                repository.prune(rng.randint(1, 4), workers=2)


main()

"""A process that writes to a disk with persistent dirty bitmaps until it is killed: for test_bitmaps.py.

Usage: bitmap_worker.py IMAGE SEED. It says on its standard output, a line each, in the order of events:

    wrote UNIT      a write to this unit was acknowledged
    drop NAME       from here on units of this bitmap may become clean
    dropped NAME    they have; what is written from here on is dirty again
"""

from __future__ import annotations

import random
import sys

import pyfleece

UNIT = 65536
UNITS = 512
NAMES = ("daily", "weekly")


def say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main(path: str, seed: str) -> None:
    rng = random.Random(seed)
    disk = pyfleece.Disk(pyfleece.open(path, "r+"))

    def write() -> None:
        unit = rng.randrange(UNITS)
        disk.pwrite(b"x" * rng.randrange(1, 5000), unit * UNIT)
        say(f"wrote {unit}")

    while True:
        for _ in range(rng.randrange(30)):
            write()
        name = rng.choice(NAMES)
        if rng.random() < 0.2:
            say(f"drop {name}")
            disk.bitmaps[name].clear()
            say(f"dropped {name}")
        elif rng.random() < 0.7:
            with disk.snapshot("memory", bitmap=name) as snapshot:
                # Single-threaded: what was written before the cut is what was frozen.
                after = rng.randrange(5) if rng.random() < 0.5 else 0
                if rng.random() < 0.5:
                    say(f"drop {name}")
                    snapshot.commit()
                    say(f"dropped {name}")
                for _ in range(after):
                    write()


if __name__ == "__main__":
    main(*sys.argv[1:])

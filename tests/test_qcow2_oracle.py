"""The qcow2 driver against QEMU's: images made by qemu-img in all combinations of options, changed at random by our
driver and by qemu-io in turn, judged by `qemu-img check`, by `qemu-img compare` with a model, and by reading them
ourselves.

PYFLEECE_QCOW2_FULL=1 in the environment: every combination of options (some thousand), not just enough that every two
choices meet; a share of them: PYFLEECE_QCOW2_FULL=3/50 is the third of fifty shares. PYFLEECE_SEED: other operations.
"""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest
import qcow2_kit as kit
from conftest import require
from qcow2_kit import DIRTY, KIB, MIB, SECTOR, Options, Subject

import pyfleece

SEED = int(os.environ.get("PYFLEECE_SEED", "1"))


def selection() -> list[Options]:
    wanted = os.environ.get("PYFLEECE_QCOW2_FULL", "")
    if not wanted:
        return kit.pairwise()
    share, _, of = wanted.partition("/")
    return kit.every_combination()[int(share) - 1 :: int(of)] if of else kit.every_combination()


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img", "qemu-io")


def open_writable(subject: Subject, rng: random.Random) -> pyfleece.Image:
    """With a cache that is too small for what is coming, now and then, or around the page cache."""
    cache_size = rng.choice([None, 1, 64 * KIB])
    direct = rng.random() < 0.3 and kit.direct_works(subject.path.parent)
    return pyfleece.open(subject.path, "r+", cache_size=cache_size, direct=direct)


def round_by_us(subject: Subject) -> None:
    """Some operations, a verification while the image is open, more operations, and one when it is closed."""
    rng = subject.rng
    with open_writable(subject, rng) as image:
        kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(rng.randrange(3, 14))])
        if rng.random() < 0.5:
            image.flush()
            kit.verify(subject, image)
        kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(rng.randrange(3, 14))])
        kit.verify_reading(image, subject)
    kit.verify(subject)
    assert not kit.header_of(subject.path).incompatible & DIRTY


def round_by_qemu(subject: Subject) -> None:
    """Some operations; qemu-io may die after its flush, and leave lazy refcounts to be rebuilt."""
    rng = subject.rng
    die = subject.options.lazy_refcounts and rng.random() < 0.5
    kit.by_qemu(subject, [subject.operation(kit.ALL_KINDS) for _ in range(rng.randrange(3, 12))], die=die)
    if not die:
        kit.verify(subject)
    with pyfleece.open(subject.path) as image:
        kit.verify_reading(image, subject)


@pytest.mark.parametrize("options", selection(), ids=lambda options: options.id)
def test_in_turn_with_qemu(options: Options, tmp_path: Path) -> None:
    subject = kit.make(tmp_path, options, SEED)
    with pyfleece.open(subject.path) as image:
        kit.verify_reading(image, subject)
    for number in range(2 if os.environ.get("PYFLEECE_QCOW2_FULL") else 1):
        round_by_us(subject)
        if options.snapshots and number == 0:
            kit.take_snapshot(subject, "midway")
        round_by_qemu(subject)
    round_by_us(subject)


THREADED = [
    Options(cluster_size=512),
    Options(cluster_size=4 * KIB, compat="0.10", snapshots=1),
    Options(cluster_size=4 * KIB, backing="chain", snapshots=3, compression="zstd"),
    Options(cluster_size=64 * KIB, backing="qcow2<", refcount_bits=4, snapshots=1),
    Options(cluster_size=64 * KIB, preallocation="metadata", refcount_bits=1),
]


@pytest.mark.parametrize("options", THREADED, ids=lambda options: options.id)
def test_many_threads(options: Options, tmp_path: Path) -> None:
    """Each thread has sectors of its own, in clusters that it shares with the others; some have whole clusters, which
    they discard as well.
    """
    subject = kit.make(tmp_path, options, SEED)
    threads, sector = 4, kit.SECTOR
    with open_writable(subject, subject.rng) as image:

        def work(number: int) -> None:
            rng = random.Random(f"{SEED} {options.id} {number}")
            mine = Subject(options, subject.path, subject.model, rng, hot=subject.hot)
            for _ in range(60):
                operation = mine.operation(("write", "write", "write", "zero", "discard", "compressed", "flush"))
                if operation.kind == "flush":
                    if rng.random() < 0.3:
                        image.flush()
                    continue
                # In the first half of each group of clusters a sector in `threads`, in its second half a cluster.
                half = options.cluster_size * threads
                at = operation.offset // (2 * half) * 2 * half
                if operation.kind in ("write", "zero"):
                    at += operation.offset % half // (sector * threads) * sector * threads + number * sector
                    length = min(sector, subject.size - at)
                else:
                    at += half + number * options.cluster_size
                    length = min(options.cluster_size, subject.size - at)
                if length <= 0:
                    continue
                if operation.kind in ("write", "compressed"):
                    data = (operation.data * (length // len(operation.data) + 1))[:length]
                    done = kit.Operation(operation.kind, at, length, data)
                else:
                    done = kit.Operation(operation.kind, at, length)
                kit.one_by_us(image, mine, done)
                mine.apply_to_model(done, effective=not mine.discards_nothing())
                assert image.pread(length, at) == mine.model.read(length, at)

        failures: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        kit.verify_reading(image, subject)
    kit.verify(subject)


SNAPSHOTTED = [
    Options(cluster_size=512, refcount_bits=4),
    Options(cluster_size=4 * KIB, compat="0.10", backing="raw<"),
    Options(cluster_size=64 * KIB, backing="chain", compression="zstd", refcount_bits=64),
]


@pytest.mark.parametrize("options", SNAPSHOTTED, ids=lambda options: options.id)
def test_internal_snapshots_come_and_go(options: Options, tmp_path: Path) -> None:
    """QEMU makes, deletes and goes back to internal snapshots between our rounds."""
    subject = kit.make(tmp_path, options, SEED)
    rng = subject.rng
    for number in range(10):
        kind = rng.random()
        if kind < 0.5 or not subject.kept:
            kit.take_snapshot(subject, f"made{number}")
        elif kind < 0.75:
            name = rng.choice(sorted(subject.kept))
            kit.tool("qemu-img", "snapshot", "-d", name, subject.path)
            subject.kept.pop(name).unlink()
        else:
            name = rng.choice(sorted(subject.kept))
            kit.tool("qemu-img", "snapshot", "-a", name, subject.path)
            subject.model.take(subject.kept[name])
        with open_writable(subject, rng) as image:
            kit.verify_reading(image, subject)
            kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(rng.randrange(1, 8))])
        kit.verify(subject)


MAPPED = [
    Options(cluster_size=4 * KIB, backing="chain", snapshots=1),
    Options(cluster_size=512, backing="raw>", refcount_bits=64),
    Options(compat="0.10", cluster_size=4 * KIB, backing="qcow2="),
    Options(cluster_size=64 * KIB, preallocation="falloc"),
]


@pytest.mark.parametrize("options", MAPPED, ids=lambda options: options.id)
def test_map_says_what_qemu_says(options: Options, tmp_path: Path) -> None:
    """Which image of the chain has the data, and where in its file."""
    subject = kit.make(tmp_path, options, SEED)
    with open_writable(subject, subject.rng) as image:
        kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(25)])
    theirs = json.loads(kit.tool("qemu-img", "map", "--output=json", subject.path))
    with pyfleece.open(subject.path) as image:
        ours = list(image.map())
    position = 0
    for entry in ours:
        assert entry.offset == position and entry.length > 0
        position += entry.length
    assert position == subject.size
    compared = 0
    edges = sorted({entry.offset for entry in ours} | {entry["start"] for entry in theirs})
    for edge in edges:
        mine = next(entry for entry in ours if entry.offset <= edge < entry.offset + entry.length)
        qemus = next(entry for entry in theirs if entry["start"] <= edge < entry["start"] + entry["length"])
        if qemus["data"] and not qemus["zero"]:
            assert mine.kind == "data" and mine.allocated and mine.depth == qemus["depth"], (mine, qemus)
            assert mine.compressed == ("offset" not in qemus), (mine, qemus)
            if not mine.compressed:
                assert mine.host_offset is not None
                assert mine.host_offset + edge - mine.offset == qemus["offset"] + edge - qemus["start"], (mine, qemus)
            compared += 1
        elif mine.kind == "data":               # a hole of its file is no secret to QEMU
            assert mine.depth == qemus["depth"] and "offset" in qemus, (mine, qemus)
    assert compared > 5


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
@pytest.mark.parametrize("snapshots", [0, 1])
def test_growth(cluster_size: int, snapshots: int, tmp_path: Path) -> None:
    """A disk is made larger again and again, its L1 table moves, and QEMU reads on."""
    options = Options(cluster_size=cluster_size, snapshots=snapshots)
    subject = kit.make(tmp_path, options, SEED)
    for step in (SECTOR, 300 * KIB, 40 * MIB):
        with pyfleece.open(subject.path, "r+") as image:
            image.grow(subject.size + step)
            os.ftruncate(subject.model.fd, subject.size + step)
            subject.model.size += step
            assert image.size == subject.size
            subject.hot = [(subject.size - min(step, 100 * KIB), subject.size)]
            kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(8)])
            kit.verify_reading(image, subject)
        kept, subject.kept = subject.kept, {}       # a snapshot has the size that the disk had then
        kit.verify(subject)
        for name, path in kept.items():
            out = tmp_path / "out.raw"
            kit.tool("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "raw", subject.path, out)
            kit.tool("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", out, path)
        subject.kept = kept
    kit.by_qemu(subject, [subject.operation(kit.ALL_KINDS) for _ in range(8)])
    with pyfleece.open(subject.path) as image:
        kit.verify_reading(image, subject)


def test_images_that_we_make(tmp_path: Path) -> None:
    """`create` in all cluster sizes, with and without a backing file: QEMU finds no fault, and goes on with them."""
    for number, bits in enumerate(range(9, 22)):
        options = Options(cluster_size=1 << bits, compression="zstd" if bits % 2 else "zlib")
        path, size = tmp_path / f"{bits}.qcow2", (5 << bits) + 3 * SECTOR
        below = tmp_path / f"{bits}.raw"
        model = kit.Model(tmp_path / f"{bits}.model", size)
        extra: dict[str, str] = {}
        if number % 3:
            data = random.Random(bits).randbytes(size // 2)
            below.write_bytes(data)
            model.write(data, 0)
            extra = {"backing": below.name, "backing_format": "raw"}
        with pyfleece.create(path, size, cluster_size=1 << bits, compression=options.compression, **extra) as image:
            assert image.cluster_size == 1 << bits and image.size == size
            subject = Subject(options, path, model, random.Random(bits), hot=[(0, size)])
            kit.verify(subject, image)
            kit.by_us(image, subject, [subject.operation(kit.ALL_KINDS) for _ in range(10)])
        kit.verify(subject)
        kit.by_qemu(subject, [subject.operation(kit.ALL_KINDS) for _ in range(5)])
        round_by_us(subject)

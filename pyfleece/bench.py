"""What fleecing would cost on a disk: `pyfleece bench`.

For each cluster size a guest (`pyfleece.load.Load`) writes a disk, in turn
- plain: no snapshot is alive;
- first: right after a cut, one block in each cluster, so that old data is saved before every write: the worst case;
- again: the same blocks once more, all of them saved already;
- backup: from another cut on, while a backup copies the whole snapshot, until it is done.

Rounds alternate between the cluster sizes, so that what else the machine does hits all of them alike; of several
rounds the median is told. Ratios to `plain` of the same round are what carries over to another day.
"""

from __future__ import annotations

import configparser
import os
import shutil
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyfleece
from pyfleece.backup import Backup
from pyfleece.disk import Disk
from pyfleece.errors import invalid
from pyfleece.image import Image
from pyfleece.load import Load
from pyfleece.progress import human
from pyfleece.snapshot import Latency, Snapshot

MIB = 1 << 20
CLUSTERS = (4096, 16384, 65536, 1048576)
_SAMPLE_EVERY = 0.05                    # seconds between two looks at the fleecing space
_BACKUP_LIMIT = 600.0                   # seconds after which a backup under load is given up


class BenchError(Exception):
    """Something to tell in one line."""


@dataclass(frozen=True)
class Pattern:
    """What the guest does."""

    name: str
    block: int = 4096
    threads: int = 1
    order: str = "random"
    read_percent: int = 0
    hot: tuple[int, int] = (0, 0)       # percent of the operations, percent of the disk
    rate: int | None = None             # operations per second
    direct: bool = False                # around the page cache (O_DIRECT), whatever Options.direct says

    def start(self, disk: Disk, *, seed: int, touch: int | None = None, operations: int | None = None) -> Load:
        """`touch`: write one block in each so many bytes, once if the order is random."""
        order = "once" if touch and self.order == "random" else self.order
        return Load(
            disk,
            block=self.block,
            threads=self.threads,
            stride=max(touch, self.block) if touch else None,
            order=order,
            read_percent=0 if touch else self.read_percent,
            hot=self.hot,
            rate=self.rate,
            operations=operations,
            seed=seed,
        )


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        Pattern("randwrite"),
        Pattern("randwrite-qd16", threads=16),
        Pattern("seqwrite", block=MIB, order="sequential"),
        Pattern("database", block=8192, threads=4, read_percent=70, hot=(80, 20)),
    )
}


@dataclass(frozen=True)
class Phase:
    """What the guest got. Durations are seconds."""

    rate: float                 # operations per second
    bandwidth: float            # bytes per second
    p50: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Round:
    plain: Phase
    first: Phase
    again: Phase
    backup: Phase
    backup_rate: float          # bytes per second
    backup_seconds: float
    amplification: float        # bytes of old data copied, for each byte the guest wrote during `first`
    spilled: float              # of these, written to the fleecing image, for each byte that the guest wrote
    fleecing_peak: int          # bytes, of the backup under load
    staged_peak: int
    fleecing: tuple[tuple[float, int], ...]     # (seconds since the cut, bytes in the fleecing image) of that backup


@dataclass
class Case:
    """One cluster size."""

    cluster_size: int
    rounds: list[Round] = field(default_factory=list)

    def median(self, value: Callable[[Round], float]) -> float:
        return statistics.median(value(one) for one in self.rounds)

    def share(self, phase: str) -> float:
        """What the guest keeps of its plain rate in that phase."""
        return self.median(lambda one: getattr(one, phase).rate / one.plain.rate if one.plain.rate else 0.0)


@dataclass(frozen=True)
class Options:
    """What to measure, and where. Sizes are bytes."""

    source: str                         # a directory: a file is made there; else see `destroy`
    fleecing: str                       # a directory
    target: str                         # a directory, or a new file; else see `destroy`
    size: int                           # of the file that is made
    pattern: Pattern
    clusters: Sequence[int] = CLUSTERS
    seconds: float = 5.0                # of each phase but the backup
    rounds: int = 1
    stage_size: int = 64 * MIB
    workers: int | None = None
    direct: bool = False
    destroy: bool = False               # a source or target that exists may be overwritten


def run(options: Options, tell: Callable[[str], None]) -> list[Case]:
    """Measure. `tell` gets a line about what is going on, now and then. Files that were made are removed, whatever
    happens.
    """
    _check_places(options)
    cases = [Case(cluster) for cluster in options.clusters]
    with _source(options, tell) as image, _target(options) as target, Disk(image) as disk:
        for number in range(options.rounds):
            for case in cases:
                where = f"round {number + 1} of {options.rounds}, cluster {human(case.cluster_size)}"
                case.rounds.append(_round(options, disk, target, case.cluster_size, number, f"{where}: ", tell))
    return cases


# ---- places ----


def _check_places(options: Options) -> None:
    """Refuse what would destroy something, and what there is no room for, before anything is made."""
    if not os.path.isdir(options.fleecing):
        raise BenchError(f"{options.fleecing}: the place for fleecing images is a directory")
    needed: dict[int, tuple[str, int]] = {}

    def need(directory: str, size: int) -> None:
        device = os.stat(directory).st_dev
        needed[device] = (directory, needed.get(device, ("", 0))[1] + size)

    size = options.size
    if os.path.isdir(options.source):
        need(options.source, size)
    else:
        size = _existing(options.source, "source", options.destroy)
    need(options.fleecing, size)
    if os.path.isdir(options.target):
        need(options.target, size)
    elif os.path.exists(options.target):
        if _existing(options.target, "target", options.destroy) < size:
            raise BenchError(f"{options.target} is smaller than the source")
    else:
        need(os.path.dirname(options.target) or ".", size)
    for directory, wanted in needed.values():
        free = shutil.disk_usage(directory).free
        if wanted > free:
            raise BenchError(
                f"{directory} may need {human(wanted)}, and has {human(free)}; choose a smaller --size, or other places"
            )


def _existing(path: str, what: str, destroy: bool) -> int:
    """The size of a file or device that will be overwritten."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise BenchError(f"{path}: the {what} is a directory, a file or a block device")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    if not destroy:
        raise BenchError(
            f"{path} exists, and measuring would destroy all {human(size)} that it holds; give a directory, "
            f"or --destroy-contents if that is what you want"
        )
    return size


@contextmanager
def _source(options: Options, tell: Callable[[str], None]) -> Iterator[Image]:
    direct = options.direct or options.pattern.direct
    if not os.path.isdir(options.source):
        with pyfleece.open(options.source, "r+", format="raw", direct=direct) as image:
            yield image
        return
    with tempfile.TemporaryDirectory(prefix="pyfleece-bench-", dir=options.source) as directory:
        path = os.path.join(directory, "disk.raw")
        with pyfleece.create(path, options.size, direct=direct) as image:
            _fill(image, tell)
            yield image


@contextmanager
def _target(options: Options) -> Iterator[str]:
    if not os.path.isdir(options.target):
        made = not os.path.exists(options.target)
        try:
            yield options.target
        finally:
            if made and os.path.exists(options.target):
                os.unlink(options.target)
        return
    with tempfile.TemporaryDirectory(prefix="pyfleece-bench-", dir=options.target) as directory:
        yield os.path.join(directory, "backup.raw")


def _fill(image: Image, tell: Callable[[str], None]) -> None:
    """A disk of holes would cost nothing to save."""
    block = os.urandom(MIB)
    told = time.monotonic()
    for offset in range(0, image.size, MIB):
        image.pwrite(block[: min(MIB, image.size - offset)], offset)
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            tell(f"filling the disk: {100 * offset // image.size} %")
    image.flush()


# ---- a round ----


def _round(
    options: Options, disk: Disk, target: str, cluster: int, seed: int, where: str, tell: Callable[[str], None]
) -> Round:
    pattern = options.pattern
    tell(where + "plain")
    with pattern.start(disk, seed=seed + 999_983) as load:
        load.wait(options.seconds / 4)          # so that all phases find the page cache in the same state
    with pattern.start(disk, seed=seed) as load:
        load.wait(options.seconds)
        plain = _phase(load)

    with _cut(options, disk, cluster) as snapshot:
        tell(where + "first touch")
        with pattern.start(disk, seed=seed, touch=cluster) as load:
            load.wait(options.seconds)
            first = _phase(load)
            done = load.stats
        stats = snapshot.stats
        tell(where + "again")
        with pattern.start(disk, seed=seed, touch=cluster, operations=max(done.operations, 1)) as load:
            load.wait(options.seconds)
            again = _phase(load)

    tell(where + "backup")
    samples: list[tuple[float, int]] = []
    with _cut(options, disk, cluster) as snapshot:
        begin = time.monotonic()
        with pattern.start(disk, seed=seed + 1_000_003) as load, _backup(options, snapshot, target) as job:
            while not job.done:
                samples.append((time.monotonic() - begin, snapshot.stats.fleecing_bytes))
                if samples[-1][0] > _BACKUP_LIMIT:
                    raise BenchError(f"the backup was not done after {_BACKUP_LIMIT:g} s; choose a smaller --size")
                try:
                    job.wait(_SAMPLE_EVERY)
                except TimeoutError:
                    pass
            under = _phase(load)
            result = job.wait()
        samples.append((time.monotonic() - begin, snapshot.stats.fleecing_bytes))
        held = snapshot.stats
    return Round(
        plain=plain,
        first=first,
        again=again,
        backup=under,
        backup_rate=result.rate,
        backup_seconds=result.seconds,
        amplification=stats.bytes_copied / done.bytes_written if done.bytes_written else 0.0,
        spilled=stats.bytes_spilled / done.bytes_written if done.bytes_written else 0.0,
        fleecing_peak=held.fleecing_peak,
        staged_peak=held.staged_peak,
        fleecing=tuple(samples),
    )


def _cut(options: Options, disk: Disk, cluster: int) -> Snapshot:
    return disk.snapshot(options.fleecing, cluster_size=cluster, stage_size=max(options.stage_size, cluster))


@contextmanager
def _backup(options: Options, snapshot: Snapshot, target: str) -> Iterator[Backup]:
    if os.path.exists(target) and not stat.S_ISBLK(os.stat(target).st_mode):
        os.unlink(target)               # ours, or one that may be destroyed
    with Backup(snapshot, target, workers=options.workers, format="raw") as job:
        yield job


def _phase(load: Load) -> Phase:
    stats = load.stop()
    latency: Latency = stats.latency
    moved = stats.bytes_read + stats.bytes_written
    return Phase(
        rate=stats.rate,
        bandwidth=moved / stats.elapsed if stats.elapsed else 0.0,
        p50=latency.percentile(50),
        p99=latency.percentile(99),
        p999=latency.percentile(99.9),
        max=latency.max,
    )


# ---- what it means ----


def recommend(cases: Sequence[Case]) -> tuple[int, str]:
    """A cluster size, and why: the one that leaves the guest most after a cut, unless a larger one is nearly as good
    (within 3 %) and makes the backup clearly faster (by 10 %).
    """
    if not cases:
        raise invalid("there is nothing to choose from")
    best = max(cases, key=lambda case: case.share("first"))
    chosen, reason = best, "after a cut the guest keeps the most of its rate with it"
    for case in sorted(cases, key=lambda case: case.cluster_size):
        near = case.share("first") >= best.share("first") * 0.97
        faster = case.median(lambda one: one.backup_rate) >= chosen.median(lambda one: one.backup_rate) * 1.1
        if case.cluster_size > chosen.cluster_size and near and faster:
            chosen, reason = case, "the guest keeps nearly as much as with the best, and the backup is faster"
    share, under = chosen.share("first"), chosen.share("backup")
    peak = chosen.median(lambda one: one.fleecing_peak)
    return chosen.cluster_size, (
        f"{human(chosen.cluster_size)}: {reason}: {share:.0%} of its plain rate while everything is touched for the "
        f"first time, {under:.0%} while a backup runs, which held {human(peak)} in the fleecing image at most"
    )


def as_json(options: Options, cases: Sequence[Case]) -> dict[str, Any]:
    """Everything that was measured, for programs."""
    size, reason = recommend(cases)
    return {
        "options": asdict(options),
        "machine": {"cpus": os.cpu_count(), "system": " ".join(os.uname()[i] for i in (0, 2, 4))},
        "cases": [asdict(case) for case in cases],
        "recommended_cluster_size": size,
        "reason": reason,
    }


def table(cases: Sequence[Case]) -> Iterator[str]:
    """Lines for people."""
    yield f"{'':>12}  {'rate':>9} {'share':>6} {'p50':>9} {'p99':>9} {'p99.9':>9} {'max':>9}"
    for case in cases:
        yield f"cluster {human(case.cluster_size)}"
        for name, title in (
            ("plain", "plain"), ("first", "first touch"), ("again", "again"), ("backup", "with backup")
        ):
            phases = [getattr(one, name) for one in case.rounds]
            times = [
                statistics.median(getattr(phase, quantile) for phase in phases)
                for quantile in ("p50", "p99", "p999", "max")
            ]
            rate = statistics.median(phase.rate for phase in phases)
            cells = " ".join(f"{_duration(value):>9}" for value in times)
            yield f"{title:>12}  {rate:>7.0f}/s {case.share(name):>6.0%} {cells}"
        yield (
            f"{'':>12}  {case.median(lambda one: one.amplification):.2f} bytes saved for each byte written, "
            f"{case.median(lambda one: one.spilled):.2f} of them to the fleecing image"
        )
        yield (
            f"{'':>12}  backup {human(case.median(lambda one: one.backup_rate))}/s, "
            f"fleecing image at most {human(case.median(lambda one: one.fleecing_peak))}, "
            f"memory {human(case.median(lambda one: one.staged_peak))}"
        )


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


# ---- profiles ----

_RW = {
    "write": ("sequential", 0),
    "randwrite": ("random", 0),
    "read": ("sequential", 100),
    "randread": ("random", 100),
    "rw": ("sequential", 50),
    "readwrite": ("sequential", 50),
    "randrw": ("random", 50),
}
_UNITS = {"": 1, "k": 1 << 10, "m": MIB, "g": 1 << 30}
_IGNORED = {"ioengine", "size", "filename", "directory", "runtime", "time_based", "group_reporting", "name"}


def read_profile(path: str) -> Pattern:
    """The first job of a file in fio's job format: rw, bs, iodepth, numjobs, rwmixread, rate_iops, direct and
    random_distribution=zoned:A/B:... (its first zone). Options that say where and for how long are left to the
    command line; others are an error, since leaving them out would measure something else.
    """
    parser = configparser.ConfigParser(
        allow_no_value=True, default_section="global", interpolation=None, comment_prefixes=("#", ";")
    )
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
        name = parser.sections()[0]
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: {error}".replace("\n", " ")) from error
    except IndexError:
        raise BenchError(f"{path}: there is no job in it") from None
    job = {key: value or "1" for key, value in parser.items(name)}
    unknown = sorted(set(job) - _IGNORED - {"rw", "readwrite", "bs", "blocksize", "iodepth", "numjobs", "rwmixread",
                                            "rate_iops", "random_distribution", "direct"})
    if unknown:
        raise BenchError(f"{path}: {', '.join(unknown)}: not known here")
    try:
        order, reads = _RW[job.get("rw", job.get("readwrite", "randwrite")).lower()]
        if 0 < reads < 100:
            reads = int(job.get("rwmixread", reads))
        return Pattern(
            name,
            block=_bytes(job.get("bs", job.get("blocksize", "4k"))),
            threads=int(job.get("iodepth", 1)) * int(job.get("numjobs", 1)),
            order=order,
            read_percent=reads,
            hot=_hot(job.get("random_distribution", "random")),
            rate=int(job["rate_iops"]) if "rate_iops" in job else None,
            direct=_flag(job.get("direct", "0")),
        )
    except (KeyError, ValueError) as error:
        raise BenchError(f"{path}: {error.args[0]!r} is not understood") from error


def _bytes(text: str) -> int:
    number = text.lower().rstrip("ib")
    unit = number[-1] if number and number[-1] in "kmg" else ""
    return int(number[: len(number) - len(unit)]) * _UNITS[unit]


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _hot(text: str) -> tuple[int, int]:
    if text == "random":
        return 0, 0
    kind, _, zones = text.partition(":")
    if kind != "zoned":
        raise ValueError(f"random_distribution={text}")
    access, _, space = zones.split(":")[0].partition("/")
    return int(access), int(space)


__all__ = [
    "CLUSTERS", "PATTERNS", "BenchError", "Case", "Options", "Pattern", "Phase", "Round", "as_json",
    "read_profile", "recommend", "run", "table",
]

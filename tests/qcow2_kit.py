"""qcow2 images for tests: made by qemu-img in all combinations of options, changed by qemu-io and by our driver in
turn, and a model of what they must hold.

The model is a raw file with holes, so `qemu-img compare` reads it too, and no image is too large for it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyfleece

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512

# Incompatible feature bits of the header.
DIRTY, CORRUPT = 1, 2


def tool(*command: str | os.PathLike[str], expect: Sequence[int] = (0,), timeout: float = 60) -> str:
    """Run a tool that must end with one of the expected statuses; what it printed."""
    words = [os.fspath(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    output = done.stdout + done.stderr
    assert done.returncode in expect, f"{' '.join(words)[:2000]} ended with {done.returncode}:\n{output[-4000:]}"
    return output


def direct_works(directory: Path) -> bool:
    """Does this file system know O_DIRECT?"""
    probe = directory / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


# ---- options ----


@dataclass(frozen=True)
class Options:
    """What qemu-img create is asked for."""

    compat: str = "1.1"
    cluster_size: int = 64 * KIB
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    compression: str = "zlib"
    backing: str = "none"               # or raw, qcow2 with <, = or >: how its size compares to the image's; or chain
    preallocation: str = "off"
    snapshots: int = 0                  # internal ones, before the random operations

    @property
    def valid(self) -> bool:
        """Does qemu-img know how to make it?"""
        if self.compat == "0.10" and (self.refcount_bits != 16 or self.lazy_refcounts or self.compression != "zlib"):
            return False
        if self.preallocation != "off" and self.backing != "none":
            return False
        return not self.snapshots or self.refcount_bits >= 4        # fewer can't count all that refers to a cluster

    @property
    def size(self) -> int:
        """Of the disk: more than one L2 table where that costs little, and no multiple of the cluster size."""
        size = {512: 300 * KIB, 4 * KIB: 5 * MIB, 64 * KIB: 515 * MIB, 512 * KIB: 9 * MIB, 2 * MIB: 23 * MIB}
        if self.preallocation in ("falloc", "full") and self.cluster_size == 64 * KIB:
            return 3 * MIB + 7 * SECTOR
        return size.get(self.cluster_size, 3 * MIB) + (0 if self.cluster_size == 512 else 7 * SECTOR)

    @property
    def version(self) -> int:
        return 2 if self.compat == "0.10" else 3

    @property
    def id(self) -> str:
        words = [
            f"v{self.version}",
            f"{self.cluster_size}",
            f"rc{self.refcount_bits}",
            "lazy" if self.lazy_refcounts else "",
            self.compression,
            f"over-{self.backing}" if self.backing != "none" else "",
            f"prealloc-{self.preallocation}" if self.preallocation != "off" else "",
            f"{self.snapshots}snapshots" if self.snapshots else "",
        ]
        return "-".join(word for word in words if word)

    def arguments(self) -> str:
        """For qemu-img create -o."""
        words = [f"compat={self.compat}", f"cluster_size={self.cluster_size}", f"preallocation={self.preallocation}"]
        if self.version == 3:
            words.append(f"refcount_bits={self.refcount_bits}")
            words.append(f"lazy_refcounts={'on' if self.lazy_refcounts else 'off'}")
            words.append(f"compression_type={self.compression}")
        return ",".join(words)


CHOICES: dict[str, tuple[Any, ...]] = {
    "compat": ("0.10", "1.1"),
    "cluster_size": (512, 4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "lazy_refcounts": (False, True),
    "compression": ("zlib", "zstd"),
    "backing": ("none", "raw<", "raw=", "raw>", "qcow2<", "qcow2=", "qcow2>", "chain"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "snapshots": (0, 1, 3),
}
assert list(CHOICES) == [entry.name for entry in fields(Options)]


def every_combination() -> list[Options]:
    product = (Options(*values) for values in itertools.product(*CHOICES.values()))
    return [options for options in product if options.valid]


def pairwise() -> list[Options]:
    """A selection in which every two choices that can meet do meet; greedily made, always the same."""
    numbers: dict[tuple[str, Any, str, Any], int] = {}

    def pairs(options: Options) -> int:
        """The pairs in it, a bit each."""
        bits = 0
        for one, other in itertools.combinations(CHOICES, 2):
            pair = (one, getattr(options, one), other, getattr(options, other))
            bits |= 1 << numbers.setdefault(pair, len(numbers))
        return bits

    candidates = [(pairs(options), options) for options in every_combination()]
    missing = (1 << len(numbers)) - 1
    chosen: list[Options] = []
    while missing:
        bits, best = max(candidates, key=lambda candidate: bin(candidate[0] & missing).count("1"))
        missing &= ~bits
        chosen.append(best)
    return chosen


# ---- the model ----


class Model:
    """What an image must hold: a raw file beside it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        os.close(self.fd)

    def write(self, data: bytes, offset: int) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)

    def zero(self, length: int, offset: int) -> None:
        while length:
            piece = min(length, MIB)
            self.write(bytes(piece), offset)
            length, offset = length - piece, offset + piece

    def cut(self, offset: int) -> None:
        """Nothing is left from there on."""
        if offset < self.size:
            os.ftruncate(self.fd, offset)
            os.ftruncate(self.fd, self.size)

    def read(self, length: int, offset: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        assert len(data) == length
        return data

    def take(self, path: Path) -> None:
        """Become what was kept."""
        tool("cp", "--sparse=always", path, self.path)      # into the same file, which is open here

    def keep(self, path: Path) -> Path:
        """A copy of how it is now."""
        tool("cp", "--sparse=always", self.path, path)
        return path


# ---- operations ----


@dataclass(frozen=True)
class Operation:
    kind: str                           # write, zero, unmap (zeros, space may be freed), discard, compressed, flush
    offset: int = 0
    length: int = 0
    data: bytes = field(default=b"", repr=False)


@dataclass
class Subject:
    """An image under test, and what is known about it."""

    options: Options
    path: Path
    model: Model
    rng: random.Random
    kept: dict[str, Path] = field(default_factory=dict)         # internal snapshots: what each must hold
    backing: dict[Path, int] = field(default_factory=dict)      # backing files, and what their content hashed to
    hot: list[tuple[int, int]] = field(default_factory=list)    # where operations go: (start, end)

    @property
    def size(self) -> int:
        return self.model.size

    def place(self) -> tuple[int, int]:
        """A range to change: often whole clusters or near their edges, sometimes a few bytes, sometimes to the end."""
        rng, cluster = self.rng, self.options.cluster_size
        start, end = rng.choice(self.hot)
        most = min(end - start, max(6 * cluster if cluster < 512 * KIB else cluster * 3 // 2, 20 * KIB))
        length = rng.choice([rng.randrange(1, 700), rng.randrange(1, most + 1), cluster, 2 * cluster, 4 * KIB])
        length = min(length, most)
        offset = rng.randrange(start, end - length + 1)
        if rng.random() < 0.5:
            offset = max(start, offset // cluster * cluster)
            if rng.random() < 0.3:
                offset = min(offset + rng.choice([1, SECTOR, cluster // 2, cluster - 1]), end - length)
        if rng.random() < 0.08:
            offset = end - length
        return offset, length

    def data(self, length: int) -> bytes:
        """Random bytes, or something that can be compressed, or zeros in part."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            return rng.randbytes(length)
        if kind < 0.8:
            return (rng.randbytes(rng.randrange(1, 40)) * (length // 1 + 1))[:length]
        zeros = rng.randrange(length + 1)
        return (bytes(zeros) + rng.randbytes(length - zeros))[:length]

    def operation(self, kinds: Sequence[str]) -> Operation:
        kind = self.rng.choice(kinds)
        if kind == "flush":
            return Operation("flush")
        offset, length = self.place()
        if kind == "compressed":
            cluster = self.options.cluster_size
            offset = offset // cluster * cluster
            length = min(cluster * self.rng.choice([1, 1, 1, 2, 3]), self.size - offset)
        data = self.data(length) if kind in ("write", "compressed") else b""
        return Operation(kind, offset, length, data)

    def discards_nothing(self) -> bool:
        """Version 2 has no way to say that a cluster reads as zeros and not as the backing file."""
        return self.options.version == 2 and self.options.backing != "none"

    def apply_to_model(self, operation: Operation, effective: bool = True) -> None:
        if operation.kind in ("write", "compressed"):
            self.model.write(operation.data, operation.offset)
        elif operation.kind in ("zero", "unmap"):
            self.model.zero(operation.length, operation.offset)
        elif operation.kind == "discard" and effective:
            start, end = self.whole_clusters(operation.offset, operation.length)
            if start < end:
                self.model.zero(end - start, start)

    def whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """What a discard of this range frees: the clusters that it covers; the disk's end ends a cluster, too."""
        cluster = self.options.cluster_size
        start, end = -(-offset // cluster) * cluster, offset + length
        if end != self.size:
            end = end // cluster * cluster
        return start, end


ALL_KINDS = ("write", "write", "write", "write", "zero", "unmap", "discard", "discard", "compressed", "flush")


def make(directory: Path, options: Options, seed: int) -> Subject:
    """An image with some data in each of its layers, made by qemu-img and qemu-io."""
    rng = random.Random(f"{seed} {options.id}")
    size = options.size
    path = directory / "disk.qcow2"
    model = Model(directory / "model.raw", size)
    subject = Subject(options, path, model, rng, hot=hot_parts(options))
    backing = _make_backing(directory, subject)
    extra = ["-b", backing[0], "-F", backing[1]] if backing else []
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options.arguments(), *extra, path, f"{size}")
    subject.backing = {file: checksum(file) for file in directory.glob("base*")}
    for number in range(options.snapshots):
        by_qemu(subject, [subject.operation(("write", "write", "unmap", "compressed")) for _ in range(6)])
        take_snapshot(subject, f"snap{number}")
    by_qemu(subject, [subject.operation(ALL_KINDS) for _ in range(6)])
    return subject


def hot_parts(options: Options) -> list[tuple[int, int]]:
    """Where operations go: so close together that they meet, and across the end of an L2 table."""
    size, cluster = options.size, options.cluster_size
    if size <= 32 * MIB:
        return [(0, size)]
    reach = cluster * cluster // 8              # of one L2 table
    return [(0, 12 * cluster), (reach - 5 * cluster, reach + 5 * cluster), (size - 4 * cluster, size)]


def _make_backing(directory: Path, subject: Subject) -> tuple[Path, str] | None:
    """The backing files, whose content goes into the model; the topmost one and its format."""
    kind, size, rng = subject.options.backing, subject.size, subject.rng
    if kind == "none":
        return None
    layers = {
        "raw": [("raw", "")],
        "qcow2": [("qcow2", "cluster_size=4096")],
        "chain": [("raw", ""), ("qcow2", "cluster_size=65536"), ("qcow2", "cluster_size=4096,compat=0.10")],
    }[kind.rstrip("<=>")]
    below: tuple[Path, str] | None = None
    visible = 0                                 # from here on the layers below show nothing
    for number, (format, arguments) in enumerate(layers):
        factor = {"<": 0.6, "=": 1.0, ">": 1.3}.get(kind[-1], (1.2, 0.55, 0.8)[number])
        length = size if factor == 1.0 else int(size * factor) // SECTOR * SECTOR
        path = directory / f"base{number}.{format}"
        extra = ["-b", below[0], "-F", below[1]] if below else []
        options = ["-o", arguments] if arguments else []
        tool("qemu-img", "create", "-q", "-f", format, *options, *extra, path, f"{length}")
        if length < visible:
            subject.model.cut(length)
        visible = length
        commands = []
        for _ in range(10):
            start, end = rng.choice(subject.hot)
            offset = rng.randrange(start, end)
            count = min(rng.choice([4096, 20 * KIB, 200 * KIB, subject.options.cluster_size]), length - offset)
            if count <= 0:
                continue
            pattern = rng.randrange(256)
            commands += ["-c", f"write -q -P {pattern} {offset} {count}"]
            shown = min(count, size - offset)
            if shown > 0:
                subject.model.write(bytes([pattern]) * shown, offset)
        if commands:
            tool("qemu-io", "-f", format, *commands, path)
        below = (path, format)
    return below


def checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > 64 * MIB:
            return os.stat(path).st_mtime_ns            # sparse and large: the time of the last change will do
        while piece := file.read(MIB):
            total = hash((total, piece))
    return total


def take_snapshot(subject: Subject, name: str) -> None:
    tool("qemu-img", "snapshot", "-c", name, subject.path)
    subject.kept[name] = subject.model.keep(subject.path.with_name(f"{name}.raw"))


# ---- who changes the image ----


def by_qemu(subject: Subject, operations: Sequence[Operation], *, die: bool = False) -> None:
    """Let qemu-io do them. `die`: it then aborts, and leaves the image as it is after a flush."""
    commands: list[str] = []
    for number, operation in enumerate(operations):
        where = f"{operation.offset} {operation.length}"
        if operation.kind == "compressed" and subject.discards_nothing():
            operation = replace(operation, kind="write")
        if operation.kind == "compressed":      # it does not overwrite
            commands += ["-c", f"discard -q {where}"]
        if operation.kind in ("write", "compressed"):
            source = subject.path.with_name(f"pattern{number}")
            source.write_bytes(operation.data)
            flag = "-c " if operation.kind == "compressed" else ""
            command = f"write -q {flag}-s {source} {where}"
        elif operation.kind == "flush":
            command = "flush"
        else:
            words = {"zero": "write -q -z", "unmap": "write -q -z -u", "discard": "discard -q"}
            command = f"{words[operation.kind]} {where}"
        commands += ["-c", command]
        subject.apply_to_model(operation, effective=not subject.discards_nothing())
    if die:
        commands += ["-c", "flush", "-c", "abort"]
    if commands:
        output = tool("qemu-io", "-d", "unmap", "-f", "qcow2", *commands, subject.path, expect=(-6,) if die else (0,))
        assert "rror" not in output and "failed" not in output, output


def by_us(image: pyfleece.Image, subject: Subject, operations: Sequence[Operation]) -> None:
    """Do them with our driver, and read back some of it."""
    for operation in operations:
        one_by_us(image, subject, operation)
        subject.apply_to_model(operation, effective=not subject.discards_nothing())
        if subject.rng.random() < 0.3:
            offset, length = subject.place()
            assert image.pread(length, offset) == subject.model.read(length, offset), f"after {operation}: {offset}"


def one_by_us(image: pyfleece.Image, subject: Subject, operation: Operation) -> None:
    if operation.kind == "write":
        image.pwrite(operation.data, operation.offset)
    elif operation.kind in ("zero", "unmap"):
        image.zero(operation.length, operation.offset)
    elif operation.kind == "compressed":
        if subject.discards_nothing():          # a compressed write is for clusters that are not allocated
            image.pwrite(operation.data, operation.offset)
        else:
            image.discard(operation.length, operation.offset)
            image.write_compressed(operation.data, operation.offset)
    elif operation.kind == "flush":
        image.flush()
    else:
        try:
            image.discard(operation.length, operation.offset)
        except pyfleece.ImageError as error:
            if not subject.discards_nothing():
                raise
            assert "version 2" in str(error), error


# ---- what must hold ----


def verify(subject: Subject, image: pyfleece.Image | None = None) -> None:
    """qemu-img finds no fault and no leak, and what the model has, now and in each internal snapshot; nobody touched a
    backing file. `image`: our driver has it open, and flushed it; then there may be leaks, since what was taken out of
    the map keeps its refcount until that is durable.
    """
    share = ["-U"] if image is not None else []
    tool("qemu-img", "check", "-q", "-f", "qcow2", *share, subject.path, expect=(0,) if image is None else (0, 3))
    command = ["qemu-img", "compare", "-q", *share, "-f", "qcow2", "-F", "raw", subject.path, subject.model.path]
    tool(*command)
    assert not header_of(subject.path).incompatible & (DIRTY | CORRUPT) or subject.options.lazy_refcounts
    for name, kept in subject.kept.items():
        out, which = subject.path.with_name("snapshot.out"), f"snapshot.name={name}"
        tool("qemu-img", "convert", *share, "-f", "qcow2", "-l", which, "-O", "raw", subject.path, out)
        tool("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", out, kept)
        out.unlink()
    for path, known in subject.backing.items():
        assert checksum(path) == known, f"{path.name} was changed"


def verify_reading(image: pyfleece.Image, subject: Subject) -> None:
    """Our driver reads what the model has, and its extents are true."""
    position = 0
    for extent in image.extents():
        assert extent.offset == position, "a gap"
        position += extent.length
        if extent.kind == "zero":
            check_zeros(subject.model, extent.offset, extent.length)
    assert position == image.size == subject.size
    for start, end in subject.hot:
        while start < end:
            length = min(end - start, 4 * MIB + 12345)
            got, wanted = image.pread(length, start), subject.model.read(length, start)
            if got != wanted:
                at = next(i for i in range(length) if got[i] != wanted[i])
                raise AssertionError(f"byte {start + at} is {got[at]:#x}, not {wanted[at]:#x}")
            start += length


def check_zeros(model: Model, offset: int, length: int) -> None:
    """Only what the model's file has blocks for need be read."""
    end = offset + length
    while offset < end:
        try:
            start = os.lseek(model.fd, offset, os.SEEK_DATA)
        except OSError:                         # a hole up to the end
            return
        if start >= end:
            return
        stop = min(os.lseek(model.fd, start, os.SEEK_HOLE), end)
        while start < stop:
            piece = model.read(min(stop - start, MIB), start)
            assert piece.count(0) == len(piece), f"extents call [{offset}, {end}) zeros; there is data from {start} on"
            start += len(piece)
        offset = stop


# ---- the header ----


@dataclass(frozen=True)
class Header:
    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int
    autoclear: int
    refcount_order: int


def parse_header(data: bytes) -> Header:
    fixed = struct.unpack_from(">4sIQIIQIIQQIIQ", data)
    assert fixed[0] == b"QFI\xfb"
    version = fixed[1]
    incompatible, _, autoclear, order = struct.unpack_from(">QQQI", data, 72) if version > 2 else (0, 0, 0, 4)
    return Header(
        version=version,
        cluster_bits=fixed[4],
        size=fixed[5],
        l1_size=fixed[7],
        l1_offset=fixed[8],
        reftable_offset=fixed[9],
        reftable_clusters=fixed[10],
        snapshots=fixed[11],
        snapshots_offset=fixed[12],
        incompatible=incompatible,
        autoclear=autoclear,
        refcount_order=order,
    )


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return parse_header(file.read(512))


def info(path: Path) -> dict[str, Any]:
    found = json.loads(tool("qemu-img", "info", "-U", "--output=json", path))
    assert isinstance(found, dict)
    return found


def blocks(path: Path) -> int:
    """Bytes that the file occupies."""
    os.sync()
    return os.stat(path).st_blocks * 512


def make_race_image(path: Path, options: str, backing: bool = False) -> Path:
    """For tests/c/qcow2_race.c: 32 clusters and a bit, half of them with data, in part shared with a snapshot."""
    cluster = int(options.partition("cluster_size=")[2].partition(",")[0])
    size = 32 * cluster + 4 * SECTOR
    path.unlink(missing_ok=True)
    extra: list[str] = []
    if backing:
        below = path.with_name("below.raw")
        below.write_bytes(random.Random(1).randbytes(size - 3 * cluster // 2))
        extra = ["-b", below.name, "-F", "raw"]
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *extra, path, f"{size}")
    tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 3 0 {16 * cluster}", path)
    tool("qemu-img", "snapshot", "-c", "before", path)
    tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 4 {12 * cluster} {cluster}", path)
    return path

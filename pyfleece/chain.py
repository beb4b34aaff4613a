"""Chains of backups: a directory with the states of one disk at several points in time.

    pyfleece.json                   what this directory is
    000001-20260102T030405Z.qcow2   an image: a full backup, or an overlay of the one before
    000001-20260102T030405Z.digests digests of what was copied into it
    000001-20260102T030405Z.json    the manifest: this point exists, is complete, and on stable storage
    000002-20260103T030405Z.qcow2   ...

Each incremental has the image before it as its backing file, so QEMU and `qemu-img convert` read any point without us.

How it stays right, whenever it is interrupted:
- A point's manifest is written last, after image and digests are on stable storage. What has no manifest is no point,
  and is removed by the next backup if it is newer than all points.
- Which changes an incremental must hold is told by a dirty bitmap named after the point that it is relative to. The
  bitmap for the next one is added before the cut, so it has a little more, never less; the old one is removed after the
  manifest was written. Interrupted before that, the old bitmap is still there, with everything since the old point;
  after it, the new one is. If the newest point is deleted by hand, there is no bitmap for the one before it, and the
  next backup is a full one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from pyfleece import digests
from pyfleece import image as _image
from pyfleece._binding import Extent
from pyfleece.backup import ProgressLike, Result, backup
from pyfleece.disk import Disk
from pyfleece.errors import Error, FormatError, from_os_error, invalid
from pyfleece.image import Image, Path

_ABOUT = "pyfleece.json"
_LOCK = ".lock"
_NAME = re.compile(r"(\d{6,})-\d{8}T\d{6}Z")
_LONGEST_MANIFEST = 1 << 20             # bytes
_LONGEST_CHAIN = 48                     # images; a driver opens 64 at most
_FORMATS = ("qcow2", "raw")
_DIGESTS = (".digests", ".full-digests")        # of what was copied first, and when it was made a full one
_SUFFIXES = (".qcow2", ".raw", *_DIGESTS)


class ChainError(Error):
    """A directory of backups is not as it should be, or has no such point."""


@dataclass(frozen=True)
class Point:
    """One backup, as its manifest tells."""

    version: int
    uuid: str
    sequence: int           # the first has 1
    time: str               # of the cut, UTC, as in 2026-01-02T03:04:05Z
    kind: str               # "full" or "incremental"
    reason: str             # why it is a full one; else ""
    parent: str | None      # the uuid of the point that an incremental is an overlay of
    source: str             # the path of the image that was backed up
    size: int               # of the disk, bytes
    image: str              # file name, in the same directory
    format: str             # of the image
    digests: str            # file name
    digest_algorithm: str
    digests_digest: str     # of that file, hexadecimal
    bitmap: str | None      # the dirty bitmap that has the changes since
    granularity: int | None # of that bitmap, bytes
    data_bytes: int         # copied
    zero_bytes: int

    @property
    def name(self) -> str:
        return os.path.splitext(self.image)[0]

    def check(self) -> None:
        """`FormatError` unless each field is what it must be: manifests may come from anywhere."""
        for name, kind in Point.__annotations__.items():
            allowed = {"int": (int,), "str": (str,), "str | None": (str, type(None)), "int | None": (int, type(None))}
            value = getattr(self, name)
            if type(value) not in allowed[kind]:
                raise FormatError(f"{name} is {value!r}")
        for name in ("image", "digests"):
            file = getattr(self, name)
            if not _NAME.fullmatch(os.path.splitext(file)[0]) or os.path.basename(file) != file:
                raise FormatError(f"{name} is {file!r}, which is no name of a file of ours")
        if self.version != 1:
            raise FormatError(f"version {self.version} is not known")
        if self.kind not in ("full", "incremental") or (self.kind == "full") != (self.parent is None):
            raise FormatError(f"its kind is {self.kind!r}, and its parent {self.parent!r}")
        if self.format not in _FORMATS or not 0 <= self.size < 1 << 63 or self.sequence < 1:
            raise FormatError(f"format {self.format!r}, size {self.size}, sequence {self.sequence}")
        if self.kind == "incremental" and self.format != "qcow2":
            raise FormatError("a raw image can't be an overlay")


@dataclass
class Addition:
    """A point that is being added to a directory of backups. See `Repository.adding`."""

    repository: Repository
    disk: Disk
    parent: Point | None
    reason: str             # why it is going to be a full one; else ""
    uuid: str
    sequence: int
    bitmap: str             # that records what the next one needs
    granularity: int
    full_format: str
    compress: bool | str

    @property
    def since(self) -> str | None:
        """The dirty bitmap to cut with; None: a full snapshot."""
        return self.parent.bitmap if self.parent else None

    def begin(self) -> tuple[str, dict[str, Any]]:
        """After the cut: the target for `Backup`, and the options that it needs."""
        self._time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._name = f"{self.sequence:06d}-{re.sub('[-:]', '', self._time)}"
        self._format = "qcow2" if self.parent else self.full_format
        self._collector = digests.Collector(digests.best_algorithm())
        return self.repository._path(f"{self._name}.{self._format}"), {
            "format": self._format,
            "compress": self.compress if self._format == "qcow2" else False,
            "backing": self.parent.image if self.parent else None,
            "backing_format": self.parent.format if self.parent else None,
            "skip_lost": False,
            "on_piece": self._collector,
        }

    def finish(self, result: Result) -> Point:
        """The image is complete: make it a point."""
        point = Point(
            version=1,
            uuid=self.uuid,
            sequence=self.sequence,
            time=self._time,
            kind="incremental" if self.parent else "full",
            reason=self.reason,
            parent=self.parent.uuid if self.parent else None,
            source=self.disk.source.name,
            size=self.disk.size,
            image=f"{self._name}.{self._format}",
            format=self._format,
            bitmap=self.bitmap,
            granularity=self.granularity,
            data_bytes=result.data_bytes,
            zero_bytes=result.zero_bytes,
            **self.repository._write_digests(self._name, self._collector),
        )
        self.repository._publish_point(point)
        return point


@dataclass(frozen=True)
class Damage:
    """What a verification found wrong with a point."""

    point: str                              # its name
    problem: str                            # a sentence; "" if it is about ranges
    ranges: list[Extent] = field(default_factory=list)      # "wrong" and "unreadable", in the disk


class Repository:
    """A directory of backups of one disk. `create`: make it if it is not there.

    Methods raise `ChainError`, `FormatError` for damaged files, and what `backup` raises. Several programs may read at
    the same time; those that change something wait for each other.
    """

    def __init__(self, directory: Path, *, create: bool = False) -> None:
        self.directory = os.fsdecode(directory)
        path = self._path(_ABOUT)
        try:
            if create:
                os.makedirs(self.directory, exist_ok=True)
                if not os.path.exists(path):
                    ours = (_LOCK, f"{_ABOUT}.partial")
                    foreign = [name for name in os.listdir(self.directory) if name not in ours]
                    if foreign:
                        raise ChainError(f"{self.directory} has {foreign[0]} in it, and is no directory of backups")
                    self._publish(_ABOUT, _dump({"version": 1, "uuid": str(uuid.uuid4())}))
            about = self._read_json(_ABOUT)
        except FileNotFoundError as error:
            raise ChainError(f"{self.directory} is no directory of backups: it has no {_ABOUT}") from error
        except OSError as error:
            raise from_os_error(error, f"cannot use {self.directory}") from error
        if about.get("version") != 1 or not isinstance(about.get("uuid"), str):
            raise FormatError(f"{path}: version {about.get('version')!r} is not known")
        self.uuid: str = about["uuid"]

    # ---- what is there ----

    @property
    def points(self) -> list[Point]:
        """All points, the oldest first."""
        found = []
        for name in sorted(os.listdir(self.directory)):
            stem, suffix = os.path.splitext(name)
            if suffix == ".json" and _NAME.fullmatch(stem):
                point = self._read_point(name)
                if point.name != stem:
                    raise FormatError(f"{self._path(name)} is the manifest of {point.name}")
                found.append(point)
        found.sort(key=lambda point: point.sequence)
        for point, after in zip(found, found[1:]):
            if point.sequence == after.sequence or point.uuid == after.uuid:
                raise FormatError(f"{self.directory}: {point.name} and {after.name} claim to be the same point")
        return found

    def find(self, which: str = "latest") -> Point:
        """A point by its name, by the beginning of its name or UUID that no other has, or "latest"."""
        points = self.points
        if not points:
            raise ChainError(f"{self.directory} has no backups")
        if which == "latest":
            return points[-1]
        fits = [p for p in points if which and (p.name.startswith(which) or p.uuid.startswith(which))]
        exact = [p for p in fits if which in (p.name, p.uuid)]
        if len(exact or fits) != 1:
            names = ", ".join(point.name for point in (fits or points)[-5:])
            raise ChainError(f"{self.directory}: {'several points fit' if fits else 'no point is'} {which!r}: {names}")
        return (exact or fits)[0]

    def chain(self, point: Point) -> list[Point]:
        """The point and what it stands on, down to a full one."""
        by_uuid = {p.uuid: p for p in self.points}
        chain = [point]
        while chain[-1].parent is not None:
            parent = by_uuid.get(chain[-1].parent)
            if parent is None or parent.sequence >= chain[-1].sequence:
                raise ChainError(f"{self.directory}: {chain[-1].name} stands on a point that is not there")
            chain.append(parent)
        return chain

    def open(self, point: Point | str = "latest") -> Image:
        """The disk as it was at that point."""
        chosen = self.find(point) if isinstance(point, str) else point
        image = _image.open(self._path(chosen.image), format=chosen.format)
        # qcow2 rounds sizes up to 512 bytes
        if not chosen.size <= image.size < chosen.size + 512:
            image.close()
            raise FormatError(f"{image.name} has {image.size} bytes, and {chosen.name} {chosen.size}")
        return image

    # ---- a backup ----

    def backup(
        self,
        disk: Disk,
        *,
        incremental: bool = True,
        format: str = "qcow2",
        compress: bool | str = False,
        granularity: int = 65536,
        persistent: bool | None = None,
        write_intent: bool = False,
        workers: int | None = None,
        speed: int | None = None,
        progress: ProgressLike = None,
        tell: Callable[[str], None] | None = None,
        **snapshot: Any,
    ) -> tuple[Point, Result]:
        """Add a point: an incremental if that is possible, else a full one; its `reason` says why.

        `format`: "qcow2" or "raw", of full ones; incrementals are qcow2. `compress`: as in `pyfleece.backup`.
        `granularity`: of the dirty bitmap that the next incremental will need. `persistent`: keep that in the disk's
        bitmap file (None: if the disk has a place for one), `write_intent`: as in `Disk.bitmaps.add`.
        `tell` is called with a sentence when it is going to be a full backup although an incremental was wanted.
        `snapshot`: options of `Disk.snapshot`.
        """
        with self.adding(
            disk,
            incremental=incremental,
            format=format,
            compress=compress,
            granularity=granularity,
            persistent=persistent,
            write_intent=write_intent,
        ) as addition:
            if tell is not None and incremental and addition.parent is None:
                tell(addition.reason)
            with disk.snapshot(bitmap=addition.since, **snapshot) as cut:
                path, options = addition.begin()
                result = backup(cut, path, workers=workers, speed=speed, progress=progress, **options)
                point = addition.finish(result)
        return point, result

    @contextmanager
    def adding(
        self,
        disk: Disk,
        *,
        incremental: bool = True,
        format: str = "qcow2",
        compress: bool | str = False,
        granularity: int = 65536,
        persistent: bool | None = None,
        write_intent: bool = False,
    ) -> Iterator[Addition]:
        """The parts of `backup`, for those who cut several disks at once: enter before the cut, and leave, by the
        exception if there is one, when `Addition.finish` was called and the snapshot is closed.
        """
        if format not in _FORMATS:
            raise invalid(f"format is {format!r}; it can be {', '.join(_FORMATS)}")
        if persistent is None:
            persistent = disk.bitmaps.file is not None
        with self._locked(fcntl.LOCK_EX):
            points = self.points
            self._tidy(points)
            parent, reason = self._parent(disk, points) if incremental else (None, "asked for")
            new = str(uuid.uuid4())
            sequence = points[-1].sequence + 1 if points else 1
            bitmap = self._bitmap_prefix + new
            disk.bitmaps.add(bitmap, granularity, persistent=persistent, write_intent=persistent and write_intent)
            try:
                yield Addition(self, disk, parent, reason, new, sequence, bitmap, granularity, format, compress)
            except BaseException:
                disk.bitmaps.remove(bitmap)
                raise
            self._remove_bitmaps(disk, keep=bitmap)

    def _parent(self, disk: Disk, points: list[Point]) -> tuple[Point | None, str]:
        """The point that an incremental can be made on; or None, and why not."""
        if not points:
            return None, "there is no backup yet"
        last = points[-1]
        if last.size != disk.size:
            return None, f"the disk has {disk.size} bytes now, and had {last.size}"
        if last.bitmap is None or last.bitmap not in disk.bitmaps:
            return None, f"the disk has no dirty bitmap with the changes since {last.name}"
        bitmap = disk.bitmaps[last.bitmap]
        if bitmap.inconsistent:
            return None, f"the dirty bitmap with the changes since {last.name} can't be trusted: {bitmap.problem}"
        try:
            if len(self.chain(last)) >= _LONGEST_CHAIN:
                return None, f"{last.name} stands on {_LONGEST_CHAIN - 1} others already"
            self.open(last).close()
        except Error as error:
            return None, f"{last.name} can't be built upon: {error}"
        return last, ""

    @property
    def _bitmap_prefix(self) -> str:
        return f"backup-{self.uuid[:8]}-"

    def _remove_bitmaps(self, disk: Disk, keep: str) -> None:
        for name in list(disk.bitmaps):
            if name.startswith(self._bitmap_prefix) and name != keep:
                disk.bitmaps.remove(name)

    def _tidy(self, points: list[Point]) -> None:
        """Remove what an interrupted backup or prune left."""
        first, last = (points[0].sequence, points[-1].sequence) if points else (0, 0)
        if points and points[0].parent is not None:
            first = 0                   # it stands on what somebody took out of the list: that is not ours to drop
        digests_of = {point.name: point.digests for point in points}
        for name in os.listdir(self.directory):
            match = _NAME.match(name)
            if match is None:
                continue
            stem, suffix = os.path.splitext(name)
            half = suffix in (".partial", ".full") or int(match[1]) > last
            dropped = suffix in _SUFFIXES and _NAME.fullmatch(stem) and int(match[1]) < first
            replaced = suffix in _DIGESTS and name != digests_of.get(stem, name)
            if half or dropped or replaced:
                os.unlink(self._path(name))

    # ---- verify ----

    def verify(
        self,
        point: Point | str | None = None,
        *,
        workers: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Damage]:
        """Read what a point stands on, or with None everything, and compare it with the digests. Empty: all is well.
        `progress` is called with the bytes that were read since the last call.
        """
        with self._locked(fcntl.LOCK_SH):
            chosen = self.find(point) if isinstance(point, str) else point
            todo = self.points if chosen is None else self.chain(chosen)
            damages = []
            for one in todo:
                try:
                    self.chain(one)
                    ranges = self._verify_point(one, workers, progress)
                    if ranges:
                        damages.append(Damage(one.name, "", ranges))
                except (Error, OSError) as error:
                    damages.append(Damage(one.name, str(error)))
            return damages

    def _verify_point(
        self, point: Point, workers: int | None, progress: Callable[[int], None] | None
    ) -> list[Extent]:
        path = self._path(point.digests)
        with open(path, "rb") as file:
            data = file.read()
        if digests.hasher(point.digest_algorithm)(data).hex() != point.digests_digest:
            raise FormatError(f"{path} is damaged: it is not what the manifest says")
        with self.open(point) as image:
            algorithm, records = digests.decode(data, image.size, path)
            return digests.verify(image, algorithm, records, workers=workers, progress=progress)

    # ---- dropping old points ----

    def prune(self, keep: int, *, workers: int | None = None) -> list[str]:
        """Drop all but the newest `keep` points; returns the names of those that went. If the oldest that stays is an
        incremental, it is made a full one first: its image is replaced, in one step, by one with the same content that
        stands on nothing.
        """
        if keep < 1:
            raise invalid("at least one point is kept")
        with self._locked(fcntl.LOCK_EX):
            points = self.points
            self._tidy(points)
            old, kept = points[:-keep], points[-keep:]
            if not old:
                return []
            # What stays may have been full before, or stand on what goes; only the oldest of a chain can be the latter.
            going = {point.uuid for point in old}
            for point in kept:
                if point.parent in going:
                    self._make_full(point, workers)
            for point in reversed(old):         # nothing ever stands on what is not there
                self._remove_point(point)
            self._tidy(self.points)
            return [point.name for point in old]

    def _make_full(self, point: Point, workers: int | None) -> None:
        collector = digests.Collector(digests.best_algorithm())
        path = self._path(point.image)
        with self.open(point) as image, Disk(image, bitmap_file=False) as disk, disk.snapshot("memory") as whole:
            # Beside it, then over it: the backup would refuse to replace what it reads.
            temporary = f"{path}.full"
            result = backup(whole, temporary, format="qcow2", workers=workers, on_piece=collector)
        written = self._write_digests(point.name, collector, ".full-digests")
        changed = {
            **asdict(point),
            **written,
            "kind": "full",
            "parent": None,
            "reason": "the points before it were dropped",
            "data_bytes": result.data_bytes,
            "zero_bytes": result.zero_bytes,
        }
        # The old manifest and its digests, which are about a part, are true of the new image: it has the same content.
        os.replace(temporary, path)
        self._sync()
        self._publish_point(Point(**changed))
        with suppress(FileNotFoundError):
            os.unlink(self._path(point.digests))

    def _remove_point(self, point: Point) -> None:
        for name in (f"{point.name}.json", point.digests, point.image):
            try:
                os.unlink(self._path(name))
            except FileNotFoundError:
                pass
            except OSError as error:
                raise from_os_error(error, f"cannot remove {self._path(name)}") from error
            self._sync()

    # ---- files ----

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        with open(path, "rb") as file:
            data = file.read(_LONGEST_MANIFEST + 1)
        try:
            value = json.loads(data) if len(data) <= _LONGEST_MANIFEST else None
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise FormatError(f"{path} is damaged: it is no object of JSON, or far too long")
        return value

    def _read_point(self, name: str) -> Point:
        value = self._read_json(name)
        try:
            point = Point(**value)
            point.check()
        except (TypeError, FormatError) as error:
            raise FormatError(f"{self._path(name)} is no manifest: {error}") from error
        return point

    def _write_digests(self, name: str, collector: digests.Collector, suffix: str = ".digests") -> dict[str, Any]:
        """Write the file, durably; what the manifest says of it."""
        data = digests.encode(collector.algorithm, collector.records())
        self._publish(f"{name}{suffix}", data)
        return {
            "digests": f"{name}{suffix}",
            "digest_algorithm": collector.algorithm,
            "digests_digest": digests.hasher(collector.algorithm)(data).hex(),
        }

    def _publish_point(self, point: Point) -> None:
        point.check()
        self._publish(f"{point.name}.json", _dump(asdict(point)))

    def _publish(self, name: str, data: bytes) -> None:
        """A file is there with all of its content, durably, or not at all."""
        path = self._path(name)
        try:
            with open(f"{path}.partial", "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.partial", path)
            self._sync()
        except OSError as error:
            raise from_os_error(error, f"cannot write {path}", side="target") from error

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Alone (LOCK_EX), or with others that read (LOCK_SH)."""
        try:
            fd = os.open(self._path(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if how == fcntl.LOCK_EX:
                raise from_os_error(error, f"cannot lock {self.directory}") from error
            yield                       # read-only storage: nobody changes anything
            return
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<Repository {self.directory!r}>"


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def split(text: str) -> tuple[str, str]:
    """DIR@POINT as (DIR, POINT); DIR alone means its latest point."""
    directory, at, point = text.rpartition("@")
    if at and point and not os.path.isdir(text):
        return directory, point
    return text, "latest"

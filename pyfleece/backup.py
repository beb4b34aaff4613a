"""Backups: copying a snapshot to a target, and discarding from the snapshot what was copied.

Each backup is watched by one Python thread, which waits for the C workers (or, for file objects, takes their chunks
and writes them), then makes the target durable and gives it its name. Whoever waits for a backup waits for that
thread, in a wait that Ctrl-C interrupts at once.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar, Union

from pyfleece import _binding
from pyfleece._binding import Extent, PieceHook, Resource, call, call_code, positive
from pyfleece._native import ffi, lib
from pyfleece.chunks import Chunks, lost_ranges
from pyfleece.errors import CancelledError, ClosedError, ForkedError, invalid
from pyfleece.image import BackingRoot, Path
from pyfleece.progress import Bar, Progress, total_of
from pyfleece.snapshot import Snapshot
from pyfleece.targets import Target, TargetLike, TargetOptions, open_target

# Called with a Progress; or "bar": a bar on stderr if that is a terminal.
ProgressLike = Union[Callable[[Progress], Any], str, None]

_Item = TypeVar("_Item")

_SLICE = 100_000_000        # ns that the watching thread waits in C at a time
_REPORT_EVERY = 0.1         # seconds
_CANCEL_WAIT = 0.6          # seconds: cancel() returns within one, on a busy machine too
_INTERRUPTED_WAIT = 0.1     # after Ctrl-C we are more in a hurry


@dataclass(frozen=True)
class Result:
    """What a backup did. Sizes are bytes."""

    total: int                  # visited: the disk, or what its dirty bitmap holds
    data_bytes: int             # copied
    zero_bytes: int             # found to be zeros
    lost_bytes: int             # left out, see `lost`
    lost: list[Extent]          # ranges left out because they were lost (policy "lose-range") or discarded
    seconds: float
    retries: int                # reads repeated because a guest write came in between
    fleecing_peak: int          # the most that the fleecing image held
    staged_peak: int            # the most that was held in memory
    reflinked_bytes: int = 0    # of data_bytes: shared with the source, see `reflink`

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.total / self.seconds if self.seconds else 0.0


class Backup(Resource):
    """A backup in the background: `start`, `wait`, `cancel`. A context manager: entering starts it, leaving cancels
    it if it still runs.

    Arguments are those of `backup`. All methods may be called by any thread. Closing the snapshot cancels it.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        target: TargetLike,
        *,
        granularity: int | None = None,
        workers: int | None = None,
        speed: int | None = None,
        discard_source: bool = True,
        progress: ProgressLike = None,
        skip_lost: bool | None = None,
        target_is_zero: bool = False,
        format: str | None = None,
        compress: bool | str = False,
        target_cluster_size: int | None = None,
        backing: Path | None = None,
        backing_format: str | None = None,
        backing_root: BackingRoot = None,
        on_piece: PieceHook | None = None,
        reflink: bool = False,
    ) -> None:
        super().__init__()
        given = type(snapshot).__name__
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a backup is made of a Snapshot, not of a {given}; of several at once: backup_group")
        self._snapshot = snapshot
        self._target_like = target
        self._options = TargetOptions(
            format=format,
            target_is_zero=target_is_zero,
            compress=compress,
            cluster_size=target_cluster_size,
            backing=backing,
            backing_format=backing_format,
            backing_root=backing_root,
        )
        self._granularity = positive(granularity, "granularity")
        self._workers = positive(workers, "workers", 32)
        self._speed = positive(speed, "speed")
        self._discard = discard_source
        self._reflink = bool(reflink)
        if self._reflink and (compress or on_piece is not None):
            what = "compress" if compress else "on_piece"
            raise invalid(f"reflink shares blocks without reading them, and {what} needs their bytes: choose one")
        self._skip_lost = snapshot.on_cbw_error == "lose-range" if skip_lost is None else skip_lost
        self._report = _reporter(progress)
        self._process = os.getpid()
        self._started = False
        self._publishes = True          # False: a group does it, when all of its jobs are sealed
        self._on_piece = on_piece
        self._piece_failures: list[BaseException] = []
        self._piece_number = 0
        self._done = threading.Event()
        # Written by the watching thread before `_done` is set.
        self._failure: BaseException | None = None
        self._result: Result | None = None
        self._final: Progress | None = None
        # Set by cancel(), before it tells C.
        self._cancelled = False
        self._waited = False            # cancel() did, as long as it may

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def start(self) -> None:
        """Open the target and start. Raises what is wrong with the arguments or the target; later failures come from
        `wait`.
        """
        self._check_process()
        if self._started:
            raise invalid("the backup was started before")
        if self._closed:
            raise ClosedError("the backup is closed")
        inputs = [self._snapshot.disk.source]
        if self._snapshot.fleecing is not None:
            inputs.append(self._snapshot.fleecing)
        self._target = open_target(self._target_like, self._snapshot.size, self._options, inputs)
        try:
            self._start_job(self._target)
        except BaseException as error:
            self._target.abandon()
            _binding.close_after(self._target.release, error)
            raise
        self._started = True
        self._snapshot._users.add(self)
        threading.Thread(target=self._watch, name="pyfleece-backup", daemon=True).start()

    def wait(self, timeout: float | None = None) -> Result:
        """Wait until it is done, return the result or raise its first failure. TimeoutError: it still runs after
        `timeout` seconds.

        The progress callback is called from here, about ten times a second and once at the end. What it raises ends
        the wait, not the backup.
        """
        self._check_process()
        if not self._started:
            raise invalid("the backup was not started")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _REPORT_EVERY if deadline is None else max(min(_REPORT_EVERY, deadline - time.monotonic()), 0)
            if self._done.wait(left):
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the backup still runs after {timeout:g} s")
            if self._report is not None:
                self._report(self.progress)
        if self._failure is not None:
            raise self._failure
        if self._report is not None:
            self._report(self.progress)
        assert self._result is not None
        return self._result

    def cancel(self) -> bool:
        """End it: a new target file is removed. Returns within a second; False: something still hangs in the kernel,
        and ends by itself later. Does nothing when it is over.
        """
        self._check_process()
        if not self._started:
            return True
        self._ask_to_end()
        self._waited = True
        return self._done.wait(_CANCEL_WAIT)

    @property
    def done(self) -> bool:
        """Is it over, one way or another?"""
        return self._done.is_set()

    @property
    def result(self) -> Result | None:
        """The result; None while it runs. Raises its first failure."""
        if not self._done.is_set():
            return None
        if self._failure is not None:
            raise self._failure
        return self._result

    @property
    def progress(self) -> Progress:
        """How far it is."""
        self._check_process()
        if not self._started:
            return Progress(self._snapshot.size, 0, 0, 0, 0, 0.0, 0, 0, False)
        try:
            if self._final is None:
                return self._read_progress()
        except ClosedError:
            if self._final is None:     # it was kept just before the job was closed
                raise
        return self._final

    @property
    def speed(self) -> int | None:
        """The limit in bytes per second, or None. Can be changed at any time; no effect once it is over."""
        return self._speed or None

    @speed.setter
    def speed(self, speed: int | None) -> None:
        self._check_process()
        self._speed = positive(speed, "speed")
        if self._started and not self._done.is_set():
            with suppress(ClosedError):      # it ended meanwhile
                call(lib.fl_backup_set_speed, self._job, self._speed)

    # ---- the job ----

    def _start_job(self, target: Target) -> None:
        self._chunks: Chunks | None = None
        if target.image is None:
            self._chunks = Chunks(
                self._snapshot._handle,
                granularity=self._granularity or None,
                workers=self._workers or None,
                buffers=None,
                discard=self._discard,
                ack_timeout=1e9,                # we acknowledge all that we get
                skip_lost=self._skip_lost,
                speed=self._speed or None,
            )
            self._job = self._chunks._job.handle
            return
        options = ffi.new("fl_backup_options *")
        options.granularity = self._granularity
        options.workers = self._workers
        options.speed = self._speed
        options.discard = self._discard
        options.target_is_zero = target.is_zero
        options.compress = bool(self._options.compress)
        options.skip_lost = self._skip_lost
        options.reflink = self._reflink
        if self._on_piece is not None:
            self._piece_number = _binding.add_piece_hook(self._on_piece, self._piece_failures)
            options.on_piece, options.piece_context = lib.pyfleece_piece, self._piece_number
        snapshot, image = self._snapshot._handle, target.image._handle
        self._job = _binding.make("fl_backup **", lib.fl_backup_free, lib.fl_backup_start, snapshot, image, options)

    def _watch(self) -> None:
        """The body of the watching thread."""
        try:
            if self._chunks is not None:
                self._pump(self._chunks)
            while call_code(lib.fl_backup_wait, self._job, _SLICE, expected=(-lib.FL_ERUNNING,)):
                self._check_cancelled()
            self._target.seal()
            self._check_cancelled()
            result = self._make_result()
            if self._publishes:
                self._target.publish()
            self._result = result
        except BaseException as error:
            self._target.abandon()
            cancelled = self._cancelled and isinstance(error, (CancelledError, ClosedError))
            self._failure = CancelledError("the backup was cancelled") if cancelled else error
            if self._piece_failures and not cancelled:
                self._failure = self._piece_failures[0]
        finally:
            self._tidy()
            _binding.drop_piece_hook(self._piece_number)
            self._done.set()

    def _pump(self, chunks: Chunks) -> None:
        """Write the chunks, and zeros where there are none: what was lost, or is outside of the dirty bitmap."""
        position = 0
        for chunk in chunks:
            self._write_zeros(position, chunk.offset)
            if self._on_piece is not None:
                self._on_piece(chunk.offset, chunk.length, chunk.buffer)
            self._target.write(chunk.offset, chunk.length, chunk.buffer)
            position = chunk.offset + chunk.length
            chunk.ack()
            self._check_cancelled()
        self._write_zeros(position, self._snapshot.size)

    def _write_zeros(self, offset: int, end: int) -> None:
        while offset < end:
            length = min(end - offset, _binding.PIECE)
            self._target.write(offset, length, None)
            self._check_cancelled()
            offset += length

    def _tidy(self) -> None:
        """End the C job, which holds on to snapshot and target. What fails here adds nothing to what is known."""
        # A group releases the targets of jobs that succeeded, when it has published them.
        release = self._target.release if self._publishes or self._failure is not None else None
        for step in (self._keep_progress, self._close_job, release):
            try:
                if step is not None:
                    step()
            except Exception as error:
                if self._failure is None and self._result is None:
                    self._failure = error

    def _keep_progress(self) -> None:
        self._final = self._read_progress()

    def _close_job(self) -> None:
        call(lib.fl_backup_close, self._job)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError("the backup was cancelled")

    def _publish(self) -> None:
        """For a group: after all of its jobs are sealed."""
        try:
            self._target.publish()
        finally:
            self._target.release()

    def _read_progress(self) -> Progress:
        raw = ffi.new("fl_progress *")
        call(lib.fl_backup_progress, self._job, raw)
        return Progress(
            total=raw.total,
            done=raw.done,
            data_bytes=raw.data_bytes,
            zero_bytes=raw.zero_bytes,
            lost_bytes=raw.lost_bytes,
            elapsed=raw.elapsed_ns / 1e9,
            retries=raw.retries,
            fleecing_bytes=raw.fleecing_bytes,
            finished=bool(raw.finished),
            reflinked_bytes=raw.reflinked_bytes,
        )

    def _make_result(self) -> Result:
        progress = self._read_progress()
        stats = self._snapshot.stats
        return Result(
            total=progress.total,
            data_bytes=progress.data_bytes,
            zero_bytes=progress.zero_bytes,
            lost_bytes=progress.lost_bytes,
            lost=lost_ranges(self._job),
            seconds=progress.elapsed,
            retries=progress.retries,
            fleecing_peak=stats.fleecing_peak,
            staged_peak=stats.staged_peak,
            reflinked_bytes=progress.reflinked_bytes,
        )

    def _ask_to_end(self) -> None:
        if not self._done.is_set():
            self._cancelled = True
            lib.fl_backup_cancel(self._job)
            self._target.abandon()      # its name at least, if the watching thread hangs

    def _close(self) -> None:
        self._check_process()
        if not self._started:
            return
        self._ask_to_end()
        self._done.wait(0 if self._waited else _CANCEL_WAIT)
        call(lib.fl_backup_close, self._job)
        if not self._publishes and self._done.is_set():
            self._target.abandon()
            self._target.release()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedError("the backup belongs to the parent process")

    def __enter__(self) -> Backup:
        if not self._started:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception) or not self._give_up():
            super().__exit__(kind, error, traceback)

    def _give_up(self) -> bool:
        """Ctrl-C: cancel, and do not wait for long. True: it hangs somewhere, and its own thread cleans up later."""
        if self._closed or not self._started:
            return False
        self._ask_to_end()
        self._closed = not self._done.wait(_INTERRUPTED_WAIT)
        return self._closed

    def __repr__(self) -> str:
        state = "closed" if self._closed else "done" if self.done else "running" if self._started else "not started"
        return f"<Backup of {self._snapshot.disk.source.name} {state}>"


def backup(
    snapshot: Snapshot,
    target: TargetLike,
    *,
    granularity: int | None = None,
    workers: int | None = None,
    speed: int | None = None,
    discard_source: bool = True,
    progress: ProgressLike = None,
    skip_lost: bool | None = None,
    target_is_zero: bool = False,
    format: str | None = None,
    compress: bool | str = False,
    target_cluster_size: int | None = None,
    backing: Path | None = None,
    backing_format: str | None = None,
    backing_root: BackingRoot = None,
    on_piece: PieceHook | None = None,
    reflink: bool = False,
) -> Result:
    """Copy a snapshot to a target, and return when the copy is on stable storage.

    `target`:
    - a path: a new, sparse image, raw or qcow2. It is written as `<target>.partial` and gets its name only when it is
      complete and durable; a file of that name is replaced then. After a failure or a cancel nothing is left.
      `format`: as in `open`, where the suffix does not tell.
    - the path of a block device: written in place. It must be as large as the disk at least.
    - an open Image: written in place, not closed. Unless `target_is_zero`, zeros of the disk are zeroed on it too.
    - any binary file object with a write(): a pipe, a socket's file, a compressor. It gets all bytes in order, zeros
      as well (also where something was left out), from another thread. It is flushed, not closed, and need not be able
      to seek.

    `granularity`: bytes that are copied, and discarded, at a time: a multiple of the snapshot's cluster size.
    `workers`: threads that copy; None: one a processor, 2 to 16 (storage far away may like more).
    `speed`: the limit in bytes per second. None: defaults.
    `discard_source`: discard from the snapshot what was copied: guest writes do not save it any more, and its space
    is freed.
    `progress`: called with a `Progress` about ten times a second, from the calling thread; "bar": a bar on stderr if
    that is a terminal.
    `skip_lost`: leave out what was lost or discarded, and list it in the result, instead of failing. None: if the
    snapshot's policy is "lose-range".
    `on_piece`: called with (offset, length, data) of each piece that is copied, by the threads that copy, several at
    once and in any order, while they hold it: for digests. `data` is valid during the call; None: zeros. What it raises
    ends the backup.

    `reflink`: where source and target are raw files of one file system that lets files share blocks (XFS, btrfs),
    share them in place of copying, as `cp --reflink` does: no byte is moved, and the backup takes no space until the
    source is written to. What cannot be shared is copied; `Result.reflinked_bytes` tells. Off by default, for these
    reasons. It is no second copy: a bad sector hits both. It does not put the guest first: while a range is shared,
    1 MiB at a time, guest writes anywhere on the source wait, also for the range's dirty data to reach the disk. And
    later writes to shared blocks go elsewhere, which tears the source into pieces: of a disk that is written to all
    over, each such backup is slower than the one before, and soon slower than a copy. Not with `compress` or
    `on_piece`, which need the bytes.

    For a new qcow2 image:
    `backing`, `backing_format`: a backing file, as `create` takes them: for an incremental, the backup before it. What
    is not in the snapshot's bitmap is then read from there, and so is what was left out by `skip_lost`.
    `backing_root`: as in `open`.
    `target_cluster_size`: None: 64 KiB.
    `compress`: True, or "zlib" or "zstd": write whole clusters compressed, by all workers at once. (For an open Image,
    whose clusters must not have been written before, in the way that it has: True.)

    Raises the first failure: its `side` tells where it was. Ctrl-C cancels the backup, and is raised when that is done.
    """
    with Backup(
        snapshot,
        target,
        granularity=granularity,
        workers=workers,
        speed=speed,
        discard_source=discard_source,
        progress=progress,
        skip_lost=skip_lost,
        target_is_zero=target_is_zero,
        format=format,
        on_piece=on_piece,
        reflink=reflink,
        compress=compress,
        target_cluster_size=target_cluster_size,
        backing=backing,
        backing_format=backing_format,
        backing_root=backing_root,
    ) as job:
        return job.wait()


@dataclass(frozen=True)
class GroupResult:
    """What a backup of several disks did. Everything is in the order of the snapshots."""

    uuid: uuid.UUID                     # of this backup of the whole group
    results: list[Result | None]        # None: this one failed
    seconds: float
    failures: dict[int, BaseException] = field(default_factory=dict)        # by index; only with all_or_nothing=False

    @property
    def ok(self) -> bool:
        return not self.failures


def backup_group(
    snapshots: Sequence[Snapshot],
    targets: Sequence[TargetLike] | Mapping[Snapshot, TargetLike],
    *,
    all_or_nothing: bool = True,
    granularity: int | None = None,
    workers: int | None = None,
    speed: int | None = None,
    discard_source: bool = True,
    progress: ProgressLike = None,
    skip_lost: bool | None = None,
    target_is_zero: bool = False,
    format: str | None = None,
    compress: bool | str = False,
    target_cluster_size: int | None = None,
    backing: Sequence[Path | None] | Mapping[Snapshot, Path | None] | None = None,
    backing_format: str | None = None,
    backing_root: BackingRoot = None,
    reflink: bool = False,
) -> GroupResult:
    """Back up several snapshots, usually of one instant (`snapshot_group`), as one job: all at the same time, so that
    no fleecing image grows while it waits for its turn.

    `targets`: one for each snapshot, in order, or a dict. Options are those of `backup`, for each of them (`speed`
    too); `backing`: one for each target, in order, or a dict.

    `all_or_nothing`: the first failure cancels the others and is raised, and new files get their names only when all
    of them are complete. Otherwise each one that succeeds is kept, and the result tells the failures.
    """
    snapshots = list(snapshots)
    targets = _one_each("targets", targets, snapshots)
    backings: Sequence[Path | None] = [None] * len(snapshots)
    if backing is not None:
        backings = _one_each("backing", backing, snapshots)
    report = _reporter(progress)
    begun = time.monotonic()
    jobs = [
        Backup(
            snapshot,
            target,
            granularity=granularity,
            workers=workers,
            speed=speed,
            discard_source=discard_source,
            skip_lost=skip_lost,
            target_is_zero=target_is_zero,
            format=format,
            compress=compress,
            target_cluster_size=target_cluster_size,
            backing=file,
            backing_format=backing_format if file is not None else None,
            backing_root=backing_root,
            reflink=reflink,
        )
        for snapshot, target, file in zip(snapshots, targets, backings)
    ]
    failures: dict[int, BaseException] = {}
    with ExitStack() as stack:
        stack.push(lambda kind, error, _: _end_all(jobs, error))
        for index, job in enumerate(jobs):
            job._publishes = not all_or_nothing
            try:
                job.start()
            except Exception as error:
                if all_or_nothing:
                    raise
                failures[index] = error
        _wait_for_all(jobs, failures, all_or_nothing, report)
        if all_or_nothing:
            _publish_all(jobs)
    results = [job._result for job in jobs]
    return GroupResult(uuid.uuid4(), results, time.monotonic() - begun, failures)


def _one_each(
    name: str, given: Sequence[_Item] | Mapping[Snapshot, _Item], snapshots: list[Snapshot]
) -> Sequence[_Item]:
    if isinstance(given, Mapping):
        if set(given) != set(snapshots):
            raise invalid(f"{name} must have each snapshot of the group, and no other")
        return [given[snapshot] for snapshot in snapshots]
    if isinstance(given, (str, bytes)) or len(given) != len(snapshots):
        raise invalid(f"{name} must be one for each of the {len(snapshots)} snapshots")
    return given


def _publish_all(jobs: list[Backup]) -> None:
    published: list[Backup] = []
    try:
        for job in jobs:
            job._publish()
            published.append(job)
    except BaseException:
        for job in published:
            job._target.withdraw()
        raise


def _wait_for_all(
    jobs: list[Backup],
    failures: dict[int, BaseException],
    all_or_nothing: bool,
    report: Callable[[Progress], Any] | None,
) -> None:
    """Until all that were started are done, or until the first failure where that is the end."""
    while True:
        running = [job for job in jobs if job._started and not job.done]
        for index, job in enumerate(jobs):
            if job.done and job._failure is not None and index not in failures:
                if all_or_nothing:
                    raise job._failure
                failures[index] = job._failure
        if report is not None:
            report(total_of([job.progress for job in jobs if job._started]))
        if not running:
            return
        running[0]._done.wait(_REPORT_EVERY)


def _end_all(jobs: list[Backup], error: BaseException | None) -> None:
    """Cancel all before waiting for any."""
    for job in jobs:
        if job._started:
            job._ask_to_end()
    for job in jobs:
        job.__exit__(type(error) if error is not None else None, error, None)


def _reporter(progress: ProgressLike) -> Callable[[Progress], Any] | None:
    if progress is None or callable(progress):
        return progress
    if progress == "bar":
        return Bar()
    raise invalid(f"progress is {progress!r}; it can be a callable or 'bar'")

"""Backups that a server runs: one cut of several disks, one job for each of them, and one outcome.

A backup has one thread of its own, which watches its jobs. All or nothing: the first failure ends all of its jobs, and
new files get their names when all of them are complete. What happens is told by events in the order that QEMU has:

    JOB_STATUS_CHANGE created, running, then
      waiting, pending, BLOCK_JOB_COMPLETED, concluded, null      it is complete, under its name
      aborting, BLOCK_JOB_COMPLETED with "error", ...             it failed
      aborting, BLOCK_JOB_CANCELLED, ...                          it was cancelled, or another one failed
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from pyfleece import image as _image
from pyfleece.backup import Backup, _end_all, _publish_all
from pyfleece.chain import Addition
from pyfleece.errors import CancelledError, ClosedError, Error, SnapshotBrokenError, describe
from pyfleece.group import SnapshotGroup
from pyfleece.image import Image
from pyfleece.progress import total_of

Emit = Callable[[str, dict[str, Any]], None]
_LOOK_EVERY = 0.1           # seconds
_CLOSE_WAIT = 2.0           # seconds that closing a target is waited for


class Part(NamedTuple):
    """What a backup is asked to do with one disk."""

    name: str               # of the disk, and so of its job
    target: str
    in_place: bool          # the target is an image that is there, to be written over


def broken_event(name: str, snapshot: str, error: SnapshotBrokenError) -> tuple[str, dict[str, Any]]:
    """The event that a snapshot of the disk `name` broke."""
    data = {"device": name, "snapshot": snapshot, "side": error.side, "offset": error.offset, "length": error.length}
    told = {key: value for key, value in data.items() if value is not None}
    return "SNAPSHOT_BROKEN", {**told, "errmsg": describe(error)}


class Run:
    """One backup. It owns `group` from now on, also when this raises, and closes it in the end.

    `additions`: of disks whose backup becomes a point in a directory of backups. `points` has them entered, and is left
    in the end, too. `keep`: how many points stay, the newest ones; None: all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        group: SnapshotGroup,
        *,
        told: str,
        speed: int | None,
        workers: int | None,
        format: str | None,
        compress: bool | str,
        additions: Mapping[str, Addition],
        points: ExitStack,
        keep: int | None,
        emit: Emit,
        on_end: Callable[[Run], None],
    ) -> None:
        self.uuid = str(uuid.uuid4())
        self.begun = time.time()
        self.ended: float | None = None
        self.parts = {part.name: part for part in parts}
        self._group = group
        self._told = told
        self._emit = emit
        self._on_end = on_end
        self._over = threading.Event()
        # Written before the events that tell of it.
        self._states = {part.name: "created" for part in parts}
        self._failure: BaseException | None = None
        self._cancelled = False
        self._reported: set[str] = set()        # names of disks whose snapshot is known to be broken
        self.jobs: dict[str, Backup] = {}
        self._images: list[Image] = []          # targets that are written in place
        self._additions = dict(additions)
        self._points = points
        self._keep = keep
        self._prune_problem = ""                # of a backup that is good all the same
        try:
            for part, snapshot in zip(parts, group):
                options: dict[str, Any] = {"format": None if part.in_place else format, "compress": compress}
                target: str | Image = self._open(part.target, format) if part.in_place else part.target
                if part.name in additions:
                    target, options = additions[part.name].begin()
                job = Backup(snapshot, target, workers=workers, speed=speed or None, **options)
                job._publishes = False          # we do it, when all of them are sealed
                self.jobs[part.name] = job
            for job in self.jobs.values():
                job.start()
        except BaseException as error:
            self._failure = error
            self._close_all(error)
            raise

    def start(self) -> None:
        for state in ("created", "running"):
            self._enter(self.jobs, state)
        self._emit("BACKUP_STATUS_CHANGE", {"uuid": self.uuid, "status": "active"})
        threading.Thread(target=self._watch, name="pyfleece-run", daemon=True).start()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: float | None) -> bool:
        return self._over.wait(timeout)

    def cancel(self) -> None:
        """Ask it to end. Does nothing when it is over."""
        self._cancelled = True
        for job in self.jobs.values():
            job._ask_to_end()

    # ---- what it tells ----

    @property
    def status(self) -> dict[str, Any]:
        """For `query-backup`."""
        parts = {name: job.progress for name, job in self.jobs.items()}
        progress = total_of(list(parts.values()))
        told: dict[str, Any] = {
            "uuid": self.uuid,
            "status": self._status,
            "backup-file": self._told,
            "start-time": int(self.begun),
            "total": progress.total,
            "transferred": progress.done,
            "zero-bytes": progress.zero_bytes,
            "lost-bytes": progress.lost_bytes,
            "devices": [
                {
                    "device": name,
                    "target": self.parts[name].target,
                    "total": part.total,
                    "transferred": part.done,
                    "zero-bytes": part.zero_bytes,
                    "lost-bytes": part.lost_bytes,
                    "fleecing-bytes": part.fleecing_bytes,
                    **self._kind(name),
                }
                for name, part in parts.items()
            ],
        }
        if self.ended is not None:
            told["end-time"] = int(self.ended)
        if self._failure is not None:
            told["errmsg"] = self._message
        if self._prune_problem:
            told["prune-errmsg"] = self._prune_problem
        return told

    def _kind(self, name: str) -> dict[str, str]:
        """Of a disk whose backup becomes a point: is it an incremental, and if not, why."""
        addition = self._additions.get(name)
        if addition is None:
            return {}
        return {"kind": "incremental"} if addition.parent else {"kind": "full", "reason": addition.reason}

    def job_info(self, name: str) -> dict[str, Any]:
        """For `query-block-jobs`."""
        status = self._states[name]
        return {
            **self._numbers(name),
            "busy": status == "running",
            "paused": False,
            "ready": False,
            "io-status": "ok",
            "status": status,
            "auto-finalize": True,
            "auto-dismiss": True,
        }

    @property
    def _status(self) -> str:
        if not self.over:
            return "active"
        return "done" if self._failure is None else "error"

    @property
    def _message(self) -> str:
        if self._cancelled and isinstance(self._failure, (CancelledError, ClosedError)):
            return "backup cancelled"
        return describe(self._failure) if self._failure is not None else ""

    def _numbers(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        progress = job.progress
        length, done = progress.total, progress.done
        return {"type": "backup", "device": name, "len": length, "offset": done, "speed": job.speed or 0}

    # ---- the thread that watches ----

    def _watch(self) -> None:
        jobs = list(self.jobs.values())
        failed: dict[str, BaseException] = {}
        try:
            try:
                self._wait(failed)
                self._enter(self.jobs, "pending")
                _publish_all(jobs)
                for name, addition in self._additions.items():
                    addition.finish(self.jobs[name].wait())
                for snapshot in self._group:
                    snapshot.commit()
            except BaseException as error:
                self._failure = error
            for job in jobs:
                job._ask_to_end()
            self._look_for_broken()
        finally:
            self._close_all(self._failure)
        if self._failure is None and self._keep is not None:
            self._prune(self._keep)
        self.ended = time.time()
        self._tell_end(failed)

    def _wait(self, failed: dict[str, BaseException]) -> None:
        """Until all jobs are complete. Raises the first failure. A job whose target hangs does not end when it is
        cancelled, and is not waited for.
        """
        running = dict(self.jobs)
        while running and not self._cancelled:
            self._look_for_broken()
            for name, job in list(running.items()):
                if job.done:
                    del running[name]
                    if job._failure is not None:
                        failed[name] = job._failure
                        raise job._failure
                    self._enter([name], "waiting")
            for job in running.values():
                job._done.wait(_LOOK_EVERY)
                break
        if self._cancelled:
            raise CancelledError("the backup was cancelled")

    def _look_for_broken(self) -> None:
        for name, job in self.jobs.items():
            try:
                error = job.snapshot.broken
            except ClosedError:
                continue
            if error is not None and name not in self._reported:
                self._reported.add(name)
                self._emit(*broken_event(name, self.uuid, error))

    def _tell_end(self, failed: dict[str, BaseException]) -> None:
        if self._failure is not None:
            self._enter(self.jobs, "aborting")
            if not failed and not self._cancelled:      # none of the jobs failed: publishing did, or a commit
                failed = dict.fromkeys(self.jobs, self._failure)
        cancelled = self._message == "backup cancelled"
        ends = []
        for name in self.jobs:
            numbers = self._numbers(name)
            if self._failure is None:
                ends.append((name, "BLOCK_JOB_COMPLETED", numbers))
            elif name in failed and not cancelled:
                ends.append((name, "BLOCK_JOB_COMPLETED", {**numbers, "error": describe(failed[name])}))
            else:
                ends.append((name, "BLOCK_JOB_CANCELLED", numbers))
        # Whoever waits for an event may ask, or start the next one, at once: so it is over before the last of them.
        self._on_end(self)
        self._over.set()
        for name, event, data in ends:
            self._emit(event, data)
            self._enter([name], "concluded")
            self._enter([name], "null")
        told = {"uuid": self.uuid, "status": self._status}
        self._emit("BACKUP_STATUS_CHANGE", told if self._failure is None else {**told, "errmsg": self._message})

    def _open(self, path: str, format: str | None) -> Image:
        try:
            image = _image.open(path, "r+", format=format)
        except Error as error:
            error.side = "target"
            raise
        self._images.append(image)
        return image

    def _close_all(self, error: BaseException | None) -> None:
        """End the jobs, then the snapshots. The outcome is known, and what fails or hangs here changes nothing."""
        steps: tuple[Callable[[], None], ...] = (
            lambda: _end_all(list(self.jobs.values()), error),
            self._group.close,
            self._close_images,
            self._leave_points,
        )
        for step in steps:
            try:
                step()
            except Exception:
                pass

    def _leave_points(self) -> None:
        failure = self._failure
        self._points.__exit__(type(failure) if failure is not None else None, failure, None)

    def _prune(self, keep: int) -> None:
        for addition in self._additions.values():
            try:
                addition.repository.prune(keep)
            except Exception as error:
                self._prune_problem = describe(error)

    def _close_images(self) -> None:
        for image in self._images:
            # In a thread of its own: on storage that hangs, so does this.
            closer = threading.Thread(target=image.close, name="pyfleece-close", daemon=True)
            closer.start()
            closer.join(_CLOSE_WAIT)

    def _enter(self, names: Iterable[str], state: str) -> None:
        for name in names:
            self._states[name] = state
            self._emit("JOB_STATUS_CHANGE", {"id": name, "status": state})

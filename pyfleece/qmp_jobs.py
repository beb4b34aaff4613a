"""The commands around backups: `backup`, `backup-cancel`, `query-backup`, and QEMU's for block jobs."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from pyfleece.chain import Addition, Repository
from pyfleece.group import OK, SKIPPED, snapshot_group
from pyfleece.image import new_format
from pyfleece.qmp_backup import Emit, Part, Run
from pyfleece.qmp_commands import Commands
from pyfleece.qmp_disks import Disks
from pyfleece.qmp_wire import QmpError
from pyfleece.snapshot import BITMAP_MODES, Snapshot

_NEW, _EXISTING = "absolute-paths", "existing"      # the names that QEMU has for them
_KEPT = 16                  # backups that are over and can be asked about
_CANCEL_WAIT = 1.0          # seconds that cancelling waits for the backup to end


class Jobs:
    """The backups of a server. `options`: those of `snapshot_group` for each cut, with its hooks."""

    def __init__(self, disks: Disks, options: Mapping[str, Any], hooks: Mapping[str, Any], emit: Emit) -> None:
        self._disks = disks
        self._options = dict(options)
        self._hooks = dict(hooks)
        self._emit = emit
        # A directory that no backup goes to: the mount of the disks themselves. Set before the first command.
        self.avoid: str | None = None
        self._lock = threading.Lock()           # protects what follows
        self._runs: dict[str, Run] = {}         # by UUID, in the order of their start
        self._taken: dict[str, str] = {}        # disk -> UUID of the backup that runs, or "" while it starts
        self._closed = False

    def add_commands(self, commands: Commands) -> None:
        wanted = {
            "*devlist": "str|strs",
            "*backup-dir": "str",
            "*target": "str",
            "*format": "str",
            "*compress": "bool|str",
            "*speed": "int",
            "*max-workers": "int",
            "*fleecing": "bool",
            "*bitmap": "str",
            "*bitmap-mode": "str",
            "*mode": "str",
            "*incremental": "bool",
            "*keep": "int",
        }
        commands.add("backup", self.backup, wanted)
        commands.add("backup-cancel", self.cancel, {"*uuid": "str"})
        commands.add("query-backup", self.query, {"*uuid": "str"})
        commands.add("query-block-jobs", self.query_jobs)
        commands.add("block-job-cancel", self.cancel_job, {"device": "str", "*force": "bool"})
        commands.add("block-job-set-speed", self.set_speed, {"device": "str", "speed": "int"})

    def close(self, timeout: float) -> None:
        """Start nothing any more, cancel what runs, and wait for it until `timeout` seconds are over."""
        with self._lock:
            self._closed = True
            running = [run for run in self._runs.values() if not run.over]
        deadline = time.monotonic() + timeout
        for run in running:
            run.cancel()
        for run in running:
            run.wait(max(deadline - time.monotonic(), 0))

    def wait(self, enough: threading.Event) -> None:
        """Wait until no backup runs, or until `enough` is set."""
        while not enough.wait(0.1):
            with self._lock:
                if not self._taken:
                    return

    @property
    def snapshots(self) -> list[tuple[str, str, Snapshot]]:
        """What is copied now: the UUID of the backup, the name of the disk, the snapshot."""
        with self._lock:
            running = [run for run in self._runs.values() if not run.over]
        return [(run.uuid, name, job.snapshot) for run in running for name, job in run.jobs.items()]

    # ---- commands ----

    def backup(
        self,
        devlist: str | list[str] | None = None,
        backup_dir: str | None = None,
        target: str | None = None,
        format: str | None = None,
        compress: bool | str = False,
        speed: int = 0,
        max_workers: int | None = None,
        fleecing: bool = False,
        bitmap: str | None = None,
        bitmap_mode: str = "on-success",
        mode: str = _NEW,
        incremental: bool = False,
        keep: int | None = None,
    ) -> dict[str, Any]:
        """Cut, and start to copy. Returns when the jobs run."""
        names = self._names(devlist)
        if speed < 0:
            raise QmpError(f"Parameter 'speed' expects a value of 0 (no limit) or more, not {speed}")
        if max_workers is not None and max_workers < 1:
            raise QmpError(f"Parameter 'max-workers' expects a value of 1 or more, not {max_workers}")
        _check_word("bitmap-mode", bitmap_mode, tuple(BITMAP_MODES))
        _check_word("mode", mode, (_NEW, _EXISTING))
        if incremental and (backup_dir is None or bitmap is not None or mode != _NEW):
            raise QmpError("'incremental' is with 'backup-dir', and without 'bitmap' and 'mode'")
        if keep is not None and (keep < 1 or not incremental):
            raise QmpError("'keep' is with 'incremental', and a number of points, 1 or more")
        parts = _parts(names, backup_dir, target, format, mode == _EXISTING)
        if incremental:
            parts = [part._replace(target=os.path.splitext(part.target)[0]) for part in parts]
        self._check_targets(parts, incremental)
        if bitmap is not None:
            self._check_incremental(bitmap, parts)
        with ExitStack() as undo:
            self._take(names)
            undo.callback(self._give_back, names)
            fleecings = [self._disks.fleecing_for(name, fleecing) for name in names]
            additions: dict[str, Addition] = {}
            points = ExitStack()
            undo.push(points)                   # the Run's, when it is made
            for part in parts if incremental else ():
                adding = Repository(part.target, create=True).adding(
                    self._disks.by_name[part.name], format=format or "qcow2", compress=compress
                )
                additions[part.name] = points.enter_context(adding)
            group = snapshot_group(
                [self._disks.by_name[name] for name in names],
                fleecings,
                bitmap=[additions[name].since if incremental else bitmap for name in names],
                bitmap_mode=bitmap_mode,
                **self._options,
                **self._hooks,
            )
            run = Run(
                parts,
                group,
                told=backup_dir or target or "",
                speed=speed,
                workers=max_workers,
                format=format,
                compress=compress,
                additions=additions,
                points=points,
                keep=keep,
                emit=self._emit,
                on_end=self._end,
            )
            self._keep(run)
            undo.pop_all()
        return {"UUID": run.uuid, **_hook_problem(group.freeze_report.thaw)}

    def cancel(self, uuid: str | None = None) -> None:
        """End the backup, or all that run. No error where none does."""
        if uuid is not None:
            runs = [self._find(uuid)]
        else:
            with self._lock:
                runs = list(self._runs.values())
        runs = [run for run in runs if not run.over]
        for run in runs:
            run.cancel()
        for run in runs:
            run.wait(_CANCEL_WAIT)

    def query(self, uuid: str | None = None) -> dict[str, Any]:
        if uuid is not None:
            return self._find(uuid).status
        with self._lock:
            latest = list(self._runs.values())[-1:]
        return latest[0].status if latest else {}

    def query_jobs(self) -> list[dict[str, Any]]:
        with self._lock:
            running = [run for run in self._runs.values() if not run.over]
        return [run.job_info(name) for run in running for name in run.jobs]

    def cancel_job(self, device: str, force: bool = False) -> None:
        """The disks of a backup belong together: the others end too."""
        run = self._run_of(device)
        run.cancel()
        run.wait(_CANCEL_WAIT)

    def set_speed(self, device: str, speed: int) -> None:
        if speed < 0:
            raise QmpError(f"Parameter 'speed' expects a value of 0 (no limit) or more, not {speed}")
        self._run_of(device).jobs[device].speed = speed or None

    # ---- what runs ----

    def _names(self, devlist: str | list[str] | None) -> list[str]:
        """The disks that are meant. A string has them separated by commas, semicolons or colons."""
        if devlist is None:
            return list(self._disks.by_name)
        names = devlist if isinstance(devlist, list) else [name for name in re.split("[,;:]", devlist) if name]
        for name in names:
            self._disks.find(name)
        if not names:
            raise QmpError("Parameter 'devlist' names no device")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise QmpError(f"Device '{twice[0]}' is in devlist twice")
        return names

    def _check_targets(self, parts: Sequence[Part], directories: bool) -> None:
        for part in parts:
            try:
                mode = os.stat(part.target).st_mode
            except FileNotFoundError:
                mode = stat.S_IFREG
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode) or directories):
                # Opening a pipe may take forever, and nobody could cancel that.
                raise QmpError(f"the target {part.target} is neither a file nor a block device")
            if self.avoid is not None and os.path.realpath(part.target).startswith(self.avoid + os.sep):
                raise QmpError(f"the target {part.target} is in the mount of the disks that are backed up")

    def _check_incremental(self, bitmap: str, parts: Sequence[Part]) -> None:
        for part in parts:
            if bitmap not in self._disks.by_name[part.name].bitmaps:
                raise QmpError(f"Dirty bitmap '{bitmap}' not found on device '{part.name}'")
            if not part.in_place and _is_file(part.target):
                raise QmpError(
                    f"{part.target} exists, and an incremental does not replace it: it has only what is dirty. Mode "
                    f"'{_EXISTING}' brings that copy up to date; or take another place"
                )

    def _take(self, names: Sequence[str]) -> None:
        """One backup at a time for each disk: jobs are named after their disks."""
        with self._lock:
            if self._closed:
                raise QmpError("the server is about to end")
            for name in names:
                if name in self._taken:
                    by = f"backup {self._taken[name]}" if self._taken[name] else "another backup"
                    raise QmpError(f"Device '{name}' is in use: {by} has not finished")
            self._taken.update(dict.fromkeys(names, ""))

    def _give_back(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                self._taken.pop(name, None)

    def _keep(self, run: Run) -> None:
        with self._lock:
            over = [key for key, old in self._runs.items() if old.over]
            for key in over[: max(len(over) - _KEPT, 0)]:
                del self._runs[key]
            self._runs[run.uuid] = run
            self._taken.update(dict.fromkeys(run.jobs, run.uuid))
            closed = self._closed
        run.start()
        if closed:                              # the server began to end while this started
            run.cancel()

    def _end(self, run: Run) -> None:
        self._give_back(list(run.jobs))

    def _find(self, uuid: str) -> Run:
        with self._lock:
            run = self._runs.get(uuid)
        if run is None:
            raise QmpError(f"there is no backup {uuid}")
        return run

    def _run_of(self, device: str) -> Run:
        with self._lock:
            run = self._runs.get(self._taken.get(device, ""))
        if run is None:
            raise QmpError(f"Block job '{device}' not found", "DeviceNotActive")
        return run


def _parts(
    names: Sequence[str], directory: str | None, target: str | None, format: str | None, in_place: bool
) -> list[Part]:
    """Where each disk goes: to a file with its name in a directory; or a single one to `target`."""
    if (directory is None) == (target is None):
        raise QmpError("one of 'backup-dir' and 'target' is needed, and not both")
    if target is not None:
        if len(names) > 1:
            raise QmpError(f"'target' is for one device, not for {', '.join(names)}: use 'backup-dir'")
        if not os.path.isabs(target):
            raise QmpError(f"'target' must be an absolute path: {target}")
        return [Part(names[0], target, in_place)]
    assert directory is not None
    if not os.path.isabs(directory):
        raise QmpError(f"'backup-dir' must be an absolute path: {directory}")
    if not stat.S_ISDIR(os.stat(directory).st_mode):
        raise QmpError(f"backup-dir {directory} is not a directory")
    parts = [Part(name, os.path.join(directory, f"{name}.{format or 'raw'}"), in_place) for name in names]
    new_format(parts[0].target, format)
    return parts


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _hook_problem(thaw: str) -> dict[str, str]:
    """A thaw that failed does not undo a good cut, but somebody should look at the guest."""
    return {} if thaw in (OK, SKIPPED) else {"thaw": thaw}


def _check_word(name: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        raise QmpError(f"Parameter '{name}' does not accept value '{value}'; it can be {' or '.join(words)}")

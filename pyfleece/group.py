"""Snapshots of several disks at one instant, with hooks that make the guest's file systems consistent around it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, Union, overload

from pyfleece._binding import close_after, nanoseconds
from pyfleece.disk import Disk, cut
from pyfleece.errors import FreezeError, invalid
from pyfleece.fleecing import MEMORY, Fleecing
from pyfleece.image import Image, Path
from pyfleece.snapshot import Snapshot

# A callable without arguments, or a command and its arguments.
Hook = Union[Callable[[], Any], Sequence[str]]
T = TypeVar("T")

# Held from a freeze to its thaw. Each hook has a deadline, so this wait has an end.
_turn = threading.Lock()

OK, SKIPPED, TIMED_OUT = "ok", "not run", "timed out"


@dataclass
class FreezeReport:
    """How the hooks ended: each is "ok", "not run", "timed out", or "failed: " and why."""

    freeze: str = SKIPPED
    thaw: str = SKIPPED

    @property
    def ok(self) -> bool:
        return self.freeze in (OK, SKIPPED) and self.thaw in (OK, SKIPPED)


class SnapshotGroup(Sequence[Snapshot]):
    """Snapshots of one instant, in the order of the disks. A context manager that closes all of them."""

    def __init__(self, snapshots: Sequence[Snapshot], freeze_report: FreezeReport) -> None:
        self._snapshots = tuple(snapshots)
        self.freeze_report = freeze_report

    def close(self) -> None:
        """Close all snapshots, also when closing one of them fails."""
        with ExitStack() as stack:
            for snapshot in self._snapshots:
                stack.callback(snapshot.close)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Snapshot, ...]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | tuple[Snapshot, ...]:
        return self._snapshots[index]

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def __enter__(self) -> SnapshotGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            close_after(self.close, error)

    def __repr__(self) -> str:
        return f"<SnapshotGroup {list(self._snapshots)}>"


def snapshot_group(
    disks: Sequence[Disk],
    fleecing: Fleecing | Sequence[Fleecing] | Mapping[Disk, Fleecing] = None,
    *,
    cluster_size: int | None = None,
    bitmap: str | Sequence[str | None] | Mapping[Disk, str | None] | None = None,
    bitmap_mode: str = "on-success",
    on_cbw_error: str = "break-snapshot",
    cbw_timeout: float = 45.0,
    fleecing_limit: int | None = None,
    stage_size: int = 64 << 20,
    fleecing_dir: Path | None = None,
    whole: bool = False,
    freeze: Hook | None = None,
    thaw: Hook | None = None,
    freeze_timeout: float = 10.0,
) -> SnapshotGroup:
    """Cut several disks at one instant: no write is in one snapshot whose predecessor on another disk is not. All or
    none.

    Options are those of `Disk.snapshot`, and hold for each disk; `fleecing` and `bitmap` may also be a list in the
    order of the disks, or a dict by disk.

    `freeze`, `thaw`: make the guest quiet before the cut, and let it go on after: a callable, or a command as a list.
    Each gets `freeze_timeout` seconds. Both run outside of the calling thread, so that one that hangs can be left
    behind. `thaw` is always called once freezing was tried: also when it failed or hung, when the cut failed, and
    once more when a freeze that was given up ends after all. `freeze_report` of the result tells how they ended.

    Groups with hooks take turns, in one process: one group's thaw must not wake a guest up that another one froze.

    Raises `FreezeError` (with the `report`) when freezing failed: nothing was cut then. A thaw that fails does not
    undo a good cut: it is in the report, and a RuntimeWarning is given.
    """
    disks = list(disks)
    if not disks:
        raise invalid("a group has one disk at least")
    if len(set(disks)) < len(disks):
        raise invalid("a disk is in the group twice")
    shared = isinstance(fleecing, (str, bytes, os.PathLike)) and fleecing != MEMORY and not os.path.isdir(fleecing)
    if (shared or isinstance(fleecing, Image)) and len(disks) > 1:
        raise invalid("several disks need a fleecing image each: pass a list, a dict by disk, or a directory")
    each = list(zip(_spread(fleecing, disks, "fleecing"), _spread(bitmap, disks, "bitmap")))
    timeout = nanoseconds(freeze_timeout, "freeze_timeout") / 1e9
    report = FreezeReport()
    with _turn if freeze is not None or thaw is not None else nullcontext(), ExitStack() as undo:
        try:
            if freeze is not None:
                report.freeze = _run(freeze, timeout, late=thaw)
                if report.freeze != OK:
                    raise FreezeError(f"freezing the guest did not work ({report.freeze}); nothing was cut")
            snapshots = cut(
                disks,
                each,
                bitmap_mode=bitmap_mode,
                cluster_size=cluster_size,
                on_cbw_error=on_cbw_error,
                cbw_timeout=cbw_timeout,
                fleecing_limit=fleecing_limit,
                stage_size=stage_size,
                fleecing_dir=fleecing_dir,
                whole=whole,
            )
            for snapshot in snapshots:
                undo.callback(snapshot.close)
        except FreezeError as error:
            error.report = report
            raise
        finally:
            if thaw is not None:
                report.thaw = _run(thaw, timeout)
                if report.thaw != OK:
                    warnings.warn(f"thawing the guest did not work ({report.thaw})", RuntimeWarning, stacklevel=2)
        undo.pop_all()
    return SnapshotGroup(snapshots, report)


def _spread(value: Any, disks: Sequence[Disk], name: str) -> list[Any]:
    """One value for each disk."""
    if isinstance(value, Mapping):
        unknown = [disk for disk in value if disk not in disks]
        if unknown:
            raise invalid(f"{name}: {unknown[0]} is not in the group")
        return [value.get(disk) for disk in disks]
    if isinstance(value, (list, tuple)):
        if len(value) != len(disks):
            raise invalid(f"{name}: there are {len(value)} values for {len(disks)} disks")
        return list(value)
    return [value] * len(disks)


def _run(hook: Hook, timeout: float, late: Hook | None = None) -> str:
    """Run a hook for at most `timeout` seconds and tell how it ended. One that ends after it was given up is followed
    by `late`.
    """
    ended = threading.Event()
    outcome: list[str] = []
    lock = threading.Lock()             # protects given_up and outcome against each other
    given_up = False

    def body() -> None:
        told = _run_command(hook, timeout) if not callable(hook) else _run_callable(hook)
        with lock:
            outcome.append(told)
            follow = given_up
        ended.set()
        if follow and late is not None:
            _run_callable(late) if callable(late) else _run_command(late, timeout)

    threading.Thread(target=body, name="pyfleece-hook", daemon=True).start()
    try:
        # A command is ended by its own thread at `timeout`: that takes a moment.
        ended.wait(timeout if callable(hook) else timeout + 2)
    finally:
        with lock:
            given_up = not outcome
    return outcome[0] if outcome else TIMED_OUT


def _run_callable(hook: Callable[[], Any]) -> str:
    try:
        hook()
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"
    return OK


def _run_command(command: Sequence[str], timeout: float) -> str:
    try:
        # A file and not a pipe: a pipe would have to be read, and grandchildren that keep it open would be waited for.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                try:
                    process.wait(1)
                except subprocess.TimeoutExpired:       # it hangs in the kernel
                    pass
                return TIMED_OUT
            output.seek(0)
            said = output.read(4096).decode(errors="replace").strip()
    except OSError as error:
        return f"failed: {error}"
    if status == 0:
        return OK
    ended = f"exit status {status}" if status > 0 else f"signal {-status}"
    return f"failed: {ended}{': ' + said if said else ''}"

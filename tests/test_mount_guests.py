"""Real guests: ext4 on a loop device on the mount's file, written by fio (which verifies), git, sqlite and fstrim while
snapshots are cut and backed up by files, by qemu-img and by the API.

Every backup is as after a power failure at its cut: the kernel mounts it (and replays the journal), then e2fsck, git
fsck and sqlite find nothing wrong, and all that had been committed before the cut is there.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run
from mount_kit import Served, opened, serve

import pyfleece

SIZE = 192 * MIB
ROUNDS = int(os.environ.get("PYFLEECE_GUEST_ROUNDS", "3"))
TOOLS = ("losetup", "mkfs.ext4", "e2fsck", "fstrim", "fio", "git", "qemu-img")


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    device = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


class Writers:
    """Threads that use the guest's file system until they are stopped."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = 0                       # committed to the database
        self.commits = 0                    # to the repository
        self.problems: list[BaseException] = []
        self._stop = threading.Event()
        self._fio: subprocess.Popen[str] | None = None
        bodies = (self._database, self._repository)
        self._threads = [threading.Thread(target=self._run, args=(body,)) for body in bodies]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        command = [
            "fio", "--name=guest", f"--filename={self.root}/fio", "--size=16M", "--rw=randwrite", "--bs=8k",
            "--ioengine=psync", "--fsync=32", "--verify=crc32c", "--verify_fatal=1", "--loops=10000", "--randseed=7",
            "--verify_state_save=0",
        ]  # fmt: skip
        self._fio = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._fio is not None
        ended_early = self._fio.poll()
        self._fio.terminate()
        output, _nothing = self._fio.communicate()
        assert ended_early is None, output
        assert "verify" not in output or "bad" not in output, output
        assert self.problems == []

    def wait_for_more(self) -> None:
        """Until both have committed since, so that a cut is in the middle of something."""
        rows, commits = self.rows, self.commits
        while self.rows == rows or self.commits == commits:
            assert not self.problems, self.problems
            self._stop.wait(0.01)

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            self.problems.append(error)

    def _database(self) -> None:
        connection = sqlite3.connect(self.root / "db.sqlite")
        try:
            # With "full" the deletion of the journal, which is what commits, may not have reached the disk yet.
            connection.execute("pragma synchronous = extra")
            connection.execute("create table t (id integer primary key, a, b)")
            connection.execute("create index i on t (b)")
            while not self._stop.is_set():
                with connection:
                    connection.executemany(
                        "insert into t (a, b) values (?, ?)",
                        [(os.urandom(300), int.from_bytes(os.urandom(4), "little")) for _ in range(20)],
                    )
                    connection.execute("update t set a = ? where id > ?", (os.urandom(100), self.rows - 30))
                self.rows += 20
        finally:
            connection.close()

    def _repository(self) -> None:
        repository = self.root / "repository"
        run("git", "init", "-q", repository)
        run("sync", "-f", repository)       # of what `init` made nothing is on stable storage
        options = ("core.fsync=all", "user.name=x", "user.email=x", "gc.auto=0")
        git = ("git", "-C", repository, *(word for option in options for word in ("-c", option)))
        while not self._stop.is_set():
            for number in range(5):
                (repository / f"file{number}").write_bytes(os.urandom(5000).hex().encode())
            run(*git, "add", "-A")
            run(*git, "commit", "-q", "-m", f"{self.commits + 1}")
            # git syncs what it writes, but not the directory in which it then renames the reference.
            with opened(repository / ".git" / "refs" / "heads", os.O_RDONLY) as fd:
                os.fsync(fd)
            self.commits += 1


def check_backup(backup: Path, rows: int, commits: int, directory: Path) -> None:
    with loop_device(backup) as device:
        with mounted(device, directory) as root:            # replays the journal
            connection = sqlite3.connect(root / "db.sqlite")
            try:
                assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
                assert connection.execute("select count(*) from t").fetchone()[0] >= rows
            finally:
                connection.close()
            told = run("git", "-c", "safe.directory=*", "-C", root / "repository", "fsck", "--strict", "--no-dangling")
            assert not any(word in told for word in ("error", "missing", "corrupt", "broken")), told
            count = run("git", "-c", "safe.directory=*", "-C", root / "repository", "rev-list", "--count", "HEAD")
            assert int(count) >= commits
        run("e2fsck", "-fn", device)


def back_up(served: Served, how: int, name: str, target: Path) -> None:
    if how == 0:
        run("cp", "--sparse=always", served.snap(name), target)
    elif how == 1:
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.snap(name), target)
    else:
        pyfleece.backup(served.mount.snapshots[name]["vm.raw"], target)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("direct", ["on", "off"])
def test_backups_of_a_busy_guest_are_good(direct: str, tmp_path: Path, no_leaks: None) -> None:
    require(*TOOLS)
    if os.geteuid() != 0:
        missing("root, for loop devices,")
    with serve(tmp_path, size=SIZE) as served:
        served.disk.discard(SIZE, 0)
        with loop_device(served.file, f"--direct-io={direct}") as device:
            run("mkfs.ext4", "-q", "-E", "nodiscard", device)
            with mounted(device, tmp_path / "guest") as root, Writers(root) as writers:
                for number in range(ROUNDS):
                    writers.wait_for_more()
                    rows, commits = writers.rows, writers.commits
                    served.cut(f"{number}")
                    run("fstrim", root)
                    back_up(served, number % 3, f"{number}", tmp_path / "backup.raw")
                    os.rmdir(served.path / ".snap" / f"{number}")
                    check_backup(tmp_path / "backup.raw", rows, commits, tmp_path / "check")
                    (tmp_path / "backup.raw").unlink()
        run("e2fsck", "-fn", served.file)
        assert served.errors == []

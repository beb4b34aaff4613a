"""What goes wrong around a mount: storage that fails or hangs, snapshots that break or end, clients and servers that
die, mount points that are unfit, hooks that fail. Each time the guest's I/O goes on.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, own_threads, run, wait_for
from mount_kit import CLUSTER, Served, attribute, fails, need_mount, opened, punch, serve

import pyfleece

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


def guest_goes_on(served: Served) -> None:
    with opened(served.file) as fd:
        assert os.pwrite(fd, b"still here", 12345) == 10
        assert os.pread(fd, 10, 12345) == b"still here"
        os.fsync(fd)


def busy(path: Path) -> str:
    """Is it mounted, as far as the kernel is concerned? Its line of mountinfo, or ""."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return next((line for line in lines if line.split(" ")[4] == str(path)), "")


# ---- errors and their stories ----


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_errors_of_the_source_come_back(served: Served, number: int) -> None:
    with opened(served.file) as fd:
        for operation, call in (
            ("read", lambda: os.pread(fd, 4096, 0)),
            ("write", lambda: os.pwrite(fd, b"x" * 4096, 0)),
            ("zero", lambda: punch(fd, 0, 4096)),
            ("flush", lambda: os.fsync(fd)),
        ):
            served.source.fail(operation, error=number)
            with fails(number):
                call()
            call()
        story = attribute(served.file, "error")
        assert os.strerror(number) in story and "vm.raw" not in attribute(served.path / ".snap", "error")
        wait_for(lambda: served.errors)
        path, error = served.errors[0]
        assert path == "vm.raw" and isinstance(error, pyfleece.ImageError)
        assert (error.errno, error.side) == (number, "source")
        assert str(error) in story or story in str(error) or os.strerror(number) in str(error)


def test_a_failed_flush_never_counts_as_done(served: Served) -> None:
    """The kernel takes ENOSYS for "there is no such operation", and says that it worked from then on."""
    served.source.fail("flush", error=errno.ENOSYS, times=2)
    with opened(served.file) as fd:
        with fails(errno.EOPNOTSUPP):
            os.fsync(fd)
        with fails(errno.EOPNOTSUPP):
            os.fsync(fd)
        before = served.source.seen("flush")
        os.fsync(fd)
        assert served.source.seen("flush") == before + 1


def test_without_on_error_it_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(tmp_path, on_error=None) as served, caplog.at_level(logging.WARNING, "pyfleece.mount"):
        served.source.fail("read", times=5)
        for _ in range(5):
            with fails(errno.EIO):
                served.file.read_bytes()
        wait_for(lambda: caplog.records)
    assert len(caplog.records) == 1, "repetitions are left out"
    assert "vm.raw: " in caplog.text and "Input/output error" in caplog.text


def test_on_error_may_raise_and_use_the_mount(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()

    def on_error(path: str, error: pyfleece.Error) -> None:
        (tmp_path / "mount" / ".snap" / "by the handler").mkdir()
        told.set()
        raise RuntimeError("a broken handler")

    with serve(tmp_path, on_error=on_error) as served:
        served.source.fail("read")
        with fails(errno.EIO):
            served.file.read_bytes()
        assert told.wait(10)
        wait_for(lambda: "a broken handler" in caplog.text)
        assert list(served.mount.snapshots) == ["by the handler"]
        guest_goes_on(served)


def test_a_broken_snapshot_tells_why_and_the_guest_goes_on(tmp_path: Path) -> None:
    options = {"fleecing": "memory", "stage_size": 4 * CLUSTER, "cbw_timeout": 0.05}
    with serve(tmp_path, snapshot_options=options) as served:
        served.cut()
        with opened(served.snap(), os.O_RDONLY) as fd, opened(served.file) as guest:
            os.pwrite(guest, b"\xff" * (64 * CLUSTER), 0)
            for call in (lambda: os.pread(fd, 1, MIB), lambda: os.lseek(fd, 0, os.SEEK_DATA)):
                with fails(errno.EIO):
                    call()
            assert "the snapshot is broken" in attribute(served.snap(), "error")
            assert '"state": "broken"' in attribute(served.snap(), "stats")
            guest_goes_on(served)
        wait_for(lambda: served.errors)
        assert served.errors[0][0] == ".snap/now/vm.raw"
        assert isinstance(served.errors[0][1], pyfleece.SnapshotBrokenError)
        os.rmdir(served.snap().parent)
        served.cut("again")
        assert served.snap("again").read_bytes() == served.disk.pread(served.disk.size, 0)


def test_lost_ranges_fail_and_the_rest_does_not(tmp_path: Path) -> None:
    options = {
        "fleecing": "memory", "stage_size": 4 * CLUSTER, "cbw_timeout": 0.01, "on_cbw_error": "lose-range",
    }  # fmt: skip
    with serve(tmp_path, snapshot_options=options) as served:
        made = served.cut()["vm.raw"]
        with opened(served.file) as guest, opened(served.snap(), os.O_RDONLY) as fd:
            os.pwrite(guest, b"\xff" * (16 * CLUSTER), MIB)
            lost = made.lost
            assert lost
            with fails(errno.EIO):
                os.pread(fd, 1, lost[0].offset)
            assert "lost" in attribute(served.snap(), "error")
            assert os.lseek(fd, lost[0].offset, os.SEEK_DATA) == lost[0].offset
            assert os.pread(fd, MIB, 0) == served.data[:MIB]


def test_too_many_snapshots(served: Served) -> None:
    for number in range(16):
        served.cut(f"{number}")
    with fails(errno.EMFILE):
        os.mkdir(served.path / ".snap" / "one too many")
    assert "16 snapshots alive" in attribute(served.path / ".snap", "error")
    wait_for(lambda: served.errors)
    assert served.errors[0][0] == ".snap/one too many"
    assert len(os.listdir(served.path / ".snap")) == len(served.mount.snapshots) == 16
    guest_goes_on(served)
    os.rmdir(served.path / ".snap" / "3")
    served.cut("fits again")
    assert attribute(served.path / ".snap", "error") == ""


def test_a_bitmap_that_is_in_use(tmp_path: Path) -> None:
    with serve(tmp_path, bitmaps={"vm.raw": "b"}) as served:
        served.cut("one")
        with fails(errno.EBUSY):
            os.mkdir(served.path / ".snap" / "two")
        assert "another snapshot uses the dirty bitmap 'b'" in attribute(served.path / ".snap", "error")
        guest_goes_on(served)


def test_rmdir_while_files_are_open(served: Served) -> None:
    made = served.cut()["vm.raw"]
    with opened(served.snap()) as fd:
        served.disk.pwrite(b"\xff" * MIB, 0)
        assert os.pread(fd, MIB, 0) == served.data[:MIB]
        os.rmdir(served.snap().parent)
        assert made.closed
        for call in (
            lambda: os.pread(fd, 1, 0),
            lambda: os.lseek(fd, 0, os.SEEK_DATA),
            lambda: punch(fd, 0, CLUSTER),
        ):
            with fails(errno.ESTALE):
                call()
        guest_goes_on(served)
        served.cut()                            # the same name again
        assert served.snap().read_bytes() == served.disk.pread(served.disk.size, 0)
        with fails(errno.ESTALE):
            os.pread(fd, 1, 0)


def test_a_snapshot_that_its_owner_closes(served: Served) -> None:
    served.cut()["vm.raw"].close()
    with opened(served.snap()) as fd, fails(errno.ESTALE):
        os.pread(fd, 1, 0)
    guest_goes_on(served)
    os.rmdir(served.snap().parent)


# ---- what hangs ----


def test_requests_that_hang_do_not_hold_up_others(tmp_path: Path) -> None:
    """Also not when there are as many of them as there were threads."""
    with serve(tmp_path, "slow.raw", "fast.raw") as served:
        slow = served.sources["slow.raw"]
        slow.hang("read", times=None)
        readers = [threading.Thread(target=(served.path / "slow.raw").read_bytes) for _ in range(10)]
        for reader in readers:
            reader.start()
        wait_for(lambda: slow.hanging == len(readers), 20)
        assert (served.path / "fast.raw").read_bytes() == served.content["fast.raw"]
        with opened(served.path / "slow.raw") as fd:
            assert os.pwrite(fd, b"x", 0) == 1
        served.cut()
        os.rmdir(served.snap().parent)
        slow.clear()
        for reader in readers:
            reader.join()
        with opened(served.path / "fast.raw") as fd:    # threads that are not needed any more end, while there is work
            wait_for(lambda: os.pwrite(fd, b"x", 0) and len(own_threads()) <= 5, 40)


def kernel_version() -> tuple[int, ...]:
    return tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])


def test_writes_to_one_file_do_not_wait_for_each_other(served: Served) -> None:
    if kernel_version() < (6, 2):
        pytest.skip("the kernel sends one write to a file after the other: Linux 6.2 is the first that does not")
    served.source.hang("write", times=None)

    def write(number: int) -> None:
        with opened(served.file) as fd:
            assert os.pwrite(fd, bytes([number]) * 8192, number * 65536) == 8192

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 9)]
    for writer in writers:
        writer.start()
    wait_for(lambda: served.source.hanging == len(writers), 20)
    served.source.clear()
    for writer in writers:
        writer.join()
    for number in range(1, 9):
        assert served.disk.pread(8192, number * 65536) == bytes([number]) * 8192


def test_a_client_that_dies_in_the_middle_of_a_write(served: Served) -> None:
    served.source.hang("write", offset=MIB, length=1)
    script = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'x' * 65536, 1 << 20)"
    client = subprocess.Popen([sys.executable, "-c", script, served.file])
    wait_for(lambda: served.source.hanging == 1)
    client.kill()
    # No fsync: the kernel lets it wait for all writes to the file that are under way.
    with opened(served.file) as fd:
        assert os.pwrite(fd, b"still here", 12345) == 10
        assert os.pread(fd, 10, 12345) == b"still here"
    # What it had opened is closed only when its request has ended.
    served.source.resume()
    assert client.wait() == -signal.SIGKILL
    with opened(served.file, os.O_RDONLY) as fd:
        assert os.pread(fd, 65536, MIB) == b"x" * 65536, "it was under way: all of it is there"
    wait_for(lambda: served.mount.open_files == 0)
    assert served.errors == []


def test_closing_while_a_request_hangs(tmp_path: Path) -> None:
    """It is given up, and the memory that it needs stays until it ends."""
    with serve(tmp_path) as served:
        served.source.hang("read", times=None)
        result: list[BaseException] = []

        def read() -> None:
            try:
                served.file.read_bytes()
            except OSError as error:
                result.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: served.source.hanging == 1)
        start = time.monotonic()
        served.mount.close()
        assert 4 < time.monotonic() - start < 30
        reader.join()
        assert isinstance(result[0], OSError) and result[0].errno in (errno.ECONNABORTED, errno.ENOTCONN)
        assert not busy(served.path)
        served.source.clear()


# ---- the end ----


def test_closing_while_files_are_open(served: Served) -> None:
    with opened(served.file) as fd:
        os.pwrite(fd, b"done", 0)
        assert served.mount.open_files == 1
        served.mount.close()
        assert not busy(served.path)
        for call in (lambda: os.pread(fd, 1, 0), lambda: os.pwrite(fd, b"x", 0), lambda: os.fsync(fd)):
            with fails(errno.ENOTCONN):
                call()
        assert served.disk.pread(4, 0) == b"done"
        with pyfleece.mount(served.disks, served.path):
            assert served.file.read_bytes()[:4] == b"done"


def unmount(path: Path, *options: str) -> None:
    if os.geteuid() == 0:
        run("umount", *options, path)
    else:
        run("fusermount3", "-u", *("-z" for option in options if option == "--lazy"), path)


def test_somebody_else_unmounts_it(served: Served) -> None:
    made = served.cut()["vm.raw"]
    assert not served.mount.wait(0)
    unmount(served.path)
    assert served.mount.wait(10)
    assert not served.mount.closed and not made.closed
    assert made.pread(100, 0) == served.data[:100], "what a backup reads stays there until it is closed"
    (served.path / "a file").write_text("of whoever has the directory now")
    served.mount.close()
    assert made.closed
    assert (served.path / "a file").exists()
    (served.path / "a file").unlink()


def test_somebody_else_unmounts_it_lazily_and_mounts_another_one(served: Served) -> None:
    with opened(served.file) as fd:
        unmount(served.path, "--lazy")
        assert not served.mount.wait(0.05), "a file is open"
        assert os.pread(fd, 100, 0) == served.data[:100]
        with (
            pyfleece.create(served.directory / "other.raw", MIB) as image,
            pyfleece.Disk(image) as disk,
            pyfleece.mount({"other.raw": disk}, served.path),
        ):
            served.mount.close()
            assert os.listdir(served.path) == [".snap", "other.raw"], "that one is not ours to unmount"
        with fails(errno.ENOTCONN):
            os.pread(fd, 1, 0)


def test_closing_while_cuts_are_made(tmp_path: Path) -> None:
    """However it ends: no snapshot and no thread is left, and mkdir tells."""
    with serve(tmp_path, size=MIB) as served:
        stop = threading.Event()
        ended: list[int] = []

        def cut(number: int) -> None:
            try:
                for name in range(10000):
                    os.mkdir(served.path / ".snap" / f"{number}-{name}")
                    os.rmdir(served.path / ".snap" / f"{number}-{name}")
            except OSError as error:
                ended.append(error.errno or 0)

        threads = [threading.Thread(target=cut, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: served.mount.snapshots)
        served.mount.close()
        stop.set()
        for thread in threads:
            thread.join()
        assert set(ended) <= {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ESTALE}, ended
        assert len(ended) == 3


SERVER = """
import os, signal, sys, time
import pyfleece
image = pyfleece.create(sys.argv[1], 1 << 20)
mount = pyfleece.mount({"vm.raw": pyfleece.Disk(image)}, sys.argv[2])
os.mkdir(sys.argv[2] + "/.snap/now")
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    print("child", child, flush=True)
if "unwatched" in sys.argv:
    mount._watch._process.kill()
print("mounted", flush=True)
time.sleep(100)
"""


def start_server(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    (directory / "mount").mkdir(exist_ok=True)
    need_mount()
    command = [sys.executable, "-c", SERVER, str(directory / "killed.raw"), str(directory / "mount"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_server_that_is_killed_leaves_no_mount(how: str, tmp_path: Path) -> None:
    """Neither does a child that it forked keep it alive."""
    server = start_server(tmp_path, how)
    assert server.stdout is not None
    child = 0
    try:
        if how == "fork":
            child = int(server.stdout.readline().split()[1])
        assert server.stdout.readline() == "mounted\n"
        with opened(tmp_path / "mount" / "vm.raw") as fd:
            server.kill()
            server.wait()
            with fails(errno.ENOTCONN):
                os.pread(fd, 1, 0)
            wait_for(lambda: not busy(tmp_path / "mount"), 20)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_the_next_mount_cleans_up(tmp_path: Path) -> None:
    """Where whoever watched was killed too."""
    server = start_server(tmp_path, "unwatched")
    assert server.stdout is not None and server.stdout.readline() == "mounted\n"
    server.kill()
    server.wait()
    server.stdout.close()
    with fails(errno.ENOTCONN):
        os.listdir(tmp_path / "mount")
    assert busy(tmp_path / "mount")
    with serve(tmp_path) as served:
        guest_goes_on(served)
    assert not busy(tmp_path / "mount")


def test_a_forked_child_does_nothing(served: Served) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            served.mount.cut("by the child")
        except pyfleece.ForkedError:
            try:
                served.mount.close()
            except pyfleece.ForkedError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    guest_goes_on(served)
    assert served.mount.snapshots == {}


# ---- mount points ----


def test_unfit_mount_points(tmp_path: Path) -> None:
    need_mount()
    with serve(tmp_path) as served:
        disks = served.disks

        def refused(path: Path, kind: type[OSError], number: int, message: str) -> None:
            with pytest.raises(kind, match=message) as raised:
                pyfleece.mount(disks, path)
            assert raised.value.errno == number

        refused(tmp_path / "missing", FileNotFoundError, errno.ENOENT, "missing: No such file")
        refused(tmp_path / "0.raw", NotADirectoryError, errno.ENOTDIR, r"0\.raw: Not a directory")
        refused(served.path, pyfleece.ImageError, errno.EBUSY, "something is mounted there")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        refused(tmp_path / "full", pyfleece.ImageError, errno.ENOTEMPTY, "it would hide 'file'")
        guest_goes_on(served)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    (tmp_path / "more").mkdir()
    with serve(tmp_path / "more") as served, pyfleece.mount(served.disks, tmp_path / "link") as mount:
        assert mount.mountpoint == str(tmp_path / "real"), "several mounts of one disk do no harm"
        assert (tmp_path / "real" / "vm.raw").read_bytes() == served.data


NOBODY = 65534


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may look into."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="pyfleece-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        missing("root, to become somebody else")
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd="/")


def test_others_may_use_it_only_when_allowed(public: Path) -> None:
    with serve(public) as served:
        assert "Permission denied" in as_nobody("ls", str(served.path)).stderr
    (public / "other").mkdir(mode=0o755)
    with serve(public / "other", allow_other=True) as served:
        assert as_nobody("ls", str(served.path)).stdout == "vm.raw\n"
        assert "Permission denied" in as_nobody("cksum", str(served.file)).stderr
        assert "Permission denied" in as_nobody("mkdir", str(served.path / ".snap" / "x")).stderr
        os.chown(served.file, NOBODY, NOBODY)
        assert str(len(served.data)) in as_nobody("cksum", str(served.file)).stdout


def become_nobody(directory: Path) -> None:
    """In a mount namespace of our own, where /dev/fuse is everybody's, as distributions have it."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, bind, new_namespace = 1 << 18 | 1 << 14, 1 << 12, 0x20000
    os.mknod(directory / "fuse", stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    os.chmod(directory / "fuse", 0o666)
    assert libc.unshare(new_namespace) == 0
    assert libc.mount(None, b"/", None, private, None) == 0
    assert libc.mount(os.fsencode(directory / "fuse"), b"/dev/fuse", None, bind, None) == 0
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def test_it_needs_no_root(public: Path) -> None:
    """Where fusermount3 is. In a child, since the interpreter may be root's."""
    if os.geteuid() != 0:
        pytest.skip("all the other tests run without root here")
    if shutil.which("fusermount3") is None:
        missing("fusermount3")
    need_mount()
    (public / "mount").mkdir()
    os.chown(public / "mount", NOBODY, NOBODY)
    os.chown(public, NOBODY, NOBODY)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            become_nobody(public)
            with serve(public) as served:
                made = served.cut()
                guest_goes_on(served)
                assert served.snap().read_bytes() == served.data == made["vm.raw"].pread(len(served.data), 0)
                with opened(served.file):
                    served.mount.close()
            assert not busy(public / "mount")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# ---- freezing ----


def test_hooks_run_around_a_mkdir(tmp_path: Path) -> None:
    order: list[str] = []
    with serve(tmp_path, freeze=lambda: order.append("freeze"), thaw=lambda: order.append("thaw")) as served:
        made = served.cut()
        assert order == ["freeze", "thaw"]
        assert made.freeze_report.ok
        served.mount.cut("without", freeze=None, thaw=None)
        assert order == ["freeze", "thaw"]


def test_hooks_may_use_the_mount(tmp_path: Path) -> None:
    """A guest's agent flushes its file systems, which are on the mount; what it writes is in the snapshot."""

    def freeze() -> None:
        with opened(tmp_path / "mount" / "vm.raw") as fd:
            os.pwrite(fd, b"flushed", 0)
            os.fsync(fd)
        os.listdir(tmp_path / "mount")

    with serve(tmp_path, freeze=freeze, thaw=freeze, threads=1) as served:
        served.cut()
        assert served.snap().read_bytes()[:7] == b"flushed"


def test_a_freeze_that_fails_cuts_nothing(tmp_path: Path) -> None:
    freeze, thaw = ["sh", "-c", "echo no guest >&2; exit 3"], ["touch", str(tmp_path / "thawed")]
    with serve(tmp_path, freeze=freeze, thaw=thaw) as served:
        with fails(errno.EAGAIN):
            os.mkdir(served.path / ".snap" / "now")
        assert "no guest" in attribute(served.path / ".snap", "error")
        assert (tmp_path / "thawed").exists()
        assert os.listdir(served.path / ".snap") == []
        wait_for(lambda: served.errors)
        assert isinstance(served.errors[0][1], pyfleece.FreezeError)
        guest_goes_on(served)
        with pytest.raises(pyfleece.FreezeError, match="no guest"):
            served.mount.cut()


def test_a_freeze_that_hangs_is_left_at_its_deadline(tmp_path: Path) -> None:
    release, thawed = threading.Event(), threading.Event()
    with serve(tmp_path, freeze=release.wait, thaw=thawed.set, freeze_timeout=0.3) as served:

        def make() -> None:
            with fails(errno.EAGAIN):
                os.mkdir(served.path / ".snap" / "now")

        maker = threading.Thread(target=make)
        maker.start()
        guest_goes_on(served)
        maker.join()
        assert thawed.is_set()
        assert "timed out" in attribute(served.path / ".snap", "error")
        release.set()


# ---- without libfuse3 ----


def test_without_libfuse3_it_says_what_to_install(tmp_path: Path) -> None:
    """The same sources, compiled as where it is not found."""
    program = tmp_path / "none.c"
    program.write_text(
        '#include "fleece.h"\n#include <stdio.h>\n'
        "int main(void) { fl_mount *mount; fl_mount_options o = { 0 }; fl_error e;\n"
        '    printf("%d %s", fl_mount_start("x", 0, 0, 0, &o, &mount, &e), e.text); return 0; }\n'
    )
    sources = [*sorted((ROOT / "csrc").glob("export_fuse*.c")), ROOT / "csrc" / "util" / "util.c"]
    compiler = shutil.which("gcc") or shutil.which("cc") or missing("a C compiler")
    run(str(compiler), "-std=gnu11", "-pthread", f"-I{ROOT / 'csrc'}", program, *sources, "-o", tmp_path / "none")
    told = run(tmp_path / "none")
    assert told.startswith(f"-{errno.ENOSYS} ")
    assert "install libfuse3-dev" in told

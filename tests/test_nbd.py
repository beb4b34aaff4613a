"""NBD, as `pyfleece serve --nbd` offers it, with the real clients: nbdinfo, nbdcopy, qemu-img, qemu-io, fio."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, wait_for
from serve_kit import COMMAND, Client, served_disk, serving

import pyfleece
from pyfleece import nbd
from pyfleece.runtime import PrivateDirectory

SIZE = 16 * MIB


@pytest.fixture
def image(tmp_path) -> Path:
    require("nbdkit", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
    if not os.path.exists("/dev/fuse"):
        missing("/dev/fuse")
    with served_disk(tmp_path / "vm.raw", SIZE):
        pass
    return tmp_path / "vm.raw"


class Served:
    """A server with a mount, NBD and a control socket."""

    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.mountpoint = directory / "mount"
        self.socket = directory / "nbd"
        self.control = directory / "control"

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    def cut(self, name: str) -> None:
        """Returns when it is exported, which is told after it is."""
        with Client(self.control) as client:
            (self.mountpoint / ".snap" / name).mkdir()
            client.event("SNAPSHOT_CREATED", snapshot=name)

    def exports(self) -> set[str]:
        found = json.loads(run("nbdinfo", "--json", "--list", self.uri()))
        return {export["export-name"] for export in found["exports"]}

    def nbdkits(self) -> list[int]:
        """The numbers of the server's nbdkit processes."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "nbdkit\n"]


@contextmanager
def served(image: Path, *more: str | os.PathLike[str]) -> Iterator[Served]:
    directory = image.parent
    if "mount" not in os.listdir(directory):
        (directory / "mount").mkdir()
    where = ("--mount", directory / "mount", "--nbd", f"unix:{directory}/nbd", "--control", directory / "control")
    with serving(image, *where, *more) as process:
        yield Served(directory, process)


def test_exports_are_the_disks_and_their_snapshots(image, tmp_path):
    with served(image) as server:
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
        assert server.exports() == {"vm.raw"}
        (export,) = json.loads(run("nbdinfo", "--json", server.uri()))["exports"]       # the one that needs no name
        assert export["export-size"] == SIZE and not export["is_read_only"]
        assert export["can_multi_conn"] and export["can_trim"] and export["can_flush"] and export["can_zero"]
        server.cut("now")
        assert server.exports() == {"vm.raw", "vm.raw@now"}
        with Client(server.control) as client:
            (server.mountpoint / ".snap" / "now").rmdir()
            client.event("SNAPSHOT_DELETED", snapshot="now")
            assert server.exports() == {"vm.raw"}
        server.process.terminate()
        assert server.process.wait(30) == 0
    assert sorted(os.listdir(tmp_path)) == ["mount", "vm.raw"]


def test_holes_are_seen_through_nbd(image):
    expected = [
        (extent.offset, extent.length, extent.kind == "zero") for extent in pyfleece.open(image).extents()
    ]
    with served(image) as server:
        server.cut("now")
        for export in ("vm.raw", "vm.raw@now"):
            found = json.loads(run("nbdinfo", "--map", "--json", server.uri(export)))
            assert [(e["offset"], e["length"], e["type"] == 3) for e in found] == expected


def test_snapshots_are_pulled_while_the_guest_writes(image, tmp_path):
    """The guest and those who pull are all NBD clients."""
    before = image.read_bytes()
    with served(image) as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 1M 1M", "-c", "flush", server.uri("vm.raw"))
        expected = before[:MIB] + b"\1" * MIB + before[2 * MIB :]
        server.cut("now")
        guest = subprocess.Popen(
            ["qemu-io", "-f", "raw", *(word for i in range(64) for word in ("-c", f"write -P 2 {i * 256}k 128k")),
             server.uri("vm.raw")],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        run("nbdcopy", server.uri("vm.raw@now"), tmp_path / "one.raw")
        assert guest.wait(60) == 0
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri("vm.raw@now"), tmp_path / "two.qcow2")
        run("cp", "--sparse=always", server.mountpoint / ".snap/now/vm.raw", tmp_path / "three.raw")
        assert (tmp_path / "one.raw").read_bytes() == expected == (tmp_path / "three.raw").read_bytes()
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "one.raw", tmp_path / "two.qcow2")
        assert (server.mountpoint / "vm.raw").read_bytes()[: 128 << 10] == b"\2" * (128 << 10)


def test_snapshots_are_read_only_but_for_trim(image):
    with served(image) as server:
        server.cut("now")
        uri = server.uri("vm.raw@now")
        for command in ("write 0 4k", "write -z 0 4k"):
            said = run("qemu-io", "-f", "raw", "-c", command, "-c", "flush", uri, check=False)
            assert "failed" in said or "not permitted" in said or "ead-only" in said, said
        assert "4 KiB" in run("qemu-io", "-f", "raw", "-c", "read 0 4k", uri)
        # A trim says: I have it. It is not saved any more, and cannot be read any more.
        run("qemu-io", "-f", "raw", "-c", "discard 0 1M", uri)
        assert "read failed" in run("qemu-io", "-f", "raw", "-c", "read 0 4k", uri, check=False)
        assert "4 KiB" in run("qemu-io", "-f", "raw", "-c", "read 1M 4k", uri)
        before = image.read_bytes()
        run("qemu-io", "-f", "raw", "-c", "write -P 9 0 4k", server.uri("vm.raw"))
        assert image.read_bytes()[4096:] == before[4096:]


def test_guest_trims_and_zeroes(image):
    with served(image) as server:
        commands = ("discard 0 1M", "write -z 2M 64k", "write -z -u 4M 64k", "flush")
        run("qemu-io", "-f", "raw", "-d", "unmap", *(w for c in commands for w in ("-c", c)), server.uri("vm.raw"))
        for offset in (2 * MIB, 4 * MIB):
            assert f"pattern 0 {offset} 64k" and "failed" not in run(
                "qemu-io", "-f", "raw", "-c", f"read -P 0 {offset} 64k", server.uri("vm.raw")
            )


def test_a_qcow2_disk_is_served_as_what_is_in_it(image, tmp_path):
    """Its file in the mount and its export are raw; what guests write goes into the qcow2."""
    source = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, source)
    before = image.read_bytes()
    with served(source) as server, Client(server.control) as client:
        run("qemu-io", "-f", "raw", "-c", "write -P 1 3M 100k", "-c", "flush", server.uri("disk.raw"))
        (server.mountpoint / ".snap" / "now").mkdir()
        commands = ("write -P 2 3M 200k", "discard 0 1M", "flush")
        run("qemu-io", "-f", "raw", *(word for c in commands for word in ("-c", c)), server.uri("disk.raw"))
        (node,) = client.execute("query-named-block-nodes")
        assert (node["node-name"], node["drv"], node["size"]) == ("disk", "qcow2", SIZE)
        now = (server.mountpoint / "disk.raw").read_bytes()
        assert client.end_of(client.execute("backup", target=str(tmp_path / "b.qcow2"))["UUID"])["status"] == "done"
        expected = before[: 3 * MIB] + b"\1" * (100 << 10) + before[3 * MIB + (100 << 10) :]
        assert (server.mountpoint / ".snap" / "now" / "disk.raw").read_bytes() == expected
        server.process.terminate()
        assert server.process.wait(30) == 0
    for name in ("disk.qcow2", "b.qcow2"):
        run("qemu-img", "check", tmp_path / name)
        run("qemu-img", "convert", "-O", "raw", tmp_path / name, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == now, name


@pytest.mark.slow
def test_fio_verifies_what_it_wrote_while_backups_run(image, tmp_path):
    require("fio")
    if "nbd" not in run("fio", "--enghelp").split():
        missing("fio with the nbd engine")
    with served(image) as server, Client(server.control) as client:
        fio = subprocess.Popen(
            ["fio", "--name=guest", "--ioengine=nbd", f"--uri={server.uri('vm.raw')}", f"--size={SIZE}",
             "--rw=randwrite", "--bs=4k", "--iodepth=16", "--loops=2", "--randseed=7",
             "--verify=crc32c", "--verify_fatal=1"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        backups = 0
        while fio.poll() is None:
            target = tmp_path / f"b{backups % 3}.raw"
            uuid = client.execute("backup", target=str(target))["UUID"]
            assert client.end_of(uuid)["status"] == "done"
            backups += 1
        out, _ = fio.communicate()
        assert fio.returncode == 0 and "verify" not in out.lower().replace("verify=", ""), out
        assert backups


def test_death_of_nbdkit_is_told_and_it_is_started_again(image):
    with served(image) as server, Client(server.control) as client:
        server.cut("now")
        (pid,) = server.nbdkits()
        os.kill(pid, signal.SIGKILL)
        assert client.event("NBD_SERVER_DIED")["data"]["reason"] == "nbdkit ended (SIGKILL)"
        wait_for(lambda: server.nbdkits() and server.nbdkits() != [pid], 20)
        wait_for(lambda: subprocess.run(["nbdinfo", "--list", server.uri()], capture_output=True).returncode == 0, 20)
        assert server.exports() == {"vm.raw", "vm.raw@now"}
        assert any("nbdkit ended (SIGKILL); starting it again" in line for line in server.process.said)
        # All of that was nobody else's concern.
        assert (server.mountpoint / "vm.raw").read_bytes() == image.read_bytes()


def test_nbdkit_ends_with_the_server(image):
    with served(image) as server:
        (pid,) = server.nbdkits()
        server.process.kill()
        server.process.wait(20)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"), 20)
        assert server.socket.exists()
    # And what it leaves is not in the way.
    with served(image) as server:
        assert server.exports() == {"vm.raw"}
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert not server.socket.exists() and not server.nbdkits()


def test_nbd_alone_has_a_private_mount(image, tmp_path):
    """A server that is killed leaves it behind, and the next one removes it."""
    private = tmp_path / "private"
    private.mkdir()
    environment = {**os.environ, "TMPDIR": str(private)}
    for ends_by in (signal.SIGKILL, signal.SIGTERM):
        with serving(image, "--nbd", f"unix:{tmp_path}/nbd", env=environment) as process:
            run("nbdcopy", f"nbd+unix:///?socket={tmp_path}/nbd", tmp_path / "copy.raw")
            assert len(os.listdir(private)) == 1
            process.send_signal(ends_by)
            assert process.wait(30) == (-signal.SIGKILL if ends_by == signal.SIGKILL else 0)
        assert (tmp_path / "copy.raw").read_bytes() == image.read_bytes()
    assert os.listdir(private) == []
    assert str(private) not in Path("/proc/self/mountinfo").read_text()


def test_private_directories_of_the_living_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = PrivateDirectory()
    second = PrivateDirectory()
    (tmp_path / "pyfleece-run-new").mkdir()             # somebody is about to make a lock in it
    (tmp_path / "pyfleece-run-old").mkdir()
    os.utime(tmp_path / "pyfleece-run-old", (0, 0))
    (tmp_path / "other").mkdir()
    os.utime(tmp_path / "other", (0, 0))
    PrivateDirectory().close()
    left = {str(path) for path in tmp_path.iterdir()}
    assert left == {first.path, second.path, str(tmp_path / "pyfleece-run-new"), str(tmp_path / "other")}
    first.close()
    second.close()


def test_tcp_only_when_asked(image, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(image, "--nbd", f"tcp:127.0.0.1:{port}") as process:
        found = json.loads(run("nbdinfo", "--json", f"nbd://127.0.0.1:{port}/vm.raw"))
        assert found["exports"][0]["export-size"] == SIZE
        process.terminate()
        assert process.wait(30) == 0
    with served(image) as server:
        for pid in (server.process.pid, *server.nbdkits()):
            sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
            inodes = {name[8:-1] for name in sockets if name.startswith("socket:[")}
            for table in ("tcp", "tcp6"):
                lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
                assert not inodes & {line.split()[9] for line in lines}


def test_options_go_to_nbdkit(image):
    with served(image, "--nbdkit=--filter=limit") as server:
        assert server.exports() == {"vm.raw"}


def test_what_nbd_does_not_start_with(image, tmp_path):
    def fails(*arguments: str, **options) -> str:
        command = [COMMAND, "serve", image, "--nbd", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
        assert done.returncode == 1, done
        return done.stderr.splitlines()[-1]

    assert "unrecognized option" in fails(f"unix:{tmp_path}/nbd", "--nbdkit=--no-such-option")
    assert "No such file or directory" in fails(f"unix:{tmp_path}/no/nbd")
    (tmp_path / "nbd").write_text("precious")
    assert "something that is not a socket" in fails(f"unix:{tmp_path}/nbd")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert "nbdkit ended" in fails(f"tcp:127.0.0.1:{busy.getsockname()[1]}")
    empty = tmp_path / "bin"
    empty.mkdir()
    for tool in ("umount", "fusermount3"):
        (empty / tool).symlink_to(shutil.which(tool, path=os.environ["PATH"] + ":/sbin:/usr/sbin") or "/bin/false")
    said = fails(f"unix:{tmp_path}/nbd2", env={**os.environ, "PATH": str(empty)})
    assert "NBD needs the program nbdkit" in said
    assert not os.path.ismount(tmp_path / "mount")


WRONG = ["", "unix:", "vm.sock", "tcp:", "tcp:10809", "tcp:a:b", "tcp:h:0", "tcp:h:70000", "udp:h:1"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_address(text):
    with pytest.raises(pyfleece.ArgumentError, match="is no address for NBD"):
        nbd.parse_address(text)


def test_addresses():
    assert nbd.parse_address("tcp:[::1]:10809").arguments == ["--ipaddr", "::1", "--port", "10809"]
    assert nbd.parse_address("tcp:localhost:10809").uri == "nbd://localhost:10809/"
    assert nbd.parse_address("unix:/run/nbd").path == "/run/nbd"

"""`pyfleece serve` as a program: how it starts and ends, as a command, as a daemon, as a service."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import MIB, missing, run, wait_for
from serve_kit import BLOCK, COMMAND, Client, served_disk, serving

from pyfleece import cli
from pyfleece.daemon import PidFile
from pyfleece.notify import Notifier

SIZE = 16 * MIB
SLOW = 256 << 10            # a backup at this speed still runs when a test looks at it


def requires_mount() -> None:
    if not os.path.exists("/dev/fuse"):
        missing("/dev/fuse")


@pytest.fixture
def image(tmp_path):
    with served_disk(tmp_path / "vm.raw", SIZE):
        pass
    return tmp_path / "vm.raw"


def ends(process: subprocess.Popen, number: int = signal.SIGTERM) -> list[str]:
    process.send_signal(number)
    assert process.wait(30) == 0
    wait_for(lambda: any("everything is flushed" in line for line in process.said))
    return process.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_end_it_cleanly(image, tmp_path, number):
    with serving(image, "--control", tmp_path / "control") as process, Client(tmp_path / "control") as client:
        ends(process, number)
        assert client.event("SHUTDOWN")["data"]["reason"] == number.name
    assert os.listdir(tmp_path) == ["vm.raw"]


def test_names_of_disks(image, tmp_path):
    (tmp_path / "scratch").write_bytes(bytes(MIB))
    with (
        serving(f"drive-scsi0={image}", f"drive-scsi0-fleecing={tmp_path}/scratch", "--control", tmp_path / "control"),
        Client(tmp_path / "control") as client,
    ):
        nodes = [node["node-name"] for node in client.execute("query-named-block-nodes")]
        assert nodes == ["drive-scsi0", "drive-scsi0-fleecing"]
        uuid = client.execute("backup", target=str(tmp_path / "b.raw"), fleecing=True)["UUID"]
        assert client.end_of(uuid)["status"] == "done"
        client.execute("quit")
    run("cmp", image, tmp_path / "b.raw")


def fails(*arguments: str | os.PathLike[str]) -> str:
    command = [os.fspath(word) for word in (COMMAND, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == "", done
    return done.stderr[len("pyfleece: ") : -1]


def test_what_it_does_not_start_with(image, tmp_path):
    control = tmp_path / "control"
    assert "nothing to serve" in fails("serve", image)
    assert "No such file or directory" in fails("serve", tmp_path / "no.raw", "--control", control)
    assert "no name for a disk" in fails("serve", f"a b={image}", "--control", control)
    assert "two images are called vm" in fails("serve", image, f"vm={image}", "--control", control)
    assert "write unix:PATH" in fails("serve", image, "--nbd", "/tmp/x")
    assert "write unix:PATH" in fails("serve", image, "--nbd", "tcp:localhost:99999")
    assert "No such file or directory" in fails("serve", image, "--control", tmp_path / "no" / "control")
    assert "No such file or directory" in fails("serve", image, "--mount", tmp_path / "no")
    control.write_text("precious")
    assert "not a socket" in fails("serve", image, "--control", control)
    control.unlink()
    with serving(image, "--control", control) as process:
        (tmp_path / "other.raw").write_bytes(bytes(MIB))
        assert "another process listens there" in fails("serve", tmp_path / "other.raw", "--control", control)
        assert "in use" in fails("serve", image, "--control", tmp_path / "control2")
        ends(process)


def test_killed_server_leaves_nothing_in_the_way(image, tmp_path):
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    arguments = (image, "--control", tmp_path / "control", "--mount", mountpoint)
    with serving(*arguments) as process:
        with open(mountpoint / "vm.raw", "r+b", buffering=0) as file:
            file.write(b"written before the kill")
        process.kill()
        process.wait(20)
    assert (tmp_path / "control").exists()
    with serving(*arguments) as process:
        assert (mountpoint / "vm.raw").read_bytes()[:23] == b"written before the kill"
        with Client(tmp_path / "control") as client:
            assert client.execute("query-version")
        ends(process)
    assert not os.path.ismount(mountpoint) and os.listdir(mountpoint) == []


def test_sigterm_flushes_what_was_written_through_the_mount(image, tmp_path):
    """Also with a file that is still open, and a backup that runs: both end, the server does not wait for them."""
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    with (
        serving(image, "--control", tmp_path / "control", "--mount", mountpoint) as process,
        Client(tmp_path / "control") as client,
        open(mountpoint / "vm.raw", "r+b", buffering=0) as guest,
    ):
        client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)
        data = os.urandom(MIB)
        for offset in range(0, SIZE, 4 * MIB):
            os.pwrite(guest.fileno(), data, offset)
        ends(process)
        client.event("BLOCK_JOB_CANCELLED")
        with pytest.raises(OSError):
            os.pwrite(guest.fileno(), b"too late", 0)
    for offset in range(0, SIZE, 4 * MIB):
        with image.open("rb") as file:
            file.seek(offset)
            assert file.read(MIB) == data
    assert sorted(os.listdir(tmp_path)) == ["mount", "vm.raw"]


def test_cuts_in_the_mount_are_told_and_listed(image, tmp_path):
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    with serving(image, "--control", tmp_path / "control", "--mount", mountpoint) as process:
        with Client(tmp_path / "control") as client:
            (mountpoint / ".snap" / "now").mkdir()
            assert client.event("SNAPSHOT_CREATED")["data"] == {"snapshot": "now", "devices": ["vm"]}
            (node,) = client.execute("query-named-block-nodes")
            assert [s["name"] for s in node["snapshots"]] == ["now"] and node["snapshots"][0]["broken"] is False
            (mountpoint / ".snap" / "now").rmdir()
            assert client.event("SNAPSHOT_DELETED")["data"] == {"snapshot": "now", "devices": ["vm"]}
            for target in (mountpoint / "vm.raw", mountpoint / "new.raw"):
                desc = client.refusal("backup", target=str(target), mode="existing")[1]
                assert desc == f"the target {target} is in the mount of the disks that are backed up"
        ends(process)


def test_broken_snapshot_of_the_mount_is_told(image, tmp_path):
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    options = ("--fleecing", "memory", "--stage-size", "64K", "--cbw-timeout", "0.01")
    with serving(image, "--control", tmp_path / "control", "--mount", mountpoint, *options) as process:
        with Client(tmp_path / "control") as client, open(mountpoint / "vm.raw", "r+b", buffering=0) as guest:
            (mountpoint / ".snap" / "now").mkdir()
            for offset in range(0, MIB, BLOCK):
                os.pwrite(guest.fileno(), b"y" * BLOCK, offset)
            broken = client.event("SNAPSHOT_BROKEN")["data"]
            assert (broken["device"], broken["snapshot"], broken["side"]) == ("vm", "now", "fleecing")
            assert client.execute("query-named-block-nodes")[0]["snapshots"][0]["broken"] is True
        assert any("snapshot now of vm is broken" in line for line in ends(process))


def test_unmounting_ends_it_when_the_backup_is_complete(image, tmp_path):
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    with serving(image, "--control", tmp_path / "control", "--mount", mountpoint) as process:
        with Client(tmp_path / "control") as client:
            uuid = client.execute("backup", target=str(tmp_path / "b.raw"), speed=SLOW)["UUID"]
            run("umount", mountpoint)
            wait_for(lambda: any("was unmounted" in line for line in process.said), 20)
            client.execute("block-job-set-speed", device="vm", speed=0)
            client.event("BACKUP_STATUS_CHANGE", uuid=uuid, status="done")
            assert client.event("SHUTDOWN")["data"]["reason"] == "unmounted"
        assert process.wait(30) == 0
    run("cmp", image, tmp_path / "b.raw")


def test_incrementals_go_on_after_a_kill(image, tmp_path):
    """A persistent bitmap has what was written before the kill, so the next backup is an incremental."""
    requires_mount()
    mountpoint, copy = tmp_path / "mount", str(tmp_path / "copy.raw")
    mountpoint.mkdir()
    arguments = (image, "--control", tmp_path / "control", "--mount", mountpoint)
    with serving(*arguments) as process, Client(tmp_path / "control") as client:
        client.execute("block-dirty-bitmap-add", node="vm", name="daily", persistent=True)
        assert client.end_of(client.execute("backup", target=copy)["UUID"])["status"] == "done"
        with open(mountpoint / "vm.raw", "r+b", buffering=0) as guest:
            os.pwrite(guest.fileno(), os.urandom(3 * BLOCK), 5 * MIB)
        process.kill()
        process.wait(20)
    with serving(*arguments) as process, Client(tmp_path / "control") as client:
        uuid = client.execute("backup", target=copy, bitmap="daily", mode="existing")["UUID"]
        status = client.end_of(uuid)
        assert status["status"] == "done" and 0 < status["total"] <= MIB
        ends(process)
    run("cmp", image, copy)


def test_cuts_by_the_control_socket(image, tmp_path):
    """With --bitmap a mkdir makes an incremental; the first one of a new bitmap wants a full cut before it."""
    requires_mount()
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    snaps = mountpoint / ".snap"
    options = ("--control", tmp_path / "control", "--mount", mountpoint, "--bitmap", "daily")
    with (
        serving(image, *options) as process,
        Client(tmp_path / "control") as client,
        open(mountpoint / "vm.raw", "r+b", buffering=0) as guest,
    ):
        assert any("dirty bitmap daily is new on vm" in line for line in process.said)
        assert client.execute("snapshot-create", name="first", full=True) == {"name": "first"}
        assert (snaps / "first" / "vm.raw").read_bytes() == image.read_bytes()
        assert "there is a snapshot 'first' already" in client.refusal("snapshot-create", name="first")[1]
        client.execute("snapshot-delete", name="first", commit=True)
        assert not (snaps / "first").exists()
        os.pwrite(guest.fileno(), b"z" * BLOCK, 6 * MIB)
        name = client.execute("snapshot-create", devlist=["vm"])["name"]
        assert sorted(os.listdir(snaps / name)) == ["vm.changed", "vm.raw"]
        with (snaps / name / "vm.changed").open("rb") as changed:
            assert os.lseek(changed.fileno(), 0, os.SEEK_DATA) == 6 * MIB
        count = client.execute("query-named-block-nodes")[0]["dirty-bitmaps"][0]["count"]
        assert count == 0
        client.execute("snapshot-delete", name=name)            # not committed: it is dirty again
        assert client.execute("query-named-block-nodes")[0]["dirty-bitmaps"][0]["count"] == 65536
        client.execute("snapshot-create", name="again")
        client.execute("snapshot-delete", name="again", commit=True)
        assert client.execute("query-named-block-nodes")[0]["dirty-bitmaps"][0]["count"] == 0
        assert "there is no snapshot 'no'" in client.refusal("snapshot-delete", name="no")[1]
        assert client.refusal("snapshot-create", devlist=["no"])[0] == "DeviceNotFound"
        assert "'full' is without" in client.refusal("snapshot-create", bitmap="daily", full=True)[1]
        ends(process)


# ---- daemons and service managers ----


def test_daemon_returns_when_it_is_ready(image, tmp_path):
    control, pidfile, log = tmp_path / "control", tmp_path / "pid", tmp_path / "log"
    # Relative paths are those of the directory that the command was given in.
    command = [COMMAND, "serve", "vm.raw", "--daemon", "--control", "control", "--pidfile", "pid", "--log", "log"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    pid = int(pidfile.read_text())
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.getsid(pid) == pid
        assert all(os.readlink(f"/proc/{pid}/fd/{n}") == "/dev/null" for n in range(3))
        with Client(control) as client:
            uuid = client.execute("backup", target=str(tmp_path / "b.raw"))["UUID"]
            assert client.end_of(uuid)["status"] == "done"
        run("cmp", image, tmp_path / "b.raw")
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not pidfile.exists() and not os.path.exists(f"/proc/{pid}"), 20)
    assert not control.exists()
    assert all(words in log.read_text() for words in ("serving vm", f"[{pid}]", "everything is flushed"))


def test_daemon_that_cannot_start_says_so(image, tmp_path):
    options = ["--control", tmp_path / "no" / "control", "--pidfile", tmp_path / "pid"]
    command = [COMMAND, "serve", image, "--daemon", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "No such file or directory" in done.stderr and not (tmp_path / "pid").exists()


def test_pid_file_is_removed(tmp_path):
    with PidFile(tmp_path / "pid"):
        assert int((tmp_path / "pid").read_text()) == os.getpid()
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_service_manager_is_notified(image, tmp_path, abstract):
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(30)
    name = f"@pyfleece-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager.bind(name.replace("@", "\0"))
    environment = {**os.environ, "NOTIFY_SOCKET": name}
    with manager, serving(image, "--control", tmp_path / "control", env=environment) as process:
        told = dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))
        assert told["READY"] == "1" and told["STATUS"].startswith("serving vm") and told["MAINPID"] == str(process.pid)
        with Client(tmp_path / "control") as client:
            assert client.execute("query-version")          # ready means ready
        process.terminate()
        told = dict(line.split("=", 1) for line in manager.recv(4096).decode().split("\n"))
        assert told["STOPPING"] == "1"
        assert process.wait(30) == 0


def test_notifier_without_a_manager_says_nothing(monkeypatch, tmp_path):
    for address in (None, "", "relative", str(tmp_path / "nobody"), "@nobody-listens", "/" + "x" * 300):
        if address is None:
            monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
        else:
            monkeypatch.setenv("NOTIFY_SOCKET", address)
        Notifier().ready("fine")
        assert "NOTIFY_SOCKET" not in os.environ


# ---- the documentation ----

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("name", ["serving.md", "control.md"])
def test_commands_of_the_documentation_parse(name):
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^(pyfleece (?:serve|ctl) [^#|\n]*)", "".join(blocks), re.MULTILINE)
    assert len(commands) > 2
    for command in commands:
        cli._parser().parse_args(shlex.split(command)[1:])
    for script in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL):
        compile(script, name, "exec")


def test_systemd_unit_of_the_documentation(tmp_path):
    (unit,) = re.findall(r"^```ini\n(.*?)^```", (DOCS / "serving.md").read_text(), re.MULTILINE | re.DOTALL)
    (start,) = re.findall(r"^ExecStart=\S+/pyfleece (.*)", unit, re.MULTILINE)
    cli._parser().parse_args(shlex.split(start.replace("$ARGS", "vm.raw")))
    assert "Type=notify" in unit
    if shutil.which("systemd-analyze"):
        program = tmp_path / "pyfleece"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        (tmp_path / "pyfleece@.service").write_text(unit.replace("/usr/local/bin/pyfleece", str(program)))
        said = run("systemd-analyze", "verify", "--man=no", tmp_path / "pyfleece@.service", check=False)
        assert "pyfleece@" not in said, said


def test_control_socket_documentation_names_every_command(image, tmp_path):
    text = (DOCS / "control.md").read_text()
    requires_mount()
    (tmp_path / "mount").mkdir()
    with (
        serving(image, "--control", tmp_path / "control", "--mount", tmp_path / "mount"),
        Client(tmp_path / "control") as client,
    ):
        for command in client.execute("query-commands"):
            short = command["name"].replace("block-dirty-bitmap", "")
            assert f"`{short}`" in text or f"`{command['name']}`" in text, command["name"]
            for argument in command["arguments"]:
                assert f"`{argument}`" in text or f"`{argument.lstrip('*')}`" in text, (command["name"], argument)
        client.execute("quit")

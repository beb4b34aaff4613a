"""`pyfleece ctl`, the human's way to the control socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading

from conftest import wait_for
from serve_kit import COMMAND, SIZE, Client, disk, server

__all__ = ["disk", "server"]        # fixtures

# Slow enough that a backup still runs when a test looks at it.
SLOW = 256 << 10


def ctl(*arguments: str | os.PathLike[str], status: int = 0) -> tuple[str, str]:
    command = [os.fspath(word) for word in (COMMAND, "ctl", *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done
    return done.stdout, done.stderr


def test_ctl(server, disk, tmp_path):
    control = tmp_path / "control"
    out, _ = ctl(control)
    assert "block-dirty-bitmap-merge node=str target=str bitmaps=strs" in out.splitlines()
    assert "block-job-cancel device=str [force=bool]" in out.splitlines()
    out, _ = ctl(control, "backup", "devlist=vm", f"target={tmp_path}/b.raw", "speed=100M", "fleecing=false", "--wait")
    assert json.loads(out)["status"] == "done" and (tmp_path / "b.raw").read_bytes() == disk.pread(SIZE, 0)
    assert ctl(control, "block-dirty-bitmap-add", "node=vm", "name=daily", "granularity=64K") == ("", "")
    out, _ = ctl(control, "query-named-block-nodes")
    assert json.loads(out)[0]["dirty-bitmaps"][0]["granularity"] == 65536
    for words, said in (
        (["backup", "devlist=nope", "target=/x.raw"], "Device 'nope' not found; this server has: vm"),
        (["frobnicate"], "The command frobnicate has not been found"),
        (["backup", "devlist"], "'devlist' is no argument: write KEY=VALUE"),
        (["backup", "speed=fast"], "speed: 'fast' is not a size"),
        (["backup", "fleecing=perhaps"], "fleecing is true or false"),
        (["query-version", "--wait"], "--wait is for backup"),
    ):
        out, err = ctl(control, *words, status=1)
        assert out == "" and err.startswith("pyfleece: ") and said in err and err.count("\n") == 1


def test_ctl_without_a_server(tmp_path):
    said = ctl(tmp_path / "control", "quit", status=1)[1]
    assert said.startswith(f"pyfleece: no server at {tmp_path}/control: No such")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()

        def answer() -> None:
            with other.accept()[0] as connection:
                connection.sendall(b"220 smtp\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        assert "no QMP server" in ctl(tmp_path / "s", "quit", status=1)[1]
        answering.join()


def test_ctl_follows_events(server, tmp_path):
    command = [COMMAND, "ctl", tmp_path / "control", "--events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        wait_for(lambda: any(client._ready for client in list(server._control._clients)), 20)
        server._emit("TEST", {"x": 1})
        assert json.loads(process.stdout.readline())["data"] == {"x": 1}
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_interrupting_ctl_cancels_the_backup_that_it_waits_for(server, tmp_path):
    command = [COMMAND, "ctl", tmp_path / "control", "backup", f"target={tmp_path}/b.raw", f"speed={SLOW}", "--wait"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        Client(tmp_path / "control") as client,
    ):
        wait_for(lambda: client.execute("query-block-jobs"), 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        wait_for(lambda: client.execute("query-backup")["status"] == "error", 20)
        assert client.execute("query-backup")["errmsg"] == "backup cancelled"


def test_ctl_tells_that_the_backup_failed(server, tmp_path):
    command = [COMMAND, "ctl", tmp_path / "control", "backup", f"target={tmp_path}/b.raw", f"speed={SLOW}", "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with Client(tmp_path / "control") as client:
            wait_for(lambda: client.execute("query-block-jobs"), 20)
            client.execute("backup-cancel")
        assert process.wait(20) == 1
        assert process.stderr and process.stderr.read() == "pyfleece: backup cancelled\n"

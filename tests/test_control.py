"""The control socket: its protocol, what clients can do to it, and what they cannot do to each other and to guests."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from conftest import MIB, missing, wait_for
from serve_kit import Client, Guest, served_disk

import pyfleece
from pyfleece import control as control_module
from pyfleece import unix_socket
from pyfleece.qmp_wire import MAX_MESSAGE, Framer, QmpError
from pyfleece.serve import Server
from pyfleece.testing import FaultyImage

VERSION = b'{"execute": "query-version"}'


@pytest.fixture
def said():
    return []


@pytest.fixture
def server(tmp_path, said):
    path = tmp_path / "control"
    with served_disk(tmp_path / "vm.raw", 8 * MIB) as disk:
        server = Server({"vm": disk}, control=path, log=said.append)
        server.disk, server.path = disk, path
        with server:
            yield server


# ---- messages in a stream of bytes ----


def frames(data: bytes, sizes: list[int], limit: int = MAX_MESSAGE) -> list[bytes | str]:
    """What a framer finds when it gets `data` in pieces of these sizes, over and over."""
    framer, found, at, turn = Framer(limit), [], 0, 0
    while at < len(data):
        for message in framer.feed(data[at : at + sizes[turn % len(sizes)]]):
            found.append("too long" if isinstance(message, QmpError) else message)
        at += sizes[turn % len(sizes)]
        turn += 1
    return found


@pytest.mark.parametrize("sizes", [[1], [2, 3], [7], [4096]], ids=str)
def test_messages_end_with_their_braces_or_with_the_line(sizes):
    one, nested = b'{"a": 1}', b'{"a": {"b": [1, "}"]}, "c\\"{\\\\": "\\\\"}'
    assert frames(one + nested + b" \r\n\t" + one + b"\n\n" + one, sizes) == [one, nested, one, one]
    assert frames(b"garbage {}\n" + one, sizes) == [b"garbage {}", one]
    assert frames(b'{"a": "half\n' + one + b'{"half": ', sizes) == [b'{"a": "half', one]
    assert frames(b'{"a": "half\\\n' + one, sizes) == [b'{"a": "half\\', one]
    assert frames(b"[1, 2]\n" + one, sizes) == [b"[1, 2]", one]
    assert frames(b"}]}{\n" + one, sizes) == [b"}]}{", one]


@pytest.mark.parametrize("sizes", [[1], [97], [4096]], ids=str)
def test_messages_that_are_too_long_are_passed_over(sizes):
    one, limit = b'{"a": 1}', 1000
    long = b'{"a": "' + b"x" * 5000 + b'}\\""}'
    for end in (b"", b"\n"):
        assert frames(one + long + end + one, sizes, limit) == [one, "too long", one]
        assert frames(b"y" * 5000 + b"\n" + one, sizes, limit) == ["too long", one]
        assert frames(b"{" * 5000 + b"\n" + one + end, sizes, limit) == ["too long", one]
    assert frames(b'{"a": "' + b"x" * (limit - 9) + b'"}' + one, sizes, limit)[-1] == one
    assert "too long" not in frames(b'{"a": "' + b"x" * (limit - 9) + b'"}' + one, sizes, limit)


def test_frames_do_not_depend_on_how_the_bytes_arrive():
    rng = random.Random(7)
    whole_ones = [b'{"a": 1}', b'{"s": "}\\""}', b"x" * 300]
    parts = [*whole_ones, b"\n", b'"', b"{", b"}", b"\\", b" ", b"[", b"]", b"\xff", b"\0"]
    for _ in range(300):
        data = b"".join(rng.choice(parts) for _ in range(rng.randrange(1, 60)))
        whole = frames(data, [len(data)], 500)
        assert frames(data, [1], 500) == whole == frames(data, [3, 1, 50], 500)


# ---- the protocol ----


def test_greeting_and_negotiation(server):
    with Client(server.path, negotiate=False) as client:
        version = client.greeting["QMP"]["version"]
        assert version["package"] == f"pyfleece {pyfleece.__version__}"
        assert set(version["qemu"]) == {"major", "minor", "micro"}
        assert client.greeting["QMP"]["capabilities"] == []
        error = client.ask(VERSION)["error"]
        assert error["class"] == "CommandNotFound" and "qmp_capabilities" in error["desc"]
        wanted = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
        assert "enabled" in client.ask(wanted)["error"]["desc"]
        assert client.ask({"execute": "qmp_capabilities", "id": 1}) == {"return": {}, "id": 1}
        assert client.ask({"execute": "qmp_capabilities"})["error"]["class"] == "CommandNotFound"
        assert client.execute("query-version") == version


def test_answers_carry_the_id_whatever_it_is(server):
    with Client(server.path) as client:
        for identity in ("a", 7, None, {"x": [1]}, "\u00e9\U0001f600"):
            assert client.ask({"execute": "query-version", "id": identity})["id"] == identity
            assert client.ask({"execute": "nope", "id": identity})["id"] == identity
            assert client.ask({"exec": "nope", "id": identity})["id"] == identity
        assert "id" not in client.ask({"execute": "query-version"})


def test_commands_are_answered_in_order(server):
    with Client(server.path) as client:
        client.send(b"".join(b'{"execute": "query-version", "id": %d}' % i for i in range(500)))
        assert [client.answer()["id"] for _ in range(500)] == list(range(500))


@pytest.mark.parametrize(
    ("sent", "desc"),
    [
        (b"hello\n", "JSON parse error"),
        (b"\xff\xfe\x00\n", "JSON parse error"),
        (b'{"execute": "query-version"\n', "JSON parse error"),
        (b'{"execute": "query-version" "id": 1}\n', "JSON parse error"),
        (b'{"execute": NaN}\n', "NaN is no JSON"),
        (b'{"execute": "\\ud800"}\n', "JSON parse error"),
        (b'{"id": ' + b"[" * 100_000 + b"\n", "JSON parse error"),
        (b'{"id": ' + b"[" * 60_000 + b"]" * 60_000 + b"}\n", "JSON parse error, nested too deeply"),
        (b'{"id": ' + b"9" * 10_000 + b"}\n", "JSON parse error"),
        (b"[]\n", "QMP input must be a JSON object"),
        (b"null\n", "QMP input must be a JSON object"),
        (b"{}\n", "QMP input lacks member 'execute'"),
        (b'{"execute": 1}\n', "QMP input member 'execute' must be a string"),
        (b'{"execute": "query-version", "arguments": []}\n', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "query-version", "x": 1}\n', "QMP input member 'x' is unexpected"),
        (b'{"execute": "query-version", "arguments": {"x": 1}}\n', "Parameter 'x' is unexpected"),
        (b'{"execute": "backup", "arguments": {"speed": "1"}}', "parameter type for 'speed', expected: integer"),
        (b'{"execute": "backup", "arguments": {"speed": true}}\n', "expected: integer"),
        (b'{"execute": "backup", "arguments": {"speed": 1e3}}\n', "expected: integer"),
        (b'{"execute": "backup", "arguments": {"speed": 9223372036854775808}}\n', "expected: integer"),
        (b'{"execute": "backup", "arguments": {"devlist": 5}}\n', "expected: string or array of strings"),
        (b'{"execute": "block-dirty-bitmap-add", "arguments": {"node": "vm"}}\n', "Parameter 'name' is missing"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_is_wrong_with_a_message_is_said_and_the_next_one_is_understood(server, sent, desc):
    with Client(server.path) as client:
        error = client.ask(sent)["error"]
        assert error["class"] == "GenericError" and desc in error["desc"]
        assert client.ask(VERSION)["return"]


def test_line_of_a_million_bytes(server):
    with Client(server.path) as client:
        assert f"longer than {MAX_MESSAGE} bytes" in client.ask(b"x" * 1_000_000 + b"\n")["error"]["desc"]
        assert client.ask(VERSION)["return"]
        long = b'{"execute": "query-version", "id": "' + b"x" * 1_000_000 + b'"}'
        assert f"longer than {MAX_MESSAGE} bytes" in client.ask(long)["error"]["desc"]
        assert client.ask(VERSION)["return"]


def test_query_commands_lists_what_there_is(server):
    with Client(server.path) as client:
        commands = {command["name"]: command["arguments"] for command in client.execute("query-commands")}
    assert commands["backup"]["*devlist"] == "str|strs" and commands["block-dirty-bitmap-add"]["node"] == "str"
    wanted = """backup backup-cancel query-backup block-dirty-bitmap-add block-dirty-bitmap-remove query-block-jobs
        query-named-block-nodes block-job-set-speed block-job-cancel query-backup-support quit query-version"""
    assert set(wanted.split()) <= set(commands)


def test_a_bug_in_a_command_is_told_and_the_server_goes_on(server, said):
    def bug():
        raise ZeroDivisionError("of our own")

    server._commands.add("bug", bug)
    with Client(server.path) as client:
        assert client.refusal("bug") == ("GenericError", "internal error: ZeroDivisionError: of our own")
        assert client.execute("query-version")
    assert any("Traceback" in line and "of our own" in line for line in said)


# ---- clients beside each other ----


def test_a_client_that_dies_or_sends_garbage_disturbs_nobody(server, said):
    rng = random.Random(5)
    with Guest(server.disk.pwrite, server.disk.size) as guest, Client(server.path) as steady:
        for turn in range(30):
            with Client(server.path, negotiate=turn % 2 == 0) as client:
                client.send(rng.randbytes(rng.randrange(1, 5000)) if turn % 3 else b'{"execute": "query-')
                if turn % 5 == 0:
                    client.socket.shutdown(socket.SHUT_WR)
            assert steady.execute("query-version")
        guest.goes_on()
        wait_for(lambda: len(server._control._clients) == 1)
    assert any("in the middle of a message" in line for line in said)


def test_many_clients_at_once(server):
    def work(number: int) -> None:
        try:
            with Client(server.path) as client:
                for turn in range(20):
                    identity = [number, turn]
                    assert client.ask({"execute": "query-named-block-nodes", "id": identity})["id"] == identity
        except BaseException as error:
            failures.append(error)

    failures: list[BaseException] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_client_too_many_is_refused_and_has_room_later(server, monkeypatch):
    monkeypatch.setattr(control_module, "MOST_CLIENTS", 3)
    clients = [Client(server.path) for _ in range(3)]
    with Client(server.path, negotiate=False) as refused:
        assert refused.greeting["error"]["desc"] == "there are 3 clients already"
        with pytest.raises((EOFError, ConnectionError)):
            refused.receive()
    clients.pop().close()
    wait_for(lambda: len(server._control._clients) == 2)
    clients.append(Client(server.path))
    for client in clients:
        client.close()


def test_a_client_that_does_not_read_holds_up_nobody(server, monkeypatch):
    monkeypatch.setattr(control_module, "_QUEUE", 50)
    with Client(server.path) as slow, Client(server.path) as quick:
        count = 5000
        begun = time.monotonic()
        for number in range(count):
            server._emit("TEST", {"number": number, "filler": "x" * 200})
            while len(quick.events) <= number and number % 20 == 19:
                quick.events.append(quick.receive())
        assert time.monotonic() - begun < 60
        assert quick.execute("query-version")
        assert [e["data"]["number"] for e in quick.events if e["event"] == "TEST"] == list(range(count))
        # The slow one is told how much it missed, and is served as before.
        assert slow.execute("query-version")
        got: list[int] = []
        lost, seen = 0, 0
        while len(got) + lost < count:          # more than once, when the socket took some in between
            while seen == len(slow.events):
                slow.events.append(slow.receive())
            event, seen = slow.events[seen], seen + 1
            if event["event"] == "TEST":
                got.append(event["data"]["number"])
            elif event["event"] == "EVENTS_LOST":
                lost += event["data"]["count"]
        assert got == sorted(set(got)) and 0 < len(got) < count and len(got) + lost == count


def test_a_client_that_asks_and_never_reads(server, monkeypatch):
    """Its answers fill its queue and the socket: then it is not read from any more, and that is all."""
    monkeypatch.setattr(control_module, "_QUEUE", 10)
    with Client(server.path) as greedy, Client(server.path) as other:
        greedy.socket.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += greedy.socket.send(b'{"execute": "query-commands"}\n' * 100)
        assert other.execute("query-version")
        assert sent < 20 * MIB


def test_events_reach_only_those_who_negotiated(server):
    with Client(server.path, negotiate=False) as early, Client(server.path) as ready:
        server._emit("TEST", {"turn": 1})
        ready.event("TEST", turn=1)
        assert early.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        assert early.events == []
        server._emit("TEST", {"turn": 2})
        stamp = early.event("TEST", turn=2)["timestamp"]
        assert abs(stamp["seconds"] - time.time()) < 60 and 0 <= stamp["microseconds"] < 1_000_000


# ---- the socket ----


def test_socket_is_for_its_owner_only_and_goes_away(tmp_path, no_leaks):
    with served_disk(tmp_path / "vm.raw", MIB) as disk:
        old = os.umask(0)
        try:
            with Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None):
                mode = os.lstat(tmp_path / "control").st_mode
                assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
                assert sorted(os.listdir(tmp_path)) == ["control", "vm.raw"]
        finally:
            os.umask(old)
    assert os.listdir(tmp_path) == ["vm.raw"]


def test_stale_socket_is_replaced_and_a_live_one_is_not(server, tmp_path):
    with pytest.raises(OSError, match="cannot listen on .*control: another process listens there"):
        unix_socket.listen(server.path)
    with Client(server.path) as client:
        assert client.execute("query-version")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    listener = unix_socket.listen(tmp_path / "stale")
    assert unix_socket.is_listening(tmp_path / "stale")
    unix_socket.stop(listener, tmp_path / "stale")
    assert not (tmp_path / "stale").exists()


def test_what_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="something that is not a socket"):
        unix_socket.listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="cannot listen on"):
        unix_socket.listen(tmp_path / "no" / "socket")
    with pytest.raises(pyfleece.ArgumentError, match="at most 107 bytes"):
        unix_socket.listen(tmp_path / ("x" * 200))
    assert os.listdir(tmp_path) == ["file"]


def test_two_servers_that_start_at_once(tmp_path):
    """One of them gets the socket, the others are told; every time."""
    for turn in range(10):
        path = tmp_path / f"s{turn}"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        got, refused = [], []

        def start(path=path, got=got, refused=refused) -> None:
            try:
                got.append(unix_socket.listen(path))
            except OSError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 3
        assert unix_socket.is_listening(path)
        unix_socket.stop(got[0], path)


def test_a_socket_that_another_server_took_over_is_not_removed(tmp_path):
    ours = unix_socket.listen(tmp_path / "s")
    os.unlink(tmp_path / "s")
    theirs = unix_socket.listen(tmp_path / "s")
    unix_socket.stop(ours, tmp_path / "s")
    assert unix_socket.is_listening(tmp_path / "s")
    unix_socket.stop(theirs, tmp_path / "s")
    assert os.listdir(tmp_path) == []


def test_clients_learn_that_the_server_ends(tmp_path):
    with served_disk(tmp_path / "vm.raw", MIB) as disk:
        server = Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None)
        server.start()
        with Client(tmp_path / "control") as one, Client(tmp_path / "control") as two:
            assert one.execute("quit") == {}
            assert server.wait(20) == "quit"
            server.stop()
            for client in (one, two):
                assert client.event("SHUTDOWN")["data"] == {"guest": False, "reason": "quit"}
                with pytest.raises(EOFError):
                    client.receive()
        server.stop()
        server.request_stop("too late")


def test_the_end_flushes_and_a_flush_that_fails_is_told(tmp_path, no_leaks):
    path = tmp_path / "vm.raw"
    with pyfleece.create(path, MIB) as image, FaultyImage(image) as faulty, pyfleece.Disk(faulty) as disk:
        for told in (True, False):
            server = Server({"vm": disk}, control=tmp_path / "control", log=lambda _: None)
            server.start()
            if told:
                faulty.fail("flush", error=errno.EIO, nth=1)
                with pytest.raises(OSError) as caught:
                    server.stop()
                assert caught.value.errno == errno.EIO
            else:
                server.stop()
            assert not (tmp_path / "control").exists()


# ---- real QMP clients ----


def test_qemu_qmp_client(server, tmp_path):
    try:
        from qemu.qmp import ExecuteError, QMPClient
    except ImportError:
        missing("the Python package qemu.qmp")

    async def drive() -> list[str]:
        client = QMPClient("test")
        await client.connect(str(server.path))
        assert client.greeting.QMP.version["package"].startswith("pyfleece ")
        with client.listener("JOB_STATUS_CHANGE") as statuses, client.listener("BLOCK_JOB_COMPLETED") as ends:
            answer = await client.execute("backup", {"devlist": "vm", "target": str(tmp_path / "b.raw")})
            end = await asyncio.wait_for(ends.get(), 30)
            assert end["data"]["device"] == "vm" and "error" not in end["data"]
            seen = []
            while not seen or seen[-1] != "null":
                seen.append((await asyncio.wait_for(statuses.get(), 30))["data"]["status"])
        assert (await client.execute("query-backup"))["uuid"] == answer["UUID"]
        with pytest.raises(ExecuteError, match="Device 'nope' not found") as caught:
            await client.execute("backup", {"devlist": "nope", "target": str(tmp_path / "c.raw")})
        assert caught.value.error_class == "DeviceNotFound"
        await client.execute("quit")
        await client.disconnect()
        return seen

    assert asyncio.run(drive()) == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert (tmp_path / "b.raw").read_bytes() == server.disk.pread(server.disk.size, 0)
    assert server.wait(10) == "quit"


def test_raw_use_as_with_socat(server):
    """Bytes go in and out by a program that knows nothing of QMP."""
    script = (
        "import socket, sys, threading\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(sys.stdin.buffer.read()); s.shutdown(socket.SHUT_WR)\n"
        "sys.stdout.write(s.makefile().read())\n"
    )
    sent = '{"execute":"qmp_capabilities"}\n{ "execute" : "query-block-jobs" }\nwhat?\n'
    command = [sys.executable, "-c", script, server.path]
    done = subprocess.run(command, input=sent, capture_output=True, text=True, timeout=30)
    greeting, ready, jobs, error = map(json.loads, done.stdout.splitlines())
    assert "QMP" in greeting and ready == {"return": {}} and jobs == {"return": []}
    assert error["error"]["class"] == "GenericError"

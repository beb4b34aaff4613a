"""The installed `pyfleece` command, beside the tools that it has to agree with: qemu-img, cmp, qemu-io, losetup."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MIB, require, run, wait_for

from pyfleece.commands import kit

COMMAND = Path(sys.executable).with_name("pyfleece")
# A call into the library ends within 0.2 s of Ctrl-C, and the interpreter's own end comes on top. A machine that is
# busy with other things may be late, but not every time.
PROMPT, LATE = 0.3, 2.0


def start(*arguments: str | os.PathLike[str], **options) -> subprocess.Popen[bytes]:
    assert COMMAND.exists(), "install the package first: pip install -e '.[test]'"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen([os.fspath(word) for word in (COMMAND, *arguments)], **options)


def pyfleece(*arguments: str | os.PathLike[str], status: int = 0, **options) -> tuple[str, str]:
    """Run the command to its end; what it wrote to stdout and stderr."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=60)
    told = (out or b"").decode(errors="replace"), (err or b"").decode()
    assert process.returncode == status, told
    assert "Traceback" not in told[1]
    return told


def fails(*arguments: str | os.PathLike[str], **options) -> str:
    """Run a command that has to fail with one line about it; that line."""
    out, err = pyfleece(*arguments, status=1, **options)
    assert out == ""
    assert err.startswith("pyfleece: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err[len("pyfleece: ") : -1]


def assert_same(one: Path | str, other: Path | str) -> None:
    run("cmp", one, other)
    assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", one, other)


@contextmanager
def used_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """QEMU has the image open."""
    command = ["qemu-io", *options, "-f", "raw", os.fspath(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdin and process.stdout
        process.stdin.write(b"length\n")
        process.stdin.flush()
        told = b""
        while b"MiB" not in told and b"KiB" not in told:
            assert select.select([process.stdout], [], [], 10)[0], told
            told += os.read(process.stdout.fileno(), 4096)
        yield
    finally:
        process.kill()
        process.communicate()


# ---- usage ----


def test_usage_errors_end_with_status_2():
    for arguments in ([], ["frobnicate"], ["backup", "vm.raw"], ["info"], ["demo", "--size", "much"]):
        out, err = pyfleece(*arguments, status=2)
        assert out == "" and err.startswith("usage: pyfleece")


def test_help_and_version():
    out, _ = pyfleece("--help")
    assert all(command in out for command in ("backup", "info", "map", "create", "demo", "130 interrupted"))
    out, _ = pyfleece("backup", "--help")
    assert all(option in out for option in ("--speed", "--workers", "--fleecing", "--on-cbw-error", "--share"))
    out, _ = pyfleece("--version")
    assert re.fullmatch(r"pyfleece \d+\.\d+\.\d+\n", out)


def test_python_dash_m_is_the_same_command(make_image):
    path, data = make_image()
    done = subprocess.run([sys.executable, "-m", "pyfleece", "info", "--json", path], capture_output=True, check=True)
    assert json.loads(done.stdout)["size"] == len(data)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("65536", 65536), ("64K", 65536), ("4k", 4096), ("1.5G", 3 << 29), ("5MiB", 5 << 20), ("2 T", 1 << 41)],
)
def test_sizes(text, size):
    assert kit.size(text) == size
    assert kit.speed(text + "/s") == size


@pytest.mark.parametrize("text", ["", "K", "-1", "0", "1.0001K", "1X", "1KK", "1e6", "9999999T", "٣", "nan", "inf"])
def test_what_is_not_a_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a (size|whole number)"):
        kit.size(text)


# ---- backup ----


@pytest.mark.parametrize("size", [0, 1, 512, MIB + 513, 20 * MIB])
def test_backup_is_identical_and_sparse(make_image, tmp_path, size):
    require("qemu-img")
    source, data = make_image(size)
    target = tmp_path / "backup.raw"
    before = source.stat().st_mtime_ns
    out, err = pyfleece("backup", source, target)
    assert target.read_bytes() == data
    if size:
        assert_same(source, target)
    assert target.stat().st_blocks <= source.stat().st_blocks + 16
    assert "of data" in out and str(target) in out and err == ""
    assert source.stat().st_mtime_ns == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backup.raw", "vm.raw"]


def test_backup_result_as_json(make_image, tmp_path):
    source, data = make_image(4 * MIB)
    out, _ = pyfleece("backup", source, tmp_path / "b.raw", "--json")
    result = json.loads(out)
    assert result["total"] == len(data) == result["data_bytes"] + result["zero_bytes"]
    zeros = sum(data[at : at + 4096].count(0) == 4096 for at in range(0, len(data), 4096)) * 4096
    assert result["zero_bytes"] <= zeros and result["data_bytes"] >= len(data) - zeros
    assert (result["source"], result["target"]) == (str(source), str(tmp_path / "b.raw"))
    assert result["lost"] == [] and result["seconds"] > 0 and result["rate"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "1", "--granularity", "64K"],
        ["--cluster-size", "64K", "--granularity", "4M", "--workers", "8"],
        ["--direct"],
        ["--fleecing", "memory", "--stage-size", "1M", "--on-cbw-error", "lose-range", "--cbw-timeout", "0.5"],
        ["--fleecing", ".", "--fleecing-limit", "1M", "--on-cbw-error", "break-guest-write"],
        ["--no-progress", "--format", "raw", "--target-format", "raw"],
    ],
    ids=" ".join,
)
def test_backup_options(make_image, tmp_path, options):
    source, data = make_image(5 * MIB + 4096)
    pyfleece("backup", source, tmp_path / "b.raw", *options, cwd=tmp_path)
    assert (tmp_path / "b.raw").read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 2


def test_backup_replaces_the_old_one_only_when_complete(make_image, tmp_path):
    source, data = make_image(4 * MIB)
    target = tmp_path / "b.raw"
    target.write_bytes(b"the old one")
    with start("backup", source, target, "--speed", "1M") as process:
        wait_for(lambda: (tmp_path / "b.raw.partial").exists())
        time.sleep(0.2)
        assert target.read_bytes() == b"the old one"
        process.kill()
    assert target.read_bytes() == b"the old one"
    # What was killed left its .partial file; the next one is not disturbed.
    assert (tmp_path / "b.raw.partial").exists()
    pyfleece("backup", source, target)
    assert target.read_bytes() == data
    assert not (tmp_path / "b.raw.partial").exists()


def test_speed_is_kept(make_image, tmp_path):
    source, _ = make_image(8 * MIB)
    occupied = source.stat().st_blocks * 512
    begun = time.monotonic()
    pyfleece("backup", source, tmp_path / "b.raw", "--speed", "4M/s")
    assert time.monotonic() - begun > 0.6 * occupied / (4 * MIB)


def test_backup_to_standard_output(make_image, tmp_path):
    source, data = make_image(6 * MIB + 513)
    target = tmp_path / "b.raw"
    # To a file, to a pipe, and appended to what others wrote to the same descriptor.
    with target.open("wb") as file:
        _, err = pyfleece("backup", source, "-", stdout=file)
    assert target.read_bytes() == data and "standard output" in err
    run("bash", "-c", '"$0" backup "$1" - | cat > "$2"', COMMAND, source, target)
    assert target.read_bytes() == data
    run("bash", "-c", '{ echo begin; "$0" backup "$1" - --json; echo end; } > "$2"', COMMAND, source, target)
    assert target.read_bytes() == b"begin\n" + data + b"end\n"


def test_slow_reader_of_the_pipe_gets_everything(make_image):
    source, data = make_image(3 * MIB + 513)
    with start("backup", source, "-") as process:
        assert process.stdout
        time.sleep(0.5)
        got = b""
        while block := process.stdout.read(65536):
            got += block
            time.sleep(0.001)
        assert process.wait(20) == 0
    assert got == data


def test_reader_of_the_pipe_dies(make_image):
    source, _ = make_image(20 * MIB)
    done = subprocess.run(
        ["bash", "-c", '"$0" backup "$1" - | head -c 100000 | wc -c; echo ${PIPESTATUS[0]}', COMMAND, source],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stdout.split() == ["100000", "1"]
    assert done.stderr.count("\n") == 1
    assert "target" in done.stderr and "standard output" in done.stderr and "Broken pipe" in done.stderr


def test_standard_output_that_is_a_terminal_or_closed_is_refused(make_image):
    source, _ = make_image()
    ours, theirs = pty.openpty()
    try:
        _, err = pyfleece("backup", source, "-", stdout=theirs, status=1)
        assert "terminal" in err
    finally:
        os.close(ours)
        os.close(theirs)
    done = subprocess.run(["bash", "-c", '"$0" backup "$1" - >&-', COMMAND, source], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "Traceback" not in done.stderr


def test_target_is_full(make_image):
    source, _ = make_image()
    said = fails("backup", source, "/dev/full")
    assert said.startswith("target: ") and "/dev/full" in said and "No space left on device" in said


def test_block_devices(make_image, tmp_path, loop_device):
    source, data = make_image(8 * MIB)
    device = loop_device(12 * MIB)
    pyfleece("backup", source, device)
    assert Path(device).read_bytes()[: 8 * MIB] == data
    pyfleece("backup", device, tmp_path / "b.raw")
    assert (tmp_path / "b.raw").stat().st_size == 12 * MIB
    assert_same(device, tmp_path / "b.raw")
    out, _ = pyfleece("info", "--json", device)
    info = json.loads(out)
    assert info["block_device"] is True and info["size"] == 12 * MIB and info["format"] == "raw"


def test_block_device_that_is_too_small(make_image, loop_device):
    source, _ = make_image(8 * MIB)
    device = loop_device(4 * MIB)
    said = fails("backup", source, device)
    assert said.startswith("target: ") and device in said


def test_progress_bar_on_a_terminal_only(make_image, tmp_path):
    source, _ = make_image(8 * MIB)

    def on_terminal(*options: str) -> bytes:
        ours, theirs = pty.openpty()
        process = start("backup", source, tmp_path / "b.raw", "--speed", "16M", *options, stderr=theirs)
        os.close(theirs)
        told = b""
        try:
            while block := os.read(ours, 4096):
                told += block
        except OSError:                 # how a terminal says that the other end was closed
            pass
        os.close(ours)
        process.communicate()
        assert process.returncode == 0
        return told

    told = on_terminal()
    assert b"100%" in told and told.count(b"\r") > 2
    assert on_terminal("--no-progress") == b""
    _, err = pyfleece("backup", source, tmp_path / "b.raw")
    assert err == ""


# ---- interrupts ----


def assert_ends_promptly(once: Callable[[], float]) -> None:
    """`once` returns how many seconds it took something to end."""
    taken: list[float] = []
    while not taken or (min(taken) > PROMPT and len(taken) < 3):
        taken.append(once())
    assert min(taken) <= PROMPT and max(taken) <= LATE, taken


def interrupt(process: subprocess.Popen[bytes], number: int) -> tuple[float, bytes]:
    """How long it took to end, and what it had to say."""
    begun = time.monotonic()
    process.send_signal(number)
    process.wait(20)
    taken = time.monotonic() - begun
    assert process.returncode == 128 + number
    return taken, process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_backup_leaves_nothing(make_image, tmp_path, number):
    source, _ = make_image(8 * MIB)
    work = tmp_path / "work"
    work.mkdir()

    def once() -> float:
        with start("backup", source, work / "b.raw", "--speed", "512K", "--fleecing", work) as process:
            wait_for(lambda: (work / "b.raw.partial").exists())
            time.sleep(0.3)
            taken, err = interrupt(process, number)
        assert err == (b"pyfleece: interrupted\n" if number == signal.SIGINT else b"pyfleece: terminated\n")
        assert list(work.iterdir()) == []
        return taken

    assert_ends_promptly(once)


def test_interrupted_while_nobody_reads_the_pipe(make_image):
    source, _ = make_image(20 * MIB)

    def once() -> float:
        with start("backup", source, "-") as process:
            assert process.stdout
            wait_for(lambda: select.select([process.stdout], [], [], 0)[0])
            time.sleep(0.3)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            return time.monotonic() - begun

    assert_ends_promptly(once)


def test_standard_output_stays_blocking_for_others(make_image):
    """A pipe is shared by all that write to it: our not waiting in it is not to be theirs."""
    source, _ = make_image()
    reader, writer = os.pipe()
    process = start("backup", source, "-", stdout=writer)
    got = b""
    while process.poll() is None or select.select([reader], [], [], 0)[0]:
        assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK
        if select.select([reader], [], [], 0.05)[0]:
            got += os.read(reader, 1 << 20)
    process.communicate()
    os.close(reader)
    os.close(writer)
    assert (len(got), process.returncode) == (source.stat().st_size, 0)


# ---- what is wrong with images ----


def test_missing_files_and_directories(make_image, tmp_path):
    source, _ = make_image()
    missing = tmp_path / "no.raw"
    for command in (["backup", missing, tmp_path / "b.raw"], ["info", missing], ["map", missing]):
        said = fails(*command)
        assert "no.raw" in said and "No such file" in said
    assert fails("backup", missing, tmp_path / "b.raw").startswith("source: ")
    said = fails("backup", source, tmp_path / "nowhere" / "b.raw")
    assert said.startswith("target: ") and "nowhere" in said and "No such file" in said
    said = fails("backup", source, tmp_path)
    assert said.startswith("target: ") and "Is a directory" in said
    assert "directory" in fails("info", "--format", "raw", tmp_path)
    said = fails("backup", source, tmp_path / "b.raw", "--fleecing", tmp_path / "no-fleecing.raw")
    assert said.startswith("fleecing: ") and "no-fleecing.raw" in said
    assert [file.name for file in tmp_path.iterdir()] == ["vm.raw"]


def test_formats_are_never_guessed(make_image, tmp_path):
    source, data = make_image()
    odd = source.rename(tmp_path / "vm.dump")
    said = fails("info", odd)
    assert "vm.dump" in said and "--format" in said
    pyfleece("info", odd, "--format", "raw")
    said = fails("backup", odd, tmp_path / "b.dump", "--format", "raw")
    assert said.startswith("target: ") and "--target-format" in said
    pyfleece("backup", odd, tmp_path / "b.dump", "--format", "raw", "--target-format", "raw")
    assert (tmp_path / "b.dump").read_bytes() == data
    assert "frob" in fails("info", odd, "--format", "frob")
    disguised = tmp_path / "disguised.raw"
    disguised.write_bytes(b"QFI\xfb" + data)
    said = fails("map", disguised)
    assert "qcow2" in said and "--format" in said
    pyfleece("map", disguised, "--format", "raw")


def test_image_in_use_by_qemu(make_image, tmp_path):
    require("qemu-io")
    source, data = make_image(4 * MIB)
    target = tmp_path / "b.raw"
    with used_by_qemu(source):
        for command in (["backup", source, target], ["info", source], ["map", source]):
            said = fails(*command)
            assert "vm.raw" in said and "in use" in said and "--share" in said
        assert not target.exists()
        _, err = pyfleece("backup", source, target, "--share")
        assert err.startswith("pyfleece: ") and "lock" in err
        assert target.read_bytes() == data
        pyfleece("info", source, "--share")
    with used_by_qemu(target):
        said = fails("backup", source, target)
        assert said.startswith("target: ") and "b.raw" in said and "in use" in said
    with used_by_qemu(source, "-r"):
        pyfleece("backup", source, target)      # readers do not disturb each other


def test_backup_locks_its_source_and_target(make_image, tmp_path):
    require("qemu-io")
    source, _ = make_image(4 * MIB)
    target = tmp_path / "b.raw"
    target.write_bytes(b"the old one")
    with start("backup", source, target, "--speed", "512K") as process:
        wait_for(lambda: (tmp_path / "b.raw.partial").exists())
        assert "lock" in run("qemu-io", "-f", "raw", "-c", "write 0 4k", source, check=False)
        said = fails("backup", source, target)
        assert said.startswith("target: ") and "in use" in said
        process.kill()


def test_source_is_truncated_meanwhile(make_image, tmp_path):
    source, data = make_image(8 * MIB)
    source.write_bytes(data.replace(b"\0", b"\1"))
    with start("backup", source, tmp_path / "b.raw", "--speed", "4M") as process:
        wait_for(lambda: (tmp_path / "b.raw.partial").exists())
        os.truncate(source, 4 * MIB)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    said = err.decode()
    assert said.startswith("pyfleece: source: ") and said.count("\n") == 1 and str(source) in said
    assert str(4 * MIB) in said
    assert [file.name for file in tmp_path.iterdir()] == ["vm.raw"]


def test_wrong_settings(make_image, tmp_path):
    source, _ = make_image()
    target = tmp_path / "b.raw"
    assert "5000" in fails("backup", source, target, "--cluster-size", "5000")
    assert "granularity" in fails("backup", source, target, "--granularity", "5000")
    assert "workers" in fails("backup", source, target, "--workers", "100000")
    assert "workers" in fails("backup", source, target, "--workers", "0")
    assert "cbw_timeout" in fails("backup", source, target, "--cbw-timeout", "nan")
    assert fails("backup", source, source).startswith("target: ")
    assert not target.exists()


def test_debug_shows_the_traceback(tmp_path):
    with start("info", "--debug", tmp_path / "no.raw") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"Traceback" in err and err.splitlines()[-1].startswith(b"pyfleece: ")


# ---- info and map ----


def test_info_agrees_with_qemu_img(make_image):
    require("qemu-img")
    path, _ = make_image(3 * MIB + 512)
    theirs = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", path))
    out, _ = pyfleece("info", "--json", path)
    ours = json.loads(out)
    assert ours["size"] == theirs["virtual-size"] == 3 * MIB + 512
    assert ours["allocated"] == theirs["actual-size"]
    assert (ours["format"], ours["filename"]) == (theirs["format"], str(path))
    assert ours["block_device"] is False and ours["cluster_size"] == os.stat(path).st_blksize
    out, _ = pyfleece("info", path)
    assert str(path) in out and "raw" in out and f"({3 * MIB + 512} bytes)" in out


@pytest.mark.parametrize("size", [0, 4096, 3 * MIB + 512])
def test_map_agrees_with_qemu_img(make_image, size):
    require("qemu-img")
    path, _ = make_image(size)
    theirs: list[dict[str, object]] = []
    for extent in json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path)):
        kind = "data" if extent["data"] else "zero"
        if not extent["length"]:
            continue                    # all that it has of an empty image
        if theirs and theirs[-1]["kind"] == kind:
            theirs[-1]["length"] += extent["length"]
        else:
            theirs.append({"start": extent["start"], "length": extent["length"], "kind": kind})
    out, _ = pyfleece("map", "--json", path)
    ours = json.loads(out)
    assert [{key: extent[key] for key in ("start", "length", "kind")} for extent in ours] == theirs
    assert all(extent["present"] and extent["depth"] == 0 and extent["offset"] == extent["start"] for extent in ours)
    assert sum(extent["length"] for extent in theirs) == size
    out, _ = pyfleece("map", path)
    lines = [line.split() for line in out.splitlines()[1:]]
    shown = [(int(start, 16), int(length, 16), kind, layer, int(at, 16)) for start, length, kind, layer, at in lines]
    assert shown == [(e["start"], e["length"], e["kind"], "0", e["start"]) for e in theirs]


def test_map_whose_reader_had_enough(tmp_path):
    path = tmp_path / "vm.raw"
    with path.open("wb") as file:
        for offset in range(0, 400 * MIB, 128 << 10):       # more lines than a pipe holds
            file.seek(offset)
            file.write(b"x")
    script = '"$0" map "$1" | head -n 1; echo ${PIPESTATUS[0]}'
    done = subprocess.run(["bash", "-c", script, COMMAND, path], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.endswith("\n1\n")


def test_standard_output_is_full(make_image):
    path, _ = make_image()
    with open("/dev/full", "wb") as full:
        _, err = pyfleece("map", path, stdout=full, status=1)
    assert err == "pyfleece: No space left on device\n"

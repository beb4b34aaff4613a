"""`pyfleece ls`, `cat` and `cp`."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MIB, require, run
from files_kit import BAD_NAME, assert_same, grow, make_ext, on_disk

import pyfleece as library
from pyfleece.chain import Repository

SECOND = 10**9


def pyfleece(*arguments: str | os.PathLike[str], status: int = 0, **options) -> tuple[bytes, str]:
    """Run the command; its standard output, and what it said."""
    command = [sys.executable, "-m", "pyfleece", *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=60, **options)
    assert done.returncode == status, done
    assert b"Traceback" not in done.stderr
    return done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("tree")
    grow(top)
    os.symlink("holes", top / "link")
    return top


@pytest.fixture(scope="module")
def image(tree, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "vm.raw"
    make_ext(path, tree, "-t", "ext4")
    return path


@pytest.fixture
def partitioned(image, tmp_path) -> Path:
    require("sfdisk")
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(80 * MIB)
    run("sh", "-c", f"printf 'size=4M, name=\"first\"\\nsize=64M, name=\"root\"\\n' | sfdisk -q -X gpt {path}")
    make_ext(tmp_path / "first", None, "-t", "ext2", "-L", "boot", size=4 * MIB)
    for number, part in ((1, tmp_path / "first"), (5, image)):
        with path.open("r+b") as file, part.open("rb") as data:
            file.seek(number * MIB)
            shutil.copyfileobj(data, file)
    return path


def test_ls_lists_names(image, tree):
    out, err = pyfleece("ls", image)
    assert sorted(out.splitlines()) == sorted([*os.listdir(os.fsencode(tree)), b"lost+found"])
    assert err == ""
    assert pyfleece("ls", image, "/holes", "/dir0")[0].startswith(b"/holes\n/dir0:\n")
    assert pyfleece("ls", image, "/link")[0] == b"/link\n"
    assert pyfleece("ls", "-l", image, "/link")[0].endswith(b" /link -> holes\n")
    assert pyfleece("ls", image, b"/" + BAD_NAME)[0] == b"/" + BAD_NAME + b"\n"


def test_ls_lists_everything_below(image, tree):
    out, _ = pyfleece("ls", "-R", image)
    wanted = {os.fsencode(path) for path in on_disk(tree)} | {b"/", b"/lost+found"}
    assert set(out.splitlines()) == wanted


def test_ls_long(image):
    told = pyfleece("ls", "-l", image)[0].decode(errors="replace").splitlines()
    lines = {line.split(maxsplit=6)[-1]: line for line in told}
    assert lines["holes"].startswith("-rw-r--r--   2     0     0      9437184 20")
    assert lines["absolute link -> /etc/passwd"].startswith("lrwxrwxrwx   1     0     0           11 20")
    assert lines["fifo"].startswith("prw-r-----")
    if os.geteuid() == 0:
        assert lines["device"].startswith("brw-rw----   1     0     0    259,70000 20")


def test_ls_as_json(image, tree):
    found = {entry["path"]: entry for entry in json.loads(pyfleece("ls", "-R", "--json", image)[0])}
    for path, record in on_disk(tree).items():
        assert found[path]["mode"] == f"{record.mode & 0o7777:04o}"
        assert found[path]["mtime_ns"] // SECOND == record.mtime_ns // SECOND
        assert (found[path]["uid"], found[path]["gid"]) == record.owner
    assert os.fsencode("/") + BAD_NAME in {os.fsencode(path) for path in found}
    assert found["/absolute link"]["target"] == "/etc/passwd"
    assert found["/holes"]["kind"] == "file" and found["/holes"]["links"] == 2
    assert json.loads(pyfleece("ls", "--json", image, "/empty directory")[0]) == []


def test_volumes(partitioned, image):
    out, _ = pyfleece("ls", partitioned)
    rows = [line.split() for line in out.decode().splitlines()]
    assert rows[0] == ["volume", "start", "size", "content", "type", "name"]
    assert rows[1] == ["1", "0x100000", "4.0", "MiB", "ext2", "Linux", "first,", "boot"]
    assert rows[2] == ["2", "0x500000", "64.0", "MiB", "ext4", "Linux", "root"]
    volumes = json.loads(pyfleece("ls", "--json", partitioned)[0])
    assert [(v["number"], v["filesystem"], v["label"]) for v in volumes] == [(1, "ext2", "boot"), (2, "ext4", None)]
    assert pyfleece("ls", partitioned, "1:")[0] == b"lost+found\n"
    assert pyfleece("ls", partitioned, "2:/")[0] == pyfleece("ls", image)[0]
    assert b"the disk" not in pyfleece("ls", "--volumes", image)[0]
    _, err = pyfleece("ls", partitioned, "/etc", status=1)
    assert err == (
        f"pyfleece: {partitioned} has several volumes: say which, as in 1:/etc (1: ext, 4194304 bytes; 2: ext,"
        " 67108864 bytes)\n"
    )


def test_cat_writes_files_one_after_the_other(image, tree):
    out, _ = pyfleece("cat", image, "/holes", "/link")
    assert out == (tree / "holes").read_bytes() + (tree / "link").read_bytes()
    _, err = pyfleece("cat", image, "/nothing", status=1)
    assert err == "pyfleece: /nothing: No such file or directory\n"
    _, err = pyfleece("cat", image, "/dir0", status=1)
    assert err == "pyfleece: /dir0: Is a directory\n"
    command = [sys.executable, "-m", "pyfleece", "cat", os.fspath(image), "/holes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()              # as `| head` does
        assert process.wait(30) == 1


def test_cp_copies_trees(image, tree, tmp_path):
    _, err = pyfleece("cp", "-r", image, "/", tmp_path / "out")
    (tmp_path / "out" / "lost+found").rmdir()
    if os.geteuid() == 0:
        assert err == ""
        assert_same(on_disk(tmp_path / "out"), on_disk(tree), unit=SECOND)
    _, err = pyfleece("cp", image, "/holes", "/dir0", tmp_path / "out", status=1)
    assert err == "pyfleece: /dir0 is a directory: it is only copied recursively (here: -r)\n"


def test_cp_tells_what_it_could_not_copy_and_goes_on(image, tmp_path):
    (tmp_path / "out" / "holes").mkdir(parents=True)
    _, err = pyfleece("cp", "-r", image, "/holes", "/fifo", "/dir0", tmp_path / "out", status=1)
    assert err == "pyfleece: /holes: cannot make the copy: Is a directory\n"
    assert (tmp_path / "out" / "dir0").is_dir()


def test_names_reach_a_terminal_printable(image):
    """A name may hold what would be a command to it."""
    mine, its = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "pyfleece", "ls", image], stdout=its, stderr=its) as process:
        os.close(its)
        out = b""
        while True:
            try:
                part = os.read(mine, 65536)
            except OSError:                 # the other end is closed
                break
            if not part:
                break
            out += part
        assert process.wait(30) == 0
    os.close(mine)
    assert b"\x1b" not in out and b"\\udcff\\udcfe\\x1b[31m" in out


def test_formats_and_locks_are_those_of_other_commands(image, tmp_path):
    shutil.copyfile(image, tmp_path / "now.vm")
    _, err = pyfleece("ls", tmp_path / "now.vm", status=1)
    assert "does not tell the format" in err and "--format" in err
    assert pyfleece("ls", "--format", "raw", tmp_path / "now.vm")[0] == pyfleece("ls", image)[0]


def test_files_come_out_of_qcow2(image, tmp_path):
    require("qemu-img")
    for options in ([], ["-c"]):
        run("qemu-img", "convert", *options, "-O", "qcow2", image, tmp_path / "vm.qcow2")
        assert pyfleece("ls", "-R", "-l", tmp_path / "vm.qcow2")[0] == pyfleece("ls", "-R", "-l", image)[0]
        assert pyfleece("cat", tmp_path / "vm.qcow2", "/holes")[0] == pyfleece("cat", image, "/holes")[0]


def test_files_come_out_of_any_point_of_a_backup(image, tmp_path):
    """A full one and an incremental."""
    require("debugfs")
    path, new, backups = tmp_path / "vm.raw", tmp_path / "new.raw", tmp_path / "backups"
    shutil.copyfile(image, path)
    shutil.copyfile(image, new)
    run("debugfs", "-w", "-R", "rm /link", new)
    changed = new.read_bytes()
    repository = Repository(backups, create=True)
    with library.open(path, "r+") as source, library.Disk(source) as disk:
        repository.backup(disk)
        for offset in range(0, disk.size, 4096):
            if disk.pread(4096, offset) != changed[offset : offset + 4096]:
                disk.pwrite(changed[offset : offset + 4096], offset)
        repository.backup(disk)
    assert [point.kind for point in repository.points] == ["full", "incremental"]
    names = [point.name for point in repository.points]
    assert b"/link\n" in pyfleece("ls", "-R", f"{backups}@{names[0]}")[0]
    for latest in (backups, f"{backups}@{names[1]}"):
        assert b"/link\n" not in pyfleece("ls", "-R", latest)[0]
        pyfleece("cp", latest, "/holes", tmp_path / "holes")
    _, err = pyfleece("ls", f"{backups}@nothing", status=1)
    assert "nothing" in err

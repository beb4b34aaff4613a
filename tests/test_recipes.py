"""The recipes of docs/recipes.md do what they say, with the real tools and a disk that is being written."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MIB, content, missing, require, wait_for
from files_kit import assert_same, grow, make_ext, on_disk

import pyfleece

RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes"


# ---- an agent with its own store ----


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    spec = importlib.util.spec_from_file_location("dedup_agent", RECIPES / "dedup_agent.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_agent_keeps_each_chunk_once_and_restores_what_was_at_the_cut(agent, make_image, tmp_path, no_leaks):
    path, data = make_image(24 * MIB + 513)
    store = tmp_path / "store"
    store.mkdir()
    with pyfleece.open(path, "r+") as source, pyfleece.Disk(source) as disk:
        stop = threading.Event()

        def write() -> None:
            rng = random.Random(1)
            while not stop.is_set():
                disk.pwrite(rng.randbytes(5000), rng.randrange(disk.size - 5000))

        cut = disk.snapshot

        def cut_and_write(*arguments, **options):
            made = cut(*arguments, **options)
            guest.start()
            return made

        guest = threading.Thread(target=write)
        disk.snapshot = cut_and_write           # the guest writes from the instant of the cut on
        try:
            agent.backup(disk, store, "monday")
        finally:
            stop.set()
            guest.join()
        del disk.snapshot
        first = len(list(store.iterdir()))
        now = disk.pread(disk.size, 0)
        assert now != data
        agent.backup(disk, store, "tuesday")
        disk.pwrite(b"one chunk differs", 5 * MIB)
        again = len(list(store.iterdir()))
        agent.backup(disk, store, "wednesday")
        assert len(list(store.iterdir())) == again + 2 > first      # a chunk and a manifest
    agent.restore(store, "monday", tmp_path / "monday.raw")
    agent.restore(store, "tuesday", tmp_path / "tuesday.raw")
    assert (tmp_path / "monday.raw").read_bytes() == data
    assert (tmp_path / "tuesday.raw").read_bytes() == now
    chunk = max(store.iterdir(), key=lambda path: path.stat().st_size)
    chunk.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="is damaged"):
        for name in ("monday", "tuesday", "wednesday"):
            agent.restore(store, name, tmp_path / f"again-{name}.raw")


def test_the_examples_run(agent, make_image, tmp_path, monkeypatch):
    _, data = make_image(4 * MIB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "dedup_agent", agent)
    (example,) = re.findall(r"^```python\n(.*?)^```", (RECIPES.parent / "recipes.md").read_text(), re.M | re.S)
    exec(compile(example, "recipes.md", "exec"), {})
    assert (tmp_path / "restored.raw").read_bytes() == data


def test_the_recipes_are_as_short_as_they_say():
    for name in ("restic.sh", "borg.sh"):
        assert len((RECIPES / name).read_text().splitlines()) <= 11
    lines = (RECIPES / "dedup_agent.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 45


# ---- restic and borg, through the mount ----


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, bytes]]:
    """A disk that is served, and written by a guest all the time; the mount point, and what the first half of the disk
    holds: a file system, which the guest leaves alone until the first snapshot is there.
    """
    if not os.path.exists("/dev/fuse"):
        missing("FUSE")
    image, mount = tmp_path / "vm.raw", tmp_path / "mnt"
    (tmp_path / "tree").mkdir()
    grow(tmp_path / "tree", files=30, special=False)
    make_ext(image, tmp_path / "tree", "-t", "ext4", size=12 * MIB)
    data = image.read_bytes() + content(12 * MIB)
    image.write_bytes(data)
    mount.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "pyfleece", "serve", os.fspath(image), "--mount", os.fspath(mount)],
        stderr=subprocess.PIPE,
    )
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(1)
        with (mount / "vm.raw").open("r+b", buffering=0) as file:
            while not stop.is_set():
                half = 0 if any((mount / ".snap").iterdir()) else 12 * MIB
                os.pwrite(file.fileno(), rng.randbytes(4096), half + rng.randrange(12 * MIB - 4096))

    try:
        wait_for(lambda: server.poll() is not None or (mount / "vm.raw").exists(), 30)
        assert server.poll() is None, server.stderr.read()
        guest = threading.Thread(target=write)
        guest.start()
        try:
            yield mount, data[: 12 * MIB]
        finally:
            stop.set()
            guest.join()
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert server.returncode == 0, err


def recipe(name: str, mount: Path, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [RECIPES / name, mount], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert list((mount / ".snap").iterdir()) == []          # whatever happened
    return done.stdout + done.stderr


def test_restic_backs_up_a_live_disk(served, tmp_path):
    require("restic")
    mount, half = served
    settings = {
        "RESTIC_REPOSITORY": os.fspath(tmp_path / "repository"),
        "RESTIC_PASSWORD": "secret",
        "RESTIC_CACHE_DIR": os.fspath(tmp_path / "cache"),
    }

    def restic(*arguments: str | Path) -> str:
        command, options = ["restic", *map(os.fspath, arguments)], {"check": True, "capture_output": True, "text": True}
        return subprocess.run(command, env={**os.environ, **settings}, **options).stdout

    restic("init")
    recipe("restic.sh", mount, **settings)
    restic("restore", "latest", "--target", tmp_path / "restored")
    (restored,) = (tmp_path / "restored").rglob("vm.raw")
    assert restored.stat().st_size == 24 * MIB
    with restored.open("rb") as file:
        assert file.read(len(half)) == half
    told = recipe("restic.sh", mount, **settings)
    assert "using parent snapshot" in told
    assert "no errors were found" in restic("check", "--read-data")
    recipe("restic.sh", mount, status=1, **{**settings, "RESTIC_PASSWORD": "wrong"})


def test_borg_backs_up_a_live_disk(served, tmp_path):
    require("borg")
    mount, half = served
    settings = {
        "BORG_REPO": os.fspath(tmp_path / "repository"),
        "BORG_BASE_DIR": os.fspath(tmp_path),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }

    def borg(*arguments: str) -> str:
        (tmp_path / "restored").mkdir(exist_ok=True)
        return subprocess.run(
            ["borg", *arguments], env={**os.environ, **settings}, check=True, cwd=tmp_path / "restored",
            capture_output=True, text=True,
        ).stdout  # fmt: skip

    borg("init", "--encryption", "none")
    recipe("borg.sh", mount, **settings)
    (archive,) = borg("list", "--short").split()
    borg("extract", "--sparse", f"::{archive}")
    (restored,) = (tmp_path / "restored").rglob("vm.raw")
    assert restored.stat().st_size == 24 * MIB
    with restored.open("rb") as file:
        assert file.read(len(half)) == half
    borg("check", "--verify-data")
    recipe("borg.sh", mount, status=2, **{**settings, "BORG_REPO": os.fspath(tmp_path / "nothing")})


def test_files_come_out_of_a_snapshot_of_the_mount(served, tmp_path):
    """As docs/files.md has it, while the guest overwrites the file system."""
    mount, _ = served
    (mount / ".snap" / "now").mkdir()
    try:
        image = mount / ".snap" / "now" / "vm.raw"
        command = [sys.executable, "-m", "pyfleece", "cp", "-r", image, "/", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        (mount / ".snap" / "now").rmdir()
    assert_same(on_disk(tmp_path / "out"), on_disk(tmp_path / "tree"), unit=10**9, plain=True)


def test_a_backup_that_is_interrupted_leaves_no_snapshot(served, tmp_path):
    """By a signal to the script and what it runs, as from Ctrl-C."""
    mount, _ = served
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "restic"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'runs'}\nexec sleep 60\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    with subprocess.Popen([RECIPES / "restic.sh", mount], env=environment, start_new_session=True) as process:
        wait_for((tmp_path / "runs").exists, 30)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    assert list((mount / ".snap").iterdir()) == []

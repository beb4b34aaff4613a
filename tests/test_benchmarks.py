"""The benchmarks in bench/ work: each runs once, with little to do. No speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

ROOT = Path(__file__).resolve().parent.parent


def run(directory: Path, *command: str | os.PathLike[str]) -> str:
    """What a Python program of the benchmarks prints."""
    environment = {**os.environ, "BENCH_DIRECTORY": os.fspath(directory)}
    words = [sys.executable, *map(os.fspath, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(directory.iterdir()), "nothing is left behind"
    return done.stdout


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, without their heads."""
    lines = text.splitlines()
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("|---")}
    kept = [line for index, line in enumerate(lines) if line.startswith("|") and index not in heads]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept if not line.startswith("|---")]


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_parts(work):
    require("gcc")
    options = ["-q", "-p", "no:cacheprovider", "--durations=0"]
    told = run(work, "-m", "pytest", "bench", "--benchmark-disable", *options)
    assert "skipped" not in told and "passed" in told


def test_table_of_parts(work):
    require("gcc")
    told = run(work, "bench/parts.py", "--directory", work, "-k", "test_call and nothing", "-p", "no:cacheprovider")
    head, floor, *others = rows(told)
    assert head[0] == "**write of nothing, no snapshot**"
    assert floor[0] == "C loop, pwrite" and floor[3] == "1"
    assert len(others) == 4 and all(float(row[3]) > 0 for row in others)


def test_scaling(work, tmp_path):
    path = tmp_path / "scaling.json"
    told = run(work, "bench/scaling.py", "--directory", work, "--quick", "--rounds", "1", "--json", path)
    tables = json.loads(path.read_text())["tables"]
    assert list(tables) == ["size", "extents", "dirty", "workers", "disks"]
    assert [row[0] for row in rows(told)] == [point for points in tables.values() for point in points]
    for points in tables.values():
        for columns in points.values():
            assert all(len(figures) == 1 and figures[0] >= 0 for figures in columns.values())


def test_backups_beside_qemu(work, tmp_path):
    require("qemu-img", "qemu-storage-daemon", "fio")
    path = tmp_path / "vs.json"
    only = [word for name in ("idle", "direct", "empty", "busy") for word in ("--only", name)]
    told = run(work, "bench/vs_qemu.py", "--directory", work, "--rounds", "1", "--scale", "0", "--json", path, *only)
    found = json.loads(path.read_text())["rows"]
    assert [row[0] for row in rows(told)] == [row["what"] for row in found]
    assert len(found) == 15 and all(row["ratios"][0] >= 0 for row in found)


def test_mounts_beside_qemu(work, tmp_path):
    require("gcc", "pkg-config", "qemu-storage-daemon", "fio", "fusermount3")
    path = tmp_path / "mount.json"
    few = ["--size", "16", "--seconds", "0.1", "--rounds", "1"]
    told = run(work, "bench/mount.py", "--directory", work, *few, "--json", path)
    assert rows(told)[0][0].startswith("plain, 4 KiB random, QD1") and len(rows(told)) == 12
    for columns in json.loads(path.read_text()).values():
        assert list(columns) == ["ours", "bare FUSE", "QEMU FUSE", "QEMU NBD"]
        assert all(rate > 0 for rates in columns.values() for rate in rates)


COMMANDS = """Before.

<!-- begin: python bench/nothing.py -->
old, kept
<!-- end -->

<!-- begin: python bench/scaling.py --only workers --quick --rounds 1 -->
old
<!-- end -->
After.
"""


def test_report_replaces_what_a_command_printed(work, tmp_path):
    """In all documents that show it; it runs once."""
    documents = tmp_path / "README.md", tmp_path / "docs" / "performance.md"
    documents[1].parent.mkdir()
    for document in documents:
        document.write_text(COMMANDS)
    run(work, "bench/report.py", "--documents", tmp_path, "--directory", work, "workers")
    text = documents[0].read_text()
    assert documents[1].read_text() == text
    begin, end = text.index("rounds 1 -->\n"), text.index("<!-- end -->\nAfter.")
    assert "old, kept\n<!-- end -->" in text and text.startswith("Before.\n") and text.endswith("After.\n")
    assert [row[0] for row in rows(text[begin:end])] == ["1", "16"]


def test_report_knows_the_commands_of_the_documents(work):
    """Each begins with a program that is there."""
    listed = run(work, "bench/report.py", "--list").splitlines()
    commands = [line.partition(": ")[2].split() for line in listed]
    assert len(commands) > 5
    assert all(python == "python" and (ROOT / program).is_file() for python, program, *_ in commands)

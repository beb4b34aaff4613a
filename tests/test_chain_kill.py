"""Chains of backups, killed at random moments: every point is what the disk was at its cut, and nothing has to be read
anew because of a kill.

    PYFLEECE_CHAIN_CYCLES=500 python -m pytest tests/test_chain_kill.py
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MIB

import pyfleece
from pyfleece.chain import Repository

CYCLES = int(os.environ.get("PYFLEECE_CHAIN_CYCLES", "12"))
WORKER = Path(__file__).with_name("chain_worker.py")
SIZE = 4 * MIB


@pytest.mark.timeout(60 + 10 * CYCLES)
def test_killed_chains(tmp_path: Path) -> None:
    source, directory, cuts = tmp_path / "vm.raw", tmp_path / "backups", tmp_path / "cuts"
    cuts.mkdir()
    pyfleece.create(source, SIZE).close()
    rng = random.Random(4)
    seen: dict[str, int] = {}
    kinds: list[str] = []
    for cycle in range(CYCLES):
        with subprocess.Popen(
            [sys.executable, WORKER, source, directory, cuts, str(cycle)], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", f"cycle {cycle} did not begin"
            try:
                worker.wait(rng.uniform(0, 0.6))
                raise AssertionError(f"cycle {cycle} ended by itself with {worker.returncode}")
            except subprocess.TimeoutExpired:
                worker.kill()
        if (directory / "pyfleece.json").exists():
            repository = Repository(directory)
            for point in repository.points:
                if point.sequence in seen.values():
                    continue
                assert point.kind == "full" or not point.reason
                check(repository, point, cuts)
                seen[point.uuid] = point.sequence
                kinds.append(point.kind)
    assert kinds.count("incremental") >= CYCLES // 4, f"too few to show anything: {kinds}"
    points = Repository(directory).points
    for point in points:
        check(Repository(directory), point, cuts)
    assert Repository(directory).verify() == []
    # The first is a full one, and so is the oldest that stayed when others were dropped. No kill made another one.
    assert {p.reason for p in points} <= {"", "there is no backup yet", "the points before it were dropped"}
    assert not [name for name in os.listdir(tmp_path) if "fleece" in name and name != "vm.raw.fleece-bitmaps"]


def check(repository: Repository, point, cuts: Path) -> None:
    with repository.open(point) as image:
        held = image.pread(point.size, 0)
    expected = (cuts / str(point.sequence)).read_bytes()
    wrong = next((at for at in range(0, SIZE, 512) if held[at : at + 512] != expected[at : at + 512]), None)
    assert wrong is None, f"{point.name} ({point.kind}) is wrong at {wrong}"

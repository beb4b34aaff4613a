"""The C programs: the stress program, and those for images and backups, plain and under the sanitizers.

The stress program runs for PYFLEECE_STRESS_SECONDS (default: 4) in each flavour, with a seed that it prints;
PYFLEECE_STRESS_SEED repeats one. Runs of 10 seconds (asan: 20, tsan: 40) also demand that everything happened.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import mutants
import pytest
from c_programs import FLAVOURS, C, build, run
from conftest import missing

SECONDS = float(os.environ.get("PYFLEECE_STRESS_SECONDS", "4"))
SEED = os.environ.get("PYFLEECE_STRESS_SEED") or str(random.randrange(1, 1 << 32))
PATTERNS = ("test_image*.c", "test_backup*.c", "test_qcow2*.c", "test_fuse.c")
PROGRAMS = sorted(source.stem for pattern in PATTERNS for source in C.glob(pattern))


def stress(flavour: str, directory: Path, *options: str, seconds: float = SECONDS) -> dict[str, int]:
    """Run it; how often each thing happened."""
    arguments = ["--seconds", str(max(1, round(seconds))), "--seed", SEED, *options]
    output = run(flavour, "stress", directory, *arguments, timeout=2 * seconds + 100)
    print(output)
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.timeout(3 * SECONDS + 200)
def test_stress(flavour: str, tmp_path: Path) -> None:
    happened = stress(flavour, tmp_path)
    for event in ("writes", "discards", "exact_cuts", "hot_cuts", "bytes_verified", "bytes_spilled", "chains_checked"):
        assert happened[event] > 0, event


VARIANTS = [("--direct",), ("--threads", "12"), ("--threads", "1"), ("--mode", "tight")]


@pytest.mark.parametrize("options", VARIANTS, ids=" ".join)
def test_stress_variants(options: tuple[str, ...], tmp_path: Path) -> None:
    happened = stress("plain", tmp_path, *options, seconds=2)
    assert happened["bytes_verified"] > 0


QCOW2 = ("--source", "qcow2", "--fleecing", "qcow2", "--target", "qcow2")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("options", [QCOW2, (*QCOW2, "--direct")], ids=["", "direct"])
def test_stress_on_qcow2(flavour: str, options: tuple[str, ...], tmp_path: Path) -> None:
    happened = stress(flavour, tmp_path, *options, seconds=SECONDS / 2)
    assert happened["bytes_verified"] > 0
    assert happened["discards"] > 0


# Lies that no error betrays: only the comparison with the model can notice them.
LIES = [
    mutants.Mutant(
        "staged_clusters_are_read_from_their_start",
        "store.c",
        "place_slot(pieces[i].place)) + pieces[i].skip, pieces[i].length);\n",
        "place_slot(pieces[i].place)), pieces[i].length);\n",
        (),
    ),
    mutants.Mutant(
        "unaligned_writes_save_nothing",
        "cbw.c",
        "    bool needs_saving = disk->snapshot_count != 0;\n",
        "    bool needs_saving = disk->snapshot_count != 0 && (end - *offset) % 4096 != 513;\n",
        (),
    ),
    mutants.Mutant(
        "the_reader_does_not_look_again",
        "snapshot.c",
        "    if ((found = bitmap_next_set(&snapshot->saved, first, end)) < end) {\n",
        "    if (0) {\n",
        (),
    ),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.name)
def test_stress_notices(lie: mutants.Mutant, engine: Path, tmp_path: Path) -> None:
    """Nothing is proven by a checker that can't fail."""
    with mutants.mutated(lie, engine, ["stress"]) as build_directory:
        command = [build_directory / "plain" / "stress", tmp_path, "--seconds", "20", "--mode", "calm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    verdict = r"byte \d+ is \w\w, not|the cut is between|not one instant|torn or foreign"
    assert re.search(verdict, done.stderr), done.stderr


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("engine")
    mutants.prepare(base, ["stress"])
    return base


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, flavour: str, tmp_path: Path) -> None:
    output = run(flavour, program, tmp_path)
    if "SKIP" in output:
        missing(output.strip())


def test_everything_builds_without_warnings() -> None:
    for flavour in FLAVOURS:  # with -Wall -Wextra -Wshadow -Wstrict-prototypes -Werror
        assert (build(flavour) / "stress").exists()

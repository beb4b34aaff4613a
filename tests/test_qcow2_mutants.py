"""Break the qcow2 driver on purpose, one line at a time, and demand that the crash test, or the race of several threads
for one cluster, notices: nothing is proven by a checker that can't fail.

Each mutant replaces a piece of text, which must occur exactly once in its file (else the table is out of date), in a
copy of csrc.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import mutants
import pytest
from conftest import require
from mutants import Mutant
from qcow2_kit import KIB, make_race_image
from qcow2_replay import SECTOR
from test_qcow2_crash import TABLE, Scenario, prepare, record, try_states

SEEDS = range(1, 9)

# What a mutant is noticed in. None: in the race.
FREES = Scenario("frees", size=128 * KIB, operations=250)
SHARED = Scenario("shared", size=128 * KIB, snapshots=1)
GROWS = Scenario("grows", size=300 * KIB, reopen=True, grow=1234 * SECTOR)
PLAIN = Scenario("plain", size=256 * KIB)


def _mutant(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"qcow2/{file}", old, new, ())


MUTANTS: list[tuple[Mutant, Scenario | None]] = [
    (
        _mutant(
            "no_sync_between_refcounts_and_tables",
            "commit.c",
            "c->piece_count[SLICE_REFCOUNTS], error);\n    if (rc == 0)\n        rc = flush(q, error);\n",
            "c->piece_count[SLICE_REFCOUNTS], error);\n",
        ),
        PLAIN,
    ),
    (
        _mutant(
            "no_sync_between_l2_and_l1",
            "commit.c",
            "c->piece_count[SLICE_L2], error);\n        if (rc == 0)\n            rc = flush(q, error);\n",
            "c->piece_count[SLICE_L2], error);\n",
        ),
        PLAIN,
    ),
    (
        _mutant(
            "l1_is_not_synced",
            "commit.c",
            "c->header.l1_offset, error);\n        if (rc == 0)\n            rc = flush(q, error);\n",
            "c->header.l1_offset, error);\n",
        ),
        PLAIN,
    ),
    (
        _mutant(
            "refcount_table_is_not_synced",
            "commit.c",
            "    if (rc == 0 && (c->table || c->reftable_count))\n        rc = flush(q, error);\n",
            "",
        ),
        TABLE,
    ),
    (
        _mutant(
            "header_points_at_a_table_that_is_not_synced",
            "commit.c",
            "c->header.reftable_offset, error);\n        if (rc == 0)\n            rc = flush(q, error);\n",
            "c->header.reftable_offset, error);\n",
        ),
        TABLE,
    ),
    (
        _mutant(
            "freed_before_the_tables_are_durable",
            "commit.c",
            "        rc = write_changes(q, &c, error);\n        if (rc == 0)\n            done_with(q, &c);\n",
            "        done_with(q, &c);\n        settle(q);\n        rc = write_changes(q, &c, error);\n"
            "        if (rc == 0)\n            ;\n",
        ),
        FREES,
    ),
    (
        _mutant(
            "shared_clusters_are_overwritten",
            "map.c",
            "        place->ours = table_ours && (entry & ENTRY_COPIED);\n",
            "        place->ours = table_ours;\n",
        ),
        SHARED,
    ),
    (
        _mutant(
            "shared_tables_are_overwritten",
            "map.c",
            "    *ours = entry & ENTRY_COPIED;\n",
            "    *ours = true;\n",
        ),
        SHARED,
    ),
    (
        _mutant(
            "flush_forgets_entries",
            "map.c",
            "        cache_dirty(q, slice);\n        q->must_commit = true;\n",
            "        cache_dirty(q, slice);\n",
        ),
        PLAIN,
    ),
    (
        _mutant(
            "flush_of_data_alone_does_not_sync",
            "commit.c",
            "    if (rc == 1)\n        rc = flush(q, error);\n",
            "    if (rc == 1)\n        rc = 0;\n",
        ),
        PLAIN,
    ),
    (
        _mutant(
            "l1_moves_before_its_refcounts",
            "grow.c",
            "clusters, &run, error);\n    if (rc == 0)\n        rc = must_commit(q, error);\n",
            "clusters, &run, error);\n",
        ),
        GROWS,
    ),
    (
        _mutant(
            "l1_moves_before_it_is_synced",
            "grow.c",
            "bytes, header.l1_offset, error);\n    if (rc == 0)\n        rc = io_flush(&q->io, error);\n",
            "bytes, header.l1_offset, error);\n",
        ),
        GROWS,
    ),
    (
        _mutant(
            "no_claims",
            "map.c",
            "    while (claimed(claims, first, count)) {\n",
            "    while (claimed(claims, first, count) && 0) {\n",
        ),
        None,
    ),
    (
        _mutant(
            "used_again_before_its_readers_left",
            "free.c",
            "        if (!freed || !epoch_passed(&q->epoch, freed->ticket))\n",
            "        if (!freed)\n",
        ),
        None,
    ),
    (
        _mutant(
            "entries_before_the_data",
            "write.c",
            "    if (rc == 0) {\n"
            "        rc = write_merged(q, cursor, &around, host + (offset & q->cluster_mask), n, error);\n"
            "        free(around.buffer);\n    }\n"
            "    for (uint64_t i = 0; i < run.count; i++)\n"
            "        new[i] = ENTRY_COPIED | (host + (i << q->cluster_bits));\n"
            "    if (rc == 0)\n        rc = map_change(q, first, run.count, old, new, error);\n",
            "    for (uint64_t i = 0; i < run.count; i++)\n"
            "        new[i] = ENTRY_COPIED | (host + (i << q->cluster_bits));\n"
            "    if (rc == 0)\n        rc = map_change(q, first, run.count, old, new, error);\n"
            "    if (rc == 0) {\n"
            "        rc = write_merged(q, cursor, &around, host + (offset & q->cluster_mask), n, error);\n"
            "        free(around.buffer);\n    }\n",
        ),
        None,
    ),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("qemu-img", "qemu-io")
    base = tmp_path_factory.mktemp("engine")
    mutants.prepare(base, ["qcow2_crash", "qcow2_race"])
    return base


def crash_test_fails(build: Path, scenario: Scenario, directory: Path, seed: int) -> bool:
    prepared = prepare(scenario, directory, seed)
    try:
        run, log = record(build / "qcow2_crash", scenario, prepared, seed)
    except AssertionError:                      # it did not even get through
        return True
    return bool(try_states(prepared, run, log, 600, seed, stop_early=True).failures)


def race_fails(build: Path, directory: Path, seed: int) -> bool:
    image = make_race_image(directory / "race.qcow2", "cluster_size=4096")
    command = [build / "qcow2_race", image, "--rounds", "400", "--seed", f"{seed}", "--snapshots"]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0
    except subprocess.TimeoutExpired:           # it hangs: that is noticed, too
        return True


@pytest.mark.parametrize(("mutant", "scenario"), MUTANTS, ids=[mutant.name for mutant, _ in MUTANTS])
def test_mutant_is_noticed(mutant: Mutant, scenario: Scenario | None, engine: Path, tmp_path: Path) -> None:
    program = "qcow2_crash" if scenario else "qcow2_race"
    with mutants.mutated(mutant, engine, [program]) as build:
        for seed in SEEDS:
            directory = build / "plain"
            if scenario and crash_test_fails(directory, scenario, tmp_path, seed):
                return
            if not scenario and race_fails(directory, tmp_path, seed):
                return
    pytest.fail(f"nobody notices {mutant.name}")

"""The races of tests/c/test_litmus.c on this machine; tests/test_arm64.py runs them under qemu-user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from c_programs import FLAVOURS, run

SECONDS = os.environ.get("PYFLEECE_LITMUS_SECONDS", "0.4")  # for each race
RACES = ["gate", "write", "file", "relay", "release", "claim", "pages", "ones", "claims", "reads", "frees"]


def counts(output: str) -> dict[str, int]:
    """The lines "name number" of what a program printed."""
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.timeout(300)
def test_litmus(flavour: str, tmp_path: Path) -> None:
    seconds = SECONDS if flavour == "plain" else "0.05"
    output = run(flavour, "test_litmus", tmp_path, "--seconds", seconds, timeout=280)
    print(output)
    happened = counts(output)
    assert all(happened[f"{race}_rounds"] > 0 for race in RACES)
    if flavour == "plain":  # the sanitizers are slow, and there to find other faults
        assert all(happened[f"{race}_overlaps"] > 0 for race in RACES), output


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor is in order with itself")
def test_the_races_can_show_reordering(tmp_path: Path) -> None:
    """Without a fence a store is seen late: the same race as `release`, but for that."""
    happened = counts(run("plain", "test_litmus", tmp_path, "--seconds", SECONDS, "--only", "control"))
    assert happened["control_overlaps"] > 0

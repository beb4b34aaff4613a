#!/usr/bin/env python3
"""Check the model of the write path (cbw.pml) with spin, in every configuration below; with --mutants, take one check
out of it at a time and see that spin then finds an error, and the one that was to be expected.

    tests/model/check.py                    all configurations, searched to the end: about a minute on two free cores,
                                            and not more than 600 MiB each
    tests/model/check.py release hang       these
    tests/model/check.py --mutants          the checks, one by one: another minute or two
    tests/model/check.py --trail save -D NO_SECOND_LOOK         the steps that lead to an error

Needs spin (6.4 or later) and gcc. The exit status is 0 when everything is as it should be.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 3500
DEPTH = 1_000_000
SECONDS = 600                   # for one search


@dataclass(frozen=True)
class Configuration:
    name: str
    what: str
    defines: str
    progress: bool = False      # look for circles instead of errors


# Unless it says otherwise: two clusters, one snapshot that is there from the start, two writers of both clusters, a
# reader of any cluster, a spiller, two memory slots and two file slots, spills that fail at any time, no release, no
# timeout. The longest come first.
CONFIGURATIONS = [
    Configuration(
        "two", "two snapshots, one cut while writes run, of which one is unaligned",
        "-DNS=2 -DCUTS=1 -DNF=1 -DREADS=2 -DOLD1=0 -DW0=0,0,1 -DW1=0,1,2"),
    Configuration(
        "release", "a cluster is released at any time; an unaligned write",
        "-DRELEASE=1 -DREADS=0 -DOLD1=0 -DW1=0,0,2"),
    Configuration(
        "break", "one slot, timeouts, break-snapshot",
        "-DNR=1 -DTIMEOUTS=1 -DW0=0,0,3"),
    Configuration(
        "lose", "one slot, timeouts, lose-range",
        "-DNR=1 -DTIMEOUTS=1 -DW0=0,0,3 -DPOLICY0=LOSE_RANGE"),
    Configuration(
        "fail", "one slot, timeouts, break-guest-write",
        "-DNR=1 -DTIMEOUTS=1 -DW0=0,0,3 -DPOLICY0=BREAK_GUEST_WRITE"),
    Configuration(
        "one-slot", "a stage of one slot; writes of one cluster each, one released",
        "-DNR=1 -DW0=0,0,3 -DW1=1,1,3 -DRELEASE=1 -DREADS=0"),
    Configuration(
        "cut", "the snapshot is cut while writes run",
        "-DCUTS=1 -DREADS=0"),
    Configuration(
        "room", "three clusters, two writes of two each: they wait for room for two",
        "-DNC=3 -DW0=0,1,3 -DW1=1,2,3 -DREADS=1"),
    Configuration(
        "mixed", "two snapshots of one cluster, break-snapshot and break-guest-write",
        "-DNS=2 -DNC=1 -DNR=1 -DTIMEOUTS=1 -DPOLICY1=BREAK_GUEST_WRITE -DW0=0,0,3 -DW1=0,0,2"),
    Configuration(
        "hang-late", "spills may hang for ever, timeouts, a release: what a hung spill keeps",
        "-DHANG=1 -DTIMEOUTS=1 -DNR=1 -DREAD=0 -DRELEASE=1 -DW0=0,0,3"),
    Configuration(
        "fine", "an unaligned write; the writers' steps as small as they get",
        "-DFINE=1 -DW1=0,1,2 -DREADS=0"),
    Configuration(
        "two-late", "two snapshots as above, with stages of one slot, and timeouts, without a reader",
        "-DNS=2 -DCUTS=1 -DNR=1 -DNF=1 -DREAD=0 -DOLD1=0 -DTIMEOUTS=1 -DW0=0,0,1 -DW1=0,1,2"),
    Configuration(
        "cut-close", "a snapshot is cut, and another one closed, while writers wait for room",
        "-DCLOSE=1 -DCUTS=1 -DNS=2 -DNR=1 -DREAD=0 -DW0=0,0,3 -DW1=1,1,3"),
    Configuration(
        "save", "an aligned and an unaligned write; a cluster of zeros",
        "-DOLD1=0 -DW1=0,1,2"),
    Configuration(
        "close", "no fleecing image; the snapshot is closed while writers wait for room",
        "-DCLOSE=1 -DNR=1 -DNF=0 -DW0=0,0,3 -DW1=1,1,3"),
    Configuration(
        "hang", "spills may hang for ever, no timeouts: a cut comes through all the same",
        "-DHANG=1 -DNS=2 -DCUTS=1 -DNR=1 -DREAD=0 -DW0=0,0,3"),
    Configuration(
        "incremental", "two incremental snapshots, cut one after the other",
        "-DNS=2 -DCUTS=2 -DINCREMENTAL=1 -DREADS=3 -DW0=0,0,3"),
    Configuration(
        "circles", "three clusters, one snapshot, two writes of two each: nobody runs in circles for ever",
        "-DNC=3 -DREAD=0 -DW0=0,1,3 -DW1=1,2,3", True),
]

LIED, GUEST, LEAK = "a_snapshot_lied", "the_guest_lost", "a_slot_leaked"
DIRTY, CAUSE, DEADLOCK, CIRCLE = "dirty_was_missed", "cause_is_missing", "waits for ever", "runs in circles"


@dataclass(frozen=True)
class Mutant:
    option: str                 # the name to define, and maybe more options that make the error easier to find
    configuration: str
    expected: str
    what: str

    @property
    def name(self) -> str:
        return self.option.split()[0]

    def defines(self) -> list[str]:
        return [*f"-D{self.option} -DVISIBLE".split(), *(["-DIGNORE_LEAKS=1"] if self.expected != LEAK else [])]


MUTANTS = [
    # writers
    Mutant("NO_CLAIM", "save", LIED, "a writer saves what another one has claimed"),
    Mutant("NO_WAIT_FOR_CLAIMS", "save", LIED, "a writer does not wait for the one that saves its cluster"),
    Mutant("SAVED_TOO_EARLY", "save", LIED, "saved is set before the data is in the store (I1)"),
    Mutant("NO_WRITER_FENCE", "save", LIED, "saved becomes visible after the write (I2)"),
    Mutant("NO_LOOK_AT_RELEASED", "release", LEAK, "a writer does not free what was released while it was saved"),
    Mutant("NO_RESTART", "room", LIED, "a claim that was given up is taken for a saved cluster"),
    Mutant("KEEP_CLAIMS", "room", DEADLOCK, "claims are kept during the wait for room"),
    Mutant("KEEP_GRANT", "room", LEAK, "room that was promised, and not needed after all, is not returned"),
    Mutant("WAIT_INSIDE", "hang", DEADLOCK, "a writer waits for room inside the gate"),
    Mutant("STALE_SNAPSHOTS -DCLOSE=0 -DREAD=1 -DREADS=3", "cut-close", LIED,
           "after the wait for room, the snapshots that were cut meanwhile are not looked at"),
    Mutant("BREAK_AFTER_WRITE", "break", LIED, "the snapshot is marked broken after the write (I2)"),
    Mutant("CAUSE_AFTER_MARK", "break", CAUSE, "the first cause is noted after the mark"),
    Mutant("LOSE_AFTER_WRITE", "lose", LIED, "the cluster is marked lost after the write (I2)"),
    Mutant("WAIT_IGNORES_LOST", "lose", DEADLOCK, "who waits for a claim does not look at lost"),
    Mutant("GUEST_GOES_ON", "fail", GUEST, "break-guest-write goes on with the write"),
    # the queue for room
    Mutant("NO_GRANT", "room", DEADLOCK, "room that becomes free wakes nobody"),
    Mutant("NO_LAST_LOOK", "room", DEADLOCK, "no look at the room before the wait"),
    Mutant("TIMEOUT_DROPS_GRANT", "break", LEAK, "room that was promised at the moment of the timeout is forgotten"),
    Mutant("STAY_IN_QUEUE", "break", LEAK, "who timed out stays in the queue"),
    Mutant("GRANT_ONE", "circles", CIRCLE, "room is promised slot by slot, not all that one needs"),
    Mutant("NO_WAKE_AT_CLOSE", "close", DEADLOCK, "closing a snapshot does not wake those who wait for its room"),
    # readers
    Mutant("NO_SECOND_LOOK", "save", LIED, "no look at anything after the source was read (I3)"),
    Mutant("NO_SECOND_LOOK_AT_SAVED", "save", LIED, "... at saved"),
    Mutant("NO_SECOND_LOOK_AT_BROKEN", "break", LIED, "... at broken"),
    Mutant("NO_SECOND_LOOK_AT_LOST", "lose", LIED, "... at lost"),
    Mutant("NO_SECOND_LOOK_AT_RELEASED", "release", LIED, "... at released"),
    Mutant("NO_READER_FENCE", "save", LIED, "the look after the read sees what was before it"),
    Mutant("NO_RELEASED_AFTER_STORE", "release", LIED, "no look at released after the store was read (I3)"),
    Mutant("NO_STOPPED_AFTER_STORE", "close", LIED, "... at whether the snapshot still lives"),
    Mutant("NO_PIN", "room", LIED, "a reader does not pin the slot that it reads (I5)"),
    # the store, the spiller and releases
    Mutant("NO_PIN_COUNT", "room", LIED, "a slot is used again although somebody has it pinned (I5)"),
    Mutant("NO_LAST_UNPIN", "room", DEADLOCK, "the last unpin does not free the slot"),
    Mutant("MAPPED_TOO_EARLY", "room", LIED, "the map points at the file before the data is there"),
    Mutant("NO_LOOK_AT_MAP", "release", LEAK, "a spill does not see that its cluster was freed meanwhile"),
    Mutant("FREE_HUNG_SLOT", "room", LIED, "the file slot of a spill that hangs is used again (I5)"),
    Mutant("FREE_BEFORE_RELEASED", "release", LIED, "a cluster is freed before it is marked released"),
    Mutant("NO_RELEASE_FENCE", "release", LEAK, "the release looks at saved before its mark is visible"),
    Mutant("NO_FREE", "release", LEAK, "a release frees nothing"),
    # the gate and the cut
    Mutant("LOOK_BEFORE_COUNT", "cut", LIED, "a writer looks at the gate before it is counted"),
    Mutant("NO_WAIT_FOR_WRITERS", "cut", LIED, "a cut does not wait for the writers inside"),
    Mutant("OPEN_TOO_EARLY", "cut", LIED, "the gate is opened before the snapshot is installed"),
    Mutant("MARK_BEFORE_GATE -DREAD=0 -DW1=0,0,3", "incremental", DIRTY, "a write is marked before the gate (I6)"),
    Mutant("MARK_AFTER_GATE", "incremental", DIRTY, "... after the gate (I6)"),
]


@dataclass
class Result:
    errors: int
    states: int
    memory: float               # MiB
    seconds: float
    found: str                  # what pan complained about, by the names above; "" when nothing
    complete: bool
    lines: frozenset[str]       # of the model that this configuration has
    reached: frozenset[str]     # and of these, those of which every step was taken


def model(directory: Path, configuration: Configuration, extra: list[str]) -> Path:
    """Make the verifier in `directory`."""
    defines = configuration.defines.split() + extra + (["-DPROGRESS=1"] if configuration.progress else [])
    shutil.copytree(HERE, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for command in (
        ["spin", "-a", *defines, "cbw.pml"],
        ["gcc", "-w", "-O1", f"-DMEMLIM={MEMORY_MIB}", "-DCOLLAPSE", "-DNP" if configuration.progress else "-DSAFETY",
         "-o", "pan", "pan.c"],
    ):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode or not (directory / ("pan.c" if command[0] == "spin" else "pan")).exists():
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return directory / "pan"


def complaint(output: str) -> str:
    """What pan found, by the names above; "" when nothing."""
    found = re.search(r"pan:\d+: (.*)", output)
    if not found:
        return ""
    text = found.group(1)
    if "invalid end state" in text:
        return DEADLOCK
    if "non-progress cycle" in text:
        return CIRCLE
    name = re.search(r"assertion violated .*\|\|(\w+)\)", text)
    return name.group(1) if name else text


def verify(configuration: Configuration, extra: list[str], trail: bool = False) -> Result:
    """Search it, to the end or to the first error."""
    with tempfile.TemporaryDirectory(prefix="cbw-model-") as name:
        pan = model(Path(name), configuration, extra)
        began = time.monotonic()
        options = ["-l", "-f"] if configuration.progress else []
        done = subprocess.run([str(pan), f"-m{DEPTH}", "-w24", *options], cwd=name, capture_output=True, text=True,
                              timeout=SECONDS, check=False)
        seconds = time.monotonic() - began
        output = done.stdout + done.stderr
        if trail and (Path(name) / "cbw.pml.trail").exists():
            subprocess.run([str(pan), "-r", *options], cwd=name, check=False)
        errors = re.search(r"errors: (\d+)", output)
        states = re.search(r"(\d+) states, stored", output)
        memory = re.search(r"([\d.]+)\s+total actual memory", output)
        if not errors or not states or not memory:
            raise RuntimeError(f"{configuration.name}: pan said nothing of use:\n{output[-2000:]}")
        incomplete = ("Search not completed", "max search depth too small", "memory limit", "Warning")
        lines = frozenset(re.findall(r"STATE \d+ - (\w+\.pml:\d+)", (Path(name) / "pan.m").read_text()))
        unreached = {line for line, step in re.findall(r"^\s+(\w+\.pml:\d+), state \d+, \"(.*)\"", output, re.M)
                     if step not in ("-end-", "(1)")}       # the end of what never ends; a skip that spin has merged
        return Result(int(errors.group(1)), int(states.group(1)), float(memory.group(1)), seconds, complaint(output),
                      not any(text in output for text in incomplete), lines, lines - unreached)


def check_configurations(chosen: list[Configuration], jobs: int, extra: list[str], trail: bool) -> bool:
    good = True
    states = seconds = 0.0
    lines: set[str] = set()
    reached: set[str] = set()
    began = time.monotonic()
    print(f"{'configuration':13} {'states':>11} {'seconds':>8} {'MiB':>6}  result")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for c, r in zip(chosen, pool.map(lambda c: verify(c, extra, trail), chosen)):
            result = r.found or ("no error" if r.complete and not r.errors else "INCOMPLETE")
            good &= result == "no error"
            states += r.states
            seconds += r.seconds
            lines |= r.lines
            reached |= r.reached
            print(f"{c.name:13} {r.states:11,} {r.seconds:8.1f} {r.memory:6.0f}  {result:10} {c.what}", flush=True)
    print(f"{'in all':13} {states:11,.0f} {seconds:8.1f}  in {time.monotonic() - began:.0f} s")
    if good and len(chosen) == len(CONFIGURATIONS) and not extra and lines - reached:
        print(f"no configuration takes every step of {', '.join(sorted(lines - reached))}")
        good = False
    return good


def check_mutants(chosen: list[Mutant], jobs: int) -> bool:
    good = True
    began = time.monotonic()
    configurations = {c.name: c for c in CONFIGURATIONS}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda m: verify(configurations[m.configuration], m.defines()), chosen)
        for m, r in zip(chosen, results):
            good &= r.found == m.expected
            found = r.found if r.found == m.expected else f"FOUND {r.found or 'NOTHING'}, NOT {m.expected}"
            print(f"{m.name:26} {m.configuration:12} {r.states:10,} states: {found:16} {m.what}", flush=True)
    print(f"{len(chosen)} checks taken out in {time.monotonic() - began:.0f} s")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="configurations (with --mutants: mutants); all by default")
    parser.add_argument("--mutants", action="store_true", help="take out one check at a time")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--trail", action="store_true", help="show the steps that lead to the error")
    parser.add_argument("-D", action="append", default=[], metavar="NAME", help="define it as well")
    arguments = parser.parse_args()
    names: list[str] = arguments.names
    known = [m.name for m in MUTANTS] if arguments.mutants else [c.name for c in CONFIGURATIONS]
    for name in names:
        if name not in known:
            parser.error(f"there is no {name}; there are {', '.join(known)}")
    if arguments.mutants:
        good = check_mutants([m for m in MUTANTS if not names or m.name in names], arguments.jobs)
    else:
        good = check_configurations([c for c in CONFIGURATIONS if not names or c.name in names], arguments.jobs,
                                    [f"-D{name}" for name in arguments.D], arguments.trail)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

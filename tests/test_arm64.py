"""The engine on arm64: the C programs under qemu-user, and the fences in the machine code.

qemu-user on another architecture shows that the code runs there. It does not show weak memory order: it runs on the
host's processor with the host's order. That the fences which docs/memory-order.md asks for are in the machine code, on
every path, is checked there instead.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import arm64_code
import pytest
from c_programs import C
from conftest import missing, require
from test_litmus import RACES, counts

CSRC = C.parents[1] / "csrc"
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian's libc6-dev-arm64-cross has the C library
SECONDS = float(os.environ.get("PYFLEECE_STRESS_SECONDS", "4"))
PROGRAMS = ("test_litmus", "stress", "test_image", "test_image_fault", "test_backup", "test_backup_chunks")


def need_compiler() -> None:
    require(arm64_code.COMPILER, arm64_code.OBJDUMP)
    if not os.path.exists(f"{LIBRARIES}/include/stdio.h"):
        missing("the C library for arm64 (libc6-dev-arm64-cross)")


def emulator() -> str:
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if found is None:
        missing("the program qemu-aarch64-static")
    assert found is not None
    return found


@functools.cache
def build() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="pyfleece-arm64-"))
    command = ["make", "-s", "-C", str(C), f"-j{os.cpu_count() or 1}", f"BUILD={directory}"]
    command += [f"CC={arm64_code.COMPILER}", "AR=aarch64-linux-gnu-ar"]
    command += [f"{directory}/plain/{program}" for program in PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"the C programs do not build for arm64:\n{done.stdout}{done.stderr}")
    return directory / "plain"


@pytest.fixture(scope="module", autouse=True)
def build_directory_goes() -> Iterator[None]:
    yield
    if build.cache_info().currsize:
        shutil.rmtree(build().parent)


def run(program: str, *arguments: str | Path) -> str:
    """What it printed. A failed check counts at once; but the emulator crashes by itself now and then when threads end
    (qemu-user 7.2: in its own code, not in what it translated), and has then shown nothing.
    """
    need_compiler()
    command = [emulator(), "-L", LIBRARIES, build() / program, *arguments]
    for _ in range(3):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        except subprocess.TimeoutExpired as late:
            output = str(late.stdout)
            continue
        output = done.stdout + done.stderr
        if done.returncode != -signal.SIGSEGV and "uncaught target signal 11" not in output:
            assert done.returncode == 0, output[-8000:]
            return done.stdout
    pytest.fail(f"the emulator crashed or hung three times: {output[-8000:]}")


# ---- under qemu-user ----

pytestmark = pytest.mark.timeout(640)


def test_litmus(tmp_path: Path) -> None:
    """In one emulated run a race may end without its threads ever having met."""
    unseen = set(RACES)
    for _ in range(3):
        happened = counts(run("test_litmus", tmp_path, "--seconds", "0.1"))
        unseen = {race for race in unseen if happened[f"{race}_overlaps"] == 0}
        if not unseen:
            break
    assert not unseen, f"never met: {unseen}"


def test_stress(tmp_path: Path) -> None:
    happened = counts(run("stress", tmp_path, "--seconds", str(max(1, round(SECONDS)))))
    for event in ("writes", "exact_cuts", "hot_cuts", "bytes_verified", "bytes_spilled", "chains_checked"):
        assert happened[event] > 0, event


# Direct I/O is left out: qemu-user 7.2 hands the statx of a program on without the alignments, as if there were none.
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name.startswith(("test_image", "test_backup"))])
def test_program(program: str, tmp_path: Path) -> None:
    assert "SKIP" not in run(program, tmp_path)


# ---- the machine code ----

FLAGS = {
    "default": (),  # read-modify-write: functions of libgcc that choose at run time
    "exclusive": ("-mno-outline-atomics",),  # ldaxr, stlxr
    "atomics": ("-march=armv8.2-a",),  # ldaddal and others
    "newer": ("-march=armv8.5-a", "-O3"),  # and, in newer compilers, ldapr
}


@functools.cache
def code(source: Path, flags: str = "default") -> arm64_code.Code:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output.o"
        arm64_code.compile_source(source, CSRC, output, FLAGS[flags])
        return arm64_code.Code(output)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("rule", arm64_code.RULES, ids=lambda rule: rule.name)
def test_no_path_without_a_fence(rule: arm64_code.Rule, flags: str) -> None:
    need_compiler()
    bad, places = code(CSRC / rule.source, flags).violations(rule)
    assert places > 0, "the rule does not match anything any more"
    assert not bad, f"reached without a fence: {sorted(bad)}"


def weaker(source: str) -> list[str]:
    """The source without its nth fence, or with its nth load that has to be strong (in the gate) relaxed."""
    text = (CSRC / source).read_text(encoding="utf-8")
    found = [(m, ";") for m in re.finditer(r"\bfull_fence\(\);", text)]
    loads = re.finditer(r"LIKELY\((atomic_load\(&gate->state\)) ", text)
    found += [(m, m[0].replace("atomic_load", "RELAXED_LOAD")) for m in loads]
    return [text[: m.start()] + instead + text[m.end() :] for m, instead in found]


@pytest.mark.parametrize(("source", "count"), [("cbw.c", 3), ("snapshot.c", 4), ("gate.c", 4)])
def test_a_missing_fence_is_noticed(source: str, count: int, tmp_path: Path) -> None:
    """Each one of them is in a rule, and the rules can fail."""
    need_compiler()
    variants = weaker(source)
    assert len(variants) == count, "a fence without a rule in arm64_code.py, and perhaps without a word in the docs"
    for n, text in enumerate(variants):
        changed = tmp_path / source
        changed.write_text(
            "#define RELAXED_LOAD(x) atomic_load_explicit(x, memory_order_relaxed)\n" + text, encoding="utf-8"
        )
        output = tmp_path / f"{n}.o"
        arm64_code.compile_source(changed, CSRC, output)
        compiled = arm64_code.Code(output)
        rules = [rule for rule in arm64_code.RULES if rule.source == source]
        assert any(compiled.violations(rule)[0] for rule in rules), f"fence {n + 1} of {source} can go unnoticed"

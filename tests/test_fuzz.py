"""The fuzzer in tests/fuzz: its corpus is replayed (what once crashed it is in there), and it runs for a while.

The while is a number of runs from a fixed seed, so that a test run does not depend on luck. PYFLEECE_FUZZ_SECONDS makes
it that many seconds from a random one; `make -C tests/fuzz run SECONDS=3600` is for longer.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from conftest import missing

FUZZ = Path(__file__).resolve().parent / "fuzz"
SECONDS = int(os.environ.get("PYFLEECE_FUZZ_SECONDS", "0"))
RUNS = 1500
PROBE = "int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return !d && n; }"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("probe")
    (scratch / "probe.c").write_text(PROBE + "\n")
    probe = ["clang", "-fsanitize=fuzzer,address,undefined", "probe.c", "-o", "probe"]
    if shutil.which("clang") is None or subprocess.run(probe, cwd=scratch, capture_output=True).returncode:
        missing("clang with libFuzzer (Debian: clang, libclang-rt-dev)")
    command = ["make", "-s", "-C", str(FUZZ), f"-j{os.cpu_count() or 1}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return FUZZ / "build" / "fuzz_qcow2"


def fuzz(target: str, scratch: Path, *options: str) -> str:
    """Run a target of the makefile; the input that fails, if one does, becomes part of the message."""
    arguments = " ".join([f"-artifact_prefix={scratch}/", *options])
    environment = {**os.environ, "FUZZ_DIRECTORY": str(scratch)}
    command = [
        "make",
        "-s",
        "-C",
        str(FUZZ),
        target,
        f"ARGS={arguments}",
        f"SECONDS={SECONDS}",
        f"CORPUS={scratch}/corpus",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        found = [
            path for path in scratch.iterdir() if path.name.partition("-")[0] in ("crash", "timeout", "oom", "leak")
        ]
        packed = [base64.b64encode(zlib.compress(path.read_bytes(), 9)).decode() for path in found]
        pytest.fail(f"{done.stderr[-6000:]}\nthe input, base64 of zlib: {packed}")
    return done.stderr


@pytest.mark.timeout(400)
def test_corpus(fuzzer, tmp_path):
    assert len(list((FUZZ / "corpus").iterdir())) >= 16
    assert "DONE" in fuzz("replay", tmp_path)


@pytest.mark.timeout(400 + 2 * SECONDS)
def test_for_a_while(fuzzer, tmp_path):
    if SECONDS:
        output = fuzz("run", tmp_path, f"-max_total_time={SECONDS}")
    else:
        output = fuzz("run", tmp_path, "-seed=1", f"-runs={RUNS}", "-max_total_time=0", "-timeout=100")
    assert "DONE" in output


def test_corpus_is_small():
    assert sum(path.stat().st_size for path in (FUZZ / "corpus").iterdir()) < 300 << 10


def test_opening_something_else_is_noticed(fuzzer, tmp_path):
    """A harness that can't fail proves nothing: with any backing file allowed, a link leads out of the directory."""
    (tmp_path / "real").mkdir()
    program = tmp_path / "fuzz_qcow2"
    shutil.copy(fuzzer, program)
    seed = (FUZZ / "corpus" / "seed-raw-backing").read_bytes()
    (tmp_path / "input").write_bytes(seed.replace(b"base.raw", b"link.raw"))
    environment = {**os.environ, "FUZZ_DIRECTORY": str(tmp_path / "real"), "FUZZ_ALLOW": "anywhere"}
    done = subprocess.run([program, tmp_path / "input"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "outside.raw' was opened" in done.stderr

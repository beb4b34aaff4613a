"""The protocol of the write path, model checked: no order of steps makes a snapshot lie, loses a guest's write, leaks
or waits for ever; and each check in it is needed. tests/model/check.py does the work, and says more."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent / "model" / "check.py"
SECONDS = 900       # on a busy machine; two free cores need about a minute for each of the two


pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 60)]


@pytest.fixture(autouse=True)
def spin() -> None:
    missing = [tool for tool in ("spin", "gcc") if not shutil.which(tool)]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{' and '.join(missing)} must be installed in CI")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


def check(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(CHECK), *arguments], capture_output=True, text=True, timeout=SECONDS,
                          check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_order_of_steps_breaks_a_promise() -> None:
    """All configurations are searched to the end, without an error; each step of the model is taken in one of them."""
    output = check()
    assert "INCOMPLETE" not in output
    assert len(re.findall(r"^\S+ +[\d,]+ .*no error", output, re.MULTILINE)) >= 15


def test_every_check_is_needed() -> None:
    """One check is taken out of the model at a time: spin finds the error that the check is there for."""
    output = check("--mutants")
    assert "FOUND" not in output
    taken_out = re.search(r"^(\d+) checks taken out", output, re.MULTILINE)
    assert taken_out and int(taken_out.group(1)) >= 40


def test_an_error_is_reported() -> None:
    """The script itself: an error in a configuration is a failure, with its name."""
    done = subprocess.run([sys.executable, str(CHECK), "save", "-D", "NO_SECOND_LOOK"], capture_output=True, text=True,
                          timeout=SECONDS)
    assert done.returncode == 1
    assert "a_snapshot_lied" in done.stdout

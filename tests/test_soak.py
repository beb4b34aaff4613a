"""The soak test for a short while: 60 s in CI, 20 s elsewhere. For longer: python tests/soak.py --seconds 600."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("PYFLEECE_SOAK_SECONDS") or (60 if os.environ.get("CI") else 20))


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS + 60)
def test_soak(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("soak.py"), "--seconds", str(SECONDS), "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr

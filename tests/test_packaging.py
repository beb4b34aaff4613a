"""The source distribution is complete: it builds and works in a fresh environment, away from the source tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import pyfleece

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import pyfleece, pyfleece.testing

assert "site-packages" in pyfleece.__file__, pyfleece.__file__
with pyfleece.create("vm.raw", 1 << 20) as source, pyfleece.Disk(source) as disk:
    disk.pwrite(b"as it was", 4096)
    with disk.snapshot() as snapshot:
        disk.pwrite(b"changed!!", 4096)
        result = pyfleece.backup(snapshot, "backup.raw")
    assert result.total == 1 << 20
with pyfleece.open("backup.raw") as backup:
    assert backup.pread(9, 4096) == b"as it was"
print(pyfleece.__version__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made from a copy of what the source tree has, without what was built in it."""
    made = tmp_path_factory.mktemp("sdist")
    copy = made / "tree"
    built = shutil.ignore_patterns(".*", "build", "dist", "venv", "*.egg-info", "*.so", "*.o", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=built)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", made, cwd=copy)
    (archive,) = made.glob("*.tar.gz")
    return archive


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_has_every_source_and_nothing_that_was_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/**/*.[ch]", "csrc/*.py", "pyfleece/*.py", "tests/*.py", "tests/c/*.[ch]", "docs/*.md"):
        wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert wanted <= names, sorted(wanted - names)
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "pyfleece/py.typed"):
        assert name in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_installs_and_works_in_a_fresh_environment(sdist, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # First a wheel, to look at what is in it.
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = [name for name in names if name.startswith("pyfleece/_native.") and name.endswith(".so")]
    assert len(modules) == 1
    assert {"pyfleece/py.typed", "pyfleece/_native.pyi", "pyfleece/cli.py"} <= set(names)
    assert not [name for name in names if not name.startswith("pyfleece")], "nothing but the package"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert run(python, "-c", SMOKE, cwd=tmp_path) == f"{pyfleece.__version__}\n"
    command = tmp_path / "venv" / "bin" / "pyfleece"
    assert run(command, "--version", cwd=tmp_path) == f"pyfleece {pyfleece.__version__}\n"
    assert "data" in run(command, "map", "backup.raw", cwd=tmp_path)

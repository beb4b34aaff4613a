"""A build without one of the codecs works, and says what it lacks. What they do: tests/c/test_image_codec.c."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from c_programs import C
from conftest import require

CSRC = C.parents[1] / "csrc"
CODECS = {"zlib": ("FL_HAVE_ZLIB", "-lz"), "zstd": ("FL_HAVE_ZSTD", "-lzstd")}


@pytest.mark.parametrize("present", [(), ("zlib",), ("zstd",), ("zlib", "zstd")])
def test_builds(tmp_path: Path, present: tuple[str, ...]) -> None:
    require("gcc")
    program = tmp_path / "test_codec"
    command = ["gcc", "-std=gnu11", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{C}"]
    command += [f"-D{CODECS[name][0]}" for name in present]
    command += ["-o", str(program), str(C / "test_image_codec.c")]
    command += [str(CSRC / source) for source in ("qcow2/codec.c", "util/util.c")]
    command += [CODECS[name][1] for name in present]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    expected = "".join(f"{name} {'present' if name in present else 'absent'}\n" for name in CODECS)
    assert ran.stdout == expected

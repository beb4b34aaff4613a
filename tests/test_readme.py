"""What the README says is so: its examples run, its commands parse, its map of the source names every file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import require

import pyfleece
from pyfleece import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_first_example_is_short_and_runs_alone(tmp_path, monkeypatch, capsys):
    assert len(EXAMPLES[0].splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    assert re.fullmatch(r"\d+ bytes of data, \d+ MB/s\n", capsys.readouterr().out)
    with pyfleece.open("backup.raw") as backup:
        assert backup.pread(9, 4096) == b"as it was"
    with pyfleece.open("vm.raw") as source:
        assert source.pread(9, 4096) == b"changed!!"


def test_all_examples_run_one_after_the_other(tmp_path, monkeypatch):
    require("true")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    assert {"backup.raw", "disk-backup.raw", "log-backup.raw"} <= {file.name for file in tmp_path.iterdir()}
    for name in ("disk", "source"):
        names[name].close()


COMMANDS = {
    *("backup", "bench", "check", "cp", "create", "ctl", "demo", "info"),
    *("ls", "map", "points", "restore", "serve", "verify"),
}


def test_commands_parse():
    commands = re.findall(r"^(pyfleece [^#|\n]*)", README, re.MULTILINE)
    assert {command.split()[1] for command in commands} == COMMANDS
    for command in commands:
        arguments = shlex.split(command.partition(" > ")[0])[1:]
        cli._parser().parse_args(arguments)


def test_first_screen_has_the_two_commands():
    screen = "\n".join(README.splitlines()[:30])
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in screen
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("kind", ["c", "h"])
def test_map_of_the_source_names_every_file(kind):
    files = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob(f"*.{kind}")}
    _, _, section = README.partition("## The source")
    named = set(re.findall(rf"`([a-z0-9_/]+\.{kind})`", section))
    assert files == {name for name in named if not name.startswith("tests/")}


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in anchors, anchor

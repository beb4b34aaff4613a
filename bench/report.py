"""Bring the figures in the documents up to date: run the command above each of them, and put in what it prints.

    python bench/report.py [--directory DIR] [--list] [WORD ...]

The figures are in README.md and docs/*.md, between `<!-- begin: python bench/NAME.py OPTIONS -->` and `<!-- end -->`.
With words, only those commands that have one of them. DIR is passed on to each. A command runs once, for all documents
that show it, and they are written as soon as it has succeeded; one that fails, or prints nothing, leaves what was
there. The text around the figures is for people to check afterwards.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import subprocess
import sys

from kit import ROOT

BLOCK = re.compile(r"^<!-- begin: (python bench/\w+\.py[^\n]*?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def run(command: str, directory: str | None) -> str | None:
    """What it prints; None: there is nothing to put in."""
    words = [sys.executable, *shlex.split(command)[1:], *(["--directory", directory] if directory else [])]
    print(f"running {command}", file=sys.stderr)
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode or not done.stdout.strip():
        print(f"failed: {command}", file=sys.stderr)
        return None
    return done.stdout.strip()


def replaced(text: str, command: str, output: str) -> str:
    """The document with another output of a command, which it shows to the reader as well."""

    def block(match: re.Match[str]) -> str:
        body = f"`{command}`\n\n{output}\n"
        return f"<!-- begin: {command} -->\n{body}<!-- end -->" if match[1] == command else match[0]

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="on the file system to measure; the default is each command's own")
    parser.add_argument("--list", action="store_true", help="which commands there are")
    parser.add_argument("--documents", default=ROOT, type=pathlib.Path, help="where README.md and docs are")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    shown: dict[str, list[pathlib.Path]] = {}
    for path in sorted([*options.documents.glob("*.md"), *options.documents.glob("docs/*.md")]):
        for command, _ in BLOCK.findall(path.read_text(encoding="utf-8")):
            if not options.words or any(word in command for word in options.words):
                shown.setdefault(command, []).append(path)
    failed = 0
    for command, paths in shown.items():
        if options.list:
            print(f"{', '.join(path.name for path in paths)}: {command}")
            continue
        output = run(command, options.directory)
        if output is None:
            failed += 1
            continue
        for path in paths:
            path.write_text(replaced(path.read_text(encoding="utf-8"), command, output), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

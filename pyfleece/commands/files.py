"""`pyfleece ls`, `cat` and `cp`: files inside of an image."""

from __future__ import annotations

import argparse
import dataclasses
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

import pyfleece
from pyfleece.chain import Repository, split
from pyfleece.commands.kit import AS_JSON, COMMON, IMAGE, Failure, open_image, print_array, printable, say
from pyfleece.errors import Error
from pyfleece.files import FileEntry, Files, Volume
from pyfleece.progress import human

_IMAGE = "an image; or a directory of backups, with @POINT for another point than the latest"
_PATHS = (
    "A PATH is one inside of the image, from its root. Where the image has several volumes, it starts with the number"
    " of one and a colon, as in 2:/etc."
)
_PIECE = 4 << 20


def add(commands: Any) -> None:
    ls = commands.add_parser(
        "ls",
        parents=[COMMON, IMAGE, AS_JSON],
        help="list files inside of an image",
        description=f"List files inside of an image; without a PATH its root, or its volumes. {_PATHS}",
    )
    ls.add_argument("-l", dest="long", action="store_true", help="with mode, owner, size and time (UTC)")
    ls.add_argument("-R", "--recursive", action="store_true", help="with everything below, one path a line")
    ls.add_argument("--volumes", action="store_true", help="list the volumes, even if there is one only")
    ls.add_argument("image", metavar="IMAGE|DIR[@POINT]", help=_IMAGE)
    ls.add_argument("paths", metavar="PATH", nargs="*")
    ls.set_defaults(run=_ls)

    cat = commands.add_parser(
        "cat",
        parents=[COMMON, IMAGE],
        help="write files inside of an image to standard output",
        description=f"Write files inside of an image to standard output, one after the other. {_PATHS}",
    )
    cat.add_argument("image", metavar="IMAGE|DIR[@POINT]", help=_IMAGE)
    cat.add_argument("paths", metavar="PATH", nargs="+")
    cat.set_defaults(run=_cat)

    cp = commands.add_parser(
        "cp",
        parents=[COMMON, IMAGE],
        help="copy files out of an image",
        description="Copy files out of an image into the directory DEST, or to the name DEST. Modes, times, holes, "
        "links, and as root owners and device nodes, are kept. Nothing outside of DEST is ever touched. What can't be "
        f"copied is told, and the status is then 1. {_PATHS}",
    )
    cp.add_argument("-r", "--recursive", action="store_true", help="copy directories, and symbolic links as links")
    cp.add_argument("image", metavar="IMAGE|DIR[@POINT]", help=_IMAGE)
    cp.add_argument("paths", metavar="PATH", nargs="+")
    cp.add_argument("destination", metavar="DEST")
    cp.set_defaults(run=_cp)


def open_source(args: argparse.Namespace) -> pyfleece.Image:
    """What the command reads: an image (a snapshot in a mount is one), or DIR[@POINT], a directory of backups."""
    directory, point = split(args.image)
    if not os.path.isfile(args.image) and os.path.isdir(directory):
        return Repository(directory).open(point)
    return open_image(args, args.image)


class _Session:
    """The files of the image of a command. Tells, once each, why they may be older than the image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._image = open_source(args)
        try:
            self.files = Files(self._image, args.image, self._image)
        except BaseException:
            self._image.close()
            raise
        self.failed = False

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        for warning in self.files.warnings:
            say(warning)
        self.files.close()

    def problem(self, path: str, why: str) -> None:
        self.failed = True
        say(why if path in why else f"{path}: {why}")


# ---- ls ----


def _ls(args: argparse.Namespace) -> int:
    with _Session(args) as session:
        files = session.files
        if args.volumes or (not args.paths and files.default is None):
            if args.paths:
                raise Failure("--volumes goes without a PATH")
            _list_volumes(files, args.json)
            return 0
        listed = _listed(session, args.paths or ["/"], args)
        if args.json:
            print_array(_as_dict(entry) for _, _, entry in listed)
        else:
            _print_entries(listed, args)
        return int(session.failed)


def _listed(
    session: _Session, paths: list[str], args: argparse.Namespace
) -> Iterator[tuple[str | None, str, FileEntry]]:
    """What is listed: the directory that it is in, where that was asked for; what it is called; and what it is."""
    for path in paths:
        top = session.files.stat(path, follow=not args.long)
        if not top.stat.is_directory:
            yield None, path, top
        elif args.recursive:
            for entry in session.files.walk(top.path, on_error=lambda path, error: session.problem(path, str(error))):
                yield None, entry.path, entry
        else:
            for name, child in session.files.entries(top):
                if isinstance(child, Error):
                    session.problem(os.fsdecode(name), str(child))
                else:
                    yield path, child.name, child


def _print_entries(listed: Iterable[tuple[str | None, str, FileEntry]], args: argparse.Namespace) -> None:
    last = None
    for directory, name, entry in listed:
        if directory is not None and directory != last and len(args.paths) > 1:
            _print_line(f"{directory}:")
        last = directory
        _print_line(_long(entry, name) if args.long else name)


def _long(entry: FileEntry, name: str) -> str:
    found = entry.stat
    size = f"{found.device[0]},{found.device[1]}" if found.device else str(found.size)
    owner = f"{found.uid if found.uid is not None else '-':>5} {found.gid if found.gid is not None else '-':>5}"
    arrow = f" -> {entry.target}" if entry.target is not None else ""
    time = _time(found.mtime_ns) or "-"
    return f"{stat.filemode(found.mode)} {found.links:>3} {owner} {size:>12} {time:<19} {name}{arrow}"


def _time(nanoseconds: int | None) -> str | None:
    if nanoseconds is None:
        return None
    try:
        return datetime.fromtimestamp(nanoseconds // 10**9, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return str(nanoseconds // 10**9)


def _as_dict(entry: FileEntry) -> dict[str, Any]:
    """Names that are not UTF-8 have surrogates, as in Python: escapes like \\udcff."""
    found = entry.stat
    told: dict[str, Any] = {
        "path": entry.path,
        "kind": entry.kind,
        "mode": f"{stat.S_IMODE(found.mode):04o}",
        "size": found.size,
        "inode": found.number,
        "links": found.links,
        "uid": found.uid,
        "gid": found.gid,
        "mtime_ns": found.mtime_ns,
        "atime_ns": found.atime_ns,
        "ctime_ns": found.ctime_ns,
        "birth_ns": found.birth_ns,
    }
    if entry.target is not None:
        told["target"] = entry.target
    if found.device is not None:
        told["device"] = list(found.device)
    return told


def _list_volumes(files: Files, as_json: bool) -> None:
    if as_json:
        print_array({**dataclasses.asdict(volume), **_filesystem(files, volume)} for volume in files.volumes)
        return
    _print_line(f"{'volume':>6} {'start':>18} {'size':>12}  {'content':<10} {'type':<22} name")
    for volume in files.volumes:
        told = _filesystem(files, volume)
        names = [name for name in (volume.name, told["label"]) if name]
        number = "-" if volume.number is None else volume.number
        content = told["filesystem"] or volume.content or "-"
        line = f"{number:>6} {volume.offset:#18x} {human(volume.size):>12}  {content:<10} {volume.type or '-':<22} "
        _print_line((line + ", ".join(names)).rstrip())


def _filesystem(files: Files, volume: Volume) -> dict[str, str | None]:
    """What its file system says; where that can't be read, nothing."""
    if volume.content is None:
        return {"filesystem": None, "label": None, "uuid": None}
    try:
        found = files.filesystem(volume)
    except pyfleece.FileSystemError:
        return {"filesystem": None, "label": None, "uuid": None}
    return {"filesystem": found.kind, "label": found.label, "uuid": found.uuid}


# ---- cat, cp ----


def _cat(args: argparse.Namespace) -> None:
    with _Session(args) as session:
        for path in args.paths:
            with session.files.open(path) as file:
                buffer = memoryview(bytearray(min(_PIECE, file.size)))
                while count := file.readinto(buffer):
                    sys.stdout.buffer.write(buffer[:count])


def _cp(args: argparse.Namespace) -> int:
    with _Session(args) as session:
        if not args.recursive:
            for path in args.paths:
                if session.files.stat(path).stat.is_directory:
                    raise Failure(f"{path} is a directory: it is only copied recursively (here: -r)")
        result = session.files.copy(
            args.paths, args.destination, recursive=args.recursive, on_problem=session.problem
        )
        return int(bool(result.failed))


# ---- output ----


def _print_line(text: str) -> None:
    """A terminal gets printable text, anything else the bytes of the names."""
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.buffer.write(os.fsencode(text) + b"\n")

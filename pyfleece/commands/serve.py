"""`pyfleece serve`: let other programs use disks, in the foreground or as a daemon."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyfleece
from pyfleece.commands.kit import COMMON, IMAGE, Failure, say, size
from pyfleece.daemon import Daemon, PidFile, detach, file_logger, syslogger
from pyfleece.notify import Notifier
from pyfleece.qmp_disks import SUFFIX
from pyfleece.serve import Server
from pyfleece.snapshot import POLICIES


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        parents=[COMMON, IMAGE],
        help="let guests and backup programs use disks: as files, over NBD, by a control socket",
        description="Serve disks until SIGTERM, SIGINT, or the control socket's `quit`; then flush them and end. An "
        "IMAGE is a path, or NAME=PATH; without a NAME it is called what its file is, without the suffix. An image "
        "that is called as another one with -fleecing after it is the fleecing image of that disk.",
    )
    parser.add_argument("images", metavar="[NAME=]IMAGE", nargs="+")
    parser.add_argument("--mount", metavar="DIR", help="show the disks as files in DIR, an empty directory")
    parser.add_argument("--allow-other", action="store_true", help="let other users use the files of the mount")
    parser.add_argument("--nbd", metavar="ADDRESS", help="run nbdkit: unix:PATH or tcp:HOST:PORT")
    parser.add_argument("--nbdkit", metavar="OPTION", action="append", default=[], help="for nbdkit; repeatable")
    parser.add_argument("--control", metavar="PATH", help="a Unix socket for commands in QMP's form")
    parser.add_argument("--freeze", metavar="CMD", help="run before each cut: makes the guest's file systems clean")
    parser.add_argument("--thaw", metavar="CMD", help="run after each cut, whatever happened")
    parser.add_argument("--freeze-timeout", metavar="SECONDS", type=float, default=10.0, help="for each of the two")
    parser.add_argument("--bitmap", metavar="NAME", help="mkdir in .snap makes incrementals of this dirty bitmap")
    group = parser.add_argument_group("options of the snapshots")
    group.add_argument("--fleecing", metavar="WHERE", help="directory for nameless files, or memory")
    group.add_argument("--fleecing-limit", metavar="SIZE", type=size, help="the most that a fleecing file may hold")
    group.add_argument("--stage-size", metavar="SIZE", type=size, default=64 << 20, help="memory for old data, each")
    group.add_argument("--cluster-size", metavar="SIZE", type=size, help="the unit in which old data is saved")
    group.add_argument("--on-cbw-error", choices=POLICIES, default="break-snapshot", help="when it can't be saved")
    group.add_argument("--cbw-timeout", metavar="SECONDS", type=float, default=45.0, help="a write's longest wait")
    group = parser.add_argument_group("as a daemon")
    group.add_argument("--daemon", action="store_true", help="return when it is ready, and go on in the background")
    group.add_argument("--pidfile", metavar="PATH", help="write the process's number there")
    group.add_argument("--log", metavar="PATH", help="append messages there (a daemon without it: syslog)")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    _make_absolute(args)
    disks, fleecing = _split(_named(args.images))
    daemon = detach() if args.daemon else None
    log = file_logger(args.log) if args.log else syslogger() if daemon else say
    with ExitStack() as stack:
        notifier = Notifier()
        opened = {}
        for name, path in disks.items():
            image = pyfleece.open(path, "r+", format=args.format, direct=args.direct, share=args.share)
            opened[name] = stack.enter_context(pyfleece.Disk(stack.enter_context(image)))
            if args.bitmap and args.bitmap not in opened[name].bitmaps:
                lasts = opened[name].bitmaps.file is not None
                opened[name].bitmaps.add(args.bitmap, persistent=lasts)
                log(f"dirty bitmap {args.bitmap} is new on {name}{'' if lasts else ', and in memory only'}")
        if args.pidfile:
            stack.enter_context(PidFile(args.pidfile))
        server = Server(
            opened,
            control=args.control,
            mountpoint=args.mount,
            nbd=args.nbd,
            nbd_options=args.nbdkit,
            fleecing_images=fleecing,
            fleecing=args.fleecing,
            snapshot_options={
                "cluster_size": args.cluster_size,
                "on_cbw_error": args.on_cbw_error,
                "cbw_timeout": args.cbw_timeout,
                "fleecing_limit": args.fleecing_limit,
                "stage_size": args.stage_size,
            },
            bitmap=args.bitmap,
            freeze=shlex.split(args.freeze) if args.freeze else None,
            thaw=shlex.split(args.thaw) if args.thaw else None,
            freeze_timeout=args.freeze_timeout,
            allow_other=args.allow_other,
            log=log,
        )
        try:
            with server:
                _run(server, notifier, daemon, log)
        except (pyfleece.Error, OSError) as error:
            if log is not say:                  # whoever calls us says it on stderr
                log(pyfleece.errors.describe(error))
            raise
    log("ended; everything is flushed")


def _run(server: Server, notifier: Notifier, daemon: Daemon | None, log: Callable[[str], None]) -> None:
    """From ready to asked to stop."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: server.request_stop(signal.Signals(number).name))
    log(server.summary)
    if daemon is not None:
        daemon.ready()
    notifier.ready(server.summary)
    reason = server.wait()
    log(f"ending ({reason})")
    notifier.stopping(f"ending ({reason})")


# ---- names ----


def _named(words: list[str]) -> dict[str, str]:
    images: dict[str, str] = {}
    for word in words:
        match = re.match(r"([^/=]+)=(.+)", word)
        name, path = (match[1], match[2]) if match else (os.path.splitext(os.path.basename(word))[0], word)
        if name in images:
            raise Failure(f"two images are called {name}: {images[name]} and {path}; say NAME=PATH")
        images[name] = os.path.abspath(path)
    return images


def _split(images: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The disks, and the fleecing images."""
    fleecing = {name for name in images if name.endswith(SUFFIX) and name[: -len(SUFFIX)] in images}
    disks = {name: path for name, path in images.items() if name not in fleecing}
    return disks, {name: images[name] for name in fleecing}


def _make_absolute(args: argparse.Namespace) -> None:
    """A daemon works in /."""
    for name in ("mount", "control", "pidfile", "log"):
        if getattr(args, name):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    if args.fleecing and args.fleecing != "memory":
        args.fleecing = os.path.abspath(args.fleecing)

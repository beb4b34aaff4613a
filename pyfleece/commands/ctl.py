"""`pyfleece ctl`: the control socket of a server, for people and scripts."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pyfleece.commands.kit import COMMON, Failure, say, size
from pyfleece.progress import Bar, Progress
from pyfleece.qmp_client import Client
from pyfleece.qmp_wire import QmpError

_LOOK_EVERY = 0.2           # seconds between two looks at a backup that is waited for


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "ctl",
        parents=[COMMON],
        help="send a command to a server that runs",
        description="Send COMMAND to the server whose control socket is SOCKET, and print the answer as JSON. Without "
        "a COMMAND: list those that there are. Lists are separated by commas; sizes take the suffixes K, M, G and T.",
    )
    parser.add_argument("socket", metavar="SOCKET")
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    parser.add_argument("arguments", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--wait", action="store_true", help="with backup: until it is over; Ctrl-C cancels it")
    parser.add_argument("--events", action="store_true", help="print events as they come, one a line")
    parser.set_defaults(run=_ctl)


def _ctl(args: argparse.Namespace) -> None:
    try:
        with Client(args.socket) as client:
            known = {command["name"]: command.get("arguments", {}) for command in client.execute("query-commands")}
            if args.command is not None:
                _run(client, args, known)
            elif not args.events:
                for name, parameters in known.items():
                    print(" ".join([name, *(_usage(key, kind) for key, kind in parameters.items())]))
            while args.events:
                print(json.dumps(client.next_event()), flush=True)
    except QmpError as error:
        raise Failure(str(error)) from error


def _run(client: Client, args: argparse.Namespace, known: dict[str, dict[str, str]]) -> None:
    if args.wait and args.command != "backup":
        raise Failure("--wait is for backup")
    answer = client.execute(args.command, _parse(args.arguments, known.get(args.command, {})))
    if args.wait:
        _wait(client, answer)
    elif answer != {}:
        print(json.dumps(answer, indent=2))


def _wait(client: Client, answer: dict[str, Any]) -> None:
    identity = answer["UUID"]
    if "thaw" in answer:
        say(f"thawing the guest did not work ({answer['thaw']})")
    bar = Bar()
    try:
        while True:
            status = client.execute("query-backup", {"uuid": identity})
            bar(_progress(status))
            if status["status"] != "active":
                break
            time.sleep(_LOOK_EVERY)
    except BaseException as error:
        if not isinstance(error, Exception):            # Ctrl-C, SIGTERM
            client.execute("backup-cancel", {"uuid": identity})
        raise
    if status["status"] != "done":
        raise Failure(status.get("errmsg", "the backup failed"))
    print(json.dumps(status, indent=2))


def _progress(status: dict[str, Any]) -> Progress:
    return Progress(
        total=status["total"],
        done=status["transferred"],
        data_bytes=status["transferred"] - status["zero-bytes"],
        zero_bytes=status["zero-bytes"],
        lost_bytes=status["lost-bytes"],
        elapsed=0.0,
        retries=0,
        fleecing_bytes=sum(device["fleecing-bytes"] for device in status["devices"]),
        finished=status["status"] != "active",
    )


# ---- arguments ----


def _usage(key: str, kind: str) -> str:
    return f"[{key[1:]}={kind}]" if key.startswith("*") else f"{key}={kind}"


def _parse(words: list[str], parameters: dict[str, str]) -> dict[str, Any]:
    """Arguments by the types that the server wants. What it does not know goes as a string, and it will say so."""
    kinds = {key.lstrip("*"): kind.split("|") for key, kind in parameters.items()}
    arguments: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise Failure(f"{word!r} is no argument: write KEY=VALUE")
        arguments[key] = _value(key, text, kinds.get(key, ["str"]))
    return arguments


def _value(key: str, text: str, kinds: list[str]) -> Any:
    if "str" in kinds:
        return text
    if "bool" in kinds:
        words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        if text.lower() not in words:
            raise Failure(f"{key} is true or false, not {text!r}")
        return words[text.lower()]
    if "strs" in kinds:
        return text.split(",")
    if "int" in kinds:
        try:
            return 0 if text == "0" else size(text)
        except argparse.ArgumentTypeError as error:
            raise Failure(f"{key}: {error}") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failure(f"{key} wants JSON: {error}") from error

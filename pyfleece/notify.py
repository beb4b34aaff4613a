"""Telling a service manager how we are: sd_notify's protocol, which is a datagram to the socket in NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Tells the manager that started this process, if one wants to know. What cannot be told is dropped.

    It takes NOTIFY_SOCKET out of the environment: programs that we start have nothing to tell it.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def ready(self, status: str) -> None:
        self.tell("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def stopping(self, status: str) -> None:
        self.tell("STOPPING=1", f"STATUS={status}")

    def tell(self, *lines: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        # An address that starts with @ has no name in the file system: that is a null byte.
        address = self._address.replace("@", "\0", 1) if self._address.startswith("@") else self._address
        message = "\n".join(" ".join(line.split("\n")) for line in lines).encode(errors="replace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.setblocking(False)
                to.connect(address)
                to.send(message)
        except OSError:
            pass

"""QEMU as a peer: copy-before-write in one process (qemu-img bench), and backups (qemu-storage-daemon over QMP)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from types import TracebackType
from typing import Any

# QEMU's large buffers go through malloc and page faults; with this they are kept, and its backups are faster by 2 to 3.
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"}
TOOLS = ("qemu-img", "qemu-io", "qemu-storage-daemon")


def missing() -> str | None:
    return next((tool for tool in TOOLS if shutil.which(tool) is None), None)


def version() -> str:
    output = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    return output.split("\n")[0]


def discards() -> dict[str, Any]:
    """Options of a backup job that lets go of what it has copied, as ours does; QEMU can do that since 9.1."""
    match = re.search(r"version (\d+)\.(\d+)", version())
    assert match, version()
    return {"discard-source": True} if (int(match[1]), int(match[2])) >= (9, 1) else {}


def bench(options: str, count: int, depth: int, size: int, step: int) -> float:
    """Writes per second of `qemu-img bench` on an image given as --image-opts: `count` writes of `size` bytes, `step`
    bytes from one's beginning to the next one's.
    """
    command = ["qemu-img", "bench", "-w", "-t", "writeback", "-c", str(count), "-d", str(depth), "-s", str(size)]
    # By default it writes zeros, and whoever writes to the same file after it has no data to save.
    command += ["--pattern=165", "-S", str(step), "--image-opts", options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"Run completed in ([\d.]+) seconds", output)
    assert match, output
    return count / float(match[1])


def plain(path: str) -> str:
    return f"driver=file,filename={path}"


def first_touch(source: str, fleecing: str) -> str:
    """Copy-before-write with QEMU's smallest cluster, 64 KiB."""
    sides = f"file.driver=file,file.filename={source},target.driver=file,target.filename={fleecing}"
    return f"driver=copy-before-write,{sides}"


class Daemon:
    """qemu-storage-daemon with a QMP monitor on its standard input and output."""

    def __init__(self, tuned: bool = False) -> None:
        environment = {**os.environ, **(TUNED if tuned else {})}
        command = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.events: list[dict[str, Any]] = []
        self.usage: Any = None
        self._read()
        self.call("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("qemu-storage-daemon ended")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def call(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self.process.stdin.flush()
        while True:
            message = self._read()
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def add(self, name: str, driver: str, **options: Any) -> None:
        self.call("blockdev-add", {"node-name": name, "driver": driver, **options})

    def add_file(self, name: str, path: str, direct: bool = False) -> None:
        aio = {"aio": "native"} if direct else {}
        cache = {"direct": direct, "no-flush": False}
        self.add(name, "file", filename=path, discard="unmap", cache=cache, **aio)

    def write_blocks(self, node: str, socket: str, offsets: list[int], length: int) -> None:
        """A guest writes there, and flushes."""
        self.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}})
        self.call(
            "block-export-add", {"id": "guest", "type": "nbd", "node-name": node, "name": "guest", "writable": True}
        )
        script = "".join(f"write -q -P {1 + number % 255} {offset} {length}\n" for number, offset in enumerate(offsets))
        command = ["qemu-io", "-f", "raw", f"nbd+unix:///guest?socket={socket}"]
        output = subprocess.run(command, input=script + "flush\nquit\n", text=True, check=True, capture_output=True)
        assert "failed" not in output.stdout + output.stderr, output.stdout + output.stderr
        self.call("block-export-del", {"id": "guest"})
        self.call("nbd-server-stop")

    def cut_with_bitmap(self, source: str, fleecing: str, snapshot: str, bitmap: str, granularity: int) -> None:
        """Copy-before-write of what a dirty bitmap of the source has, and a snapshot with a copy of the bitmap."""
        of_source = {"node": source, "name": bitmap}
        self.add("cbw", "copy-before-write", file=source, target=fleecing, bitmap=of_source)
        self.add(snapshot, "snapshot-access", file="cbw")
        self.call(
            "block-dirty-bitmap-add",
            {"node": snapshot, "name": bitmap, "granularity": granularity, "disabled": True},
        )
        self.call("block-dirty-bitmap-merge", {"node": snapshot, "target": bitmap, "bitmaps": [of_source]})

    def backup(self, source: str, target: str, sync: str = "full", **options: Any) -> None:
        """Start a backup job."""
        job = {"job-id": "b0", "device": source, "target": target, "sync": sync, **options}
        try:
            self.call("blockdev-backup", {**job, "x-perf": {"max-workers": 16}})
        except RuntimeError:
            self.call("blockdev-backup", job)

    def run_backup(self, source: str, target: str, **options: Any) -> None:
        self.backup(source, target, **options)
        self.wait()

    def wait(self) -> None:
        """Until the job is gone; RuntimeError: it failed."""
        while True:
            for event in self.events:
                data = event.get("data", {})
                if event["event"] == "BLOCK_JOB_COMPLETED" and data.get("error"):
                    raise RuntimeError(data["error"])
                if event["event"] == "JOB_STATUS_CHANGE" and data == {"id": "b0", "status": "null"}:
                    return
            self.events.clear()
            self._read()

    def cpu(self) -> float:
        """Seconds of processor time so far, of all threads, in user mode and in the kernel."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # what clock_getcpuclockid(3) returns

    def end_export(self, export: str) -> None:
        self.call("block-export-del", {"id": export})
        while any(told["id"] == export for told in self.call("query-block-exports")):
            pass

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass


def wait_for_socket(path: str) -> None:
    end = time.monotonic() + 10
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise RuntimeError(f"{path} did not appear")
        time.sleep(0.01)

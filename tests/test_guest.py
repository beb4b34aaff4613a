"""A real guest: Linux in QEMU, whose root file system is a file of the mount, writes while it is backed up.

Debian's kernel is downloaded into pytest's cache; QEMU emulates the processor, so no /dev/kvm is needed. About 20
seconds, most of them the guest's.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, wait_for
from serve_kit import Client, serving

SIZE = 96 * MIB
TURNS = 3                   # that the guest makes before, during and after the cut
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
TOOLS = ("sh", "mount", "insmod", "switch_root", "poweroff", "dd", "cat", "md5sum", "rm", "sync", "echo", "test")

# The first process of the initramfs: find the disk, go on from it.
FIRST = """#!/bin/sh
mount -t devtmpfs none /dev
for module in {modules}; do insmod /modules/$module.ko || echo "no module $module"; done
mount -t ext4 -o rw /dev/vda /root || {{ echo "no root"; poweroff -f; }}
exec switch_root /root /sbin/init
"""

# That of the disk: write files with their checksums. A turn is told when it is on stable storage.
INIT = """#!/bin/sh
export PATH=/bin
mount -t devtmpfs none /dev
echo "guest is up"
turn=0
while :; do
    turn=$((turn + 1))
    dd if=/dev/urandom of=/data/$turn bs=64k count=4 2>/dev/null
    cat /data/$turn >> /data/log
    md5sum /data/$turn > /data/$turn.md5
    test $turn -le 40 || rm -f /data/$((turn - 40)) /data/$((turn - 40)).md5
    test $((turn % 16)) -ne 0 || : > /data/log
    sync
    echo "turn $turn is written"
done
"""


@pytest.fixture(scope="module")
def kernel(request) -> Path:
    """A directory with boot/ and lib/modules of Debian's kernel for virtual machines."""
    if platform.machine() != "x86_64":
        pytest.skip("the guest is an x86_64")
    require("qemu-system-x86_64", "busybox", "cpio", "mkfs.ext4", "debugfs", "e2fsck", "dpkg-deb", "apt-get")
    cache = Path(request.config.cache.mkdir("kernel"))
    if not (cache / "complete").exists():
        for refresh in (False, True):
            if refresh and os.geteuid() == 0:
                subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
            if fetch_kernel(cache):
                break
        else:
            missing("the package linux-image-cloud-amd64 (apt-get download)")
        (cache / "complete").touch()
    return cache


def fetch_kernel(cache: Path) -> bool:
    told = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True)
    names = re.findall(r"Depends: (linux-image-\S+)", told.stdout)
    if not names:
        return False
    done = subprocess.run(["apt-get", "download", "-qq", names[0]], cwd=cache, capture_output=True)
    packages = list(cache.glob("linux-image-*.deb"))
    if done.returncode or not packages:
        return False
    run("dpkg-deb", "-x", packages[0], cache)
    packages[0].unlink()
    return True


def make_initramfs(kernel: Path, directory: Path) -> Path:
    tree = directory / "initramfs"
    for name in ("bin", "dev", "modules", "root"):
        (tree / name).mkdir(parents=True)
    install_busybox(tree)
    for module in MODULES:
        (found,) = (kernel / "lib/modules").rglob(f"{module}.ko")
        shutil.copy(found, tree / "modules")
    write_script(tree / "init", FIRST.format(modules=" ".join(MODULES)))
    archive = directory / "initramfs.cpio"
    with archive.open("wb") as file:
        names = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=file, check=True)
    return archive


def make_disk(path: Path, directory: Path) -> None:
    tree = directory / "root"
    for name in ("bin", "dev", "sbin", "data"):
        (tree / name).mkdir(parents=True)
    install_busybox(tree)
    write_script(tree / "sbin" / "init", INIT)
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-F", "-d", tree, path)


def install_busybox(tree: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    if "not a dynamic" not in run("ldd", busybox, check=False):
        missing("busybox-static")
    shutil.copy(busybox, tree / "bin" / "busybox")
    for tool in TOOLS:
        (tree / "bin" / tool).symlink_to("busybox")


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Guest:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())

    @property
    def turn(self) -> int:
        """The last one that is on stable storage."""
        turns = re.findall(r"turn (\d+) is written", "\n".join(self.said[-20:]))
        return int(turns[-1]) if turns else 0

    def reaches(self, turn: int) -> None:
        wait_for(lambda: self.turn >= turn or self.process.poll() is not None, 90)
        assert self.turn >= turn, "\n".join(self.said[-40:])


@contextmanager
def running_guest(kernel: Path, initramfs: Path, disk: Path) -> Iterator[Guest]:
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    process = subprocess.Popen(
        [
            "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-reboot",
            "-display", "none", "-serial", "stdio",
            "-kernel", image, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
            "-drive", f"file={disk},format=raw,if=virtio,cache=none,aio=threads,discard=unmap",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    guest = Guest(process)
    try:
        yield guest
    finally:
        process.send_signal(signal.SIGKILL)     # as a host does that loses its power
        process.wait(20)
        guest._reader.join(20)
        assert process.stdout is not None
        process.stdout.close()


def check_file_system(image: Path, durable: int, directory: Path) -> int:
    """It is that of a machine that lost its power: a journal to replay, and no more. Returns the last whole turn."""
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    replayed = subprocess.run(["e2fsck", "-fp", image], capture_output=True, text=True, env=environment)
    assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
    clean = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, env=environment)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    files = directory / "files"
    files.mkdir()
    run("debugfs", "-R", f"rdump /data {files}", image)
    whole = []
    for sums in (files / "data").glob("*.md5"):
        turn = int(sums.stem)
        expected = sums.read_text().split()
        if turn <= durable:
            actual = run("md5sum", files / "data" / sums.stem).split()[0]
            assert expected and actual == expected[0], f"turn {turn} was written, and is not what it was"
            whole.append(turn)
    # All that are not removed again are there.
    assert set(whole) >= set(range(max(1, durable - 30), durable + 1)), (durable, sorted(whole))
    return max(whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_guest_boots_from_the_mount_and_writes_while_it_is_backed_up(kernel, tmp_path):
    require("md5sum")
    if not os.path.exists("/dev/fuse"):
        missing("/dev/fuse")
    initramfs = make_initramfs(kernel, tmp_path)
    make_disk(tmp_path / "vm.raw", tmp_path)
    mountpoint, control = tmp_path / "mount", tmp_path / "control"
    mountpoint.mkdir()
    with (
        serving(tmp_path / "vm.raw", "--mount", mountpoint, "--control", control) as server,
        Client(control, timeout=60) as client,
        running_guest(kernel, initramfs, mountpoint / "vm.raw") as guest,
    ):
        guest.reaches(TURNS)
        # Pushed by the server, while the guest goes on.
        pushed = guest.turn
        uuid = client.execute("backup", target=str(tmp_path / "pushed.raw"), speed=64 << 10)["UUID"]
        guest.reaches(pushed + TURNS)
        assert client.execute("query-backup")["status"] == "active"
        client.execute("block-job-set-speed", device="vm", speed=0)
        assert client.end_of(uuid)["status"] == "done"
        # Pulled from a cut in the mount, in which nothing changes however much the guest writes.
        cut = guest.turn
        (mountpoint / ".snap" / "now").mkdir()
        guest.reaches(cut + TURNS)
        run("cp", "--sparse=always", mountpoint / ".snap/now/vm.raw", tmp_path / "pulled.raw")
        (mountpoint / ".snap" / "now").rmdir()
        last = guest.turn
        guest.reaches(last + 1)
        guest.process.kill()
        guest.process.wait(20)
        server.terminate()
        assert server.wait(30) == 0
    for number, (name, durable) in enumerate((("pushed.raw", pushed), ("pulled.raw", cut), ("vm.raw", last))):
        directory = tmp_path / f"check{number}"
        directory.mkdir()
        check_file_system(tmp_path / name, durable, directory)

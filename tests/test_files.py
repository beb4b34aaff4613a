"""Files inside of images: what the real tools put into real file systems comes out again."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import threading
import time
from pathlib import Path

import files_kit
import pytest
from conftest import MIB, missing, require, run
from files_kit import BAD_NAME, assert_same, grow, inside, make_ext, mounted, on_disk, power_failure, require_tsk

import pyfleece

SECOND = 10**9


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("tree")
    grow(top)
    return top


@pytest.fixture
def ext4(tree, tmp_path) -> Path:
    make_ext(tmp_path / "ext4.raw", tree, "-t", "ext4")
    return tmp_path / "ext4.raw"


# ---- file systems ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext2", "-t ext2 -b 1024"),
        ("ext2", "-t ext2 -I 128 -O ^filetype,^sparse_super,^resize_inode"),
        ("ext3", "-t ext3"),
        ("ext4", "-t ext4"),
        ("ext4", "-t ext4 -b 1024 -O ^64bit,^metadata_csum"),
        ("ext4", "-t ext4 -O meta_bg,^resize_inode -g 4096"),
        ("ext4", "-t ext4 -b 1024 -O bigalloc,sparse_super2,^resize_inode"),
    ],
)
def test_ext_is_read(tree, tmp_path, kind, options):
    image = tmp_path / "vm.raw"
    make_ext(image, tree, *options.split())
    with pyfleece.files(image) as files:
        assert files.filesystem(files.volumes[0]).kind == kind
        assert_same(inside(files), on_disk(tree), unit=SECOND)      # mke2fs does not copy fractions


@pytest.mark.parametrize("options", ["-t ext3", "-t ext4 -b 1024", "-t ext4 -O inline_data"])
def test_ext_that_the_kernel_wrote_is_read(tmp_path, loop_device, options):
    """Fractions of seconds, hash trees, fragments, space that was allocated and not written over old data."""
    image = tmp_path / "vm.raw"
    make_ext(image, None, *options.split(), "-I", "256", size=128 * MIB)
    with mounted(loop_device(image), tmp_path / "mnt") as top:
        grow(top, files=300, seed=2)
        fill_strangely(top, preallocate="ext3" not in options)
        run("sync", "-f", top)
        wanted = on_disk(top)
    with pyfleece.files(image) as files:
        assert_same(inside(files), wanted)
        if "ext3" not in options:
            assert sum(length for _, length in files.open("/preallocated").data()) <= 4096


def fill_strangely(top: Path, *, preallocate: bool = True) -> None:
    old = top / "old data"
    old.write_bytes(os.urandom(8 * MIB))
    run("sync", "-f", top)
    old.unlink()
    with (top / "preallocated").open("wb") as file:
        if preallocate:
            os.posix_fallocate(file.fileno(), 0, MIB)
        file.write(b"head")
    with (top / "fragments").open("wb") as file:
        for number in range(1500):
            file.seek(number * 8192)
            file.write(bytes([number % 251]) * 4096)
    (top / "many").mkdir()
    for number in range(1500):
        (top / "many" / ("n" * 60 + str(number))).touch()
    os.utime(top / "fragments", ns=(0, -(10**9) // 2 * 3))          # half past the second before the last of 1969
    os.utime(top / "preallocated", ns=(0, (1 << 33) * SECOND + 7))  # beyond 2038


@pytest.mark.parametrize("options", ["", "-b size=1024 -n size=4096 -i size=512", "-m bigtime=0,crc=1 -i sparse=0"])
def test_xfs_is_read(tmp_path, loop_device, options):
    require("mkfs.xfs")
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", "-L", "data", *options.split(), image)
    with mounted(loop_device(image), tmp_path / "mnt") as top:
        grow(top, files=300, seed=3)
        fill_strangely(top) if "bigtime" not in options else None
        run("sync", "-f", top)
        wanted = on_disk(top)
    with pyfleece.files(image) as files:
        assert_same(inside(files), wanted)
        filesystem = files.filesystem(files.volumes[0])
        assert (filesystem.kind, filesystem.label, filesystem.warning) == ("xfs", "data", None)


@pytest.mark.parametrize("options", ["-m crc=0", "-m crc=0 -b size=1024 -n size=4096,ftype=0", ""])
def test_xfs_that_mkfs_filled_is_read(tmp_path, options):
    """Version 4 as well, which kernels do not mount any more."""
    require("mkfs.xfs")
    content = {f"file{number}": os.urandom(number * 777) for number in range(150)}
    long = "x" * (600 if "crc=0" in options else 100)   # in version 5 mkfs.xfs 6.1 forgets the header of longer ones
    lines = ["/", "0 0", "d--755 0 0", "link l--777 5 6 dir/file3", f"long l--777 0 0 {long}", "dir d--750 1 2"]
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        lines.append(f"{name} ---640 3 4 {tmp_path / name}")
    (tmp_path / "prototype").write_text("\n".join([*lines, "fifo p--600 0 0", "$", "$", ""]))
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", *options.split(), "-p", tmp_path / "prototype", image)
    with pyfleece.files(image) as files:
        filesystem = files.filesystem(files.volumes[0])
        assert filesystem.version == (4 if "crc=0" in options else 5)
        assert filesystem.warning is None
        found = inside(files)
        assert {path: record.owner for path, record in found.items() if record.owner != (3, 4)} == {
            "/link": (5, 6), "/long": (0, 0), "/dir": (1, 2), "/dir/fifo": (0, 0)
        }  # fmt: skip
        assert found["/long"].content == long
        assert found["/dir/fifo"].mode == stat.S_IFIFO | 0o600
        for name, data in content.items():
            assert files.open(f"/dir/{name}").read() == data
        assert files.open("/link").read() == content["file3"]


@pytest.mark.parametrize(("bits", "size"), [(12, 12), (16, 64), (32, 300)])
def test_fat_is_read(tmp_path, bits, size):
    """Names in UTF-16; times of two seconds, which are local time and taken as UTC."""
    require("mkfs.vfat", "mcopy")
    require_tsk()
    tree, image = tmp_path / "tree", tmp_path / "vm.raw"
    tree.mkdir()
    grow(tree, files=50, special=False)
    (tree / "ünï çödé.txt").write_text("hello")
    (tree / "READ.ONL").write_bytes(b"short")
    for path in tree.rglob("*"):
        os.utime(path, (1_500_000_000, 1_500_000_000))
    with image.open("wb") as file:
        file.truncate(size * MIB)
    run("mkfs.vfat", "-n", "LABEL", "-F", str(bits), image)
    run("env", "TZ=UTC", "MTOOLS_SKIP_CHECK=1", "mcopy", "-s", "-m", "-i", image, *tree.iterdir(), "::")
    with pyfleece.files(image) as files:
        assert files.filesystem(files.volumes[0]).kind == f"fat{bits}"
        assert_same(inside(files), on_disk(tree), unit=2 * SECOND + 1, plain=True)
        assert files.stat("/read.ONL").size == 5        # case does not count
        assert files.stat("/READ.ONL").stat.uid is None


def test_ntfs_is_read(tmp_path):
    require("mkntfs", "ntfs-3g", "setfattr")
    require_tsk()
    if not os.path.exists("/dev/fuse"):
        missing("FUSE")
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkntfs", "-F", "-q", "-f", image)
    with mounted(image, tmp_path / "mnt", "ntfs-3g", "-o", "compression,special_files=wsl") as top:
        grow(top, files=100, special=False)
        os.symlink("dir0/dir1", top / "link")
        os.symlink("/absolute", top / "absolute link")
        os.link(top / "holes", top / "hard link")
        (top / "compressed").mkdir()
        run("setfattr", "-h", "-v", "0x00080000", "-n", "system.ntfs_attrib", top / "compressed")
        (top / "compressed" / "text").write_bytes(b"abcd" * 500_000)
        run("sync", "-f", top)
        wanted = on_disk(top)
    with pyfleece.files(image) as files:
        assert_same(inside(files), wanted, unit=100, plain=True)
        assert files.stat("/hard link").stat.number == files.stat("/HOLES").stat.number
        assert sum(length for _, length in files.open("/holes").data()) < MIB
        copied = files.copy("/", tmp_path / "out", recursive=True)
    assert not copied.failed and copied.hard_links == 1
    assert_same(on_disk(tmp_path / "out"), wanted, unit=100, plain=True)


def test_exfat_is_read(tmp_path, loop_device):
    require("mkfs.exfat", "mount.exfat-fuse")
    require_tsk()
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    run("mkfs.exfat", "-L", "LABEL", image)
    with mounted(loop_device(image), tmp_path / "mnt", "mount.exfat-fuse") as top:
        grow(top, files=60, special=False)
        for path in top.rglob("*"):
            os.utime(path, (1_500_000_000, 1_500_000_000))
        run("sync", "-f", top)
        wanted = on_disk(top)
    with pyfleece.files(image) as files:
        assert_same(inside(files), wanted, unit=2 * SECOND + 1, plain=True)


def test_iso_9660_is_read(tmp_path):
    """Names and contents; The Sleuth Kit gives no times and modes."""
    require("genisoimage")
    require_tsk()
    tree, image = tmp_path / "tree", tmp_path / "cd.iso"
    tree.mkdir()
    grow(tree, files=30, special=False)
    run("genisoimage", "-quiet", "-J", "-o", image, tree)
    with pyfleece.files(image) as files:
        assert files.volumes[0].content == "iso9660"
        found, wanted = inside(files), on_disk(tree)
        assert {path: record.content for path, record in found.items()} == {p: r.content for p, r in wanted.items()}


# ---- what is only in the journal ----


def change_a_lot(top: Path, number: int, *, preallocate: bool = True) -> None:
    """A round of changes: new files, and blocks that are freed and used again, for other things."""
    place = top / f"round{number}"
    place.mkdir()
    grow(place, files=60, seed=number)
    fill_strangely(place, preallocate=preallocate)
    if number:
        run("sync", "-f", top)
        shutil.rmtree(top / f"round{number - 1}")
        (top / f"data{number}").write_bytes(os.urandom(3 * MIB))
        for path in list((place / "many").iterdir())[::3]:
            path.unlink()
        os.rename(place / "many", top / f"many{number}")
        os.truncate(place / "fragments", 4_000_000)


def replay_beside_the_kernel(
    image: Path, device: str, place: Path, changed, *, rounds: int = 3, turns: int = 0
) -> None:
    """Let the power fail in the middle of changes; what we read then is what the kernel finds after its replay.
    `changed(filesystem)`: how much there was to replay. `turns`: how often inodes are changed to fill the log.
    """
    found: dict[str, files_kit.Record] | None = None
    replayed = 0
    for number in range(rounds):
        with mounted(device, place) as top:
            if found is not None:
                assert_same(found, on_disk(top))
            change_a_lot(top, number, preallocate="ext3" not in os.fspath(image))
            for turn in range(turns):
                for path in sorted(top.glob("**/n*"))[turn % 2 :: 2]:
                    os.utime(path, ns=(turn, turn))
                run("sync", "-f", top)
            run("sync", "-f", top)
            (top / "last thing").write_text(str(number))
            power_failure(top, flush=number != 1)
        with pyfleece.files(image) as files:
            found = inside(files)
            filesystem = files.filesystem(files.volumes[0])
            assert filesystem.warning is None
            replayed += changed(filesystem)
    with mounted(device, place) as top:
        assert_same(found, on_disk(top))
    assert replayed, "the test had nothing to replay"


@pytest.mark.parametrize(
    "options", ["-t ext4 -b 1024 -O ^metadata_csum,^64bit", "-t ext4 -J size=4", "-t ext3"]
)
def test_changes_that_are_only_in_the_journal_are_read(tmp_path, loop_device, options):
    """The smallest journal there can be goes round."""
    image = tmp_path / f"{options.split()[1]}.raw"
    make_ext(image, None, *options.split(), "-I", "256", size=128 * MIB)
    replay_beside_the_kernel(image, loop_device(image), tmp_path / "mnt", lambda ext: len(ext._journal._places))


@pytest.mark.parametrize("options", ["-l size=8m", "-l size=5m -b size=1024 -n size=4096 -i size=512 -m reflink=0"])
def test_changes_that_are_only_in_the_log_of_xfs_are_read(tmp_path, loop_device, options):
    """In a log that is small enough to go round; mkfs.xfs makes such ones for tests of XFS only."""
    require("mkfs.xfs")
    image = tmp_path / "xfs.raw"
    with image.open("wb") as file:
        file.truncate(200 * MIB)
    run("env", "TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", *options.split(), image)
    rounds = set()

    def changed(xfs) -> int:
        rounds.update({xfs._log._read(at, 1)[:4] for at in range(100)} - {b"\xfe\xed\xba\xbe"})
        return len(xfs._log._changed)

    replay_beside_the_kernel(image, loop_device(image), tmp_path / "mnt", changed, turns=12)
    assert len(rounds) > 1, "it did not go round"


# ---- snapshots ----


def test_files_come_out_of_a_live_snapshot_while_the_disk_is_overwritten(tree, ext4, tmp_path, no_leaks):
    with pyfleece.open(ext4, "r+") as source, pyfleece.Disk(source) as disk, disk.snapshot() as snapshot:
        stop = threading.Event()

        def overwrite() -> None:
            for offset in range(0, disk.size, MIB):
                disk.pwrite(os.urandom(MIB), offset)
            stop.set()

        guest = threading.Thread(target=overwrite)
        guest.start()
        try:
            with pyfleece.files(snapshot) as files:
                assert_same(inside(files), on_disk(tree), unit=SECOND)
                assert stop.wait(60)
                assert files.copy("/", tmp_path / "out", recursive=True).failed == []
        finally:
            guest.join()
        with pytest.raises(pyfleece.FileSystemError, match="holds no file system that is known"):
            pyfleece.files(source).stat("/")
    assert_same(on_disk(tmp_path / "out"), on_disk(tree), unit=SECOND)


# ---- partitions ----


def partition(image: Path, tree: Path, script: str, places: dict[int, str], *options: str) -> None:
    """A disk with partitions, and file systems in some of them."""
    require("sfdisk")
    with image.open("wb") as file:
        file.truncate(200 * MIB)
    (image.parent / "script").write_text(script)
    run("sh", "-c", f"sfdisk -q {' '.join(options)} {image} < {image.parent / 'script'}")
    with pyfleece.files(image) as files:
        volumes = {volume.number: volume for volume in files.volumes}
    for number, kind in places.items():
        part = image.parent / f"part{number}"
        make_ext(part, tree if kind == "ext4" else None, "-t", "ext4", size=volumes[number].size)
        if kind == "swap":
            run("mkswap", part)
        with image.open("r+b") as file, part.open("rb") as data:
            file.seek(volumes[number].offset)
            shutil.copyfileobj(data, file)
        part.unlink()


def test_gpt_partitions_have_numbers_names_and_types(tree, tmp_path):
    image = tmp_path / "vm.raw"
    script = 'label: gpt\n1: size=32M, type=U, name="EFI"\n5: size=64M, name="root"\n3: size=16M\n'
    partition(image, tree, script, {5: "ext4", 3: "ext4"})
    with pyfleece.files(image) as files:
        found = [(volume.number, volume.name, volume.size) for volume in files.volumes]
        assert found == [(1, "EFI", 32 * MIB), (3, None, 16 * MIB), (5, "root", 64 * MIB)]
        assert [volume.content for volume in files.volumes] == [None, "ext", "ext"]
        assert files.volumes[0].type == "EFI system"
        assert_same(inside(files, "5:/"), on_disk(tree), unit=SECOND)
        assert files.stat("5:/file 0").path == "5:/file 0"
        for path in ("/", "file 0"):
            with pytest.raises(ValueError, match="has several volumes: say which"):
                files.stat(path)
        with pytest.raises(ValueError, match="has no volume 4"):
            files.stat("4:/")
        with pytest.raises(pyfleece.FileSystemError, match="volume 1: it holds no file system that is known"):
            files.stat("1:/")
    # The copy of the table at the end does as well.
    with image.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    with pyfleece.files(image) as files:
        assert [volume.number for volume in files.volumes] == [1, 3, 5]
    with image.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))
    with pytest.raises(pyfleece.FileSystemError, match="both copies of which are damaged"):
        pyfleece.files(image)


def test_gpt_with_sectors_of_4096_bytes(tree, tmp_path, loop_device):
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(100 * MIB)
    device = loop_device(image, "--sector-size", "4096")
    run("sh", "-c", f"echo 'start=512, size=20480' | sfdisk -q --no-reread --no-tell-kernel --label gpt {device}")
    with pyfleece.files(image) as files:
        (volume,) = files.volumes
        assert (volume.offset, volume.size) == (2 * MIB, 80 * MIB)
    make_ext(tmp_path / "part", tree, "-t", "ext4", size=80 * MIB)
    with image.open("r+b") as file, (tmp_path / "part").open("rb") as data:
        file.seek(2 * MIB)
        shutil.copyfileobj(data, file)
    with pyfleece.files(image) as files:
        assert_same(inside(files), on_disk(tree), unit=SECOND)


def test_mbr_with_logical_partitions(tree, tmp_path):
    """One volume that holds something needs no number, and keeps it when asked for by it."""
    image = tmp_path / "vm.raw"
    script = "label: dos\n1: size=10M\n2: size=180M, type=5\n5: size=20M\n6: size=64M\n7: size=20M, type=82\n"
    partition(image, tree, script, {6: "ext4", 7: "swap"})
    with pyfleece.files(image) as files:
        assert [volume.number for volume in files.volumes] == [1, 5, 6, 7]
        assert files.volumes[3].content == "swap"
        assert files.default == files.volumes[2]
        assert_same(inside(files), on_disk(tree), unit=SECOND)
        assert files.stat("6:/file 0").path == files.stat("file 0").path == "/file 0"
    # A chain of logical partitions that leads back to its start.
    with pyfleece.files(image) as files:
        second = files.volumes[2].offset - MIB
    with image.open("r+b") as file:
        file.seek(second + 446 + 16)
        file.write(struct.pack("<B3xB3xII", 0, 5, 0, 2048))
    with pytest.raises(pyfleece.FileSystemError, match="form a loop"):
        pyfleece.files(image)


@pytest.mark.parametrize(
    ("offset", "signature", "text"),
    [
        (0, b"LUKS\xba\xbe", "an encrypted LUKS volume, which can't be read"),
        (512, b"LABELONE", "an LVM physical volume, which can't be read"),
        (65600, b"_BHRfS_M", "a btrfs file system, which can't be read"),
        (0, b"", "no file system that is known"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, offset, signature, text):
    with pyfleece.create(tmp_path / "vm.raw", MIB) as image:
        if signature:
            image.pwrite(signature, offset)
        with pyfleece.files(image) as files, pytest.raises(pyfleece.FileSystemError, match=text):
            files.stat("/")


@pytest.mark.parametrize("size", [0, 1, 511, 1024, 4096])
def test_tiny_images(tmp_path, size):
    told = pytest.raises(pyfleece.FileSystemError, match="no file system that is known")
    with pyfleece.create(tmp_path / "vm.raw", size) as image, pyfleece.files(image) as files, told:
        files.stat("/")


# ---- paths and files ----


def test_paths_are_walked_as_in_a_chroot(tmp_path):
    tree = tmp_path / "tree"
    (tree / "usr" / "lib").mkdir(parents=True)
    (tree / "usr" / "lib" / "file").write_text("here")
    links = {"lib": "usr/lib", "abs": "/usr/lib", "up": "../../../usr", "loop": "loop2", "loop2": "loop"}
    for name, target in links.items():
        os.symlink(target, tree / name)
    make_ext(tmp_path / "vm.raw", tree, "-t", "ext4")
    with pyfleece.files(tmp_path / "vm.raw") as files:
        odd = ("//usr/./lib/../lib//file", b"/../../usr/lib/file")
        for path in ("/lib/file", "lib/file", "/abs/file", "up/lib/file", *odd):
            assert files.open(path).read() == b"here", path
            assert files.stat(path).path == "/usr/lib/file"
        assert files.stat("/lib").kind == "directory"
        assert files.stat("/lib", follow=False).kind == "symlink"
        assert files.readlink("/abs") == "/usr/lib"
        assert [entry.name for entry in files.scandir("/abs")] == ["file"]
        for path, code in {
            "/nothing": errno.ENOENT,
            "/usr/lib/file/x": errno.ENOTDIR,
            "/usr/lib/file/": errno.ENOTDIR,
            "/loop": errno.ELOOP,
        }.items():
            with pytest.raises(OSError) as caught:
                files.stat(path)
            assert caught.value.errno == code and path in str(caught.value)
            assert isinstance(caught.value, pyfleece.Error)
        with pytest.raises(IsADirectoryError):
            files.open("/usr")
        with pytest.raises(NotADirectoryError):
            list(files.scandir("/usr/lib/file"))
        with pytest.raises(OSError) as caught:
            files.readlink("/usr")
        assert caught.value.errno == errno.EINVAL


def test_a_file_is_a_binary_file(ext4, tree):
    wanted = (tree / "holes").read_bytes()
    with pyfleece.files(ext4) as files:
        with files.open("/holes") as file:
            assert file.readable() and file.seekable() and not file.writable()
            assert file.seek(3 * MIB - 100) == 3 * MIB - 100
            assert file.read(300) == wanted[3 * MIB - 100 : 3 * MIB + 200]
            assert file.seek(-5, os.SEEK_END) == len(wanted) - 5
            assert file.read(100) == wanted[-5:] and file.read(1) == b""
            with pytest.raises(ValueError):
                file.seek(-1)
            assert sum(length for _, length in file.data()) < 100_000
        with pytest.raises(pyfleece.ClosedError):
            file.read(1)
        left = files.open("/holes")
    with pytest.raises(pyfleece.ClosedError):
        left.read(1)
    with pytest.raises(pyfleece.ClosedError):
        files.stat("/")
    files.close()


def test_an_image_stays_open_and_a_path_does_not(ext4, no_leaks):
    with pyfleece.open(ext4) as image:
        with pyfleece.files(image) as files:
            assert files.stat("/holes").size == 9 * MIB
        assert image.pread(2, 1080) == b"\x53\xef"
    with pyfleece.files(ext4) as files:
        assert files.name == str(ext4)
    pyfleece.open(ext4, "r+").close()       # its lock is gone


def test_storage_that_fails_is_not_a_damaged_file_system(ext4, tmp_path):
    from pyfleece.testing import FaultyImage

    with pyfleece.open(ext4) as image:
        faulty = FaultyImage(image)
        with pyfleece.files(faulty) as files:
            assert files.stat("/holes").size
            faulty.fail("read", nth=1)
            with pytest.raises(pyfleece.ImageError, match="injected fault") as caught:
                files.open("/holes").read(10)
            assert caught.value.errno == errno.EIO
            faulty.fail("read", nth=10, times=3)
            result = files.copy("/", tmp_path / "out", recursive=True)
            assert len(result.failed) in (1, 2, 3) and all("injected fault" in why for _, why in result.failed)
            assert not list((tmp_path / "out").rglob(".pyfleece-*"))


# ---- copying ----


def test_a_tree_is_copied_with_everything(tree, ext4, tmp_path):
    with pyfleece.files(ext4) as files:
        result = files.copy("/", tmp_path / "out", recursive=True)
    wanted = on_disk(tree)
    if os.geteuid() == 0:
        assert_same(on_disk(tmp_path / "out"), wanted, unit=SECOND)
        assert (result.skipped, result.failed) == ([], [])
        assert result.devices == 2
    assert files_kit.allocated(tmp_path / "out" / "holes") < 200_000
    assert result.files + result.directories + result.symlinks + result.hard_links + result.devices == len(wanted) + 1
    assert result.hard_links == 1 and result.bytes > 100_000
    assert os.path.exists(os.fsencode(tmp_path / "out") + b"/" + BAD_NAME)
    assert not list((tmp_path / "out").rglob(".pyfleece-*"))


def test_times_are_kept_to_the_nanosecond(tmp_path, loop_device):
    make_ext(tmp_path / "vm.raw", None, "-t", "ext4")
    with mounted(loop_device(tmp_path / "vm.raw"), tmp_path / "mnt") as top:
        grow(top, files=20)
        run("sync", "-f", top)
        wanted = on_disk(top)
    with pyfleece.files(tmp_path / "vm.raw") as files:
        assert files.copy("/", tmp_path / "out", recursive=True).failed == []
    assert_same(on_disk(tmp_path / "out"), wanted)


def test_without_privileges_devices_are_skipped_and_owners_left(ext4, tmp_path):
    """In a child that is nobody: its files are its own, and no file is set-user-ID."""
    if os.geteuid() != 0:
        missing("root, to become somebody else,")
    run("debugfs", "-w", "-R", "set_inode_field /holes mode 0104755", ext4)
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, 65534, 65534)
    for directory in (out.parent, *out.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)
    with pyfleece.open(ext4) as image:
        data = image.pread(image.size, 0)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

            class Memory:
                size = len(data)

                def pread(self, count: int, offset: int) -> bytes:
                    return data[offset : offset + count]

            with pyfleece.files(Memory()) as files:
                told = []
                result = files.copy("/", out, recursive=True, on_problem=lambda path, why: told.append((path, why)))
            assert sorted(path for path, _ in result.skipped) == ["/device", "/fifo"], result.skipped
            assert told == result.skipped and result.failed == []
            assert (out / "holes").stat().st_mode == 0o100755
            assert (out / "empty directory").stat().st_uid == 65534
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_destinations_are_those_of_cp(ext4, tmp_path):
    with pyfleece.files(ext4) as files:
        files.copy("/holes", tmp_path / "name")                             # to a name
        assert (tmp_path / "name").stat().st_size == 9 * MIB
        (tmp_path / "d").mkdir()
        files.copy(["/holes", "/short link"], tmp_path / "d")               # into a directory; a link is followed
        assert (tmp_path / "d" / "short link").is_file() and not (tmp_path / "d" / "short link").is_symlink()
        files.copy("/short link", tmp_path / "as link", recursive=True)
        assert os.readlink(tmp_path / "as link") == "file 0"
        files.copy("/dir0", tmp_path / "new", recursive=True)
        files.copy("/dir0", tmp_path / "d", recursive=True)
        assert (tmp_path / "d" / "dir0").is_dir()
        assert sorted(on_disk(tmp_path / "new")) == sorted(on_disk(tmp_path / "d" / "dir0"))
        with pytest.raises(ValueError, match="only copied recursively"):
            files.copy("/dir0", tmp_path / "d")
        with pytest.raises(NotADirectoryError):
            files.copy(["/holes", "/fifo"], tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError):
            files.copy("/holes", tmp_path / "no" / "where")
        with pytest.raises(FileNotFoundError):
            files.copy("/nothing", tmp_path / "d")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(ext4, tmp_path):
    """Somebody who has the old file open, or a hard link to it, keeps it."""
    target = tmp_path / "holes"
    target.write_text("old")
    os.link(target, tmp_path / "link to old")
    with pyfleece.files(ext4) as files:
        files.copy("/holes", tmp_path)
        assert target.stat().st_size == 9 * MIB
        assert (tmp_path / "link to old").read_text() == "old"
        (tmp_path / "d" / "holes").mkdir(parents=True)
        result = files.copy("/holes", tmp_path / "d")
        assert "Is a directory" in result.failed[0][1]
        assert [path.name for path in (tmp_path / "d").iterdir()] == ["holes"]


def test_a_full_destination_ends_the_copy(ext4, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0:
        missing("root, to mount a small file system,")
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    try:
        with pyfleece.files(ext4) as files, pytest.raises(OSError) as caught:
            files.copy("/", small, recursive=True)
        assert caught.value.errno == errno.ENOSPC and isinstance(caught.value, pyfleece.Error)
        assert not list(small.rglob(".pyfleece-*"))
    finally:
        run("umount", small)


def test_two_thousand_files_take_seconds(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    grow(tree, files=2000)
    make_ext(tmp_path / "vm.raw", tree, "-t", "ext4", size=160 * MIB)
    begun = time.monotonic()
    with pyfleece.files(tmp_path / "vm.raw") as files:
        result = files.copy("/", tmp_path / "out", recursive=True)
    taken = time.monotonic() - begun
    assert not result.failed and result.files > 2000
    assert taken < 60, f"{taken:.1f} s"         # about 1 s where nothing else runs

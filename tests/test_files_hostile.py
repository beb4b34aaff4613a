"""Images that a hostile guest wrote: nothing is written outside of the destination, and whatever is wrong ends in a
clear error, soon.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
from pathlib import Path

import files_kit
import pytest
from conftest import MIB, missing, require, run
from files_kit import make_ext, mounted, power_failure, require_tsk

import pyfleece
from pyfleece.filesystems import tsk
from pyfleece.filesystems.base import MAX_DEPTH


@pytest.fixture
def place(tmp_path) -> Path:
    """A directory to copy into, beside what may not change."""
    for name in ("outside", "out"):
        (tmp_path / "jail" / name).mkdir(parents=True)
    (tmp_path / "jail" / "outside" / "precious").write_text("precious")
    return tmp_path / "jail" / "out"


def untouched(place: Path) -> bool:
    outside = place.parent / "outside"
    names = sorted(path.name for path in place.parent.iterdir())
    return names == ["out", "outside"] and [path.name for path in outside.iterdir()] == ["precious"] and (
        (outside / "precious").read_text() == "precious"
    )


def image_of(tmp_path: Path, fill) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    fill(tree)
    image = tmp_path / "vm.raw"
    make_ext(image, tree, "-t", "ext4", "-b", "4096", "-O", "^has_journal", size=16 * MIB)
    return image


def entry_of(data: bytes, name: bytes) -> int:
    """Where the directory entry of that name is in an image."""
    position = -1
    while True:
        position = data.index(name, position + 1)
        number, length, name_length = struct.unpack_from("<IHB", data, position - 8)
        if name_length == len(name) and 0 < number < 65536 and length % 4 == 0:
            return position - 8


def rename(image: Path, old: bytes, new: bytes) -> None:
    """Change a name in a directory to what no kernel would write."""
    data = bytearray(image.read_bytes())
    start = entry_of(bytes(data), old)
    data[start + 6] = len(new)
    data[start + 8 : start + 8 + len(new)] = new
    image.write_bytes(data)


def point(image: Path, name: bytes, number: int) -> None:
    """Make a name lead to another inode."""
    data = bytearray(image.read_bytes())
    struct.pack_into("<I", data, entry_of(bytes(data), name), number)
    image.write_bytes(data)


# ---- names ----


@pytest.mark.parametrize("name", [b"../outside/x", b"/etc/x", b"a/../../outside/x", b"a\0b", b"", b"."])
def test_names_that_no_file_may_have(tmp_path, place, name):
    image = image_of(tmp_path, lambda tree: [(tree / n).write_text(n) for n in ("n" * 30, "other")])
    rename(image, b"n" * 30, name)
    with pyfleece.files(image) as files:
        result = files.copy("/", place, recursive=True)
        if name != b".":                            # which is left out, as the real one is
            ((path, why),) = result.failed
            assert "damaged: there is a file with the name" in why and path.endswith(os.fsdecode(name))
            with pytest.raises(pyfleece.FileSystemError, match="there is a file with the name"):
                list(files.scandir("/"))
    assert sorted(path.name for path in place.iterdir()) == ["lost+found", "other"]
    assert untouched(place)


@pytest.mark.parametrize("target", ["../outside", "absolute"])
def test_a_link_and_a_directory_of_the_same_name(tmp_path, place, target):
    """First the link is copied, then the directory would be written through it."""
    leads = os.fspath(place.parent / "outside") if target == "absolute" else target

    def fill(tree: Path) -> None:
        os.symlink(leads, tree / "name1")
        (tree / "name2").mkdir()
        (tree / "name2" / "precious").write_text("overwritten")

    image = image_of(tmp_path, fill)
    for other in (b"name1", b"name2"):              # whichever comes first
        hostile = tmp_path / "hostile.raw"
        shutil.copyfile(image, hostile)
        rename(hostile, other, b"name1" if other == b"name2" else b"name2")
        with pyfleece.files(hostile) as files:
            result = files.copy("/", place, recursive=True)
        assert "several files with this name" in result.failed[0][1]
        assert untouched(place)
        shutil.rmtree(place)
        place.mkdir()


def test_links_that_lie_in_the_destination_are_not_followed(tmp_path, place):
    """From an earlier copy, say. A link in the place of a file is replaced, one in the place of a directory stays."""

    def fill(tree: Path) -> None:
        (tree / "file").write_text("new")
        (tree / "dir").mkdir()
        (tree / "dir" / "precious").write_text("overwritten")

    image = image_of(tmp_path, fill)
    os.symlink("../outside/precious", place / "file")
    os.symlink("../outside", place / "dir")
    with pyfleece.files(image) as files:
        result = files.copy("/", place, recursive=True)
    assert [path for path, _ in result.failed] == ["/dir"]
    assert (place / "file").read_text() == "new" and not (place / "file").is_symlink()
    assert untouched(place)


def test_links_are_copied_and_lead_where_they_lead(tmp_path, place):
    image = image_of(tmp_path, lambda tree: os.symlink("../outside/precious", tree / "link"))
    with pyfleece.files(image) as files:
        assert files.copy("/", place, recursive=True).symlinks == 1
        assert os.readlink(place / "link") == "../outside/precious"
        # Read through, it leads to a file of the image, and there is none.
        with pytest.raises(FileNotFoundError):
            files.open("/link")
        with pytest.raises(FileNotFoundError):
            files.copy("/link", place / "copy")
    assert untouched(place)


# ---- directories ----


def test_directories_that_lead_back(tmp_path, place):
    def fill(tree: Path) -> None:
        for name in ("top", "top/back to root", "top/back to top", "top/back to itself"):
            (tree / name).mkdir()

    image = image_of(tmp_path, fill)
    with pyfleece.files(image) as files:
        number = files.stat("/top").stat.number
    point(image, b"back to root", 2)
    point(image, b"back to top", number)
    with pyfleece.files(image) as files:
        result = files.copy("/", place, recursive=True)
        assert sorted(path for path, _ in result.failed) == ["/top/back to root", "/top/back to top"]
        assert all("in more than one place" in why for _, why in result.failed)
        with pytest.raises(pyfleece.FileSystemError, match="in more than one place"):
            list(files.walk("/"))
        told = []
        walked = [entry.path for entry in files.walk("/", on_error=lambda path, error: told.append(path))]
        assert len(walked) == 6 and len(told) == 2
    assert untouched(place)


def test_directories_nested_deeper_than_any_real_ones(tmp_path, place):
    """A chain that is as long as the bound allows is walked, and one that is longer is cut off there."""

    class Chain(pyfleece.filesystems.base.FileSystem):
        kind, root = "chain", 1

        def inode(self, number):
            return pyfleece.filesystems.base.Inode(number, 0o40755, 0, 2, 0, 0, 0)

        def names(self, directory):
            return iter([(b"d", directory.number + 1)])

        def link(self, inode):
            raise NotImplementedError

        data = pread = link

    with pyfleece.create(tmp_path / "vm.raw", MIB) as image, pyfleece.files(image) as files:
        files._filesystems[None] = Chain()
        with pytest.raises(pyfleece.FileSystemError, match="nested deeper"):
            list(files.walk("/"))
        seen = list(files.walk("/", on_error=lambda path, error: None))
        assert len(seen) == MAX_DEPTH + 1
    assert untouched(place)


# ---- maps and sizes ----


def field(image: Path, path: str, name: str, value: str) -> None:
    run("debugfs", "-w", "-R", f"set_inode_field {path} {name} {value}", image)


def test_sizes_that_no_file_has(tmp_path, place):
    image = image_of(tmp_path, lambda tree: [(tree / name).write_bytes(b"x" * 5000) for name in ("huge", "sane")])
    os.symlink("x" * 100, tmp_path / "tree" / "link")
    make_ext(image, tmp_path / "tree", "-t", "ext4", "-O", "^has_journal", size=16 * MIB)
    field(image, "/huge", "size", str((1 << 64) - 1))
    field(image, "/link", "size", str(1 << 31))
    with pyfleece.files(image) as files:
        result = files.copy("/", place, recursive=True)
        assert sorted(path for path, _ in result.failed) == ["/huge", "/link"]
        assert (place / "sane").read_bytes() == b"x" * 5000
    field(image, "/huge", "size", str(1 << 45))     # as long as it is sparse, that is a file like others
    with pyfleece.files(image) as files:
        assert files.open("/huge").read(6000) == b"x" * 5000 + bytes(1000)
    assert untouched(place)


def test_maps_without_an_end(tmp_path):
    """A tree of extents that leads to itself; a directory that is as large as can be said."""
    image = image_of(tmp_path, lambda tree: [(tree / name).write_bytes(b"x" * 5000) for name in ("file", "other")])
    (tmp_path / "tree" / "dir").mkdir()
    make_ext(image, tmp_path / "tree", "-t", "ext4", "-b", "4096", "-O", "^has_journal,^metadata_csum", size=16 * MIB)
    with pyfleece.files(image) as files:
        block = files.open("/file")._entry._filesystem._mapping(files.stat("/file").stat)[0][0].place // 4096
    data = bytearray(image.read_bytes())
    # In the place of the file's data: a node of the tree whose children are the node itself, of decreasing depth...
    root = struct.pack("<HHHHI", 0xF30A, 1, 4, 5, 0) + struct.pack("<IIHH", 0, block, 0, 0)
    node = struct.pack("<HHHHI", 0xF30A, 300, 340, 4, 0) + struct.pack("<IIHH", 0, block, 0, 0) * 300
    data[block * 4096 : block * 4096 + len(node)] = node
    at = data.index(struct.pack("<HHHHI", 0xF30A, 1, 4, 0, 0) + struct.pack("<IHHI", 0, 2, 0, block))
    data[at : at + len(root)] = root
    image.write_bytes(data)
    with pyfleece.files(image) as files, pytest.raises(pyfleece.FileSystemError, match="makes no sense"):
        files.open("/file").read()
    field(image, "/dir", "size", str(1 << 40))
    with pyfleece.files(image) as files, pytest.raises(pyfleece.FileSystemError, match="directory has 1099511627776"):
        list(files.scandir("/dir"))


# ---- noise ----


def everything(image: Path, out: Path) -> int:
    """Read and copy all that can be. Returns how many things failed: only in the ways in which they may."""
    failed = 0
    try:
        with pyfleece.files(image) as files:
            for volume in files.volumes:
                prefix = "" if volume.number is None else f"{volume.number}:"
                try:
                    failed += len(files.copy(prefix + "/", out, recursive=True).failed)
                    for entry in files.walk(prefix + "/", on_error=lambda path, error: None):
                        repr(entry)
                except pyfleece.FileSystemError:
                    failed += 1
    except pyfleece.FileSystemError:
        failed += 1
    return failed


def noises(image: Path, places: list[int], rng: random.Random) -> list[tuple[int, bytes]]:
    """What to change in one of these blocks of 512 bytes: offsets and bytes, that are anything or on the edge."""
    found = []
    for _ in range(rng.choice([1, 3, 20, 200])):
        width = rng.choice([1, 2, 4, 8])
        edge = [b"\xff" * width, bytes(width), b"\x80" + bytes(width - 1), (1).to_bytes(width, "little")]
        at = rng.choice(places) + rng.randrange(512 - width)
        found.append((at, rng.choice([*edge, rng.randbytes(width)])))
    return found


def metadata(image: Path, tree: Path) -> list[int]:
    """The blocks of an image that hold something which is not the contents of a file of the tree."""
    contents = {
        data[at : at + 512]
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
        for data in (path.read_bytes(),)
        for at in range(0, len(data), 512)
    }
    found = []
    with pyfleece.open(image) as opened:
        for extent in opened.extents():
            if extent.kind == "data":
                data = opened.pread(extent.length, extent.offset)
                blocks = {at: data[at : at + 512] for at in range(0, len(data) - 511, 512)}
                found += [
                    extent.offset + at
                    for at, block in blocks.items()
                    if len(set(block)) > 1 and block not in contents
                ]
    return found


def noise(image: Path, places: list[int], place: Path, rounds: int) -> None:
    """Change something in the image, look what comes of it, and change it back."""
    failures = 0
    for seed in range(rounds * int(os.environ.get("PYFLEECE_NOISE", "1"))):
        with image.open("r+b", buffering=0) as file:
            undo = []
            for offset, changed in noises(image, places, random.Random(seed)):
                undo.append((offset, os.pread(file.fileno(), len(changed), offset)))
                os.pwrite(file.fileno(), changed, offset)
            failures += bool(everything(image, place))
            for offset, old in reversed(undo):
                os.pwrite(file.fileno(), old, offset)
        assert untouched(place), f"seed {seed}"
        if seed % 10 == 9:
            run("chmod", "-R", "u+rwx", place)
            shutil.rmtree(place)
            place.mkdir()
    assert failures, "no noise did anything"


@pytest.fixture
def small_tree(tmp_path) -> Path:
    tree = tmp_path / "small tree"
    tree.mkdir()
    files_kit.grow(tree, files=40, special=False)
    os.symlink("../outside", tree / "link")
    return tree


@pytest.mark.parametrize("options", ["-t ext4 -b 4096", "-t ext2 -b 4096", "-t ext4 -b 1024 -O inline_data"])
def test_noise_in_ext(small_tree, tmp_path, place, options):
    image = tmp_path / "vm.raw"
    make_ext(image, small_tree, *options.split(), size=16 * MIB)
    noise(image, metadata(image, small_tree), place, 15)


def test_noise_in_the_journal(small_tree, tmp_path, place, loop_device):
    image, copy = tmp_path / "vm.raw", tmp_path / "copy.raw"
    make_ext(image, None, "-t", "ext4", "-b", "1024", size=24 * MIB)
    with mounted(loop_device(image), tmp_path / "mnt") as top:
        shutil.copytree(small_tree, top / "tree", symlinks=True)
        run("sync", "-f", top)
        shutil.copyfile(image, copy)
    noise(copy, metadata(copy, small_tree), place, 15)


def test_noise_in_partition_tables(tmp_path, place):
    require("sfdisk")
    for label, script in {"gpt": "size=1M\nsize=2M\n", "dos": "size=1M\nsize=5M, type=5\n- size=1M\nsize=1M\n"}.items():
        image = tmp_path / f"{label}.raw"
        with image.open("wb") as file:
            file.truncate(8 * MIB)
        (tmp_path / "script").write_text(f"label: {label}\n{script.replace('- ', '5: ')}")
        run("sh", "-c", f"sfdisk -q {image} < {tmp_path / 'script'}")
        noise(image, metadata(image, tmp_path / "nothing"), place, 60)


@pytest.mark.parametrize("kind", ["fat", "ntfs"])
def test_noise_in_what_the_sleuth_kit_reads(small_tree, tmp_path, place, kind):
    """It may crash; that is an error like others, and we live."""
    require("mkfs.vfat", "mcopy", "mkntfs", "ntfscp")
    require_tsk()
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    if kind == "fat":
        (small_tree / "link").unlink()
        run("mkfs.vfat", image)
        run("env", "MTOOLS_SKIP_CHECK=1", "mcopy", "-s", "-i", image, *small_tree.iterdir(), "::")
    else:
        run("mkntfs", "-F", "-q", "-f", image)
        for number, path in enumerate(sorted(small_tree.glob("file *"))[:5]):
            run("ntfscp", image, path, f"/file {number}")
    noise(image, metadata(image, small_tree), place, 12)


@pytest.mark.parametrize("unmounted", [True, False])
def test_noise_in_xfs(small_tree, tmp_path, place, loop_device, unmounted):
    """In its log as well, where the power failed."""
    require("mkfs.xfs")
    image = tmp_path / "vm.raw"
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    run("mkfs.xfs", "-q", image)
    with mounted(loop_device(image), tmp_path / "mnt") as top:
        shutil.copytree(small_tree, top / "tree", symlinks=True)
        (top / "many").mkdir()
        for number in range(400):
            (top / "many" / f"name {number}").touch()
        with (top / "fragments").open("wb") as file:
            for number in range(400):
                file.seek(number * 8192)
                file.write(b"x" * 4096)
        if not unmounted:
            power_failure(top, flush=True)
    noise(image, metadata(image, small_tree), place, 10)


# ---- the other process ----


@pytest.fixture
def fat(tmp_path) -> Path:
    require("mkfs.vfat", "mcopy")
    require_tsk()
    image = tmp_path / "fat.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    (tmp_path / "file").write_text("hello")
    (tmp_path / "large").write_bytes(os.urandom(5 * MIB))
    run("mkfs.vfat", image)
    run("env", "MTOOLS_SKIP_CHECK=1", "mcopy", "-i", image, tmp_path / "file", tmp_path / "large", "::")
    return image


def test_a_reader_that_crashes_is_an_error(fat, no_leaks):
    with pyfleece.files(fat) as files:
        filesystem = files.filesystem(files.volumes[0])
        os.kill(filesystem._process.pid, signal.SIGSEGV)
        with pytest.raises(pyfleece.FileSystemError, match="its reader ended with status -11"):
            files.stat("/file")
        with pytest.raises(pyfleece.FileSystemError):
            files.stat("/file")


def test_a_reader_that_hangs_is_ended(fat, monkeypatch, no_leaks):
    with pyfleece.files(fat) as files:
        filesystem = files.filesystem(files.volumes[0])
        monkeypatch.setattr(tsk, "TIME_LIMIT", 0.2)
        os.kill(filesystem._process.pid, signal.SIGSTOP)
        with pytest.raises(pyfleece.FileSystemError, match=r"no answer within 0\.2 s"):
            files.stat("/file")
        assert filesystem._process.poll() is not None


def test_the_reader_has_no_privileges_and_no_files(fat):
    with pyfleece.files(fat) as files:
        files.stat("/file")
        process = files.filesystem(files.volumes[0])._process.pid
        status = Path(f"/proc/{process}/status").read_text()
        opened = {os.readlink(path).partition(":")[0] for path in Path(f"/proc/{process}/fd").iterdir()}
    if os.geteuid() != 0:
        missing("root, to see privileges being dropped,")
    assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
    assert "\nCapEff:\t0000000000000000\n" in status
    assert opened == {"pipe", "/dev/null"}


def test_without_pytsk3_the_error_says_what_to_install(fat, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pyfleece.files(fat) as files, pytest.raises(pyfleece.FileSystemError) as caught:
        files.stat("/")
    assert "reading FAT needs pytsk3, which is not installed: pip install 'pyfleece[files]'" in str(caught.value)


def test_storage_that_fails_under_the_reader_is_told_as_such(fat):
    from pyfleece.testing import FaultyImage

    with pyfleece.open(fat) as image:
        faulty = FaultyImage(image)
        with pyfleece.files(faulty) as files:
            assert files.open("/file").read() == b"hello"
            faulty.fail("read", times=None)
            with pytest.raises(pyfleece.ImageError, match="injected fault"):
                files.open("/large").read()

"""Images made to do harm: each class has a test, and an error that says what is wrong.

What is asked of each: no file is opened that was not named by the caller, nothing outside of the image changes, time
and memory stay bounded, and a refused write leaves the image as it was. The fuzzer (tests/fuzz) looks for what is
missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import require, run_python
from qcow2_damage import COPIED, Tables, make, tool

import pyfleece

MIB = 1 << 20
HUGE = (1 << 32) - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    require("qemu-img", "qemu-io")
    directory = tmp_path_factory.mktemp("made")

    def get(kind: str) -> bytes:
        path = directory / f"{kind}.qcow2"
        return (path if path.exists() else make(path, kind)).read_bytes()

    return get


@pytest.fixture
def image(made, tmp_path) -> Callable[..., Path]:
    """image(change, kind): an image of that kind, changed."""

    def damaged(change: Callable[[Tables], object], kind: str = "plain") -> Path:
        tables = Tables(made(kind))
        change(tables)
        path = tmp_path / "vm.qcow2"
        path.write_bytes(tables.data)
        return path

    return damaged


def refused(path: Path, what: str, **options: object) -> None:
    """It can't be opened, and trying changes nothing."""
    before = path.read_bytes()
    for mode in ("r", "r+"):
        with pytest.raises(pyfleece.FormatError, match=what):
            pyfleece.open(path, mode, **options)
    assert path.read_bytes() == before


# ---- sizes in the header that overflow or are huge ----


@pytest.mark.parametrize(
    ("offset", "width", "value", "what"),
    [
        (36, 4, HUGE, "its L1 table has 4294967295 entries"),
        (40, 8, 1 << 63, "its L1 table ends beyond 2\\^63"),
        (40, 8, (1 << 64) - (1 << 16), "its L1 table ends beyond 2\\^63"),
        (56, 4, HUGE, "its refcount table has \\d+ entries"),
        (56, 4, 0, "it has no refcount table"),
        (48, 8, (1 << 63) - (1 << 16), "its refcount table ends beyond 2\\^63"),
        (60, 4, HUGE, "it has 4294967295 internal snapshots"),
        (100, 4, HUGE, "header_length is 4294967295"),
        (16, 4, HUGE, "backing_file_size is 4294967295"),
        (20, 4, 64, "cluster_bits is 64"),
        (96, 4, 7, "refcount_order is 7"),
    ],
)
def test_huge_size_in_the_header(image, offset, width, value, what):
    def change(tables: Tables) -> None:
        tables.put(offset, width, value)
        if offset == 16:
            tables.put(8, 8, 512)

    refused(image(change), what)


def test_huge_snapshot_table(image):
    """65536 snapshots whose names and extra data have no end."""

    def change(tables: Tables) -> None:
        tables.put(tables.snapshot_table + 36, 4, HUGE)

    path = image(change, "snapshots")
    with pyfleece.open(path) as opened, pytest.raises(pyfleece.FormatError, match="snapshot"):
        opened.internal_snapshots()
    assert "snapshot table: entry 0 of 2 ends beyond" in pyfleece.check(path).findings[0].text


def test_huge_header_extension(image):
    def change(tables: Tables) -> None:
        tables.put(tables.number(100, 4) + 4, 4, HUGE)

    refused(image(change), "header extension 0x[0-9a-f]+ at \\d+ claims 4294967295 bytes")


@pytest.mark.parametrize(
    ("offset", "width", "value", "what"),
    [
        (0, 4, HUGE, "claims 4294967295 bitmaps"),
        (8, 8, (1 << 64) - 1, "its directory of bitmaps has \\d+ entries"),
        (16, 8, 1 << 63, "directory of bitmaps ends beyond 2\\^63"),
    ],
)
def test_huge_directory_of_bitmaps(image, offset, width, value, what):
    def change(tables: Tables) -> None:
        at = tables.number(100, 4)
        while tables.number(at, 4) != 0x23852875:
            at += 8 + (tables.number(at + 4, 4) + 7) // 8 * 8
        tables.put(at + 8 + offset, width, value)

    refused(image(change, "bitmaps"), what)


def test_virtual_size_of_exabytes(image):
    """More than the L1 table maps; and one that can't be mapped at all."""
    refused(
        image(lambda tables: tables.put(24, 8, 1 << 44)),
        "its L1 table has \\d+ entries, and a disk of \\d+ bytes needs",
    )
    refused(image(lambda tables: tables.put(24, 8, (1 << 63) - 512)), "more than an L1 table of 32 MiB can map")
    refused(image(lambda tables: tables.put(24, 8, (1 << 64) - 512)), "its disk has \\d+ bytes; 2\\^63 - 1 is the most")


BOUNDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
import pyfleece
with pyfleece.open(sys.argv[1], "r+") as image:
    for offset in (0, image.size // 2, image.size - 4096):
        image.pwrite(b"x" * 4096, offset)
        assert image.pread(4096, offset) == b"x" * 4096
    kinds = [extent.kind for extent in image.extents()]
    print(image.size, kinds.count("data"))
assert pyfleece.check(sys.argv[1]).status == 0
"""


def test_largest_disk_in_little_memory(tmp_path):
    """2 EiB in clusters of 2 MiB: an L1 table of 32 MiB, and the rest costs what it holds."""
    require("qemu-img")
    path = tmp_path / "vm.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, str(1 << 61))
    assert run_python(BOUNDED, path).split() == [str(1 << 61), "3"]


# ---- metadata that overlaps, or points at itself ----


@pytest.mark.parametrize(
    ("field", "other", "what"),
    [(40, 48, "its L1 table and its refcount table overlap"), (64, 40, "its L1 table and its snapshot table overlap")],
)
def test_tables_of_the_header_in_one_place(image, field, other, what):
    refused(image(lambda tables: tables.put(field, 8, tables[other]), "snapshots"), what)


@pytest.mark.parametrize("field", [40, 48, 64])
def test_table_of_the_header_in_the_header(image, field):
    refused(image(lambda tables: tables.put(field, 8, 0), "snapshots"), "is at 0, where the header is")


TABLES: dict[str, Callable[[Tables], int]] = {
    "L1 table": lambda tables: tables.l1,
    "its own L2 table": lambda tables: tables.l2(),
    "refcount table": lambda tables: tables.reftable,
    "refcount block": lambda tables: tables.block,
    "snapshot table": lambda tables: tables.snapshot_table,
}


@pytest.mark.parametrize("table", ["L1 table", "its own L2 table", "refcount table", "snapshot table"])
def test_data_in_a_table(image, table):
    """A guest that could write there would write its own tables. (Refcount blocks, and L2 tables that it does not go
    through, are not noticed when they are written, but by the check: see test_qcow2_check.)
    """

    def change(tables: Tables) -> None:
        tables[tables.entry(MIB)] = TABLES[table](tables) | COPIED

    path = image(change, "snapshots")
    before = path.read_bytes()
    with pyfleece.open(path, "r+") as opened:
        with pytest.raises(pyfleece.FormatError, match=f"is damaged at {MIB} of the disk"):
            opened.pwrite(b"x" * 4096, MIB)
        with pytest.raises(pyfleece.Error):  # and nothing else is written to such an image
            opened.pwrite(b"x" * 4096, 2 * MIB)
    assert path.read_bytes() == before
    assert pyfleece.check(path).status == 2


@pytest.mark.parametrize("table", ["L1 table", "refcount table", "refcount block"])
def test_l2_table_in_another_table(image, table):
    path = image(lambda tables: tables.put(tables.l1, 8, TABLES[table](tables) | COPIED))
    before = path.read_bytes()
    with pyfleece.open(path, "r+") as opened, pytest.raises(pyfleece.FormatError, match="is damaged at 0 of the disk"):
        opened.pwrite(b"x" * 512, 0)
    assert path.read_bytes() == before
    assert pyfleece.check(path).status == 2


def test_refcount_block_in_another_table(image):
    path = image(lambda tables: tables.put(tables.reftable, 8, tables.l1))
    before = path.read_bytes()
    with pyfleece.open(path, "r+") as opened, pytest.raises(pyfleece.FormatError, match="is damaged"):
        opened.pwrite(b"x" * 512, 3 * MIB - 512)
        opened.flush()
    assert path.read_bytes()[: len(before)] == before
    assert pyfleece.check(path).status == 2


# ---- entries that are not what they should be ----


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (lambda old: old + 512, "does not point at the beginning of a cluster"),
        (lambda old: 1 << 40 | COPIED, "behind the end of the file"),
        (lambda old: ((1 << 56) - (1 << 16)) | COPIED, "behind the end of the file"),
    ],
)
def test_data_in_no_place(image, entry, what, write):
    def change(tables: Tables) -> None:
        at = tables.entry(MIB)
        tables[at] = entry(tables[at])

    path = image(change)
    before = path.read_bytes()
    with pyfleece.open(path, "r+") as opened:
        with pytest.raises(pyfleece.FormatError, match=f"is damaged at {MIB} of the disk.*{what}"):
            opened.pwrite(b"x", MIB) if write else opened.pread(1, MIB)
        with pytest.raises(pyfleece.FormatError, match="damaged"):
            list(opened.extents())
        assert opened.pread(512, 4 * MIB - 512) == bytes(512)  # the rest can be read
    assert path.read_bytes() == before


@pytest.mark.parametrize("entry", [512, 1 << 16 | 512, 1 << 50])
def test_l2_table_in_no_place(image, entry):
    path = image(lambda tables: tables.put(tables.l1, 8, entry | COPIED))
    with pyfleece.open(path, "r+") as opened:
        for use in (lambda: opened.pread(1, 0), lambda: opened.pwrite(b"x", 0), lambda: list(opened.extents())):
            with pytest.raises(
                pyfleece.FormatError, match="entry 0 of the L1 table is 0x[0-9a-f]+, which is no place|damaged"
            ):
                use()


@pytest.mark.parametrize("entry", [512, 1 << 16 | 512, 1 << 50, 1])
def test_refcount_block_in_no_place(image, entry):
    path = image(lambda tables: tables.put(tables.reftable, 8, entry))
    with (
        pyfleece.open(path, "r+") as opened,
        pytest.raises(pyfleece.FormatError, match="entry 0 of the refcount table is"),
    ):
        opened.pwrite(b"x", 3 * MIB - 1)
        opened.flush()


def test_allocation_at_the_header(image):
    """Refcounts that call all clusters free, that of the header too: nothing of what is there is overwritten."""

    def change(tables: Tables) -> None:
        for host in range(0, len(tables.data), tables.cluster):
            tables.set_refcount(host, 0)

    path = image(change)
    before = path.read_bytes()
    with (
        pyfleece.open(path, "r+") as opened,
        pytest.raises(pyfleece.FormatError, match="cluster 0 of the file is free, but the header"),
    ):
        opened.pwrite(b"x" * 65536, 2 * MIB + 65536)
    assert path.read_bytes()[: len(before)] == before


def test_compressed_cluster_past_the_end(image):
    def change(tables: Tables) -> None:
        tables[tables.entry(0)] |= 1 << 45

    path = image(change, "zlib")
    with pyfleece.open(path, "r+") as opened:
        with pytest.raises(
            pyfleece.FormatError, match="is damaged at 0 of the disk: its compressed data .* behind its end"
        ):
            opened.pread(1, 0)
        assert opened.pread(1, 65536) == b"\2"


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_data_that_is_none(image, kind):
    def change(tables: Tables) -> None:
        at = tables[tables.entry(0)] & ((1 << 54) - 1)
        tables.data[at : at + 64] = b"\xff" * 64

    path = image(change, kind)
    with pyfleece.open(path) as opened:
        with pytest.raises(pyfleece.ImageError, match="cannot decompress the cluster at 0"):
            opened.pread(1, 0)
        assert opened.pread(1, 65536) == b"\2"


# ---- backing files, and raw disks with a header ----


def with_backing(path: Path, name: str, form: str | None) -> Path:
    """As somebody would make it who can write any bytes: the name is not looked at by anybody."""
    require("qemu-img")
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[100:104], "big")
    extension = (
        b""
        if form is None
        else bytes.fromhex("e2792aca") + len(form).to_bytes(4, "big") + form.encode().ljust(8, b"\0")
    )
    data[at : at + len(extension) + 8] = extension + bytes(8)
    data[4096 : 4096 + len(name)] = name.encode()
    data[8:20] = (4096).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("/etc/passwd", "is not below"),
        ("../secret.raw", "is not below"),
        ("sub/../../secret.raw", "is not below"),
        ("link.raw", "is not below"),
        ("/proc/self/fd/0", "is not below"),
        ('json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}', "is not a plain path"),
        ("nbd://localhost/x", "is not a plain path"),
        ("fat:rw:.", "is not a plain path"),
    ],
)
def test_backing_file_that_names_something_else(tmp_path, name, what):
    (tmp_path / "secret.raw").write_bytes(b"secret" * 1000)
    directory = tmp_path / "images"
    (directory / "sub").mkdir(parents=True)
    (directory / "link.raw").symlink_to(tmp_path / "secret.raw")
    path = with_backing(directory / "vm.qcow2", name, "raw")
    with pytest.raises(pyfleece.Error, match=what):
        pyfleece.open(path)
    with pytest.raises(pyfleece.Error, match=what if "path" in what else "not allowed"):
        pyfleece.open(path, backing_root=directory if "path" in what else False)


def test_backing_file_of_no_told_format(tmp_path):
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    refused(with_backing(tmp_path / "vm.qcow2", "base.raw", None), "but not its format")
    refused(with_backing(tmp_path / "vm.qcow2", "base.raw", "vmdk"), "of format 'vmdk'; raw and qcow2 are supported")


def test_backing_files_in_a_loop(tmp_path):
    refused(with_backing(tmp_path / "vm.qcow2", "vm.qcow2", "qcow2"), "the chain is a loop")
    with_backing(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    with_backing(tmp_path / "b.qcow2", "a.qcow2", "qcow2")
    refused(tmp_path / "a.qcow2", "the chain is a loop")


def test_backing_files_without_end(tmp_path):
    first = with_backing(tmp_path / "0000.qcow2", "0001.qcow2", "qcow2")
    for number in range(1, 100):
        data = first.read_bytes().replace(b"0001.qcow2", f"{number + 1:04}.qcow2".encode())
        (tmp_path / f"{number:04}.qcow2").write_bytes(data)
    refused(first, "64 are the most")


def test_raw_disk_with_a_header(made, tmp_path):
    """A guest wrote a qcow2 header into its raw disk, which names a file of the host: nobody reads it as that."""
    path = tmp_path / "vm.raw"
    evil = with_backing(tmp_path / "evil.qcow2", "/etc/passwd", "raw")
    shutil.copy(evil, path)
    with pytest.raises(pyfleece.FormatError, match="starts with a qcow2 header"):
        pyfleece.open(path)
    with pyfleece.open(path, format="raw") as opened:
        assert opened.size == path.stat().st_size
        assert opened.pread(4, 0) == b"QFI\xfb"
    overlay = with_backing(tmp_path / "overlay.qcow2", "vm.raw", "raw")
    with pyfleece.open(overlay) as opened:
        assert opened.pread(4, 0) == b"QFI\xfb"

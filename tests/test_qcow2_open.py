"""What is refused when a qcow2 image is opened, and how it is said: every field of the header, every limit, every
feature, every way to name a backing file. The images are qemu-img's, with bytes changed. A refusal changes nothing in
the file.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MIB, require, run
from qcow2_patch import (
    BACKING_FORMAT,
    BITMAPS,
    FEATURE_NAMES,
    change_extension,
    content_of,
    extensions,
    feature_name,
    get,
    get_bytes,
    put,
    put_bytes,
    put_extensions,
    qemu_create,
    unchanged,
)

import pyfleece

CLUSTER = 65536
HUGE = (1 << 63) - CLUSTER


@pytest.fixture(autouse=True)
def tools() -> None:
    require("qemu-img")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return qemu_create(tmp_path / "vm.qcow2")


def refused(path: Path, what: str, kind: type[Exception] = pyfleece.FormatError, **options) -> None:
    """Read-only and for writing; the message names the image and says `what` (a regular expression)."""
    before = content_of(path)
    for mode in ("r", "r+"):
        with pytest.raises(kind, match=what) as caught:
            pyfleece.open(path, mode, **options)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 740
        assert unchanged(path, before), "a refusal changed the file"


def opens(path: Path, **options) -> pyfleece.ImageInfo:
    with pyfleece.open(path, **options) as image:
        return image.info


# ---- fields: each change alone, and what is said about it ----

FIELDS: list[tuple[dict[str, int], str]] = [
    ({"magic": 0x514649FA}, "not a qcow2 image.*514649fa"),
    ({"version": 0}, "version 0"),
    ({"version": 1}, "version 1"),
    ({"version": 4}, "version 4 of the qcow2 format; versions 2 and 3"),
    ({"cluster_bits": 8}, "cluster_bits is 8"),
    ({"cluster_bits": 22}, "cluster_bits is 22"),
    ({"cluster_bits": 0xFFFFFFFF}, "cluster_bits is 4294967295"),
    ({"header_length": 0}, "header_length is 0"),
    ({"header_length": 103}, "header_length is 103"),
    ({"header_length": CLUSTER + 8}, f"header_length is {CLUSTER + 8}"),
    ({"header_length": 0xFFFFFFFF}, "header_length is 4294967295"),
    ({"refcount_order": 7}, "refcount_order is 7"),
    ({"refcount_order": 0xFFFFFFFF}, "refcount_order is 4294967295"),
    ({"size": 1 << 63}, "its disk has 9223372036854775808 bytes"),
    ({"size": (1 << 64) - 1}, "its disk has 18446744073709551615 bytes"),
    ({"size": 1 << 60}, "more than an L1 table of 32 MiB can map in clusters of 65536"),
    ({"size": (512 * MIB) + 1}, "L1 table has 1 entries, and a disk of 536870913 bytes needs 2"),
    ({"l1_size": 0}, "L1 table has 0 entries"),
    ({"l1_size": (4 << 20) + 1}, "L1 table has 4194305 entries; 4194304 are possible"),
    ({"l1_size": 0xFFFFFFFF}, "L1 table has 4294967295 entries"),
    ({"l1_table_offset": 0}, "L1 table is at 0, where the header is"),
    ({"l1_table_offset": 0x30200}, "L1 table is at 197120, which is not the start of a cluster"),
    ({"l1_table_offset": (1 << 63) - 4}, "L1 table ends beyond 2\\^63"),
    ({"l1_table_offset": (1 << 64) - CLUSTER}, "L1 table ends beyond 2\\^63"),
    ({"l1_table_offset": 1 << 40}, "L1 table, 8 bytes at 1099511627776, ends beyond the file, 196616: was that trunc"),
    ({"l1_size": 4 << 20}, "L1 table, 33554432 bytes at 196608, ends beyond the file"),
    ({"refcount_table_offset": 1 << 40}, "refcount table, 65536 bytes at 1099511627776, ends beyond the file"),
    ({"refcount_table_clusters": 0}, "has no refcount table"),
    ({"refcount_table_clusters": 129}, "refcount table has 1056768 entries; 1048576 are possible"),
    ({"refcount_table_clusters": 0xFFFFFFFF}, "refcount table has \\d+ entries"),
    ({"refcount_table_offset": 0}, "refcount table is at 0, where the header is"),
    ({"refcount_table_offset": 0x10008}, "refcount table is at 65544, which is not the start"),
    ({"refcount_table_offset": HUGE}, "refcount table ends beyond 2\\^63"),
    ({"nb_snapshots": 65537}, "65537 internal snapshots; 65536"),
    ({"nb_snapshots": 0xFFFFFFFF}, "4294967295 internal snapshots"),
    ({"nb_snapshots": 1, "snapshots_offset": 0}, "snapshot table is at 0, where the header is"),
    ({"nb_snapshots": 1, "snapshots_offset": 0x40010}, "snapshot table is at 262160, which is not the start"),
    ({"nb_snapshots": 65536, "snapshots_offset": HUGE}, "snapshot table ends beyond 2\\^63"),
    ({"crypt_method": 1}, "is encrypted \\(crypt_method 1, AES\\)"),
    ({"crypt_method": 2}, "is encrypted \\(crypt_method 2, LUKS\\)"),
    ({"crypt_method": 77}, "is encrypted \\(crypt_method 77\\)"),
    ({"incompatible": 4}, "external file \\(incompatible feature bit 2\\)"),
    ({"incompatible": 16}, "extended L2 entries.*\\(incompatible feature bit 4\\)"),
    ({"incompatible": 8}, "compression type feature.*no compression type but zlib"),
    ({"compression_type": 1}, "compression type 1 without the feature"),
    ({"incompatible": 8, "compression_type": 2}, "compression type 2, which is not known"),
    ({"incompatible": 8, "compression_type": 255}, "compression type 255, which is not known"),
    ({"incompatible": 8, "header_length": 104}, "compression type feature"),
    ({"backing_file_offset": 0x20000, "backing_file_size": 8}, "backing_file_offset is 131072, which is not between"),
    ({"backing_file_offset": 1 << 63, "backing_file_size": 8}, "backing_file_offset is 9223372036854775808"),
    ({"backing_file_offset": 8, "backing_file_size": 8}, "backing_file_offset is 8, which is not between"),
    ({"backing_file_offset": 0x8000, "backing_file_size": 1024}, "backing_file_size is 1024; up to 1023"),
    ({"backing_file_offset": 0x8000, "backing_file_size": 0xFFFFFFFF}, "backing_file_size is 4294967295"),
    ({"backing_file_offset": 0xFFF0, "backing_file_size": 17}, "backing_file_size is 17; up to 1023, inside of the f"),
    ({"backing_file_offset": 0x8000, "backing_file_size": 9}, "name of its backing file, of 9 bytes, contains a null"),
    ({"l1_table_offset": 0x10000}, "its L1 table and its refcount table overlap, at 65536"),
    ({"refcount_table_clusters": 3}, "refcount table, 196608 bytes at 65536, ends beyond the file"),
    ({"nb_snapshots": 1, "snapshots_offset": 0x30000}, "its L1 table and its snapshot table overlap, at 196608"),
    ({"nb_snapshots": 1, "snapshots_offset": 0x10000}, "its refcount table and its snapshot table overlap"),
]


IDS = [",".join(f"{name}={value:#x}" for name, value in fields.items()) for fields, _ in FIELDS]


@pytest.mark.parametrize(("fields", "what"), FIELDS, ids=IDS)
def test_field(image, fields, what):
    put(image, **fields)
    refused(image, what)


@pytest.mark.parametrize("length", [0, 3, 71])
def test_file_shorter_than_a_header(image, length):
    os.truncate(image, length)
    refused(image, f"not a qcow2 image: it has {length} bytes, fewer than a header")


def test_file_shorter_than_the_header_of_version_3(image):
    os.truncate(image, 103)
    refused(image, "it has 103 bytes, fewer than the header of version 3")


def test_refcount_table_into_the_l1_table(image):
    os.truncate(image, MIB)
    put(image, refcount_table_clusters=3)
    refused(image, "its L1 table and its refcount table overlap, at 196608")


@pytest.mark.parametrize("length", [0x30007, 0x30000, 0x1FFFF, 4096])
def test_truncated_file(image, length):
    """The rest would read as zeros."""
    os.truncate(image, length)
    refused(image, f"ends beyond the file, {length}: was that truncated")


def test_raw_file_by_the_wrong_name(tmp_path):
    path = tmp_path / "vm.qcow2"
    path.write_bytes(bytes(MIB))
    refused(path, "begins with 00000000")


# ---- what is fine ----


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 1024, 4096, 65536, 2 * MIB])
def test_versions_and_clusters(tmp_path, version, cluster):
    path = qemu_create(tmp_path / "vm.qcow2", "3M", f"compat={version}", f"cluster_size={cluster}")
    info = opens(path)
    assert (info.format, info.size, info.cluster_size) == ("qcow2", 3 * MIB, cluster)
    assert info.qcow2 is not None and info.qcow2.version == (2 if version == "0.10" else 3)
    assert (info.qcow2.compression, info.qcow2.dirty, info.qcow2.corrupt) == ("zlib", False, False)
    assert (info.backing, info.backing_format) == (None, None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_bits(tmp_path, bits):
    path = qemu_create(tmp_path / "vm.qcow2", "1M", f"refcount_bits={bits}", "lazy_refcounts=on")
    details = opens(path).qcow2
    assert details is not None and (details.refcount_bits, details.lazy_refcounts) == (bits, True)


def test_zstd_is_told(tmp_path):
    details = opens(qemu_create(tmp_path / "vm.qcow2", "1M", "compression_type=zstd")).qcow2
    assert details is not None and details.compression == "zstd"


def test_unknown_compatible_and_autoclear_features_and_extensions_are_ignored(image):
    put(image, compatible=0xFFFFFFFFFFFFFFFE, autoclear=0xFFFFFFFFFFFFFFFE)
    put_extensions(image, (0x12345678, b"what is this"), (BACKING_FORMAT, b"raw"), (0xFFFFFFFF, b""))
    assert opens(image).size == MIB


@pytest.mark.parametrize("length", [104, 112, 120, 1000])
def test_other_header_lengths(image, length):
    put_bytes(image, 104, bytes(1024))
    put(image, header_length=length)
    assert opens(image).size == MIB


def test_disk_of_no_bytes_needs_no_l1_table(image):
    put(image, size=0, l1_size=0, l1_table_offset=0)
    assert opens(image).size == 0


def test_largest_l1_table(image):
    """4 Mi entries that are all holes: nothing of that size is read or kept for nothing."""
    put(image, l1_size=4 << 20, l1_table_offset=0x40000, size=2 << 50)
    os.truncate(image, 0x40000 + (32 << 20))
    assert opens(image).size == 2 << 50


# ---- features ----


def test_extended_l2_of_qemu(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M", "extended_l2=on")
    refused(path, "extended L2 entries, for subclusters \\(incompatible feature bit 4\\)")


def test_external_data_file_of_qemu(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M", f"data_file={tmp_path / 'data.raw'}")
    refused(path, "keeps its data in an external file \\(incompatible feature bit 2\\)")


def test_encrypted_image_of_qemu(tmp_path):
    path = tmp_path / "vm.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"    # making LUKS takes a measurement of time, which may fail
    run("qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o", options, path, "1M")
    refused(path, "is encrypted \\(crypt_method 1, AES\\)")


def test_unknown_feature_without_a_name(image):
    put(image, incompatible=1 << 63)
    put_extensions(image)
    refused(image, "incompatible features that are not known here: bit 63$")


def test_unknown_features_by_their_names(image):
    put(image, incompatible=1 << 5 | 1 << 9 | 1 << 40)
    names = feature_name(1, 5, b"compatible") + feature_name(0, 5, b"quantum clusters") + feature_name(0, 9, b"x" * 46)
    put_extensions(image, (FEATURE_NAMES, names))
    refused(image, f"bit 5 \\('quantum clusters'\\), bit 9 \\('{'x' * 46}'\\), bit 40$")


def test_names_of_features_can_not_forge_a_message(image):
    put(image, incompatible=1 << 5)
    put_extensions(image, (FEATURE_NAMES, feature_name(0, 5, b"a\nb\x1b[2J'\xff")))
    refused(image, "bit 5 \\('a\\?b\\?\\[2J\\?\\?'\\)")


def test_all_unknown_features_at_once(image):
    put(image, incompatible=0xFFFFFFFFFFFFFFE0)
    put_extensions(image, (FEATURE_NAMES, b"".join(feature_name(0, bit, b"y" * 46) for bit in range(64))))
    refused(image, "bit 5 .* \\.\\.\\.")


def test_damaged_extensions_do_not_hide_an_unknown_feature(image):
    put(image, incompatible=1 << 7)
    put_bytes(image, get(image, "header_length"), struct.pack(">II", FEATURE_NAMES, 0xFFFFFFFF))
    refused(image, "bit 7$")


def test_corrupt_image_opens_for_reading_only(image):
    put(image, incompatible=2)
    before = content_of(image)
    info = opens(image)
    assert info.qcow2 is not None and info.qcow2.corrupt
    with pytest.raises(pyfleece.FormatError, match="corrupt"):
        pyfleece.open(image, "r+")
    assert unchanged(image, before)


def test_dirty_image_opens_for_reading_and_stays_dirty(image):
    put(image, incompatible=1)
    before = content_of(image)
    info = opens(image)
    assert info.qcow2 is not None and info.qcow2.dirty
    assert unchanged(image, before)


# ---- extensions ----


@pytest.mark.parametrize("length", [CLUSTER, 0x7FFFFFFF, 0xFFFFFFF8, 0xFFFFFFFF])
def test_extension_longer_than_its_cluster(image, length):
    put_bytes(image, get(image, "header_length"), struct.pack(">II", 0x12345678, length))
    refused(image, f"header extension 0x12345678 at 112 claims {length} bytes")


def test_extension_into_the_name_of_the_backing_file(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M", backing=("base.raw", "raw"))
    start = get(path, "header_length")
    room = get(path, "backing_file_offset") - start - 8
    put_bytes(path, start, struct.pack(">II", 0x12345678, room + 1))
    refused(path, f"claims {room + 1} bytes, {room} are left")


def test_name_of_a_format_that_is_too_long(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M")
    put_extensions(path, (BACKING_FORMAT, b"q" * 16))
    refused(path, "format of its backing file has a name of 16 bytes; 15 is the most")


def test_extensions_up_to_the_last_byte(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "64k", "cluster_size=512")
    put_bytes(path, 112, struct.pack(">II", 0x12345678, 512 - 120))
    assert opens(path).size == 65536
    put_bytes(path, 112, struct.pack(">II", 0x12345678, 512 - 124))     # no room for another one, nor for an end mark
    assert opens(path).size == 65536


# ---- the bitmaps extension ----


@pytest.fixture
def with_bitmaps(image) -> Path:
    run("qemu-img", "bitmap", "--add", "-g", "64k", image, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "128k", image, "second bitmap")
    return image


BITMAP_FIELDS = [
    (0, ">I", 0, "claims 0 bitmaps; 1 to 65535"),
    (0, ">I", 65536, "claims 65536 bitmaps"),
    (4, ">I", 1, "a reserved field of its bitmaps extension is 1"),
    (8, ">Q", 0, "directory of 2 bitmaps has no bytes"),
    (8, ">Q", (64 << 20) + 1, "directory of bitmaps has 67108865 entries"),
    (8, ">Q", (1 << 64) - 1, "directory of bitmaps has 18446744073709551615 entries"),
    (16, ">Q", 0, "directory of bitmaps is at 0, where the header is"),
    (16, ">Q", 0x10200, "directory of bitmaps is at 66048, which is not the start"),
    (16, ">Q", (1 << 63) - 8, "directory of bitmaps ends beyond 2\\^63"),
    (16, ">Q", 0x30000, "its L1 table and its directory of bitmaps overlap"),
]


@pytest.mark.parametrize(("offset", "form", "value", "what"), BITMAP_FIELDS)
def test_field_of_the_bitmaps_extension(with_bitmaps, offset, form, value, what):
    change_extension(with_bitmaps, BITMAPS, offset, struct.pack(form, value))
    refused(with_bitmaps, what)
    put(with_bitmaps, autoclear=0)
    info = opens(with_bitmaps)
    assert info.qcow2 is not None and info.qcow2.bitmaps == 0, "without its autoclear bit it is void"


@pytest.mark.parametrize("length", [23, 25])
def test_length_of_the_bitmaps_extension(with_bitmaps, length):
    ((body),) = [body for kind, _, body in extensions(with_bitmaps) if kind == BITMAPS]
    put_extensions(with_bitmaps, (BITMAPS, (body + bytes(8))[:length]))
    refused(with_bitmaps, f"bitmaps extension has {length} bytes, not 24")


def test_bitmaps_are_listed(with_bitmaps):
    with pyfleece.open(with_bitmaps) as image:
        assert image.info.qcow2 is not None and image.info.qcow2.bitmaps == 2
        assert image.persistent_bitmaps() == [
            pyfleece.PersistentBitmap("b0", 65536, in_use=False, enabled=True, extra=False),
            pyfleece.PersistentBitmap("second bitmap", 131072, in_use=False, enabled=False, extra=False),
        ]


def test_bitmaps_that_were_not_closed_are_in_use(with_bitmaps):
    require("qemu-io")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", with_bitmaps, check=False)
    with pyfleece.open(with_bitmaps) as image:
        assert [bitmap.in_use for bitmap in image.persistent_bitmaps()] == [True, True]


def test_many_bitmaps_are_listed(image):
    for number in range(20):
        run("qemu-img", "bitmap", "--add", "-g", "64k", image, f"b{number}")
    with pyfleece.open(image) as opened:
        assert [bitmap.name for bitmap in opened.persistent_bitmaps()] == [f"b{number}" for number in range(20)]


def directory_of(path: Path) -> tuple[int, int]:
    ((body),) = [body for kind, _, body in extensions(path) if kind == BITMAPS]
    _, _, size, offset = struct.unpack(">IIQQ", body)
    return offset, size


ENTRY = [
    (0, ">Q", 0, "bitmap 0 has its table at 0, where none can be"),
    (0, ">Q", 0x10010, "bitmap 0 has its table at 65552, where none"),
    (0, ">Q", (1 << 63) - CLUSTER, "bitmap 0 has its table, of 1 entries at 9223372036854710272, beyond the end"),
    (0, ">Q", 1 << 40, "bitmap 0 has its table, of 1 entries at 1099511627776, beyond the end of the file"),
    (8, ">I", 2, "bitmap 0 has a table of 2 entries; a disk of 1048576 bytes needs 1"),
    (8, ">I", 0xFFFFFFFF, "bitmap 0 has a table of 4294967295 entries"),
    (12, ">I", 8, "bitmap 0 has flags that are not known: 0x8"),
    (16, "B", 0, "bitmap 0 has type 0"),
    (16, "B", 2, "bitmap 0 has type 2, which is not known; 1"),
    (17, "B", 8, "bitmap 0 has a granularity of 2\\^8 bytes; 2\\^9 to 2\\^31"),
    (17, "B", 32, "bitmap 0 has a granularity of 2\\^32"),
    (17, "B", 255, "bitmap 0 has a granularity of 2\\^255"),
    (18, ">H", 0, "bitmap 0 has a name of 0 bytes"),
    (18, ">H", 1024, "bitmap 0 .*name of 1024"),
    (18, ">H", 3, "bitmap 0 has a null character in its name"),
    (20, ">I", 0xFFFFFFFF, "bitmap 0 has 4294967295 bytes of extra data"),
    (20, ">I", 40, "bitmap 1 is beyond the end of the directory"),
]


@pytest.mark.parametrize(("offset", "form", "value", "what"), ENTRY)
def test_field_of_an_entry_of_the_directory(with_bitmaps, offset, form, value, what):
    """The image can be read all the same; the list is refused."""
    start, _ = directory_of(with_bitmaps)
    put_bytes(with_bitmaps, start + offset, struct.pack(form, value))
    if (offset, value) == (20, 40):
        put_bytes(with_bitmaps, start + 24 + 40, b"nm")
    before = content_of(with_bitmaps)
    with pyfleece.open(with_bitmaps) as image:
        with pytest.raises(pyfleece.FormatError, match=what) as caught:
            image.persistent_bitmaps()
        assert with_bitmaps.name in str(caught.value)
    assert unchanged(with_bitmaps, before)


def test_directory_beyond_the_end_of_the_file(with_bitmaps):
    change_extension(with_bitmaps, BITMAPS, 16, struct.pack(">Q", 1 << 40))
    with pyfleece.open(with_bitmaps) as image, pytest.raises(pyfleece.FormatError, match="beyond the end of the file"):
        image.persistent_bitmaps()


def test_directory_with_bytes_left_over(with_bitmaps):
    _, size = directory_of(with_bitmaps)
    os.truncate(with_bitmaps, 2 * MIB)
    change_extension(with_bitmaps, BITMAPS, 8, struct.pack(">Q", size + 8))
    with pyfleece.open(with_bitmaps) as image, pytest.raises(pyfleece.FormatError, match=f"2 bitmaps take {size}"):
        image.persistent_bitmaps()


# ---- internal snapshots ----


@pytest.fixture
def with_snapshots(image) -> Path:
    run("qemu-img", "snapshot", "-c", "first", image)
    run("qemu-img", "snapshot", "-c", "the second: \u00e4", image)
    return image


def test_snapshots_are_listed(with_snapshots):
    (theirs) = run("qemu-img", "snapshot", "-l", with_snapshots)
    with pyfleece.open(with_snapshots) as image:
        assert image.info.qcow2 is not None and image.info.qcow2.snapshots == 2
        ours = image.internal_snapshots()
    assert [(s.id, s.name, s.size, s.vm_state_size, s.vm_clock) for s in ours] == [
        ("1", "first", MIB, 0, 0.0),
        ("2", "the second: \u00e4", MIB, 0, 0.0),
    ]
    assert "first" in theirs and 0 < ours[0].date <= ours[1].date


def test_snapshots_of_version_2(tmp_path):
    path = qemu_create(tmp_path / "vm.qcow2", "1M", "compat=0.10")
    run("qemu-img", "snapshot", "-c", "old", path)
    with pyfleece.open(path) as image:
        assert [snapshot.name for snapshot in image.internal_snapshots()] == ["old"]


def test_images_without_any_list_none(image, tmp_path):
    with pyfleece.open(image) as opened:
        assert opened.internal_snapshots() == [] and opened.persistent_bitmaps() == []
    with pyfleece.create(tmp_path / "vm.raw", 4096) as raw:
        assert raw.internal_snapshots() == [] and raw.persistent_bitmaps() == [] and raw.info.qcow2 is None


SNAPSHOT = [
    (0, ">Q", 0, "snapshot 0 has its L1 table at 0, where none can be"),
    (0, ">Q", 0x10020, "snapshot 0 has its L1 table at 65568, where none"),
    (0, ">Q", (1 << 64) - CLUSTER, "snapshot 0 has its L1 table at 18446744073709486080"),
    (8, ">I", (4 << 20) + 1, "snapshot 0 has an L1 table of 4194305 entries; 4194304"),
    (36, ">I", 1025, "snapshot 0 has 1025 bytes of extra data; 1024"),
    (36, ">I", 0xFFFFFFFF, "snapshot 0 has 4294967295 bytes of extra data"),
]


@pytest.mark.parametrize(("offset", "form", "value", "what"), SNAPSHOT)
def test_field_of_a_snapshot(with_snapshots, offset, form, value, what):
    put_bytes(with_snapshots, get(with_snapshots, "snapshots_offset") + offset, struct.pack(form, value))
    with pyfleece.open(with_snapshots) as image:
        with pytest.raises(pyfleece.FormatError, match=what) as caught:
            image.internal_snapshots()
        assert with_snapshots.name in str(caught.value)


def test_snapshots_beyond_the_end_of_the_file(with_snapshots):
    put(with_snapshots, snapshots_offset=1 << 40)
    what = "snapshot 0 is at \\d+, beyond the end of the file"
    with pyfleece.open(with_snapshots) as image, pytest.raises(pyfleece.FormatError, match=what):
        image.internal_snapshots()


def test_more_snapshots_than_there_are_bytes(with_snapshots):
    """65536 of them in a sparse file: what is not there is not believed, and takes no memory."""
    put(with_snapshots, nb_snapshots=65536)
    with pyfleece.open(with_snapshots) as image, pytest.raises(pyfleece.FormatError, match="snapshot \\d+ is at"):
        image.internal_snapshots()


# ---- backing files ----


def make_chain(directory: Path, name: str = "base.raw", format: str = "raw") -> Path:
    (directory / "base.raw").write_bytes(b"base" * 16384)
    return qemu_create(directory / "vm.qcow2", "64k", backing=(name, format))


def rename_backing(path: Path, name: bytes) -> None:
    """Whatever qemu-img would say about it."""
    offset = get(path, "backing_file_offset")
    put(path, backing_file_size=len(name))
    put_bytes(path, offset, name)


def test_backing_file_beside_the_image(tmp_path):
    path = make_chain(tmp_path)
    with pyfleece.open(path) as image:
        assert image.pread(65536, 0) == b"base" * 16384
        assert (image.info.backing, image.info.backing_format) == ("base.raw", "raw")


def test_backing_file_is_relative_to_the_image_not_to_us(tmp_path, monkeypatch):
    make_chain(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert opens(Path("../vm.qcow2")).size == 65536
    monkeypatch.chdir(tmp_path)
    assert opens(Path("vm.qcow2")).size == 65536


def test_backing_file_without_a_format_is_not_probed(tmp_path):
    path = make_chain(tmp_path)
    others = [(kind, body) for kind, _, body in extensions(path) if kind != BACKING_FORMAT]
    put_extensions(path, *others)
    refused(path, "names the backing file 'base.raw', but not its format.*qemu-img rebase")


@pytest.mark.parametrize("format", [b"vmdk", b"qcow", b"file", b"host_device", b"", b"RAW", b"raw\nx"])
def test_backing_file_of_another_format(tmp_path, format):
    path = make_chain(tmp_path)
    body = [(kind, format if kind == BACKING_FORMAT else body) for kind, _, body in extensions(path)]
    put_extensions(path, *[(kind, data) for kind, data in body if kind == BACKING_FORMAT])
    refused(path, "raw and qcow2 are supported" if format else "not its format")


PROTOCOLS = [
    b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    b"nbd://localhost/x",
    b"nbd:unix:/s",
    b"http://localhost/x.raw",
    b"https://localhost/x.raw",
    b"ssh://root@localhost/x",
    b"file:base.raw",
    b"file:///etc/passwd",
    b"fat:/etc",
    b"host_device:/dev/sda",
    b"rbd:pool/image",
    b"base.raw:1",
]


@pytest.mark.parametrize("name", PROTOCOLS, ids=bytes.decode)
def test_protocols_are_no_paths(tmp_path, name):
    path = make_chain(tmp_path)
    (tmp_path / name.decode().replace("/", "_")).write_bytes(b"x")
    rename_backing(path, name)
    for root in (None, "/"):
        refused(path, "not a plain path but a protocol or options", backing_root=root)


def test_colon_behind_a_slash_is_part_of_a_name(tmp_path):
    path = make_chain(tmp_path)
    (tmp_path / "base.raw").rename(tmp_path / "a:b")
    rename_backing(path, b"./a:b")
    assert opens(path).backing == "./a:b"


@pytest.mark.parametrize("name", [b"base\n.raw", b"\x1b[31m", b"\x7f"])
def test_control_characters_in_a_name(tmp_path, name):
    path = make_chain(tmp_path)
    rename_backing(path, name)
    refused(path, "control characters in its name")


ELSEWHERE = ["/etc/passwd", "/etc/there-is-no-such-file", "/", "../secret.raw", "../missing.raw", "sub/../../x"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_backing_file_elsewhere(tmp_path, name):
    """Whether it is there or not: the answer must not tell."""
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.raw").write_bytes(b"secret")
    path = make_chain(inside)
    rename_backing(path, name.encode())
    refused(path, "is not below '.*inside', the image's directory; .*backing_root", pyfleece.ImageError)
    with pytest.raises(PermissionError):
        pyfleece.open(path)


def test_symbolic_links_lead_nowhere_else(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.raw").write_bytes(b"secret" * 1024)
    path = make_chain(inside)
    (inside / "base.raw").unlink()
    (inside / "base.raw").symlink_to("../secret.raw")
    refused(path, "'base.raw', which is not below", PermissionError)
    (inside / "base.raw").unlink()
    (inside / "up").symlink_to("..")
    rename_backing(path, b"up/secret.raw")
    refused(path, "'up/secret.raw', which is not below", PermissionError)


def test_directory_whose_name_begins_like_the_allowed_one(tmp_path):
    inside, beside = tmp_path / "images", tmp_path / "images-secret"
    inside.mkdir()
    beside.mkdir()
    (beside / "base.raw").write_bytes(b"secret")
    path = make_chain(inside)
    rename_backing(path, b"../images-secret/base.raw")
    refused(path, "is not below", PermissionError)


def test_backing_root(tmp_path, monkeypatch):
    inside, shared = tmp_path / "vms", tmp_path / "shared"
    inside.mkdir()
    shared.mkdir()
    path = make_chain(inside)
    (inside / "base.raw").rename(shared / "base.raw")
    for name in (b"../shared/base.raw", os.fsencode(shared / "base.raw")):
        rename_backing(path, name)
        refused(path, "backing_root", PermissionError)
        for root in (tmp_path, shared, "/", os.fsencode(tmp_path), str(tmp_path) + "/"):
            assert opens(path, backing_root=root).size == 65536
        refused(path, "is not below", PermissionError, backing_root=inside)
        refused(path, "backing files were not allowed", PermissionError, backing_root=False)
    monkeypatch.chdir(tmp_path)
    assert opens(path, backing_root="shared").size == 65536
    refused(path, "the directory that is allowed", FileNotFoundError, backing_root=tmp_path / "missing")


def test_backing_root_of_what_has_no_backing_file(image):
    for root in (False, "/", "/missing"):
        assert opens(image, backing_root=root).size == MIB
    with pytest.raises(ValueError, match="backing_root"):
        pyfleece.open(image, backing_root=True)


def test_image_behind_a_link_has_its_backing_file_beside_the_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.mkdir()
    path = make_chain(real)
    (link / "vm.qcow2").symlink_to(path)
    refused(link / "vm.qcow2", "the backing file 'base.raw' of image .* cannot be found", FileNotFoundError)
    (real / "base.raw").rename(link / "base.raw")
    assert opens(link / "vm.qcow2").size == 65536


def test_missing_backing_file(tmp_path):
    path = make_chain(tmp_path)
    (tmp_path / "base.raw").unlink()
    refused(path, "the backing file 'base.raw' of image '.*vm.qcow2' cannot be found", FileNotFoundError)


def test_backing_file_that_is_a_directory_or_a_pipe(tmp_path):
    path = make_chain(tmp_path)
    (tmp_path / "base.raw").unlink()
    (tmp_path / "base.raw").mkdir()
    refused(path, "is a directory", IsADirectoryError)
    (tmp_path / "base.raw").rmdir()
    os.mkfifo(tmp_path / "base.raw")
    refused(path, "is a pipe", pyfleece.ImageError)


def test_image_that_is_its_own_backing_file(tmp_path):
    path = make_chain(tmp_path, "vm.qcow2", "qcow2")
    refused(path, "the chain is a loop")
    os.link(path, tmp_path / "other.qcow2")
    rename_backing(path, b"other.qcow2")
    refused(path, "the chain is a loop")
    (tmp_path / "link.qcow2").symlink_to("vm.qcow2")
    rename_backing(path, b"link.qcow2")
    refused(path, "the chain is a loop")


def test_loop_of_three(tmp_path):
    for name, other in (("vm", "b"), ("b", "c"), ("c", "vm")):
        qemu_create(tmp_path / f"{name}.qcow2", "64k", backing=(f"{other}.qcow2", "qcow2"))
    what = "^backing file of image '.*vm.qcow2': image '.*c.qcow2' names the backing file 'vm.qcow2'.*loop"
    refused(tmp_path / "vm.qcow2", what)


def test_chains_have_a_longest(tmp_path):
    qemu_create(tmp_path / "0.qcow2", "64k")
    for number in range(1, 65):
        qemu_create(tmp_path / f"{number}.qcow2", "64k", backing=(f"{number - 1}.qcow2", "qcow2"))
    assert opens(tmp_path / "63.qcow2").size == 65536
    refused(tmp_path / "64.qcow2", "'0.qcow2', which would be image 65 of the chain; 64 are the most")


def test_refusal_further_down_says_whose_backing_file_it_is(tmp_path):
    make_chain(tmp_path)
    put(tmp_path / "vm.qcow2", cluster_bits=30)
    qemu_create(tmp_path / "top.qcow2", "64k", backing=("vm.qcow2", "qcow2"))
    refused(tmp_path / "top.qcow2", "^backing file of image '.*top.qcow2': image '.*vm.qcow2' .*cluster_bits is 30")


def test_each_image_allows_its_own_directory(tmp_path):
    """A backing file in a subdirectory may not lead out of that again, unless the caller says so."""
    sub = tmp_path / "sub"
    sub.mkdir()
    make_chain(sub)
    (sub / "base.raw").rename(tmp_path / "base.raw")
    rename_backing(sub / "vm.qcow2", b"../base.raw")
    top = qemu_create(tmp_path / "top.qcow2", "64k", backing=("sub/vm.qcow2", "qcow2"))
    refused(top, "is not below '.*sub'", PermissionError)
    assert opens(top, backing_root=tmp_path).size == 65536


def test_raw_backing_file_with_a_qcow2_header_is_raw(tmp_path):
    """Its guest may have written that, with the name of a file of ours in it."""
    path = make_chain(tmp_path)
    trap = qemu_create(tmp_path / "trap.qcow2", "64k", backing=("/etc/passwd", "raw"))
    data = trap.read_bytes()
    (tmp_path / "base.raw").write_bytes(data)
    with pyfleece.open(path) as image:
        assert image.pread(65536, 0) == data[:65536]


def test_backing_file_is_locked_for_reading(tmp_path):
    path = make_chain(tmp_path)
    base = tmp_path / "base.raw"
    with pyfleece.open(path, "r+"):
        with pyfleece.open(path.with_name("base.raw")):
            pass
        with pytest.raises(pyfleece.ImageLockedError, match="base.raw"):
            pyfleece.open(base, "r+")
    with pyfleece.open(base, "r+"):
        refused(path, "base.raw' is in use", pyfleece.ImageLockedError)
        assert opens(path, share=True).size == 65536


def test_backing_file_may_be_read_only_for_us(tmp_path):
    path = make_chain(tmp_path)
    (tmp_path / "base.raw").chmod(0o444)
    with pyfleece.open(path, "r+") as image:
        image.pwrite(b"x" * 65536, 0)
    assert (tmp_path / "base.raw").read_bytes() == b"base" * 16384


def test_inspecting_opens_no_backing_file(tmp_path):
    path = make_chain(tmp_path)
    run("qemu-img", "snapshot", "-c", "first", path)
    rename_backing(path, b"/etc/shadow")
    refused(path, "is not below", PermissionError)
    with pyfleece.open(path, inspect=True) as image:
        assert (image.info.backing, image.size) == ("/etc/shadow", 65536)
        assert [snapshot.name for snapshot in image.internal_snapshots()] == ["first"]
        for call in (
            lambda: image.pread(1, 0),
            lambda: list(image.map()),
            lambda: list(image.extents()),
            lambda: pyfleece.Disk(image).pread(1, 0),
        ):
            with pytest.raises(OSError, match="opened to inspect it only"):
                call()
    with pytest.raises(pyfleece.ArgumentError, match="both to inspect it only and for writing"):
        pyfleece.open(path, "r+", inspect=True)


# ---- everything is let go of ----


def test_refusals_leave_nothing_open(tmp_path, no_leaks):
    path = make_chain(tmp_path)
    breaks: list[Callable[[], None]] = [
        lambda: put(path, cluster_bits=63),
        lambda: rename_backing(path, b"missing.raw"),
        lambda: rename_backing(path, b"vm.qcow2"),
    ]
    good = path.read_bytes()
    for change in breaks:
        path.write_bytes(good)
        change()
        with pytest.raises((pyfleece.Error, OSError)):
            pyfleece.open(path, "r+")
    path.write_bytes(good)
    with pyfleece.open(path, "r+"):
        pass


def test_size_of_the_backing_file_is_its_own_affair(tmp_path):
    """Smaller than the overlay: what is beyond its end reads as zeros."""
    path = make_chain(tmp_path)
    os.truncate(tmp_path / "base.raw", 1000)
    with pyfleece.open(path) as image:
        assert image.pread(65536, 0) == (b"base" * 250) + bytes(65536 - 1000)


def test_names_in_messages_are_short(tmp_path):
    path = make_chain(tmp_path)
    rename_backing(path, b"x" * 1000)
    with pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.open(path)
    assert len(str(caught.value)) < 740 and re.search("x{50}", str(caught.value))
    assert get_bytes(path, get(path, "backing_file_offset"), 4) == b"xxxx"

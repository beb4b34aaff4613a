"""The check and its repairs against qemu-img check, in both directions.

Each class of damage: both come to the same verdict; after our repair QEMU finds nothing, and what could be read reads
the same; after QEMU's repair we agree with it. The same for random changes in the tables of all kinds of images:
PYFLEECE_CHECK_MUTATIONS of them (default: 40), from PYFLEECE_CHECK_SEED on.

Where the counts differ on purpose:
- QEMU counts an entry in a table once for each way to the table (snapshots share them), we once.
- Where a refcount block is damaged, QEMU counts it and each cluster that it stood for; we count the block.
- An L2 entry that leads into the active L1 table or the refcount table is a corruption for us even when refcounts say
  that two use the cluster: both are written in place.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import require, run_python
from qcow2_damage import COPIED, KINDS, OFFSET, ZERO, Tables, make, mutate, qemu_check, qemu_read, tool

import pyfleece
from pyfleece import cli

MUTATIONS = int(os.environ.get("PYFLEECE_CHECK_MUTATIONS", "40"))
SEED = int(os.environ.get("PYFLEECE_CHECK_SEED", "1"))
COUNTS = (
    "corruptions",
    "leaks",
    "check_errors",
    "image_end_offset",
    "total_clusters",
    "allocated_clusters",
    "compressed_clusters",
    "fragmented_clusters",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """images(kind): the bytes of an image of that kind, made once."""
    require("qemu-img", "qemu-io")
    directory = tmp_path_factory.mktemp("kinds")

    def get(kind: str) -> bytes:
        path = directory / f"{kind}.qcow2"
        return (path if path.exists() else make(path, kind)).read_bytes()

    return get


def qemu_counts(found: dict[str, int]) -> dict[str, int]:
    return {name: found.get(name.replace("_", "-"), 0) for name in COUNTS}


# ---- images without damage ----


@pytest.mark.parametrize("kind", KINDS)
def test_sound_images(kind, images, tmp_path):
    path = tmp_path / "vm.qcow2"
    path.write_bytes(images(kind))
    result = pyfleece.check(path)
    status, found = qemu_check(path)
    assert (result.status, result.findings) == (status, ()) == (0, ())
    assert {name: getattr(result, name) for name in COUNTS} == qemu_counts(found)
    assert path.read_bytes() == images(kind)  # it only looked
    assert pyfleece.check(path, "all") == result
    assert path.read_bytes() == images(kind)  # and there was nothing to repair


# ---- each class of damage ----


@dataclass(frozen=True)
class Damage:
    kind: str
    do: Callable[[Tables], None]
    status: int  # what we say of it
    repaired: int = 0  # what is left after repair="all"
    counts: bool = True  # the counts are the same as QEMU's
    text: str = ""  # of one of the findings
    by_qemu: int = 0  # what QEMU's own repair leaves
    gives_up: bool = False  # QEMU does not open it, so that it neither checks nor repairs it


def set_entry(guest: int, change: Callable[[Tables, int], int]) -> Callable[[Tables], None]:
    def do(image: Tables) -> None:
        at = image.entry(guest)
        image[at] = change(image, image[at])

    return do


def set_l1(change: Callable[[Tables, int], int]) -> Callable[[Tables], None]:
    def do(image: Tables) -> None:
        image[image.l1] = change(image, image[image.l1])

    return do


def set_block(change: Callable[[Tables, int], int]) -> Callable[[Tables], None]:
    def do(image: Tables) -> None:
        image[image.reftable] = change(image, image[image.reftable])

    return do


def leak(image: Tables) -> None:
    image.set_refcount(image.grow(1), 1)


def leak_in_use(image: Tables) -> None:
    image.set_refcount(image[image.entry(1 << 20)] & OFFSET, 2)


def too_low(image: Tables) -> None:
    image.set_refcount(image[image.entry(1 << 20)] & OFFSET, 0)


def zero_allocated(offset: Callable[[Tables], int]) -> Callable[[Tables], None]:
    return set_entry(512 << 10, lambda image, entry: offset(image) | ZERO)


def share_data(image: Tables) -> None:
    image[image.entry(3 << 20)] = image[image.entry(1 << 20)]


def two_blocks_in_one_place(image: Tables) -> None:
    image[image.reftable + 8] = image.block


def no_block(image: Tables) -> None:
    image[image.reftable] = 0


def set_bit(bit: int) -> Callable[[Tables], None]:
    def do(image: Tables) -> None:
        image[72] |= bit

    return do


def snapshot_field(offset: int, width: int, value: int) -> Callable[[Tables], None]:
    return lambda image: image.put(image.snapshot_table + offset, width, value)


def bitmap_field(offset: int, width: int, value: int) -> Callable[[Tables], None]:
    return lambda image: image.put(image.bitmap_directory() + offset, width, value)


def bitmap_entry(image: Tables) -> None:
    image[image[image.bitmap_directory()]] |= 1 << 3


def far(image: Tables, entry: int = 0) -> int:
    return (1 << 40) | COPIED


def clear_copied_of_shared(image: Tables) -> None:
    at = image.entry(1 << 20)
    image[at] |= COPIED


DAMAGE = {
    "leak": Damage("plain", leak, 3, text="leaked: its refcount is 1, with 0 references"),
    "refcount too high": Damage("plain", leak_in_use, 2, text="its COPIED bit is set, and its refcount is not 1"),
    "refcount too low": Damage("plain", too_low, 2, text="its refcount is 0, with 1 references"),
    "data cluster without COPIED": Damage("plain", set_entry(1 << 20, lambda _, entry: entry & ~COPIED), 2),
    "L2 table without COPIED": Damage("plain", set_l1(lambda _, entry: entry & ~COPIED), 2),
    "COPIED on a shared cluster": Damage("snapshots", clear_copied_of_shared, 2, text="its COPIED bit is set"),
    "two entries, one cluster": Damage("plain", share_data, 2, text="its refcount is 1, with 2 references"),
    "data in its own L2 table": Damage("plain", set_entry(1 << 20, lambda image, _: image.l2() | COPIED), 2),
    "data in the L1 table": Damage("plain", set_entry(1 << 20, lambda image, _: image.l1 | COPIED), 2),
    "data in the refcount table": Damage("plain", set_entry(1 << 20, lambda image, _: image.reftable | COPIED), 2),
    "data in a refcount block": Damage(
        "plain",
        set_entry(1 << 20, lambda image, _: image.block | COPIED),
        2,
        counts=False,
        text="something else is there too",
    ),
    "data not at a cluster's start": Damage(
        "plain", set_entry(1 << 20, lambda _, entry: entry + 512), 2, 2, text="not the start of a cluster", by_qemu=2
    ),
    "data behind the end": Damage("plain", set_entry(1 << 20, far), 2, 2, text="beyond the end of the file", by_qemu=2),
    "zeros not at a cluster's start": Damage("plain", zero_allocated(lambda image: image.block + 512), 2, counts=False),
    "zeros behind the end": Damage("plain", zero_allocated(far), 2, by_qemu=2),
    "reserved bits in an L2 entry": Damage(
        "plain", set_entry(1 << 20, lambda _, entry: entry | 1 << 58), 2, text="reserved bits are set", by_qemu=2
    ),
    "reserved bits in an L1 entry": Damage("plain", set_l1(lambda _, entry: entry | 1 << 58), 2, by_qemu=2),
    "reserved bits of the refcount table": Damage(
        "plain", set_block(lambda _, entry: entry | 2), 2, counts=False, text="reserved bits are set", by_qemu=2
    ),
    "L2 table not at a cluster's start": Damage(
        "plain", set_l1(lambda _, entry: entry + 512), 2, 2, counts=False, by_qemu=2
    ),
    "L2 table behind the end": Damage("plain", set_l1(far), 2, 2, by_qemu=2),
    "L2 table in the L1 table": Damage("plain", set_l1(lambda image, _: image.l1 | COPIED), 2, counts=False, by_qemu=2),
    "no refcount block": Damage("plain", no_block, 2, text="it has no refcount block"),
    "no refcount block, snapshots": Damage("snapshots", no_block, 2),
    "refcount block behind the end": Damage("plain", set_block(lambda *_: 1 << 40), 2, counts=False),
    "two refcount blocks in one place": Damage("plain", two_blocks_in_one_place, 2, counts=False),
    "two references, refcounts of one bit": Damage(
        "1bit", share_data, 2, 2, text="2 references are more than a refcount of 1 bits holds", by_qemu=2
    ),
    "compressed with COPIED": Damage("zlib", set_entry(0, lambda _, entry: entry | COPIED), 2, by_qemu=2),
    "compressed behind the end": Damage(
        "zlib", set_entry(0, lambda _, entry: entry | 1 << 45), 2, 2, text="beyond the end of the file", by_qemu=2
    ),
    "L1 table of a snapshot not at a cluster's start": Damage(
        "snapshots", snapshot_field(0, 8, 0x3200), 2, 2, by_qemu=2
    ),
    "L1 table of a snapshot far away": Damage(
        "snapshots", snapshot_field(0, 8, (1 << 63) + (1 << 16)), 2, 2, False, gives_up=True
    ),
    "table of a bitmap behind the end": Damage("bitmaps", bitmap_field(0, 8, 1 << 40), 2, counts=False),
    "reserved bits in a table of a bitmap": Damage("bitmaps", bitmap_entry, 2, counts=False, gives_up=True),
    "dirty": Damage("plain", set_bit(1), 0),
    "corrupt": Damage("plain", set_bit(2), 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name, images, tmp_path):
    damage = DAMAGE[name]
    image = Tables(images(damage.kind))
    damage.do(image)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for path in (ours, theirs):
        path.write_bytes(image.data)

    status, found = qemu_check(ours)
    result = pyfleece.check(ours)
    assert (result.status, status) == (damage.status, 1 if damage.gives_up else damage.status), result.findings
    if damage.counts:
        assert {name: getattr(result, name) for name in COUNTS} == qemu_counts(found)
    assert any(damage.text in finding.text for finding in result.findings) or not damage.text
    assert ours.read_bytes() == image.data

    before = qemu_read(ours)
    repaired = pyfleece.check(ours, "all")
    assert repaired.status == damage.repaired, repaired.findings
    assert qemu_check(ours)[0] == (1 if damage.gives_up and damage.repaired else damage.repaired)
    if before is not None:
        assert qemu_read(ours) == before
    if damage.status and not damage.repaired:
        assert repaired.corruptions_fixed == result.corruptions
        assert repaired.leaks_fixed == result.leaks
        assert all(finding.repaired for finding in repaired.findings)
        assert Tables(ours.read_bytes())[72] & 3 == 0 or image.version == 2
        assert pyfleece.check(ours).findings == ()

    if damage.gives_up:
        return
    tool("qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", theirs, expect=(0, 1, 2, 3))
    left = pyfleece.check(theirs)
    assert qemu_check(theirs)[0] == damage.by_qemu
    assert left.status == damage.by_qemu or is_stricter(left), left.findings


def is_stricter(result: pyfleece.CheckResult) -> bool:
    """QEMU is content when the refcount of a cluster of the L1 or refcount table says 2."""
    return any("something else is there too" in finding.text for finding in result.findings)


def test_bits_are_cleared_when_all_is_well(images, tmp_path):
    path = tmp_path / "vm.qcow2"
    for bit in (1, 2):
        image = Tables(images("plain"))
        image[72] |= bit
        path.write_bytes(image.data)
        assert pyfleece.check(path).status == 0
        assert Tables(path.read_bytes())[72] == bit
        assert pyfleece.check(path, "leaks").status == 0
        assert Tables(path.read_bytes())[72] == 0


def test_a_lazy_image_that_was_not_closed(tmp_path):
    require("qemu-img", "qemu-io")
    path = tmp_path / "vm.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 128k", "-c", "flush", "-c", "abort", path, expect=(-6, 134))
    before = qemu_read(path)
    assert pyfleece.check(path).status == qemu_check(path)[0] == 2
    assert Tables(path.read_bytes())[72] == 1
    assert pyfleece.check(path, "all").status == qemu_check(path)[0] == 0
    assert Tables(path.read_bytes())[72] == 0
    assert qemu_read(path) == before


def test_leaks_only(images, tmp_path):
    """repair="leaks" leaves everything else alone; and while entries can't be followed it frees nothing."""
    path = tmp_path / "vm.qcow2"
    image = Tables(images("plain"))
    leak(image)
    too_low(image)
    path.write_bytes(image.data)
    result = pyfleece.check(path, "leaks")
    assert (result.leaks, result.leaks_fixed, result.corruptions) == (0, 1, 2)
    expected = Tables(image.data)
    expected.set_refcount(len(image.data) - image.cluster, 0)
    assert path.read_bytes() == expected.data

    image[image.l1] += 512
    path.write_bytes(image.data)
    result = pyfleece.check(path, "leaks")
    assert result.leaks > 1
    assert result.findings[-1].kind == "note" and "can't be followed" in result.findings[-1].text
    assert path.read_bytes() == image.data


def test_leaked_snapshot_gives_copied_back(images, tmp_path):
    """A snapshot that is gone without its references: what was shared is the active disk's alone."""
    path = tmp_path / "vm.qcow2"
    image = Tables(images("snapshots"))
    image.put(60, 4, 0)
    path.write_bytes(image.data)
    before = qemu_read(path)
    assert pyfleece.check(path).status == qemu_check(path)[0] == 3
    result = pyfleece.check(path, "leaks")
    assert (result.status, result.corruptions, qemu_check(path)[0]) == (0, 0, 0)
    assert qemu_read(path) == before


def test_bitmaps_that_are_given_up(images, tmp_path):
    path = tmp_path / "vm.qcow2"
    image = Tables(images("bitmaps"))
    image.put(image.bitmap_directory() + 17, 1, 60)
    path.write_bytes(image.data)
    assert pyfleece.check(path).status == 2
    assert pyfleece.check(path, "all").status == qemu_check(path)[0] == 0
    assert Tables(path.read_bytes())[88] & 1 == 0


# ---- random damage ----


@pytest.mark.timeout(60 + 3 * MUTATIONS)
def test_random_damage(images, tmp_path):
    for seed in range(SEED, SEED + MUTATIONS):
        rng = random.Random(seed)
        kind = rng.choice(sorted(KINDS))
        image = Tables(images(kind))
        done = "; ".join(mutate(image, rng) for _ in range(rng.choice((1, 1, 1, 2, 4))))
        compare_verdicts(image, f"seed {seed}, {kind}: {done}", tmp_path)


def compare_verdicts(image: Tables, about: str, directory: Path) -> None:
    ours, theirs = directory / "ours.qcow2", directory / "theirs.qcow2"
    for path in (ours, theirs):
        path.write_bytes(image.data)
    status, _ = qemu_check(ours)
    try:
        result = pyfleece.check(ours)
    except pyfleece.FormatError as error:
        assert "overlap" in str(error) or status == 1, f"{about}: {error}"
        return
    if status != 1 and not is_stricter(result):  # 1: it gave up, where we say what is wrong
        assert result.status == status, f"{about}: {result}"
    if status == 1:
        assert result.status in (1, 2), f"{about}: {result}"

    before = qemu_read(ours)
    snapshots = {f"{number}": qemu_read(ours, f"snapshot.id={number}") for number in range(1, image.snapshots + 1)}
    repaired = pyfleece.check(ours, "all")
    after, _ = qemu_check(ours)
    assert repaired.status == after or (after == 1 and repaired.status == 2), (
        f"{about}: QEMU says {after} of {repaired}"
    )
    assert pyfleece.check(ours).status == repaired.status, about
    for number, content in [(None, before), *snapshots.items()]:
        if content is not None:
            which = f"snapshot.id={number}" if number else None
            assert qemu_read(ours, which) == content, f"{about}: snapshot {number} reads differently"

    tool("qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", theirs, expect=(0, 1, 2, 3))
    left, _ = qemu_check(theirs)
    ours_of_theirs = pyfleece.check(theirs)
    if left != 1 and not is_stricter(ours_of_theirs):
        assert ours_of_theirs.status == left, f"{about}: after QEMU's repair: {ours_of_theirs}"


# ---- bounds ----

BOUNDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
import pyfleece
result = pyfleece.check(sys.argv[1])
print(result.status, result.check_errors)
for finding in result.findings:
    print(finding)
"""


def test_a_file_that_claims_exabytes(images, tmp_path):
    path = tmp_path / "vm.qcow2"
    path.write_bytes(images("plain"))
    with path.open("r+b") as file:
        try:
            file.truncate(1 << 42)
        except OSError:
            pytest.skip("the file system has no files of 4 TiB")
    assert run_python(BOUNDED, path).split() == ["0", "0"]


def test_snapshots_that_share_one_table(tmp_path):
    """65000 snapshots with one L1 table of 1 MiB: it is refused to read it that often."""
    require("qemu-img")
    path = tmp_path / "vm.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    image = Tables(path.read_bytes())
    table, count = image.grow(0), 65000
    entry = (0).to_bytes(8, "big") + (131072).to_bytes(4, "big") + bytes(24) + (16).to_bytes(4, "big") + bytes(16)
    image.data += entry * count
    l1 = image.grow(16)
    for i in range(131072):
        image[l1 + 8 * i] = 1 << 9
    for i in range(count):
        image[table + 56 * i] = l1
    image[64] = table
    image.put(60, 4, count)
    path.write_bytes(image.data)
    assert "overlap so much" in run_python(BOUNDED, path)


def test_references_that_are_scattered(tmp_path):
    """An L2 table costs its own size in memory, and not that of what it leads to."""
    require("qemu-img")
    path = tmp_path / "vm.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "512G")
    image = Tables(path.read_bytes())
    for i in range(8):
        l2 = image.grow(1)
        image[image.l1 + 8 * i] = l2 | COPIED
        for j in range(262144):
            image[l2 + 8 * j] = (j << 29 | i << 26) + (1 << 30)
    path.write_bytes(image.data)
    with path.open("r+b") as file:
        try:
            file.truncate(1 << 43)
        except OSError:
            pytest.skip("the file system has no files of 8 TiB")
    status, errors = map(int, run_python(BOUNDED, path).split()[:2])
    assert (status, errors) in ((1, 1), (2, 0))


# ---- the call and the command ----


def test_arguments(images, tmp_path):
    path, raw, other = tmp_path / "vm.qcow2", tmp_path / "vm.raw", tmp_path / "vm.other"
    path.write_bytes(images("empty"))
    other.write_bytes(images("empty"))
    raw.write_bytes(bytes(512))
    with pytest.raises(pyfleece.ArgumentError, match="repair is 'everything'"):
        pyfleece.check(path, "everything")
    with pytest.raises(pyfleece.ArgumentError, match="in use"):
        pyfleece.check(path, "all", share=True)
    with pytest.raises(pyfleece.ImageError, match="can't be checked"):
        pyfleece.check(raw)
    with pytest.raises(pyfleece.FormatError, match="is not a qcow2 image"):
        pyfleece.check(raw, format="qcow2")
    with pytest.raises(pyfleece.FormatError, match="format="):
        pyfleece.check(other)
    assert pyfleece.check(other, format="qcow2").status == 0
    with pytest.raises(FileNotFoundError):
        pyfleece.check(tmp_path / "none.qcow2")


def test_an_image_in_use_is_refused(images, tmp_path):
    path = tmp_path / "vm.qcow2"
    path.write_bytes(images("empty"))
    with pyfleece.open(path, "r+"):
        with pytest.raises(pyfleece.ImageLockedError):
            pyfleece.check(path)
        assert pyfleece.check(path, share=True).status == 0


def test_command(images, tmp_path, capsys):
    path, raw = tmp_path / "vm.qcow2", tmp_path / "vm.raw"
    raw.write_bytes(bytes(512))
    image = Tables(images("plain"))
    path.write_bytes(image.data)
    assert cli.main(["check", str(path)]) == 0
    assert capsys.readouterr().out.startswith("no errors\n")

    leak(image)
    path.write_bytes(image.data)
    assert cli.main(["check", str(path)]) == 3
    out = capsys.readouterr().out
    assert f"leak: leaked: its refcount is 1, with 0 references (host offset {len(image.data) - 65536:#x}" in out
    assert "1 leaked clusters\n" in out
    assert cli.main(["check", str(path), "--json", "--repair", "leaks"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["leaks"], report["leaks-fixed"], report["findings"][0]["repaired"]) == (0, 1, True)

    image[image.entry(1 << 20)] += 512
    path.write_bytes(image.data)
    assert cli.main(["check", str(path), "--repair", "all"]) == 2
    assert "data cluster: not the start of a cluster (guest offset 0x100000; host offset" in capsys.readouterr().out
    assert cli.main(["check", str(raw)]) == 63
    assert "can't be checked" in capsys.readouterr().err
    assert cli.main(["check", str(raw), "--format", "qcow2"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["check", str(path), "--repair", "some"])


def test_findings_are_bounded(images, tmp_path):
    """Rows of clusters are one finding; and of too many findings only the number is kept."""
    path = tmp_path / "vm.qcow2"
    image = Tables(images("512"))
    for l2 in range(5, 10):
        for at in range(image.l2(l2), image.l2(l2) + 512, 8):
            image[at] |= (at % 16 + 2) << 56
    path.write_bytes(image.data)
    result = pyfleece.check(path)
    assert len(result.findings) == 256
    assert result.findings_dropped > 0

    image = Tables(images("plain"))
    first = image.grow(9)
    for host in range(first, len(image.data), image.cluster):
        image.set_refcount(host, 1)
    path.write_bytes(image.data)
    (finding,) = pyfleece.check(path).findings
    assert (finding.kind, finding.length) == ("leak", 9 * image.cluster)

"""`pyfleece bench` and the guest that it measures with: what is done, and that nothing else is touched. No speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import MIB

import pyfleece
from pyfleece import bench
from pyfleece.commands import kit
from pyfleece.load import Load
from pyfleece.testing import FaultyImage

COMMAND = [sys.executable, "-m", "pyfleece", "bench"]
QUICK = ["--size", "8M", "--seconds", "0.1", "--cluster-size", "4K", "--cluster-size", "64K"]


def run_bench(*arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def disk(tmp_path):
    with pyfleece.create(tmp_path / "vm.raw", 4 * MIB + 513) as image, pyfleece.Disk(image) as disk:
        yield disk


# ---- the guest ----


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [4096, 5000, MIB])
def test_once_touches_each_block_once(disk, block, threads):
    disk.bitmaps.add("all", 4096)
    with Load(disk, block=block, order="once", threads=threads) as load:
        assert load.wait(60)
        stats = load.stats
    blocks = disk.size // block
    assert (stats.operations, stats.bytes_written, stats.bytes_read) == (blocks, blocks * block, 0)
    assert stats.finished and stats.latency.count == blocks
    assert all(extent.kind == "dirty" or extent.offset >= blocks * block for extent in disk.bitmaps["all"].extents())


def test_same_seed_same_blocks(disk):
    """The first operations of a load touch the same blocks when it is repeated: none is a first touch again."""
    with disk.snapshot("memory", cluster_size=4096) as snapshot:
        for _ in range(2):
            with Load(disk, order="once", operations=100, seed=7) as load:
                assert load.wait(60)
            assert snapshot.stats.clusters_saved + snapshot.stats.zero_clusters == 100


def test_stride_leaves_the_rest_alone(disk):
    with Load(disk, block=512, stride=MIB, order="sequential", operations=10) as load:
        assert load.wait(60)
    data = disk.pread(disk.size, 0)
    for offset in range(0, disk.size, 512):
        touched = offset % MIB == 0
        assert any(data[offset : offset + 512]) == touched, offset


def test_hot_blocks_and_reads(disk):
    disk.bitmaps.add("hot", 4096)
    with Load(disk, read_percent=50, hot=(100, 10), operations=4000, threads=4) as load:
        assert load.wait(60)
        stats = load.stats
    assert stats.bytes_read + stats.bytes_written == 4000 * 4096
    assert 0.4 < stats.bytes_read / (4000 * 4096) < 0.6
    assert 0 < disk.bitmaps["hot"].count <= disk.size // 10


def test_rate_is_kept(disk):
    with Load(disk, rate=200) as load:
        assert not load.wait(1.0)
        assert load.stop().operations <= 200 * (load.stats.elapsed + 0.1) + 1


def test_failure_ends_it(tmp_path):
    with pyfleece.create(tmp_path / "vm.raw", MIB) as image:
        faulty = FaultyImage(image)
        faulty.fail("write", nth=5)
        with faulty, pyfleece.Disk(faulty) as disk, Load(disk, threads=4) as load:
            with pytest.raises(pyfleece.ImageError, match="injected"):
                load.wait(60)
            assert load.stats.finished


def test_closing_the_disk_ends_it(disk):
    load = Load(disk)
    disk.close()
    assert load.closed


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"block": 1 << 25}, {"threads": 0}, {"threads": 1000}, {"order": "odd"}, {"read_percent": 101}],
)
def test_bad_options(disk, options):
    with pytest.raises(pyfleece.ArgumentError):
        Load(disk, **options)


# ---- the command ----


def test_measures_and_cleans_up(tmp_path):
    done = run_bench("--source", tmp_path, *QUICK, "--json", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [case["cluster_size"] for case in told["cases"]] == [4096, 65536]
    assert told["recommended_cluster_size"] in (4096, 65536)
    for case in told["cases"]:
        assert len(case["rounds"]) == 2
        for one in case["rounds"]:
            for phase in ("plain", "first", "again", "backup"):
                assert one[phase]["rate"] > 0
                assert one[phase]["p50"] <= one[phase]["p99"] <= one[phase]["p999"] <= one[phase]["max"]
            assert one["amplification"] == pytest.approx(case["cluster_size"] / 4096)
            assert one["backup_rate"] > 0 and one["fleecing"][-1][1] == 0
    assert os.listdir(tmp_path) == []


def test_table_for_people(tmp_path):
    done = run_bench("--source", tmp_path, *QUICK, "--pattern", "database")
    assert done.returncode == 0, done.stderr
    for word in ("first touch", "with backup", "cluster 64.0 KiB", "recommended cluster size"):
        assert word in done.stdout


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    done = run_bench("--source", tmp_path, *QUICK, "--plot", tmp_path / "out.svg")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["out.svg"]
    picture = (tmp_path / "out.svg").read_text()
    assert "<svg" in picture and picture.rstrip().endswith("</svg>")


@pytest.mark.parametrize("option", ["--source", "--target"])
def test_nothing_is_destroyed_unless_told(tmp_path, option):
    precious = tmp_path / "precious.raw"
    precious.write_bytes(b"precious" * (MIB * 8 // 8))
    places = {"--source": tmp_path, "--target": tmp_path, option: precious}
    arguments = [part for name, place in places.items() for part in (name, place)]
    done = run_bench(*arguments, *QUICK)
    assert done.returncode == 1 and "--destroy-contents" in done.stderr and str(precious) in done.stderr
    assert precious.read_bytes() == b"precious" * (MIB * 8 // 8)
    done = run_bench(*arguments, *QUICK, "--fleecing", tmp_path, "--destroy-contents")
    assert done.returncode == 0, done.stderr
    assert precious.read_bytes() != b"precious" * (MIB * 8 // 8)
    assert os.listdir(tmp_path) == ["precious.raw"]


def test_too_little_space(tmp_path):
    done = run_bench("--source", tmp_path, "--size", "4096T")
    assert done.returncode == 1 and "smaller --size" in done.stderr
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path):
    process = subprocess.Popen([*COMMAND, "--source", tmp_path, "--size", "64M", "--seconds", "60"], text=True)
    end = time.monotonic() + 60
    while not os.listdir(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert os.listdir(tmp_path) == []


# ---- profiles and advice ----


def test_profile(tmp_path):
    path = tmp_path / "job.fio"
    path.write_text(
        "[global]\nioengine=libaio\ndirect=1\nbs=8k\n\n[oltp]\nrw=randrw\nrwmixread=70\niodepth=8\nnumjobs=2\n"
        "rate_iops=500\nrandom_distribution=zoned:90/5:10/95\ntime_based\n"
    )
    assert bench.read_profile(os.fspath(path)) == bench.Pattern(
        "oltp", block=8192, threads=16, read_percent=70, hot=(90, 5), rate=500, direct=True
    )


@pytest.mark.parametrize("existing", [False, True], ids=["made", "existing"])
@pytest.mark.parametrize(("option", "job"), [(False, False), (True, False), (False, True)])
def test_direct_by_option_or_profile(tmp_path, monkeypatch, existing, option, job):
    seen = []

    def watch(function):
        def opened(*arguments, **options):
            seen.append(options["direct"])
            return function(*arguments, **{**options, "direct": False})

        return opened

    monkeypatch.setattr(pyfleece, "open", watch(pyfleece.open))
    monkeypatch.setattr(pyfleece, "create", watch(pyfleece.create))
    place = tmp_path / "vm.raw" if existing else tmp_path
    if existing:
        place.write_bytes(bytes(MIB))
    options = bench.Options(
        source=os.fspath(place), fleecing=os.fspath(tmp_path), target=os.fspath(tmp_path), size=MIB,
        pattern=bench.Pattern("one", direct=job), clusters=(4096,), seconds=0.05, direct=option, destroy=existing,
    )  # fmt: skip
    assert len(bench.run(options, lambda line: None)) == 1
    assert seen[0] is (option or job)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no job"),
        ("[a]\nrw=sideways\n", "sideways"),
        ("[a]\nbs=many\n", "many"),
        ("[a]\ndirect=2\n", "2"),
        ("[a]\nverify=crc32c\n", "verify: not known"),
        ("[a]\nrandom_distribution=zipf:1.1\n", "zipf"),
        ("rw=write\n", "no section"),
        ("\x00\xff", "job.fio"),
    ],
)
def test_bad_profiles(tmp_path, text, message):
    path = tmp_path / "job.fio"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(bench.BenchError, match=message):
        bench.read_profile(os.fspath(path))


def case(cluster: int, first: float, backup_rate: float) -> bench.Case:
    def phase(rate: float) -> bench.Phase:
        return bench.Phase(rate, 1.0, 1.0, 1.0, 1.0, 1.0)

    one = bench.Round(phase(100), phase(first), phase(100), phase(50), backup_rate, 1.0, 1.0, 1.0, 0, 0, ((0.0, 0),))
    return bench.Case(cluster, [one])


def test_recommendation():
    """The guest first; among equals, the faster backup."""
    assert bench.recommend([case(4096, 80, 100), case(65536, 40, 500)])[0] == 4096
    assert bench.recommend([case(4096, 80, 100), case(65536, 79, 150)])[0] == 65536
    assert bench.recommend([case(4096, 80, 100), case(65536, 79, 105)])[0] == 4096


def test_command_line_knows_all_patterns():
    assert kit.size("1G") == 1 << 30
    for name in bench.PATTERNS:
        assert bench.PATTERNS[name].name == name

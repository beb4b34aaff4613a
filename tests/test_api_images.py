"""Images as Python sees them: opening, formats, buffers, errors. What drivers do with storage is tested in C."""

from __future__ import annotations

import array
import errno
import mmap
import os
import pickle
import random
import threading
from pathlib import Path

import pytest
from conftest import MIB, content, require, run, run_python

import pyfleece
from pyfleece._binding import PIECE, Resource
from pyfleece.testing import FaultyImage

pytestmark = pytest.mark.usefixtures("no_leaks")


# ---- opening ----


def test_create_then_open_round_trip(tmp_path):
    path = tmp_path / "vm.raw"
    with pyfleece.create(path, MIB + 513) as image:
        assert image.size == MIB + 513
        assert image.pwrite(b"tail", MIB + 509) == 4
        image.flush()
    with pyfleece.open(path) as image:
        assert image.pread(4, MIB + 509) == b"tail"
        assert image.pread(10, 0) == bytes(10)
        assert (image.path, image.name) == (path, str(path))
    assert path.stat().st_size == MIB + 513


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_any_kind_of_path(make_image, kind):
    path, data = make_image()
    with pyfleece.open(kind(path)) as image:
        assert image.pread(100, 0) == data[:100]


def test_null_character_in_path():
    with pytest.raises(ValueError, match="null character"):
        pyfleece.open("a\0b.raw")


@pytest.mark.parametrize("suffix", [".raw", ".img", ".iso", ".RAW"])
def test_suffix_tells_the_format(tmp_path, suffix):
    with pyfleece.create(tmp_path / f"vm{suffix}", 4096) as image:
        assert image.info.format == "raw"


@pytest.mark.parametrize("name", ["vm", "vm.bin", "vm.backup"])
def test_unknown_suffix_needs_format(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(pyfleece.FormatError, match="format="):
        pyfleece.create(path, 4096)
    with pyfleece.create(path, 4096, format="raw"):
        pass
    with pytest.raises(pyfleece.FormatError, match="format="):
        pyfleece.open(path)
    with pyfleece.open(path, format="raw") as image:
        assert image.size == 4096


def test_format_without_a_driver(tmp_path):
    for call in (
        lambda: pyfleece.create(tmp_path / "vm.vmdk2", 4096, format="vmdk2"),
        lambda: pyfleece.open(tmp_path / "vm.raw", format="vmdk2"),
    ):
        with pytest.raises(pyfleece.FormatError, match="vmdk2"):
            call()


def test_qcow2_header_in_a_raw_image_must_be_said_out_loud(tmp_path):
    """A guest can write any header into its disk."""
    path = tmp_path / "vm.raw"
    path.write_bytes(b"QFI\xfb" + bytes(4092))
    with pytest.raises(pyfleece.FormatError, match="qcow2 header"):
        pyfleece.open(path)
    with pyfleece.open(path, "r+", format="raw") as image:
        assert image.pread(4, 0) == b"QFI\xfb"


def test_missing_file_is_a_file_not_found_error(tmp_path):
    path = tmp_path / "missing.raw"
    with pytest.raises(FileNotFoundError) as caught:
        pyfleece.open(path)
    assert isinstance(caught.value, pyfleece.Error)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        pyfleece.open(tmp_path / "missing")


def test_create_refuses_an_existing_file(make_image):
    path, data = make_image()
    with pytest.raises(FileExistsError):
        pyfleece.create(path, 4096)
    assert path.read_bytes() == data


def test_other_mistakes_in_arguments(make_image, tmp_path):
    path, _ = make_image()
    with pytest.raises(ValueError, match="mode"):
        pyfleece.open(path, "w")
    with pytest.raises(ValueError, match="negative"):
        pyfleece.create(tmp_path / "new.raw", -1)
    with pytest.raises(TypeError):
        pyfleece.create(tmp_path / "new.raw", 1.5)
    assert not (tmp_path / "new.raw").exists()


def test_second_writer_is_refused_and_named(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+"):
        with pytest.raises(pyfleece.ImageLockedError, match="vm.raw") as caught:
            pyfleece.open(path, "r+")
        assert caught.value.errno == errno.EBUSY
        with pyfleece.open(path, "r+", share=True) as image:
            image.pwrite(b"x", 0)
    pyfleece.open(path, "r+").close()


def test_qemu_and_we_keep_each_other_out(make_image):
    require("qemu-io")
    path, data = make_image(MIB)
    with pyfleece.open(path, "r+"):
        assert "lock" in run("qemu-io", "-f", "raw", "-c", "write 0 512", path, check=False)
    assert path.read_bytes() == data


def test_info(make_image):
    path, _ = make_image()
    with pyfleece.open(path) as image:
        info = image.info
    assert (info.format, info.size, info.block_device, info.writable, info.direct) == (
        "raw",
        MIB + 513,
        False,
        False,
        False,
    )
    assert 0 < info.allocated <= MIB + 4096
    assert info.cluster_size >= 512


# ---- reading and writing ----


def test_write_to_a_read_only_image(make_image):
    path, data = make_image()
    with pyfleece.open(path) as image:
        for call in (lambda: image.pwrite(b"x", 0), lambda: image.zero(1, 0), lambda: image.discard(1, 0)):
            with pytest.raises(OSError, match="vm.raw") as caught:
                call()
            assert isinstance(caught.value, pyfleece.Error)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "count, offset", [(1, MIB + 513), (2, MIB + 512), (MIB, MIB), (9 * MIB, 0), (0, MIB + 514), (1 << 62, 1 << 62)]
)
def test_beyond_the_end(make_image, count, offset):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as image:
        calls = [
            lambda: image.pread(count, offset),
            lambda: image.zero(count, offset),
            lambda: image.discard(count, offset),
        ]
        if count < 1 << 30:
            calls += [lambda: image.pwrite(bytes(count), offset), lambda: image.readinto(bytearray(count), offset)]
        for call in calls:
            with pytest.raises(pyfleece.OutOfRangeError) as caught:
                call()
            assert isinstance(caught.value, ValueError)


def test_negative_numbers(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as image:
        for call in (
            lambda: image.pread(-1, 0),
            lambda: image.pread(1, -1),
            lambda: image.pwrite(b"x", -1),
            lambda: image.zero(-1, 0),
            lambda: image.extents(-1),
            lambda: image.extents(0, -1),
        ):
            with pytest.raises(ValueError, match="negative"):
                call()


def test_nothing_at_the_end_is_fine(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as image:
        assert image.pread(0, image.size) == b""
        assert image.pwrite(b"", image.size) == 0
        assert list(image.extents(image.size)) == []


def test_readinto_takes_any_writable_buffer(make_image):
    path, data = make_image()
    with pyfleece.open(path) as image:
        into_bytearray = bytearray(1000)
        assert image.readinto(into_bytearray, 7) == 1000
        assert into_bytearray == data[7:1007]
        numbers = array.array("I", bytes(400))
        assert image.readinto(numbers, 8) == 400
        assert numbers.tobytes() == data[8:408]
        with mmap.mmap(-1, 4096) as memory:
            image.readinto(memory, 0)
            assert memory[:] == data[:4096]
        middle = bytearray(30)
        image.readinto(memoryview(middle)[10:20], 0)
        assert middle == bytes(10) + data[:10] + bytes(10)


def test_buffers_that_cannot_be_used(make_image):
    path, data = make_image()
    with pyfleece.open(path, "r+") as image:
        constant = b"constant"
        with pytest.raises((BufferError, ValueError)):
            image.readinto(constant, 0)
        assert constant == b"constant"
        with pytest.raises((BufferError, ValueError)):
            image.readinto(memoryview(bytearray(20))[::2], 0)
        with pytest.raises((BufferError, ValueError)):
            image.pwrite(memoryview(bytes(20))[::2], 0)
        with pytest.raises(TypeError):
            image.pwrite("text", 0)
    assert path.read_bytes() == data


def test_transfers_longer_than_a_piece(tmp_path):
    size = 2 * PIECE + 12345
    data = random.Random(3).randbytes(size)
    with pyfleece.create(tmp_path / "vm.raw", size) as image:
        assert image.pwrite(data, 0) == size
        assert image.pread(size, 0) == data
        buffer = bytearray(size - 1)
        assert image.readinto(buffer, 1) == size - 1
        assert buffer == data[1:]
        # too long by one: nothing is written, not even the pieces that would have fitted
        with pytest.raises(pyfleece.OutOfRangeError):
            image.pwrite(bytes(size), 1)
        assert image.pread(size, 0) == data


def test_zero_and_discard(make_image):
    path, data = make_image()
    with pyfleece.open(path, "r+") as image:
        image.zero(5000, 300)
        assert image.pread(image.size, 0) == data[:300] + bytes(5000) + data[5300:]
        image.discard(4096, 8192)
        assert image.pread(8192 - 5300, 5300) == data[5300:8192]


def test_direct_takes_what_is_not_aligned(make_image):
    path, data = make_image()
    with pyfleece.open(path, "r+", direct=True) as image:
        assert image.info.direct
        assert image.pread(1000, 333) == data[333:1333]
        image.pwrite(b"z" * 777, 5)
        assert image.pread(image.size, 0) == data[:5] + b"z" * 777 + data[782:]


def test_extents_are_complete_and_alternate(tmp_path):
    """More extents than one call of the library returns; every second block has data."""
    path = tmp_path / "vm.raw"
    blocks = 1500
    with path.open("wb") as file:
        file.truncate(blocks * 4096 + 5)
        for block in range(0, blocks, 2):
            file.seek(block * 4096)
            file.write(b"x" * 4096)
    with pyfleece.open(path) as image:
        extents = list(image.extents())
        assert [extent.length for extent in extents[:-1]] == [4096] * (blocks - 1)
        assert {extent.kind for extent in extents[::2]} == {"data"}
        assert {extent.kind for extent in extents[1::2]} == {"zero"}
        assert extents[-1].offset + extents[-1].length == image.size
        assert list(image.extents(4096, 10)) == [pyfleece.Extent(4096, 10, "zero")]
        with pytest.raises(pyfleece.OutOfRangeError):
            image.extents(0, image.size + 1)


def test_many_threads(make_image):
    path, data = make_image()
    wrong = []
    with pyfleece.open(path) as image:

        def read(seed):
            rng = random.Random(seed)
            for _ in range(200):
                offset = rng.randrange(image.size - 5000)
                if image.pread(5000, offset) != data[offset : offset + 5000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- block devices ----


def test_block_device(loop_device):
    device = loop_device(2 * MIB)
    data = content(2 * MIB)
    with pyfleece.open(device, "r+") as image:
        assert (image.size, image.info.block_device, image.info.format) == (2 * MIB, True, "raw")
        image.pwrite(data, 0)
        image.zero(1000, 77)
        assert image.pread(2 * MIB, 0) == data[:77] + bytes(1000) + data[1077:]
        image.discard(MIB, MIB)
        image.flush()
    with pytest.raises(pyfleece.Error):
        pyfleece.create(device, 2 * MIB, format="raw")


def test_read_only_block_device(loop_device, make_image):
    path, data = make_image(MIB)
    device = loop_device(path, "--read-only")
    with pytest.raises(OSError, match=device):
        pyfleece.open(device, "r+")
    with pyfleece.open(device) as image:
        assert image.pread(MIB, 0) == data


# ---- closing ----


def test_closed_image(make_image):
    path, _ = make_image()
    image = pyfleece.open(path, "r+")
    assert not image.closed
    image.close()
    image.close()
    assert image.closed
    assert "closed" in repr(image)
    for call in (
        lambda: image.pread(1, 0),
        lambda: image.pwrite(b"x", 0),
        lambda: image.readinto(bytearray(1), 0),
        lambda: image.zero(1, 0),
        lambda: image.discard(1, 0),
        image.flush,
        image.extents,
        lambda: image.info,
        lambda: pyfleece.Disk(image),
    ):
        with pytest.raises(pyfleece.ClosedError) as caught:
            call()
        assert isinstance(caught.value, ValueError)


def test_dropped_image_is_closed(make_image):
    path, _ = make_image()
    image = pyfleece.open(path, "r+")
    del image
    pyfleece.open(path, "r+").close()


class FailsToClose(Resource):
    def _close(self):
        raise OSError("cannot close")


def test_leaving_by_an_exception_keeps_it_and_mentions_the_failure_to_close():
    with pytest.raises(KeyError) as caught, FailsToClose():
        raise KeyError("first")
    told = getattr(caught.value, "__notes__", None) or [str(caught.value.__context__)]
    assert "cannot close" in told[0]


def test_leaving_without_an_exception_raises_the_failure_to_close():
    with pytest.raises(OSError, match="cannot close"), FailsToClose():
        pass


def test_closing_goes_on_after_a_failure(make_image):
    path, _ = make_image()
    image = pyfleece.open(path)
    user = FailsToClose()
    image._users.add(user)
    with pytest.raises(OSError, match="cannot close"):
        image.close()
    with pytest.raises(pyfleece.ClosedError):
        image.pread(1, 0)


# ---- errors and faults ----


def test_an_error_tells_where_and_what(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as image:
        image.fail("read", error=errno.EIO, nth=2)
        image.pread(10, 0)
        with pytest.raises(pyfleece.ImageError) as caught:
            image.pread(100, 4096)
        error = caught.value
        assert (error.errno, error.cause, error.offset, error.length) == (errno.EIO, errno.EIO, 4096, 100)
        assert os.strerror(errno.EIO) in str(error)
        image.pread(100, 4096)
        assert image.seen("read") == 3


def test_an_error_is_of_the_builtin_class_too(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as image:
        image.fail("write", error=errno.EACCES)
        with pytest.raises(PermissionError) as caught:
            image.pwrite(b"x", 0)
        assert isinstance(caught.value, pyfleece.ImageError)


def test_errors_can_be_pickled(make_image, tmp_path):
    path, _ = make_image()
    errors = []
    with pyfleece.open(path) as image:
        for call in (
            lambda: image.pread(1, 1 << 40),
            lambda: image.pwrite(b"x", 0),
            lambda: pyfleece.open(tmp_path / "no.raw"),
        ):
            with pytest.raises(pyfleece.Error) as caught:
                call()
            errors.append(caught.value)
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert (again.side, again.offset, again.length, again.cause) == (
            error.side,
            error.offset,
            error.length,
            error.cause,
        )


def test_truncated_under_us(make_image):
    path, _ = make_image()
    with pyfleece.open(path) as image:
        os.truncate(path, 4096)
        with pytest.raises(pyfleece.TruncatedError) as caught:
            image.pread(4096, 8192)
        assert caught.value.errno == errno.EIO


def test_faults_hang_and_delay(make_image):
    path, data = make_image()
    got = []
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as image:
        image.hang("read", offset=0, length=1)
        thread = threading.Thread(target=lambda: got.append(image.pread(8, 0)))
        thread.start()
        while not image.hanging:
            pass
        assert image.pread(8, 4096) == data[4096:4104]
        assert got == []
        image.resume()
        thread.join()
        assert got == [data[:8]]
        image.short("write")
        image.pwrite(b"12345678", 0)
        assert inner.pread(8, 0) == b"12345678"
        image.fail(times=None)
        with pytest.raises(pyfleece.ImageError):
            image.flush()
        image.clear()
        image.flush()
        with pytest.raises(ValueError, match="scribble"):
            image.fail("scribble")


# ---- fork ----


def test_forked_child_gets_a_clear_error(make_image):
    path, _ = make_image()
    run_python(
        """
import gc, os, sys, warnings
warnings.simplefilter("ignore")
import pyfleece
image = pyfleece.open(sys.argv[1], "r+")
disk = pyfleece.Disk(image)
snapshot = disk.snapshot()
chunks = snapshot.chunks()
job = pyfleece.Backup(snapshot, sys.argv[1] + ".backup.raw", speed=1000)
job.start()
child = os.fork()
if child == 0:
    calls = [
        lambda: image.pread(1, 0), lambda: image.pwrite(b"x", 0), image.close, lambda: disk.pwrite(b"x", 0), disk.close,
        lambda: disk.snapshot(fleecing="memory"), lambda: snapshot.pread(1, 0), lambda: next(chunks), chunks.close,
        lambda: snapshot.stats, snapshot.close, job.wait, job.cancel, job.close, lambda: job.progress,
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except pyfleece.ForkedError:
            continue
        os._exit(10 + number)
    del image, disk, snapshot, chunks, job, calls, call
    gc.collect()
    # what the child makes itself works
    with pyfleece.open(sys.argv[2], "r+") as own:
        own.pwrite(b"y", 0)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
snapshot.pread(1, 0)
job.cancel()
image.close()
""",
        path,
        make_image(name="other.raw")[0],
    )


def test_a_hole_made_where_data_was_found_before_is_seen(tmp_path):
    with pyfleece.create(tmp_path / "vm.raw", 1 << 20) as image:
        image.pwrite(b"x" * (1 << 20), 0)
        assert [extent.kind for extent in image.extents(0, 4096)] == ["data"]  # where its end is was looked up
        image.discard(65536, 131072)
        assert [(extent.offset, extent.kind) for extent in image.extents(65536, 131072)] == [
            (65536, "data"),
            (131072, "zero"),
        ]

"""Images: files and block devices that hold a disk. `open` and `create` make them.

The format of an image is told by its suffix or by `format=`, never by its content: a guest can write any header into
a raw disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

from pyfleece import _binding, image_info
from pyfleece._binding import Extent, Resource, call, positive, unsigned
from pyfleece._native import ffi, lib
from pyfleece.errors import FormatError, from_os_error, invalid
from pyfleece.image_info import ImageInfo, InternalSnapshot, MapEntry, PersistentBitmap

if TYPE_CHECKING:
    from typing_extensions import Buffer

Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
# The directory below which backing files may be; None: the image's own; False: nowhere.
BackingRoot = Union[Path, bool, None]

# Which format a suffix stands for, and which formats the C library has a driver for.
_SUFFIXES = {".raw": "raw", ".img": "raw", ".iso": "raw", ".qcow2": "qcow2"}
_DRIVERS = ("raw", "qcow2")
# What the first bytes of formats look like that a raw image is not taken to be by its suffix alone.
_HEADERS = {b"QFI\xfb": "qcow2"}


class Image(Resource):
    """An open image. Made by `pyfleece.open` and `pyfleece.create`.

    Any number of threads may use it at once. All methods raise `ClosedError` once it is closed, `ForkedError` in a
    forked child, `OutOfRangeError` beyond the end, and `ImageError` (an OSError) when the storage fails.
    """

    def __init__(self, handle: Any, name: str, path: Path | None) -> None:
        """Not for users: `handle` is an `fl_image *` that is freed when it is collected."""
        super().__init__()
        self._handle = handle
        self.name = name
        self.path = path
        info = self.info
        self._size = info.size
        self._cluster_size = info.cluster_size

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._size

    @property
    def cluster_size(self) -> int:
        """The unit in which the image allocates, in bytes: qcow2: its clusters; a raw file: the file system's block;
        a block device: its sector.
        """
        return self._cluster_size

    @property
    def info(self) -> ImageInfo:
        """All that is known about it, as of now."""
        return image_info.read_info(self._handle)

    def pread(self, count: int, offset: int) -> bytes:
        """The `count` bytes at `offset`: all of them, or an exception."""
        return _binding.read_bytes(lib.fl_image_pread, self._handle, count, offset, self._size)

    def readinto(self, buffer: Buffer, offset: int) -> int:
        """Fill a writable, contiguous buffer from `offset` on, without a copy. Returns its length in bytes."""
        return _binding.transfer(lib.fl_image_pread, self._handle, buffer, offset, self._size, into=True)

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of `data` at `offset`. Returns its length in bytes."""
        return _binding.transfer(lib.fl_image_pwrite, self._handle, data, offset, self._size, into=False)

    def zero(self, count: int, offset: int) -> None:
        """Make `count` bytes at `offset` read as zeros, and free their space where the storage can."""
        _binding.in_pieces(lib.fl_image_zero, self._handle, count, offset, self._size)

    def discard(self, count: int, offset: int) -> None:
        """Hint that `count` bytes at `offset` are not needed any more. What they read as afterwards is undefined."""
        _binding.in_pieces(lib.fl_image_discard, self._handle, count, offset, self._size)

    def flush(self) -> None:
        """Return when everything that was written is on stable storage."""
        call(lib.fl_image_flush, self._handle)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Where there is data and where zeros, in order, from `offset` on; `length` None: to the end. Of an image
        with a backing file: as it reads, whichever image of the chain has it.
        """
        return _binding.extents(lib.fl_image_extents, self._handle, offset, length, self._size)

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[MapEntry]:
        """As `extents`, and which image of the chain has the bytes, and where in its file."""
        return image_info.read_map(self._handle, offset, length, self._size)

    def write_compressed(self, data: Buffer, offset: int) -> int:
        """Write whole clusters that were never written before, each of them compressed if that makes it smaller (only
        qcow2 can). The image's last cluster may be short. Returns the length of `data`, in bytes.
        """
        return _binding.transfer(lib.fl_image_write_compressed, self._handle, data, offset, self._size, into=False)

    def grow(self, size: int) -> None:
        """Make the disk `size` bytes large (only qcow2 can); what is new reads as zeros. Nothing else may use the
        image meanwhile: no disk, no snapshot, no backup.
        """
        call(lib.fl_image_grow, self._handle, unsigned(size, "size"))
        self._size = self.info.size

    def internal_snapshots(self) -> list[InternalSnapshot]:
        """The snapshots that are stored inside of the image (qcow2). `FormatError`: their table is damaged."""
        return image_info.read_snapshots(self._handle)

    def persistent_bitmaps(self) -> list[PersistentBitmap]:
        """The dirty bitmaps that are stored inside of the image (qcow2). `FormatError`: their directory is damaged."""
        return image_info.read_bitmaps(self._handle)

    def _close(self) -> None:
        call(lib.fl_image_close, self._handle)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self._size} bytes){' closed' if self._closed else ''}>"


def open(
    path: Path,
    mode: str = "r",
    *,
    format: str | None = None,
    direct: bool = False,
    share: bool = False,
    cache_size: int | None = None,
    backing_root: BackingRoot = None,
    inspect: bool = False,
) -> Image:
    """Open an existing image: a regular file or a block device.

    `mode`: "r" or "r+". `format`: "raw" or "qcow2"; None: what the suffix says (.raw, .img, .iso, .qcow2), and raw for
    a block device.
    `direct`: go around the page cache (O_DIRECT); buffers, offsets and lengths may be unaligned all the same.
    `share`: take no lock; only where something else makes sure that nobody writes what another program relies on.
    `cache_size`: the most bytes of memory for the tables of a qcow2 image, and of each image of its chain.
    `backing_root`: a directory; backing files are opened only below it, after symbolic links are resolved. None: below
    the directory of the image that names them. "/": anywhere. False: never. An image names its backing file itself, so
    whoever made it chose the name. They are opened read-only, and only if the image tells their format as well.
    `inspect`: open no backing file, wherever it is; of a qcow2 image there is then no more than `info`,
    `internal_snapshots` and `persistent_bitmaps`, and nothing can be read.

    Raises `ImageLockedError` when another program (QEMU too), or another open in this one, uses it; `FormatError` when
    it is damaged, or needs a feature that is not supported; `ImagePermissionError` for a backing file that is not
    allowed; `ImageError`.
    """
    if mode not in ("r", "r+"):
        raise invalid(f"mode is {mode!r}; it can be 'r' or 'r+'")
    name, encoded = _names(path)
    chosen = _checked(format, name) if format is not None else _format_of(path, name)
    options = _Options(chosen, mode == "r+", direct, share, cache_size, backing_root)
    options.raw.inspect = inspect and chosen != "raw"
    image = _make(lib.fl_image_open, (encoded,), name, path, options)
    if format is None and chosen == "raw":
        try:
            _refuse_other_headers(image)
        except BaseException as error:
            _binding.close_after(image.close, error)
            raise
    return image


def create(
    path: Path,
    size: int | None,
    *,
    format: str | None = None,
    direct: bool = False,
    share: bool = False,
    cluster_size: int | None = None,
    backing: Path | None = None,
    backing_format: str | None = None,
    compression: str | None = None,
    cache_size: int | None = None,
    backing_root: BackingRoot = None,
) -> Image:
    """Make a new, sparse image of `size` bytes, open for writing. The file must not exist (`FileExistsError`).
    `format`, `direct`, `share`, `cache_size`, `backing_root`: as in `open`. A qcow2 image counts in sectors: its size
    is rounded up to 512 bytes.

    For qcow2 only:
    `cluster_size`: a power of two, 512 bytes to 2 MiB; None: 64 KiB.
    `backing`: the path of its backing file, as it will stand in the image: relative to the directory of the new image.
    With `backing_format`, "raw" or "qcow2", which is never guessed. Then `size` may be None: that of the backing file.
    `compression`: "zlib" (None) or "zstd", of clusters that are written compressed.
    """
    name, encoded = _names(path)
    chosen = new_format(path, format)
    options = _Options(chosen, True, direct, share, cache_size, backing_root)
    options.set_new(cluster_size, backing, backing_format, compression)
    if size is None:
        size = _backing_size(path, backing, backing_format, backing_root)
    return _make(lib.fl_image_create, (encoded, unsigned(size, "size")), name, path, options)


def create_nameless(directory: Path, size: int) -> Image:
    """A raw image of `size` bytes (sparse) in `directory` that has no name: it is gone with its last user, whatever
    happens.
    """
    name, encoded = _names(directory)
    function = lib.fl_image_create_nameless
    handle = _binding.make("fl_image **", lib.fl_image_free, function, encoded, unsigned(size, "size"), filename=name)
    return Image(handle, f"a nameless file in {name}", None)


def new_format(path: Path, format: str | None) -> str:
    """The format that `create` would give to an image of this path with this `format=`; else `FormatError`."""
    name, _ = _names(path)
    return _checked(format, name) if format is not None else _format_by_suffix(name)


class _Options:
    """An `fl_image_options`, and what keeps its strings alive."""

    def __init__(
        self,
        format: str,
        writable: bool,
        direct: bool,
        share: bool,
        cache_size: int | None,
        backing_root: BackingRoot,
    ) -> None:
        self.raw = ffi.new("fl_image_options *")
        self._strings: list[Any] = []
        self.raw.format = self._string(format.encode())
        self.raw.writable, self.raw.direct, self.raw.share = writable, direct, share
        self.raw.cache_size = positive(cache_size, "cache_size")
        if backing_root is False:
            self.raw.backing_root = self._string(b"-")
        elif backing_root is not None:
            if backing_root is True:
                raise invalid("backing_root is True; it can be a directory, False or None")
            self.raw.backing_root = self._string(_names(os.path.abspath(backing_root))[1])

    def set_new(
        self, cluster_size: int | None, backing: Path | None, backing_format: str | None, compression: str | None
    ) -> None:
        self.raw.cluster_size = positive(cluster_size, "cluster_size", 32)
        if backing is not None:
            self.raw.backing = self._string(_names(backing)[1])
        if backing_format is not None:
            self.raw.backing_format = self._string(backing_format.encode())
        if compression is not None:
            self.raw.compression = self._string(compression.encode())

    def _string(self, text: bytes) -> Any:
        if b"\0" in text:
            raise invalid(f"an option of the image contains a null character: {text!r}")
        self._strings.append(ffi.new("char[]", text))
        return self._strings[-1]


def _make(function: Any, arguments: tuple[Any, ...], name: str, path: Path, options: _Options) -> Image:
    handle = _binding.make("fl_image **", lib.fl_image_free, function, *arguments, options.raw, filename=name)
    return Image(handle, name, path)


def _backing_size(
    path: Path, backing: Path | None, backing_format: str | None, backing_root: BackingRoot
) -> int:
    if backing is None or backing_format is None:
        raise invalid("a new image needs a size, or a backing file and its format, from which to take it")
    beside = os.path.join(os.path.dirname(os.fsencode(path)), os.fsencode(backing))
    with open(beside, format=backing_format, backing_root=backing_root) as image:
        return image.size


def _names(path: Path) -> tuple[str, bytes]:
    """The path for people, and for C."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise invalid(f"the path {os.fsdecode(path)!r} contains a null character")
    return os.fsdecode(path), encoded


def _checked(format: str, name: str) -> str:
    if format in _DRIVERS:
        return format
    raise FormatError(f"{name}: there is no format {format!r}; this build knows {', '.join(_DRIVERS)}")


def _format_by_suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        what = f"the suffix {suffix!r} does not tell" if suffix else "without a suffix nothing tells"
        raise FormatError(f"{name}: {what} the format of the image; pass format=, for instance format='raw'")
    return _checked(_SUFFIXES[suffix], name)


def _format_of(path: Path, name: str) -> str:
    """The format of an existing image by its suffix; a block device is raw."""
    if os.path.splitext(name)[1].lower() in _SUFFIXES:
        return _format_by_suffix(name)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise from_os_error(error, f"cannot open {name}") from error
    return "raw" if stat.S_ISBLK(mode) else _format_by_suffix(name)


def _refuse_other_headers(image: Image) -> None:
    """A raw image whose first bytes are another format's header was likely given the wrong name; or a guest wants us
    to think so.
    """
    found = _HEADERS.get(image.pread(4, 0)) if image.size >= 4 else None
    if found is not None:
        raise FormatError(
            f'{image.name} is taken to be raw but starts with a {found} header; if it is raw, pass format="raw"'
        )

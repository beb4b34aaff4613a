"""Images: files and block devices that hold a disk. `open` and `create` make them.

The format of an image is told by its suffix or by `format=`, never by its content: a guest can write any header into
a raw disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from pyfleece import _binding
from pyfleece._binding import Extent, Resource, call, unsigned
from pyfleece._native import ffi, lib
from pyfleece.errors import FormatError, from_os_error, invalid

if TYPE_CHECKING:
    from typing_extensions import Buffer

Path = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

# Which format a suffix stands for, and which formats the C library has a driver for.
_SUFFIXES = {".raw": "raw", ".img": "raw", ".iso": "raw", ".qcow2": "qcow2"}
_DRIVERS = ("raw",)
# What the first bytes of formats look like that a raw image is not taken to be by its suffix alone.
_HEADERS = {b"QFI\xfb": "qcow2"}


@dataclass(frozen=True)
class ImageInfo:
    """What there is to know about an image. Sizes are bytes."""

    format: str
    size: int               # the guest's size
    allocated: int          # what it occupies on its file system; a block device: its size
    cluster_size: int       # the unit in which it allocates
    alignment: int          # what its storage asks of offsets and lengths: 1 when buffered. Callers need not care
    block_device: bool
    writable: bool
    direct: bool


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
        """The unit in which the image allocates, in bytes: a raw file: the file system's block; a block device: its
        sector.
        """
        return self._cluster_size

    @property
    def info(self) -> ImageInfo:
        """All that is known about it, as of now."""
        raw = ffi.new("fl_image_info *")
        call(lib.fl_image_info_get, self._handle, raw)
        return ImageInfo(
            format=ffi.string(raw.format).decode(),
            size=raw.size,
            allocated=raw.allocated,
            cluster_size=raw.cluster_size,
            alignment=raw.alignment,
            block_device=bool(raw.block_device),
            writable=bool(raw.writable),
            direct=bool(raw.direct),
        )

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
        """Where there is data and where zeros, in order, from `offset` on; `length` None: to the end."""
        return _binding.extents(lib.fl_image_extents, self._handle, offset, length, self._size)

    def _close(self) -> None:
        call(lib.fl_image_close, self._handle)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self._size} bytes){' closed' if self._closed else ''}>"


def open(path: Path, mode: str = "r", *, format: str | None = None, direct: bool = False, share: bool = False) -> Image:
    """Open an existing image: a regular file or a block device.

    `mode`: "r" or "r+". `format`: "raw"; None: what the suffix says (.raw, .img, .iso), and raw for a block device.
    `direct`: go around the page cache (O_DIRECT); buffers, offsets and lengths may be unaligned all the same.
    `share`: take no lock; only where something else makes sure that nobody writes what another program relies on.

    Raises `ImageLockedError` when another program (QEMU too), or another open in this one, uses it; `FormatError`;
    `ImageError`.
    """
    if mode not in ("r", "r+"):
        raise invalid(f"mode is {mode!r}; it can be 'r' or 'r+'")
    name, encoded = _names(path)
    chosen = _checked(format, name) if format is not None else _format_of(path, name)
    image = _make(lib.fl_image_open, (encoded,), name, path, chosen, writable=mode == "r+", direct=direct, share=share)
    if format is None:
        try:
            _refuse_other_headers(image)
        except BaseException as error:
            _binding.close_after(image.close, error)
            raise
    return image


def create(path: Path, size: int, *, format: str | None = None, direct: bool = False, share: bool = False) -> Image:
    """Make a new, sparse image of `size` bytes, open for writing. The file must not exist (`FileExistsError`).
    Options as in `open`.
    """
    name, encoded = _names(path)
    chosen = _checked(format if format is not None else _format_by_suffix(name), name)
    arguments = (encoded, unsigned(size, "size"))
    return _make(lib.fl_image_create, arguments, name, path, chosen, writable=True, direct=direct, share=share)


def create_nameless(directory: Path, size: int) -> Image:
    """A raw image of `size` bytes (sparse) in `directory` that has no name: it is gone with its last user, whatever
    happens.
    """
    name, encoded = _names(directory)
    function = lib.fl_image_create_nameless
    handle = _binding.make("fl_image **", lib.fl_image_free, function, encoded, unsigned(size, "size"), filename=name)
    return Image(handle, f"a nameless file in {name}", None)


def check_new_format(path: Path, format: str | None) -> None:
    """Raise `FormatError` unless `create` would know what to make of this path and `format=`."""
    name, _ = _names(path)
    _checked(format, name) if format is not None else _format_by_suffix(name)


def _make(
    function: Any,
    arguments: tuple[Any, ...],
    name: str,
    path: Path,
    format: str,
    *,
    writable: bool,
    direct: bool,
    share: bool,
) -> Image:
    c_format = ffi.new("char[]", format.encode())       # the struct does not keep it alive: this variable does
    options = ffi.new("fl_image_options *")
    options.format, options.writable, options.direct, options.share = c_format, writable, direct, share
    handle = _binding.make("fl_image **", lib.fl_image_free, function, *arguments, options, filename=name)
    return Image(handle, name, path)


def _names(path: Path) -> tuple[str, bytes]:
    """The path for people, and for C."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise invalid(f"the path {os.fsdecode(path)!r} contains a null character")
    return os.fsdecode(path), encoded


def _checked(format: str, name: str) -> str:
    if format in _DRIVERS:
        return format
    if format in _SUFFIXES.values():
        raise FormatError(f"{name}: this build has no driver for {format} images yet")
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

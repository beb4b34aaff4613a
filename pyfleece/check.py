"""Is an image as it should be? `check` looks, and repairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyfleece import image
from pyfleece._binding import call
from pyfleece._native import ffi, lib
from pyfleece.errors import invalid

_REPAIRS = {None: lib.FL_REPAIR_NONE, "leaks": lib.FL_REPAIR_LEAKS, "all": lib.FL_REPAIR_ALL}
_KINDS = {
    lib.FL_FOUND_CORRUPTION: "corruption",
    lib.FL_FOUND_LEAK: "leak",
    lib.FL_FOUND_ERROR: "error",
    lib.FL_FOUND_NOTE: "note",
}
_NOWHERE = (1 << 64) - 1


@dataclass(frozen=True)
class Finding:
    """One thing that a check found; a row of clusters with the same fault is one finding."""

    kind: str               # "corruption", "leak", "error" (of the check itself), "note" (counted nowhere)
    text: str
    guest: int | None       # offset in the disk
    host: int | None        # offset in the file
    length: int             # bytes of the file
    repaired: bool

    def __str__(self) -> str:
        offsets = (("guest", self.guest), ("host", self.host))
        places = [f"{name} offset {at:#x}" for name, at in offsets if at is not None]
        if self.host is not None and self.length:
            places[-1] += f", {self.length} bytes"
        what = f"{'repaired ' if self.repaired else ''}{self.kind}"
        return f"{what}: {self.text}" + (f" ({'; '.join(places)})" if places else "")


@dataclass(frozen=True)
class CheckResult:
    """What a check found: the state of the image now, after the repair. As in `qemu-img check --output=json`."""

    corruptions: int        # bad entries, and clusters with too low a refcount
    leaks: int              # clusters that take space and are not used
    check_errors: int       # the check is incomplete
    corruptions_fixed: int
    leaks_fixed: int
    image_end_offset: int   # bytes of the file behind which nothing is in use
    total_clusters: int     # of the disk
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    findings: tuple[Finding, ...]
    findings_dropped: int   # more were found than are kept

    @property
    def status(self) -> int:
        """What `qemu-img check` exits with: 0 fine, 1 check incomplete, 2 corruptions, 3 leaks only."""
        if self.check_errors:
            return 1
        return 2 if self.corruptions else 3 if self.leaks else 0


def check(
    path: image.Path, repair: str | None = None, *, format: str | None = None, share: bool = False
) -> CheckResult:
    """Check a qcow2 image that is not open anywhere, and repair it: "leaks" only frees what nobody uses, "all" puts
    everything right that can be known.

    Raises `FormatError` when not even the header can be made sense of, `ImageLockedError` when it is in use, and an
    `ImageError` with EOPNOTSUPP for formats without anything to check. `share`: check it though it is in use.
    """
    if repair not in _REPAIRS:
        raise invalid(f"repair is {repair!r}; it can be None, 'leaks' or 'all'")
    if share and repair:
        raise invalid("an image that is in use can't be repaired")
    name, encoded = image._names(path)
    chosen = image._checked(format, name) if format is not None else image._format_of(path, name)
    c_format = ffi.new("char[]", chosen.encode())
    options = ffi.new("fl_image_options *")
    options.format, options.share = c_format, share
    raw = ffi.new("fl_check *")
    call(lib.fl_image_check, encoded, options, _REPAIRS[repair], raw)
    numbers = {field: getattr(raw, field) for field in CheckResult.__dataclass_fields__ if field != "findings"}
    return CheckResult(**numbers, findings=tuple(_finding(found) for found in raw.findings[0 : raw.finding_count]))


def _finding(raw: Any) -> Finding:
    def place(at: int) -> int | None:
        return None if at == _NOWHERE else at

    text = ffi.string(raw.text).decode("utf-8", "replace")
    return Finding(
        kind=_KINDS[raw.kind],
        text=text,
        guest=place(raw.guest),
        host=place(raw.host),
        length=raw.length,
        repaired=bool(raw.repaired),
    )

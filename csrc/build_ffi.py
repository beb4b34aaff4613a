"""Build the extension module `pyfleece._native` with cffi, in API mode.

The declarations are the text of fleece.h between `CFFI BEGIN` and `CFFI END`: there is no second list of them. Only two
callbacks are added: a waiting C call asks Python whether to go on (see `fl_set_interrupt`), and
the threads of a backup show what they copy (`on_piece`).

libfuse3 is looked for here, with pkg-config or where Debian has it: mounts are built in when it is found.
PYFLEECE_WITHOUT_FUSE=1 leaves them out.

setup.py runs this file through `cffi_modules`, with the project's root as the working directory.
"""

import glob
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile

from cffi import FFI

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = ("csrc/*.c", "csrc/util/*.c", "csrc/qcow2/*.c")
HEADERS = ("csrc/*.h", "csrc/util/*.h", "csrc/qcow2/*.h")


def find(patterns):
    """The files that match, relative to the root, as setuptools wants them; sorted, so that builds are reproducible."""
    found = (path for pattern in patterns for path in glob.glob(os.path.join(ROOT, *pattern.split("/"))))
    return sorted(os.path.relpath(path, ROOT) for path in found)


def declarations():
    """What fleece.h declares, for cffi's parser (which skips comments itself)."""
    with open(os.path.join(ROOT, "csrc", "fleece.h"), encoding="utf-8") as header:
        text = header.read()
    _, begin, rest = text.partition("/* CFFI BEGIN */")
    body, end, _ = rest.partition("/* CFFI END */")
    if not begin or not end:
        raise SystemExit("csrc/fleece.h: the lines CFFI BEGIN and CFFI END are missing")
    return body


FUSE_PROGRAM = """
#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>
#if FUSE_VERSION < FUSE_MAKE_VERSION(3, 8)
#error too old: no lseek
#endif
int main(void) { fuse_set_log_func(0); return fuse_reply_lseek(0, 0); }
"""


def links(flags):
    """Does a program with libfuse3 build with these flags?"""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as directory:
        source = os.path.join(directory, "fuse.c")
        with open(source, "w", encoding="utf-8") as file:
            file.write(FUSE_PROGRAM)
        command = [*compiler, source, "-o", os.path.join(directory, "fuse"), *flags]
        try:
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            return False


# Libraries that are used where this system has them: macro, library, header, and a function of it.
OPTIONAL = (
    ("FL_HAVE_ZLIB", "z", "zlib.h", "zlibVersion"),
    ("FL_HAVE_ZSTD", "zstd", "zstd.h", "ZSTD_versionNumber"),
)


def is_there(library, header, function):
    """Can a program be compiled and linked with it, by the compiler that builds the extension?"""
    words = " ".join(os.environ.get(name) or sysconfig.get_config_var(name) or "" for name in ("CC", "CFLAGS"))
    linking = os.environ.get("LDFLAGS", "").split()
    with tempfile.TemporaryDirectory() as directory:
        source = os.path.join(directory, "probe.c")
        with open(source, "w", encoding="utf-8") as file:
            file.write(f"#include <{header}>\nint main(void) {{ return {function}() == 0; }}\n")
        command = [*words.split(), "-o", os.path.join(directory, "probe"), source, *linking, f"-l{library}"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def find_fuse():
    """The flags that compile and link with libfuse3; None: it is not there."""
    if os.environ.get("PYFLEECE_WITHOUT_FUSE"):
        return None
    candidates = [["-I/usr/include/fuse3", "-lfuse3"]]
    try:
        found = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True)
        if found.returncode == 0:
            candidates.insert(0, shlex.split(found.stdout))
    except OSError:
        pass
    return next((flags for flags in candidates if links(flags)), None)


fuse = find_fuse()
FUSE_COMPILE = ["-DFLEECE_FUSE", *(flag for flag in fuse if flag.startswith(("-I", "-D")))] if fuse else []
FUSE_LINK = [flag for flag in fuse or [] if not flag.startswith(("-I", "-D"))]
WARNINGS = ["-Wall", "-Wextra"]
found = [(macro, library) for macro, library, *rest in OPTIONAL if is_there(library, *rest)]
for macro, library, *_ in OPTIONAL:
    if (macro, library) not in found:
        print(f"build_ffi: no lib{library} here: images that need it will be refused", file=sys.stderr)

ffi = FFI()
ffi.cdef(
    declarations()
    + """
    extern "Python" int pyfleece_interrupt(void);
    extern "Python" int pyfleece_piece(uint64_t, uint64_t, uint64_t, const void *);
    """
)
ffi.set_source(
    "pyfleece._native",
    '#include "fleece.h"',
    sources=find(SOURCES),
    include_dirs=["csrc"],
    depends=find(HEADERS),
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-pthread", "-fvisibility=hidden", *WARNINGS, *FUSE_COMPILE],
    extra_link_args=["-pthread", *FUSE_LINK],
    define_macros=[(macro, None) for macro, _ in found],
    libraries=[library for _, library in found],
    # One build for every CPython from 3.9 on; cffi turns it off where it cannot be (free threading).
    py_limited_api=True,
)

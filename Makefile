# make demo   install what is missing, build, and run the demo          (ARGS="--size 1G" goes to it)
# make test   install what is missing, build, and run all tests         (ARGS="-k cli" goes to pytest)
#
# What is missing is installed with apt-get where that is possible (as root, or through sudo), and named otherwise.
# Everything else lives in $(VENV).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Command or file, and the Debian package that has it.
demo: NEEDS := gcc:gcc mkfs.ext4:e2fsprogs /usr/include/zlib.h:zlib1g-dev /usr/include/zstd.h:libzstd-dev
test: NEEDS := gcc:gcc mkfs.ext4:e2fsprogs /usr/include/zlib.h:zlib1g-dev /usr/include/zstd.h:libzstd-dev qemu-img:qemu-utils losetup:mount spin:spin \
    /usr/include/fuse3/fuse_lowlevel.h:libfuse3-dev fusermount3:fuse3 rsync:rsync fio:fio git:git sqlite3:sqlite3 \
    qemu-aarch64-static:qemu-user-static aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu \
    /usr/aarch64-linux-gnu/include/stdio.h:libc6-dev-arm64-cross \
    nbdkit:nbdkit nbdcopy:libnbd-bin qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio \
    sfdisk:fdisk mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mkfs.vfat:dosfstools mcopy:mtools mkntfs:ntfs-3g setfattr:attr \
    mkfs.exfat:exfatprogs mount.exfat-fuse:exfat-fuse genisoimage:genisoimage restic:restic borg:borgbackup

# Where the fuzzer's runtime is depends on clang's version.
FUZZER := $(firstword $(wildcard /usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a) no-libfuzzer)
test: NEEDS += clang:clang $(FUZZER):libclang-rt-dev

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.py csrc/*.[ch] csrc/*/*.[ch])
READY := $(VENV)/.ready

# Debian keeps mkfs.ext4 and losetup where only root looks.
export PATH := $(PATH):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: $(READY)
	$(VENV)/bin/pyfleece demo $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

$(READY): $(SOURCES) | packages
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e '.[test]'
	@touch $@

packages:
	@missing=; \
	for need in $(NEEDS); do command -v $${need%%:*} >/dev/null || test -f $${need%%:*} || missing="$$missing $${need##*:}"; done; \
	echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || missing="$$missing libc6-dev"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	    || missing="$$missing python3-dev"; \
	test -n "$$missing" || exit 0; \
	as_root=; test "$$(id -u)" = 0 || as_root=sudo; \
	for tool in apt-get $$as_root; do \
	    command -v $$tool >/dev/null || { echo "please install:$$missing" >&2; exit 1; }; \
	done; \
	echo "installing:$$missing"; \
	$$as_root apt-get update -qq >/dev/null && \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

clean:
	rm -rf $(VENV) build dist *.egg-info pyfleece/*.so tests/c/build

.PHONY: demo test packages clean

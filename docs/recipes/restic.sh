#!/bin/sh
# For cron. `pyfleece serve /var/lib/vm/vm.raw --mount /run/vm` is running, and the guest uses /run/vm/vm.raw.
# RESTIC_REPOSITORY and RESTIC_PASSWORD_FILE are set. The name of the snapshot is always the same, so that restic finds
# the last backup of the same path; it also keeps two runs of this script apart.
set -eu
snapshot=${1:-/run/vm}/.snap/restic
mkdir "$snapshot"                                   # all disks of the mount, at one instant
trap 'rmdir "$snapshot"' EXIT                       # whatever happens
trap 'exit 130' INT TERM HUP
restic backup --ignore-inode "$snapshot"

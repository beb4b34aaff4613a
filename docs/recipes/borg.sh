#!/bin/sh
# For cron. `pyfleece serve /var/lib/vm/vm.raw --mount /run/vm` is running, and the guest uses /run/vm/vm.raw.
# BORG_REPO is set, and what it needs to get in. Chunks of a fixed size fit disks, and let borg skip holes.
set -eu
snapshot=${1:-/run/vm}/.snap/borg
mkdir "$snapshot"                                   # all disks of the mount, at one instant
trap 'rmdir "$snapshot"' EXIT                       # whatever happens
trap 'exit 130' INT TERM HUP
borg create --sparse --chunker-params fixed,1048576 "::vm-$(date +%Y-%m-%dT%H:%M:%S)" "$snapshot"

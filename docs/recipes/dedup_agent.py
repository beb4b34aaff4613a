"""A backup agent with a store of its own, which keeps each chunk once, whatever disk and whatever day it is from."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyfleece


def keep(store: Path, chunk: pyfleece.Chunk) -> tuple[int, str]:
    """Store a chunk under the hash of its content, and acknowledge it when it is on stable storage."""
    digest = hashlib.sha256(chunk.buffer).hexdigest()
    path = store / digest
    if not path.exists():
        temporary = store / f"{digest}.{chunk.offset}"
        with temporary.open("wb") as file:
            file.write(chunk.buffer)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    offset = chunk.offset
    chunk.ack()                                     # from here on the snapshot need not save this range
    return offset, digest


def backup(disk: pyfleece.Disk, store: Path, name: str) -> None:
    """Back up a disk that is being written. The manifest appears last: what has one is whole."""
    with disk.snapshot() as snapshot, snapshot.chunks(granularity=1 << 20) as chunks, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(keep, store, chunk) for chunk in chunks if chunk.kind == "data"]
        manifest = {"size": snapshot.size, "chunks": [job.result() for job in jobs]}
    (store / f"{name}.partial").write_text(json.dumps(manifest))
    (store / f"{name}.partial").replace(store / f"{name}.json")


def restore(store: Path, name: str, path: Path) -> None:
    manifest = json.loads((store / f"{name}.json").read_text())
    with pyfleece.create(path, manifest["size"]) as image:
        for offset, digest in manifest["chunks"]:
            data = (store / digest).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest, f"chunk {digest} is damaged"
            image.pwrite(data, offset)
        image.flush()

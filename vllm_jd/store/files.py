"""Durable files: hashing, fsync and atomic replacement."""

import hashlib
import os
from pathlib import Path

_PIECE = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    return sha256_files(path)


def sha256_files(*paths: Path) -> str:
    """Hex sha256 of the bytes of some files, one after the other, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's, or a folder's, contents to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees either the old file or the whole new one."""
    # One name for all: what a killed writer left is overwritten. The writer lock keeps others out.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)

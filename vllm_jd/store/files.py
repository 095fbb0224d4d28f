"""Durable files: hashing, fsync and atomic replacement."""

import hashlib
import os
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

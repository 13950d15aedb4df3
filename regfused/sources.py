"""A digest of csrc/: written into the compiled part when it is built, compared when it is loaded in a checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")


def digest(checkout: Path) -> str:
    """A digest of the names and contents of all files in csrc/ that are compiled; empty where this is no checkout."""
    folder = checkout / "csrc"
    if not (checkout / "setup.py").is_file() or not folder.is_dir():
        return ""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file()):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()

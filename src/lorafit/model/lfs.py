"""Files that are not what their names say: git-lfs pointers in the place of weights."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import ModelError

LFS_MAGIC = b"version https://git-lfs"


def refuse_pointer(path: Path, first_bytes: bytes) -> None:
    """Raise ModelError if `path` holds a git-lfs pointer, a few lines of text, instead of the weights."""
    if first_bytes.startswith(LFS_MAGIC):
        raise ModelError(
            f"{path} is a git-lfs pointer of a few lines, not the weights themselves",
            "Run `git lfs pull` in its directory, or download the file again",
        )

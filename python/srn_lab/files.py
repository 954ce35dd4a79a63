"""Writing files so that an interrupt or a full disk leaves what was there before."""

from __future__ import annotations

import json
import os
from pathlib import Path


class SaveError(OSError):
    """A file that could not be written; what was there before is still there."""


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write beside ``path`` and rename onto it. Raises SaveError, leaving ``path`` as it was."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error
    return path


def write_json(path: Path, document: object) -> Path:
    """Write ``document`` indented; NaN and infinity are refused because JSON has neither."""
    return write_atomically(path, json.dumps(document, indent=2, allow_nan=False) + "\n")

"""Where the project's own files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"
IDK = ROOT / "data" / "idontknow.jsonl"


def find_path(path: str) -> str:
    """A relative path as it stands, or else below the project's own folder."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path

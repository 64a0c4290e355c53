"""Addresses as they may be shown and stored."""

from __future__ import annotations

import re
from pathlib import Path


def without_secrets(uri: str) -> str:
    """``uri`` without user, password, query and fragment, which may hold credentials."""
    anonymous = re.sub(r"//[^/]*@", "//", uri)
    return anonymous if uri.startswith("sqlite") else re.split(r"[?#]", anonymous)[0]


def embedded_uri(output: Path) -> str:
    """Address of the SQLite file beside the runs in ``output``."""
    return f"sqlite:///{output.resolve() / 'mlflow.db'}"

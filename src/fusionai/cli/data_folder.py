"""Default folders for state."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the user's folder for FusionAI's data, where the operating system keeps such data."""
    return Path(platformdirs.user_data_dir("fusionai", appauthor=False))

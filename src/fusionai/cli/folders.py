"""Where state is kept when the user does not say."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the user's folder for FusionAI's data, after the custom of the system."""
    return Path(platformdirs.user_data_dir("fusionai", appauthor=False))

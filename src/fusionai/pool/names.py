"""Names of machines, and of their roles in a pool."""

from __future__ import annotations

import re
from typing import Literal

from fusionai.errors import ConfigError

MemberRole = Literal["compnode", "owner", "observer"]
"""What a member is in its pool. An observer only asks for the status."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> None:
    """Check a machine's name.

    Raises:
        ConfigError: it is not 1 to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name[:80]!r} must have 1 to 63 letters, digits, dots, dashes and underscores, and begin with "
            "a letter or digit"
        )

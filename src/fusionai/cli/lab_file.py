"""The lab file: emulated links and speeds by node name, in TOML.

default = "lan"                       # every pair not named below; leave out for real links
seed = 1

[links]
"anna<->berta" = "weak-4g"            # a profile of fusionai.network.lab.PROFILES
"anna->broker" = { rate_mbit = 20, one_way_ms = 15, jitter_ms = 3, loss_pct = 0.1 }

[slowdown]
berta = 4.0                           # passes take four times as long

[throttle]
anna = { after_steps = 5, factor = 3.0 }   # from a job's sixth step on they take three times as long as before
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from fusionai.errors import ConfigError
from fusionai.network.lab import PROFILES, EmulatedLink, LabConfig
from fusionai.training.slowdown import Throttle


class _LabFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    links: dict[str, EmulatedLink | str] = {}
    default: EmulatedLink | str | None = None
    seed: int = 0
    slowdown: dict[str, float] = {}
    throttle: dict[str, Throttle] = {}


class Lab(msgspec.Struct, frozen=True):
    """The contents of a lab file."""

    network: LabConfig
    slowdown: dict[str, float]
    throttle: dict[str, Throttle] = {}


def read_lab(path: Path) -> Lab:
    """Read a lab file.

    Raises:
        ConfigError: it is not there or not valid; the text names the field.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        file = msgspec.convert(table, _LabFile)
    except FileNotFoundError as error:
        raise ConfigError(f"the lab file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the lab file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the lab file {path} is not valid TOML: {error}") from error
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"the lab file {path}: {error}") from error
    for name, factor in file.slowdown.items():
        if not 1 <= factor < 1e6:
            raise ConfigError(f"the lab file {path}: slowdown.{name} must be at least 1, got {factor}")
    try:
        network = LabConfig(
            links={pair: _link(link) for pair, link in file.links.items()},
            default=None if file.default is None else _link(file.default),
            seed=file.seed,
        )
    except ConfigError as error:
        raise ConfigError(f"the lab file {path}: {error}") from error
    return Lab(network, file.slowdown, file.throttle)


def _link(link: EmulatedLink | str) -> EmulatedLink:
    if isinstance(link, EmulatedLink):
        return link
    if link not in PROFILES:
        raise ConfigError(f"link profile {link!r} is unknown; known: {', '.join(PROFILES)}")
    return PROFILES[link]

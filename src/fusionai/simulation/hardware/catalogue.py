"""Published figures of GPUs, Apple's chips and CPUs, found by the names that people use.

The figures are in catalogue.toml, each with where it comes from. They are peaks: what work reaches of them is
`efficiency`'s matter.
"""

from __future__ import annotations

import datetime
import difflib
import re
import tomllib
from functools import cache
from importlib import resources
from typing import Literal, TypeAlias

import msgspec

from fusionai.errors import ConfigError

DeviceKind: TypeAlias = Literal["consumer-gpu", "datacentre-gpu", "apple", "cpu"]
NumberFormat: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16"]

_VENDOR_WORDS = re.compile("nvidia|geforce|tesla|amd|radeon|instinct|intel|apple|rtx|gtx|rx")
"""Words that add nothing to a model's name; looked for after spaces and punctuation are gone."""

_LONGEST_NAME = 100
"""Characters of an unknown name that are compared and shown: comparing takes quadratic time."""


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price that somebody published: in US dollars, without tax."""

    usd: float
    source: str
    date: datetime.date
    """When it was valid; of a cloud's price, about."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One device as its vendor describes it."""

    name: str
    aliases: tuple[str, ...]
    kind: DeviceKind
    flops_per_s: dict[NumberFormat, float]
    """Peak dense FLOP/s, no sparsity; fp16 and bf16 accumulate in fp32. A format without units of its own is absent."""
    memory_bytes: int
    """On the board; of an Apple chip, of the configuration named; of a CPU, the most that the vendor supports."""
    memory_bytes_per_s: float
    """Peak bandwidth."""
    power_w: float | None
    """Board power or TDP; of an Apple chip, the most that the whole machine draws; None where nobody publishes it."""
    cores: int
    """Cores of a CPU, or 1."""
    buy: Price | None
    """List price at launch."""
    rent_per_hour: Price | None
    """On demand, one device."""
    source: str
    """Where the figures come from."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of catalogue.toml, in the units of datasheets."""

    name: str
    kind: DeviceKind
    tflops: dict[NumberFormat, float]
    memory_gib: float
    memory_gb_per_s: float
    source: str
    aliases: tuple[str, ...] = ()
    power_w: float | None = None
    cores: int = 1
    buy: Price | None = None
    rent: Price | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hardware: tuple[_Entry, ...]


@cache
def everything() -> tuple[Hardware, ...]:
    """Return every entry of the catalogue, in the order of its file."""
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    return tuple(_hardware(entry) for entry in msgspec.convert(tomllib.loads(text), _File).hardware)


def lookup(name: str) -> Hardware:
    """Return the entry that a name means: "RTX 3080", "rtx3080", "NVIDIA GeForce RTX 3080 10GB" are one.

    Case, spaces, punctuation and the vendor's words do not matter.

    Raises:
        ConfigError: nothing has the name (the text gives the nearest ones), or several entries do ("H100").
    """
    index = _index()
    key = _key(name)
    found = index.get(key, ())
    if len(found) == 1:
        return found[0]
    shown = repr(name[:_LONGEST_NAME])
    if found:
        raise ConfigError(f"{shown} means several: {_listed(found)}; name one of them in full")
    nearest = difflib.get_close_matches(key[:_LONGEST_NAME], index, n=8, cutoff=0.6)
    alike = tuple(dict.fromkeys(each.name for near in nearest for each in index[near]))[:5]
    hint = f"nearest: {', '.join(alike)}" if alike else f"nothing is spelled alike among {_listed(everything())}"
    raise ConfigError(
        f"{shown} is not in the hardware catalogue; {hint}. Choose one, or describe the machine by figures of its own: "
        "matmul_tflops, memory_gb and memory_gb_per_s"
    )


def _listed(entries: tuple[Hardware, ...]) -> str:
    return ", ".join(each.name for each in entries)


def _key(name: str) -> str:
    return _VENDOR_WORDS.sub("", re.sub(r"[^a-z0-9]", "", name.casefold()))


@cache
def _index() -> dict[str, tuple[Hardware, ...]]:
    """Return the entries by key. A GPU is found with its memory at the end of its name, too."""
    index: dict[str, tuple[Hardware, ...]] = {}
    for each in everything():
        keys = {_key(name) for name in (each.name, *each.aliases)}
        if each.kind != "cpu":
            keys |= {f"{key}{round(each.memory_bytes / (1 << 30))}gb" for key in keys}
        for key in sorted(keys):
            index[key] = (*index.get(key, ()), each)
    return index


def _hardware(entry: _Entry) -> Hardware:
    return Hardware(
        name=entry.name,
        aliases=entry.aliases,
        kind=entry.kind,
        # Rounded to whole FLOP/s, so that 29.8 becomes 29.8e12 and not a neighbour of it.
        flops_per_s={number: float(round(tflops * 1e12)) for number, tflops in entry.tflops.items()},
        memory_bytes=round(entry.memory_gib * (1 << 30)),
        memory_bytes_per_s=float(round(entry.memory_gb_per_s * 1e9)),
        power_w=entry.power_w,
        cores=entry.cores,
        buy=entry.buy,
        rent_per_hour=entry.rent,
        source=entry.source,
    )

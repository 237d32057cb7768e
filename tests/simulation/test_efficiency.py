"""Profiles of hardware that nobody has measured."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from fusionai.errors import ConfigError
from fusionai.scheduling.estimator import flops_rate
from fusionai.simulation.hardware.catalogue import DeviceKind, everything, lookup
from fusionai.simulation.hardware.efficiency import ASSUMED, Efficiency, profile_of

ALL = Efficiency(
    matmul=1.0, attention=1.0, convolution=1.0, memory=1.0, overhead_s=0.0, provenance="measured", note="peak"
)


@pytest.mark.parametrize("kind", get_args(DeviceKind))
def test_every_kind_has_assumed_figures(kind: DeviceKind) -> None:
    assert ASSUMED[kind].provenance == "assumed"
    assert ASSUMED[kind].note


def test_no_comparison_of_gpus_is_decided_by_an_assumption() -> None:
    assert ASSUMED["consumer-gpu"] == ASSUMED["datacentre-gpu"]


def test_a_profile_has_the_rates_that_the_estimator_reads() -> None:
    card = lookup("RTX 3080")
    profile = profile_of(card)
    assumed = ASSUMED["consumer-gpu"]
    assert flops_rate(profile, "matmul", "fp32") == assumed.matmul * 29.8e12
    assert flops_rate(profile, "matmul", "bf16") == assumed.matmul * 59.5e12
    assert flops_rate(profile, "attention", "fp32") == assumed.attention * 29.8e12
    assert flops_rate(profile, "convolution", "bf16") == assumed.convolution * 59.5e12
    assert profile.memory_bytes_per_s == assumed.memory * 760e9
    assert profile.memory_bytes == int(0.9 * (10 << 30))
    assert profile.overhead_s == assumed.overhead_s
    assert profile.name == card.name


def test_rates_of_other_formats_must_be_asked_for() -> None:
    card = lookup("H100 PCIe")
    assert flops_rate(profile_of(card, efficiency=ALL), "matmul", "fp32") == 51.2e12
    assert flops_rate(profile_of(card, efficiency=ALL, fp32_as="tf32"), "matmul", "fp32") == 378e12


def test_a_card_older_than_bf16_computes_it_as_fp32() -> None:
    card = lookup("V100 16GB")
    assert flops_rate(profile_of(card, efficiency=ALL), "matmul", "bf16") == 15.7e12
    assert flops_rate(profile_of(card, efficiency=ALL, half_as="fp16"), "matmul", "bf16") == 125e12


@pytest.mark.parametrize(
    ("name", "device", "threads"),
    [("RTX 4090", "cuda:0", 1), ("MI300X", "cuda:0", 1), ("M1", "mps", 1), ("EPYC 7763", "cpu", 64)],
)
def test_devices(name: str, device: str, threads: int) -> None:
    profile = profile_of(lookup(name))
    assert (profile.device, profile.threads) == (device, threads)


def test_every_entry_has_a_profile() -> None:
    for entry in everything():
        profile = profile_of(entry)
        assert all(rate > 0 for rate in profile.flops_per_s.values())
        assert 0 < profile.memory_bytes < entry.memory_bytes
        assert "assumed" not in profile.name


@pytest.mark.parametrize(
    ("field", "value"),
    [("matmul", 0.0), ("attention", -1.0), ("convolution", float("nan")), ("memory", 2.0), ("overhead_s", -1e-6)],
)
def test_shares_are_shares(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"efficiency\.{field} must be .*got {value}"):
        msgspec.convert({**msgspec.to_builtins(ALL), field: value}, Efficiency)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_memory_shares_are_shares(share: float) -> None:
    with pytest.raises(ConfigError, match="memory_share must be"):
        profile_of(lookup("T4"), memory_share=share)

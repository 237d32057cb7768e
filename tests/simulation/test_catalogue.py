"""The catalogue's figures, and the names under which they are found."""

from __future__ import annotations

import datetime

import pytest

from fusionai.errors import ConfigError
from fusionai.simulation.hardware.catalogue import Hardware, Price, everything, lookup


@pytest.mark.parametrize(
    ("name", "number", "tflops"),
    [
        ("RTX 3080 10GB", "fp16", 59.5),
        ("RTX 3080 10GB", "tf32", 29.8),
        ("RTX 4090", "fp16", 165.2),
        ("RTX 5090", "bf16", 209.5),
        ("A100 SXM 80GB", "bf16", 312),
        ("H100 PCIe", "fp16", 756),
        ("H100 PCIe", "bf16", 756),
        ("H100 PCIe", "tf32", 378),
        ("H100 SXM", "fp16", 989),
        ("MI300X", "bf16", 1307.4),
    ],
)
def test_headline_figures(name: str, number: str, tflops: float) -> None:
    assert {**lookup(name).flops_per_s}[number] == tflops * 1e12  # type: ignore[index]


def test_fifty_cards_for_games_are_four_of_a_datacentre() -> None:
    """The parity that FusionAI is about: 50 x RTX 3080 against 4 x H100 PCIe, dense fp16 with fp32 accumulation."""
    many, few = 50 * lookup("RTX 3080").flops_per_s["fp16"], 4 * lookup("H100 PCIe").flops_per_s["fp16"]
    assert many == 2975e12
    assert few == 3024e12


@pytest.mark.parametrize("entry", everything(), ids=lambda entry: entry.name)
def test_an_entry_is_sane(entry: Hardware) -> None:
    rates = entry.flops_per_s
    assert 1e12 < rates["fp32"] < 2e14
    for number in ("tf32", "fp16", "bf16"):
        assert rates.get(number, rates["fp32"]) >= rates["fp32"]
    if "bf16" in rates:
        assert rates["bf16"] == rates["fp16"]
    if "tf32" in rates:
        # Half the rate of fp16 on every tensor core so far; datasheets round.
        assert rates["tf32"] == pytest.approx(rates["fp16"] / 2, rel=0.02)
    assert 8 << 30 <= entry.memory_bytes <= 6 << 40
    assert 60e9 < entry.memory_bytes_per_s < 6e12
    assert entry.power_w is None or 30 < entry.power_w < 1000
    assert entry.source
    assert entry.kind == "cpu" or entry.cores == 1
    for price, least, most in ((entry.buy, 300, 15_000), (entry.rent_per_hour, 0.3, 10)):
        assert price is None or sane(price, least, most)


def sane(price: Price, least: float, most: float) -> bool:
    return least < price.usd < most and bool(price.source) and price.date > datetime.date(2017, 1, 1)


def test_rents_say_which_cloud_published_them() -> None:
    rents = [each.rent_per_hour for each in everything() if each.rent_per_hour is not None]
    assert len(rents) >= 8
    assert all("published on-demand price, " in rent.source for rent in rents)


def test_consumer_cards_count_fp32_accumulation() -> None:
    """On GeForce cards since Ampere it is twice the rate of plain fp32, and not four times."""
    cards = [each for each in everything() if "GeForce" in each.name and "bf16" in each.flops_per_s]
    assert len(cards) >= 12
    for card in cards:
        assert card.flops_per_s["fp16"] == pytest.approx(2 * card.flops_per_s["fp32"], rel=0.01)


def test_every_entry_is_found_by_its_name() -> None:
    assert len({each.name for each in everything()}) == len(everything()) >= 40
    for each in everything():
        assert lookup(each.name) is each


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx3080", "NVIDIA GeForce RTX 3080 10GB"),
        ("RTX 3080", "NVIDIA GeForce RTX 3080 10GB"),
        ("3080", "NVIDIA GeForce RTX 3080 10GB"),
        ("nvidia geforce rtx-3080 12 gb", "NVIDIA GeForce RTX 3080 12GB"),
        ("GeForce RTX 4090 24GB", "NVIDIA GeForce RTX 4090"),
        ("4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti 16GB"),
        ("7900XTX", "AMD Radeon RX 7900 XTX"),
        ("Tesla T4", "NVIDIA T4"),
        ("V100 32GB", "NVIDIA V100 SXM2 32GB"),
        # As drivers name them.
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 SXM 40GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("Tesla V100-SXM2-16GB", "NVIDIA V100 SXM2 16GB"),
        ("M2 Ultra", "Apple M2 Ultra 192GB"),
        ("i9-13900k", "Intel Core i9-13900K"),
        ("xeon 8380", "Intel Xeon Platinum 8380"),
    ],
)
def test_names_that_people_use(name: str, found: str) -> None:
    assert lookup(name).name == found


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("H100", ["NVIDIA H100 PCIe", "NVIDIA H100 SXM"]),
        ("a100 80gb", ["NVIDIA A100 PCIe 80GB", "NVIDIA A100 SXM 80GB"]),
        ("A100 40GB", ["NVIDIA A100 PCIe 40GB", "NVIDIA A100 SXM 40GB"]),
        ("A100 SXM", ["NVIDIA A100 SXM 40GB", "NVIDIA A100 SXM 80GB"]),
        ("V100", ["NVIDIA V100 SXM2 16GB", "NVIDIA V100 SXM2 32GB"]),
    ],
)
def test_a_name_of_several_is_refused_with_all_of_them(name: str, candidates: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"means several: {', '.join(candidates)};") as caught:
        lookup(name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"), [("RTX 5070", "RTX 5070 Ti"), ("RTX 3800", "RTX 3080"), ("MI300", "MI300X"), ("M1 Mux", "M1 Max")]
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is not in the hardware catalogue; nearest: .*{near}.*memory_gb"):
        lookup(name)


@pytest.mark.parametrize("name", ["", "GeForce", "quantum", "x" * 100_000, "é" * 50])
def test_a_name_like_none_gets_all_of_them(name: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing is spelled alike among .*RTX 4090.*matmul_tflops") as caught:
        lookup(name)
    assert len(str(caught.value)) < 2500

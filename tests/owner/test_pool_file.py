"""Pool files: what they mean, what is wrong with wrong ones, and docs/pool-file.md against the code."""

from __future__ import annotations

import functools
import json
import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionai.errors import ConfigError
from fusionai.owner.pool_file import PoolFile, parse_pool, pool_from, read_pool
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.efficiency import profile_of
from fusionai.simulation.hardware.what_if_pool import WhatIfPool

PAGE = (Path(__file__).resolve().parents[2] / "docs/pool-file.md").read_text(encoding="utf-8")


def example() -> WhatIfPool:
    match = re.search(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None
    return parse_pool(match[1])


def machine(**fields: Any) -> dict[str, Any]:
    """Return a machine of the catalogue; a field that is None is left out."""
    return without_none({"gpu": "RTX 3080", "up_mbps": 40, "down_mbps": 250, **fields})


def own(**fields: Any) -> dict[str, Any]:
    """Return a machine with figures of its own."""
    figures = {"matmul_tflops": 5.0, "memory_gb": 8, "memory_gb_per_s": 100.0}
    return without_none({"up_mbps": 40, "down_mbps": 250, **figures, **fields})


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def load(*machines: dict[str, Any], **tables: Any) -> WhatIfPool:
    return pool_from({"machines": list(machines), **tables}, source="pool.toml")


# --- what files mean ------------------------------------------------------------------------------------------------


def test_the_example_of_the_page() -> None:
    pool = example()
    assert [each.name for each in pool.members][:2] == ["home-1", "home-2"]
    assert [each.name for each in pool.members][-2:] == ["campus-8", "measured"]
    assert len(pool.members) == 59
    assert pool.owner is not None
    assert pool.owner.name == "owner"
    assert pool.owner_index == 59
    assert pool.machines[59] is pool.owner
    assert pool.hardware[0] is not None
    assert pool.hardware[0].name == "NVIDIA GeForce RTX 3080 10GB"
    assert pool.hardware[58] is None
    assert pool.members[50].device.memory_bytes == 16 * 10**9
    measured = pool.members[58]
    assert measured.device.flops_per_s == {"matmul": 9.5e12, "matmul.bf16": 31e12}
    assert measured.device.memory_bytes == 7_500_000_000
    assert not measured.dialable
    assert pool.members[0].dialable


def test_links_are_the_least_of_uplink_downlink_and_route() -> None:
    pool = example()
    home, campus, measured = 0, 50, 58
    assert pool.link(home, 1) == LinkProfile(rtt_s=0.015, bandwidth_bytes_per_s=40e6 / 8)
    assert pool.link(campus, 51) == LinkProfile(rtt_s=0.030, bandwidth_bytes_per_s=1000e6 / 8)
    assert pool.link(campus, measured) == LinkProfile(rtt_s=0.030, bandwidth_bytes_per_s=100e6 / 8)
    assert pool.link(campus, home) == LinkProfile(rtt_s=0.095, bandwidth_bytes_per_s=250e6 / 8)
    assert pool.link(home, campus) == LinkProfile(rtt_s=0.095, bandwidth_bytes_per_s=40e6 / 8)


def test_a_route_caps_what_crosses_it() -> None:
    regions = [{"name": "a"}, {"name": "b"}]
    wide = {"up_mbps": 1000, "down_mbps": 1000}
    machines = [machine(region="a", **wide), machine(region="b", **wide)]
    assert load(*machines, regions=regions).link(0, 1) == LinkProfile(0.1, 125e6)
    capped = load(*machines, regions=regions, routes=[{"between": ["b", "a"], "mbps": 80}])
    assert capped.link(0, 1) == capped.link(1, 0) == LinkProfile(0.1, 10e6)


def test_arrays_are_by_machine_and_by_region() -> None:
    pool = example()
    assert pool.up_bytes_per_s.shape == pool.down_bytes_per_s.shape == pool.region.shape == (60,)
    assert pool.regions == ("eu", "us")
    assert pool.region.tolist() == [0] * 50 + [1] * 9 + [0]
    assert np.array_equal(pool.rtt_s, [[0.015, 0.095], [0.095, 0.030]])
    assert pool.cap_bytes_per_s[0, 0] == np.inf
    assert pool.cap_bytes_per_s[0, 1] == pool.cap_bytes_per_s[1, 0] == 37.5e6


def test_a_planners_pool_has_every_link() -> None:
    what_if = example()
    pool = what_if.pool()
    assert pool.members == what_if.members
    assert len(pool.links) == 60 * 59
    assert pool.link("owner", "campus-1") == what_if.link(59, 50)
    assert pool.link("measured", "home-3") == what_if.link(58, 2)
    assert len({each.peer for each in what_if.machines}) == 60


def test_defaults() -> None:
    pool = load(machine(), machine(count=2), own())
    assert [each.name for each in pool.members] == ["m1", "m2-1", "m2-2", "m3"]
    assert pool.owner is None
    assert pool.owner_index is None
    assert pool.machines == pool.members
    assert pool.members[0].device == profile_of(lookup("RTX 3080"))
    assert pool.members[3].device.overhead_s == pytest.approx(10e-6)
    assert pool.members[3].device.device == "cuda:0"
    assert pool.link(0, 1).rtt_s == 0.02
    assert load(own(kind="cpu")).members[0].device.device == "cpu"
    assert load(machine(), regions=[{"name": "here"}]).regions == ("here",)


def test_profiles_of_the_catalogue_may_be_made_otherwise() -> None:
    pool = parse_pool(
        '[[machines]]\ngpu = "RTX 3080"\nup_mbps = 1\ndown_mbps = 1\n',
        profile=functools.partial(profile_of, fp32_as="tf32", memory_share=0.5),
    )
    assert pool.members[0].device.memory_bytes == 5 << 30


def test_ten_thousand_machines_load_at_once() -> None:
    started = time.process_time()
    pool = load(machine(count=9_000), own(count=1_000), owner=machine())
    assert pool.link(8_999, 9_500).bandwidth_bytes_per_s == 5e6
    assert time.process_time() - started < 5
    with pytest.raises(ConfigError, match="10,001 machines, and links are written out for at most 1,000"):
        pool.pool()


# --- mistakes -------------------------------------------------------------------------------------------------------

REGIONS = [{"name": "eu"}, {"name": "us"}]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "machines is missing; add it"),
        ({"machines": []}, "machines is empty; add a [[machines]] table"),
        ({"machines": {"gpu": "T4"}}, "machines must be an array of tables; write [[machines]] in double"),
        (
            {"machines": [{"gpu": "T4", "up_mbps": "40", "down_mbps": 1}]},
            "machines[0].up_mbps must be a number, got '40'; leave",
        ),
        ({"machine": []}, "machine = [] is no field of a pool file; the fields there are machines, owner, regions"),
        (
            {"machines": [machine(gpus="T4")]},
            "machines[0].gpus = 'T4' is no field of a pool file; the fields there are ",
        ),
        ({"machines": [machine()], "owner": machine(count=2)}, "owner.count = 2 is no field"),
        (
            {"machines": [machine()], "links": {"rtt": 2}},
            "links.rtt = 2 is no field of a pool file; the fields there are rtt",
        ),
        ({"machines": [{"gpu": "T4"}]}, "machines[0].up_mbps is missing"),
        ({"machines": [machine(), machine(up_mbps="fast")]}, "machines[1].up_mbps must be a number, got 'fast'"),
        ({"machines": [machine(gpu=3080)]}, "machines[0].gpu must be a text in quotes, got 3080"),
        ({"machines": [machine(dialable="no")]}, "machines[0].dialable must be true or false, got 'no'"),
        ({"machines": [machine(count=1.5)]}, "machines[0].count must be a whole number, got 1.5"),
        (
            {"machines": [machine(), machine(), machine(up_mbps=-3)]},
            "machines[2].up_mbps must be between 0.001 and 1e+07, got -3",
        ),
        (
            {"machines": [machine(down_mbps=float("nan"))]},
            "machines[0].down_mbps must be between 0.001 and 1e+07, got nan",
        ),
        ({"machines": [machine(up_mbps=float("inf"))]}, "machines[0].up_mbps must be between 0.001 and 1e+07, got inf"),
        ({"machines": [machine(up_mbps=10**400)]}, "machines[0].up_mbps: Number out of range, got 1000"),
        (
            {"machines": [machine(up_mbps=10**5000)]},
            "machines[0].up_mbps: Number out of range, got a number of thousands",
        ),
        ({"machines": [machine(count=0)]}, "machines[0].count must be between 1 and 100000, got 0"),
        ({"machines": [machine(count=10**5000)]}, "machines[0].count must be between 1 and 100000, got a number of"),
        (
            {"machines": [machine(count=60_000), machine(count=60_000)]},
            "machines has 120000 machines in all; plan for at most",
        ),
        (
            {"machines": [machine(gpu="RTX 3800")]},
            "machines[0].gpu: 'RTX 3800' is not in the hardware catalogue; nearest: ",
        ),
        (
            {"machines": [machine(gpu="H100")]},
            "machines[0].gpu: 'H100' means several: NVIDIA H100 PCIe, NVIDIA H100 SXM",
        ),
        ({"machines": [machine(gpu=None)]}, "machines[0].matmul_tflops is missing; give machines[0].gpu"),
        ({"machines": [own(memory_gb=None)]}, "machines[0].memory_gb is missing; give machines[0].gpu"),
        (
            {"machines": [machine(matmul_tflops=3.0)]},
            "machines[0].matmul_tflops = 3.0 stands beside machines[0].gpu = 'RTX 3080'",
        ),
        ({"machines": [machine(kind="cpu")]}, "machines[0].kind = cpu stands beside machines[0].gpu"),
        (
            {"machines": [own(kind="fpga")]},
            "machines[0].kind must be one of consumer-gpu, datacentre-gpu, apple, cpu, got 'fpga'",
        ),
        ({"machines": [own(matmul_tflops=0)]}, "machines[0].matmul_tflops must be between 1e-06 and 1e+06, got 0"),
        (
            {"machines": [own(matmul_bf16_tflops=-1)]},
            "machines[0].matmul_bf16_tflops must be between 1e-06 and 1e+06, got -1",
        ),
        ({"machines": [own(memory_gb=float("nan"))]}, "machines[0].memory_gb must be between 0.001 and 1e+06, got nan"),
        ({"machines": [own(memory_gb_per_s=0)]}, "machines[0].memory_gb_per_s must be between 0.001 and 1e+06, got 0"),
        ({"machines": [own(overhead_us=-1)]}, "machines[0].overhead_us must be between 0 and 1e+06, got -1"),
        (
            {"machines": [machine(memory="lots")]},
            "machines[0].memory: 'lots' is no amount of memory; write such as 8GB",
        ),
        (
            {"machines": [machine(memory="12GB")]},
            "machines[0].memory = '12GB' is more than the device has (10,737,418,240 bytes)",
        ),
        (
            {"machines": [own(memory="9GB")]},
            "machines[0].memory = '9GB' is more than the device has (8,000,000,000 bytes)",
        ),
        (
            {"machines": [machine(gpu="EPYC 7763")]},
            "machines[0].memory is missing, and AMD EPYC 7763 has none of its own",
        ),
        (
            {"machines": [machine(name="a>b")]},
            "machines[0].name must be 1-80 letters, digits, spaces or any of -_. and is 'a>b'",
        ),
        ({"machines": [machine(name="")]}, "machines[0].name must be 1-80 letters"),
        (
            {"machines": [machine(name="a"), machine(name="a")]},
            "machines[1].name gives a machine the name 'a', which machines[0] has; rename one",
        ),
        (
            {"machines": [machine(name="a", count=3), machine(name="a-2")]},
            "machines[1].name gives a machine the name 'a-2', which machines[0] has; rename one",
        ),
        (
            {"machines": [machine(name="x")], "owner": machine(name="x")},
            "owner.name gives a machine the name 'x', which machines[0] has",
        ),
        (
            {"machines": [machine(region="eu")]},
            "machines[0].region = 'eu' is not declared (there is no [[regions]] table); add a [[regions]]",
        ),
        (
            {"machines": [machine(region="asia")], "regions": REGIONS},
            "machines[0].region = 'asia' is not declared (there is eu, us)",
        ),
        ({"machines": [machine()], "regions": REGIONS}, "machines[0].region is missing; it is one of eu, us"),
        ({"machines": [machine()], "owner": machine(region="x")}, "owner.region = 'x' is not declared"),
        ({"machines": [machine()], "regions": [{"name": "eu"}] * 2}, "regions[1].name = 'eu' is declared twice"),
        (
            {"machines": [machine()], "regions": [{"name": "eu", "rtt_ms": -1}]},
            "regions[0].rtt_ms must be between 0 and 60000",
        ),
        ({"machines": [machine()], "regions": [{"name": f"r{n}"} for n in range(257)]}, "regions has 257 tables"),
        (
            {"machines": [machine()], "links": {"rtt_ms": float("nan")}},
            "links.rtt_ms must be between 0 and 60000, got nan",
        ),
        (
            {"machines": [machine()], "links": {"across_rtt_ms": 1e9}},
            "links.across_rtt_ms must be between 0 and 60000, got 1000000000",
        ),
    ],
)
def test_mistakes_name_file_field_value_and_remedy(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pool_from(table, source="pool.toml")
    assert str(caught.value).startswith(f"pool.toml: {said}")


@pytest.mark.parametrize(
    ("route", "said"),
    [
        ({"between": ["eu"]}, "routes[0].between must be an array of 2, got ['eu']"),
        ({"between": ["eu", 1]}, "routes[0].between[1] must be a text in quotes, got 1"),
        ({"between": ["eu", "mars"]}, "routes[0].between[1] = 'mars' is not declared (there is eu, us)"),
        ({"between": ["eu", "eu"]}, "routes[0].between = ['eu', 'eu'] is one region; set the rtt_ms of [[regions]]"),
        ({"between": ["eu", "us"], "rtt_ms": -5}, "routes[0].rtt_ms must be between 0 and 60000, got -5"),
        ({"between": ["eu", "us"], "mbps": 0}, "routes[0].mbps must be between 0.001 and 1e+07, got 0"),
        ({"between": ["eu", "us"], "loss": 0}, "routes[0].loss = 0 is no field of a pool file"),
    ],
)
def test_mistakes_in_routes(route: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(machine(region="eu"), regions=REGIONS, routes=[route])
    assert str(caught.value).startswith(f"pool.toml: {said}")


def test_a_pair_of_regions_has_one_route() -> None:
    with pytest.raises(ConfigError, match=r"routes\[1\]\.between = \['us', 'eu'\] has a route already"):
        load(machine(region="eu"), regions=REGIONS, routes=[{"between": ["eu", "us"]}, {"between": ["us", "eu"]}])


@pytest.mark.parametrize(
    "text",
    ["[[machines", "x = " + "[" * 5000, "x = " + "9" * 5000, "a = 1\na = 2"],
    ids=["cut", "deep", "long", "twice"],
)
def test_what_is_not_toml(text: str) -> None:
    with pytest.raises(ConfigError, match=r"pool\.toml is not valid TOML"):
        parse_pool(text, source="pool.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml does not exist"):
        read_pool(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pool(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.toml cannot be read"):
        read_pool(tmp_path / "latin.toml")
    (tmp_path / "pool.toml").write_text('[[machines]]\ngpu = "T4"\nup_mbps = 1\ndown_mbps = -1\n')
    with pytest.raises(ConfigError, match=r"pool\.toml: machines\[0\]\.down_mbps must be"):
        read_pool(tmp_path / "pool.toml")


# --- any table at all -----------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["RTX 3080", "H100", "eu"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def tables_like(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw tables with some of the fields of `kind`, each of them right, or anything."""
    plausible = {
        "gpu": st.sampled_from(["RTX 3080", "T4", "EPYC 7763"]),
        "up_mbps": st.floats(0.001, 1e4),
        "down_mbps": st.integers(1, 1000),
        "count": st.integers(-1, 50),
        "region": st.sampled_from(["eu", "us"]),
        "memory": st.sampled_from(["4GB", "1e400", "-1"]),
    }
    names = [field.name for field in msgspec.structs.fields(kind)]
    return st.fixed_dictionaries({}, optional={name: plausible.get(name, VALUES) | VALUES for name in names})


MACHINE = st.builds(
    lambda extra: {**machine(), **extra}, tables_like(get_args(get_type_hints(PoolFile)["machines"])[0])
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "machines": st.lists(MACHINE, max_size=3) | VALUES,
        "owner": MACHINE | VALUES,
        "regions": st.just(REGIONS) | st.lists(st.fixed_dictionaries({"name": LEAVES}), max_size=2) | VALUES,
        "links": st.fixed_dictionaries({}, optional={"rtt_ms": LEAVES, "across_rtt_ms": LEAVES}) | VALUES,
        "routes": st.lists(st.fixed_dictionaries({"between": st.just(["eu", "us"])}, optional={"mbps": LEAVES}))
        | VALUES,
    },
) | st.dictionaries(st.text(max_size=8), VALUES, max_size=3)


@settings(max_examples=200, deadline=None)
@given(table=FILES)
def test_any_table_is_a_pool_or_a_config_error(table: dict[str, Any]) -> None:
    said = "pool.toml: "
    try:
        pool = pool_from(table, source="pool.toml")
    except ConfigError as error:
        said = str(error)
    else:
        assert len(pool.hardware) == len(pool.up_bytes_per_s) == len(pool.region) == len(pool.machines)
        link = pool.link(0, len(pool.machines) - 1)
        assert 0 < link.bandwidth_bytes_per_s < float("inf")
        assert 0 <= link.rtt_s <= 60
    assert said.startswith("pool.toml: ")


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from('[]machines="gpu\n.,{}0-_# éT4'), max_size=60))
def test_any_text_is_a_pool_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_pool(text)


# --- the page -------------------------------------------------------------------------------------------------------

KINDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def written_kind(kind: Any) -> str:
    options = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is Literal:
        words = [f'`"{each}"`' for each in options]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if get_origin(kind) is tuple:
        return "texts"
    return written_kind(options[0]) if options else KINDS[kind]


def written_default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


def coded() -> Iterator[tuple[str, str, str, str]]:
    """Yield (table, field, type, default) as the page should have them."""
    for table, kind in get_type_hints(PoolFile).items():
        struct = next((each for each in get_args(kind) if isinstance(each, type)), kind)
        hints = get_type_hints(struct)
        for field in msgspec.structs.fields(struct):
            yield table, field.name, written_kind(hints[field.name]), written_default(field)


def documented() -> Iterator[tuple[str, str, str, str]]:
    table = ""
    for line in PAGE.splitlines():
        if match := re.fullmatch(r"## `\[+(\w+)\]+`", line):
            table = match[1]
        elif match := re.fullmatch(r"\| `(\w+)` \| (.*?) \| (.*?) \|(.*)\|", line):
            yield table, match[1], match[2], match[3]


def test_every_field_is_documented_as_it_is() -> None:
    assert sorted(documented()) == sorted(coded())


def test_the_mistake_that_the_page_shows() -> None:
    match = re.search(r"`pool\.toml: (machines\[2\]\.up_mbps must be .*), got -3\.0`", PAGE)
    assert match is not None
    wrong = tomllib.loads("up_mbps = -3.0")
    with pytest.raises(ConfigError, match=re.escape(match[1])):
        load(machine(), machine(), machine(**wrong))

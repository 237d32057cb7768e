"""Time and memory of capturing transformers into OP-DAGs, and of cutting the largest.

    python benchmarks/capture.py [--json]

Every model is captured in a process of its own, so that its peak memory is its own: 24-layer models of GPT-2-medium and
Llama shape with their weights, and a 70B Llama shape on the meta device, captured and cut into 8 stages at the
places where the fewest bytes cross.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fusionai.graph.capture import capture_transformers
from fusionai.graph.cuts import boundary_bytes, crossing_bytes, cut, cut_points
from fusionai.graph.encoding import content_hash, encode

STAGES = 8
SIZES = {"s0": 1, "s1": 4096}
"""One sequence of 4,096 tokens a microbatch, for the 70B shape."""


@dataclass(frozen=True)
class Measurement:
    """One model's capture."""

    model: str
    parameters: int
    layers: int
    operators: int
    build_s: float
    capture_s: float
    full_trace_s: float | None
    cut_s: float | None
    boundary_bytes: int | None
    """Bytes of one microbatch over all cuts, forward."""
    json_bytes: int
    content_hash: str
    peak_memory_bytes: int
    before_capture_bytes: int
    """Resident memory with the model built and nothing captured."""


def gpt2_medium() -> PreTrainedModel:
    """Return a model of GPT-2-medium's shape."""
    return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def llama_24() -> PreTrainedModel:
    """Return a 24-layer Llama of about 270 million parameters."""
    config = LlamaConfig(
        hidden_size=896, intermediate_size=2432, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    )
    return LlamaForCausalLM(config)


def llama_70b() -> PreTrainedModel:
    """Return a Llama of 70B shape without data."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], bool, bool]] = {
    "GPT-2 medium shape, 24 layers": (gpt2_medium, True, False),
    "Llama, 24 layers": (llama_24, True, False),
    "Llama 70B shape on meta, 80 layers": (llama_70b, False, True),
}
"""Each with whether to trace it whole as well, and whether to cut it."""


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, or the present one where a system keeps no peak."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    try:
        import resource
    except ImportError:
        return int(memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def measure(name: str) -> Measurement:
    """Build, capture and where asked cut one model; to run in a fresh process."""
    build, whole, cutting = MODELS[name]
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    model = build()
    built_s = time.perf_counter()
    before_bytes = int(psutil.Process().memory_info().rss)
    graph = capture_transformers(model).graph
    captured_s = time.perf_counter()
    cut_s = crossing = None
    if cutting:
        points = cut_points(graph, SIZES)
        bytes_at = crossing_bytes(graph, SIZES)
        wanted = [len(graph.nodes) * stage // STAGES for stage in range(1, STAGES)]
        cheap = [point for point in points if bytes_at[point] <= 1.001 * min(bytes_at[each] for each in points)]
        positions = [min(cheap, key=lambda point, at=at: abs(point - at)) for at in wanted]
        stages = cut(graph, positions)
        crossing = sum(forward for forward, _ in boundary_bytes(stages, SIZES).values())
        cut_s = time.perf_counter() - captured_s
    peak_bytes = peak_memory_bytes()
    full_trace_s = None
    if whole:
        again_s = time.perf_counter()
        full = capture_transformers(model, repeats=False).graph
        full_trace_s = time.perf_counter() - again_s
        assert full == graph, "tracing every layer gives another graph"
    return Measurement(
        model=name,
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        operators=len(graph.nodes),
        build_s=built_s - started_s,
        capture_s=captured_s - built_s,
        full_trace_s=full_trace_s,
        cut_s=cut_s,
        boundary_bytes=crossing,
        json_bytes=len(encode(graph)),
        content_hash=content_hash(graph),
        peak_memory_bytes=peak_bytes,
        before_capture_bytes=before_bytes,
    )


def in_fresh_process(name: str) -> Measurement:
    """Run `measure` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name).result(timeout=600)


def report(results: list[Measurement]) -> str:
    """Return the results as a table."""
    lines = [
        f"{'model':36} {'parameters':>15} {'operators':>9} {'capture':>9} {'full':>9} {'cut in 8':>9} "
        f"{'JSON':>9} {'memory':>9} {'of it new':>9}"
    ]
    for each in results:
        full = f"{each.full_trace_s:.1f} s" if each.full_trace_s is not None else "-"
        cutting = f"{each.cut_s:.1f} s" if each.cut_s is not None else "-"
        new_bytes = each.peak_memory_bytes - each.before_capture_bytes
        lines.append(
            f"{each.model:36} {each.parameters:15,} {each.operators:9,} {each.capture_s:7.1f} s {full:>9} "
            f"{cutting:>9} {each.json_bytes / 1e3:6.0f} kB {each.peak_memory_bytes / 1e6:6.0f} MB "
            f"{new_bytes / 1e6:6.0f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every model and print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = [in_fresh_process(name) for name in MODELS]
    if arguments.json:
        machine = {"platform": platform.platform(), "cpus": psutil.cpu_count(), "torch": torch.__version__}
        print(json.dumps({"machine": machine, "captures": [asdict(each) for each in results]}))
    else:
        print(report(results))


if __name__ == "__main__":
    main()

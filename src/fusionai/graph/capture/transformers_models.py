"""Capture of language models from transformers: attention and experts as operators that any plane can run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fusionai.errors import GraphError
from fusionai.graph.capture import trace_operators
from fusionai.graph.capture.attention_masks import AttentionKind, attention_kind
from fusionai.graph.capture.captured import Captured
from fusionai.graph.capture.inputs import Role
from fusionai.graph.capture.modes import training
from fusionai.graph.capture.modules import capture
from fusionai.graph.capture.own_positions import POSITIONS, takes_counted_positions

IMPLEMENTATION = "fusion_trace"
"""The name of our attention and experts in transformers' registries, during a capture only."""

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 16
"""Sizes of the example that is traced; both are dynamic."""

_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Arguments that attention modules pass on although they do not change attention."""


def capture_transformers(
    model: PreTrainedModel,
    task: Literal["causal", "masked"] = "causal",
    *,
    name: str = "",
    repeats: bool = True,
    validate_values: bool | None = None,
    evaluation: bool = True,
) -> Captured:
    """Capture a language model from transformers with its own loss.

    Inputs of the graph are `input_ids` and `labels`, int64 (batch, length), and `position_ids` where the model numbers
    its tokens 0..T-1 by itself (see `own_positions`). There is no attention mask: sequences are packed. Labels of -100
    do not count. With task "causal" the model shifts the labels itself; with "masked" a label stands where its token
    must be guessed. `evaluation` as in `capture`.

    Raises GraphError when the model cannot become an OP-DAG.
    """
    arguments = inspect.signature(model.forward).parameters
    if "labels" not in arguments:
        raise GraphError(
            f"{type(model).__name__} computes no loss from labels; use its {task} language-model class, or "
            "capture() with a loss"
        )
    fixed: dict[str, object] = {"use_cache": False} if task == "causal" else {}
    example = _example(model)
    roles: dict[str, Role] = {}
    if _counts_positions(model, example, fixed, argument=POSITIONS in arguments):
        example[POSITIONS] = torch.arange(example["input_ids"].shape[1]).expand_as(example["input_ids"]).contiguous()
        roles[POSITIONS] = "positions"
    return capture(
        model,
        example,
        roles=roles,
        name=name or str(model.config.model_type),
        fixed=fixed,
        repeats=repeats,
        validate_values=validate_values,
        evaluation=evaluation,
        tracing=lambda: _traceable(model),
    )


def _counts_positions(
    model: PreTrainedModel, example: Mapping[str, Tensor], fixed: Mapping[str, object], *, argument: bool
) -> bool:
    with training(model), _traceable(model):
        return takes_counted_positions(model, example, fixed, argument=argument)


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or EXAMPLE_LENGTH
    shape = (EXAMPLE_BATCH, max(2, min(EXAMPLE_LENGTH, longest)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    labels = torch.randint(0, config.vocab_size, shape, generator=generator)
    return {"input_ids": tokens, "labels": labels}


@contextmanager
def _traceable(model: PreTrainedModel) -> Iterator[None]:
    """Make a model use our attention and expert operators. Restore the model and the registries afterwards."""
    with ExitStack() as restore:
        for registry, ours in (
            (AttentionInterface, _attention),
            (AttentionMaskInterface, attention_kind),
            (ExpertsInterface, _experts),
        ):
            registry.register(IMPLEMENTATION, ours)
            restore.callback(registry._global_mapping.pop, IMPLEMENTATION, None)
        configs = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
        for config in configs.values():
            for field in ("_attn_implementation_internal", "_experts_implementation_internal"):
                if hasattr(config, field):
                    restore.callback(setattr, config, field, getattr(config, field))
                    setattr(config, field, IMPLEMENTATION)
        for each in model.modules():
            # Recomputing in backward is the execution plane's choice, not part of the model.
            if getattr(each, "gradient_checkpointing", False):
                restore.callback(setattr, each, "gradient_checkpointing", True)
                each.gradient_checkpointing = False
        yield


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the interface of transformers' implementations: (B, H, T, D) in, (B, T, H, D) out."""
    unknown = sorted(name for name, each in others.items() if each is not None and name not in _HARMLESS)
    if unknown:
        raise GraphError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which fusion.attention "
            "cannot express"
        )
    if isinstance(attention_mask, AttentionKind):
        causal, window = attention_mask.causal, attention_mask.window
    elif attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = int(sliding_window or 0)
    else:
        raise GraphError(f"{type(module).__name__} makes its own attention mask, which fusion.attention cannot express")
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    if dropout > 0:
        if window or softcap:
            raise GraphError(
                f"{type(module).__name__} drops out attention weights (p={dropout}) within a sliding window or "
                "softcap; set the attention dropout of its config to 0"
            )
        grouped = query.shape[1] != key.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    else:
        # The layer's number is set when the graph is assembled, by order.
        out = trace_operators.attention(query, key, value, 0, scale, window, float(softcap or 0.0), causal)
    return out.transpose(1, 2).contiguous(), None


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run a mixture of experts without shapes that depend on the routing, equal to transformers' grouped_mm.

    hidden_states (N, H), top_k_index and top_k_weights (N, K); rows are sorted by expert, each expert multiplies
    its own, and the results go back to their tokens.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise GraphError("the model is sharded by experts; load it without a tensor-parallel plan")
    per_token = top_k_index.size(-1)
    weights, chosen = top_k_weights.reshape(-1), top_k_index.reshape(-1)
    sorted_experts, order = torch.sort(chosen)
    experts = torch.arange(self.num_experts, device=chosen.device)
    ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    rows = hidden_states[order // per_token]

    def project(rows: Tensor, stem: str) -> Tensor:
        matrices = getattr(self, stem)
        if not self.is_transposed:
            matrices = matrices.transpose(-2, -1)
        out: Tensor = trace_operators.grouped_mm(rows.to(matrices.dtype), matrices, ends)
        return out + getattr(self, f"{stem}_bias")[sorted_experts] if self.has_bias else out

    first, activate = ("gate_up_proj", self._apply_gate) if self.has_gate else ("up_proj", self.act_fn)
    rows = activate(project(rows, first))
    rows = project(rows, "down_proj")
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * weights[order].unsqueeze(-1)
    rows = rows[torch.argsort(order)]
    summed = rows.view(hidden_states.size(0), per_token, hidden_states.size(-1)).sum(dim=1)
    return summed.to(hidden_states.dtype)

"""What a simulation of routing found."""

from __future__ import annotations

import msgspec


class RoutedPass(msgspec.Struct, frozen=True):
    """One pass that ran to its end; seconds of the run."""

    step: int
    """Steps committed before; the same again after a return to a snapshot."""
    stage: int
    peer: str
    backward: bool
    microbatch: int
    start_s: float
    end_s: float


class RoutingReport(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run."""

    finished: bool
    ended_because: str
    steps: int
    elapsed_s: float
    step_s: tuple[float, ...]
    """Of each committed step, those that a return to a snapshot undid among them."""
    passes_s: tuple[float, ...]
    """Of them, the part up to the last sum."""
    deaths: int
    """Of machines that held a stage."""
    joined: int
    """Machines that loaded a stage's state."""
    moved: int
    """Of them, those that left another stage for it."""
    rolled_back: int
    """Steps undone."""
    lost_cells: int
    """Passes of a microbatch at a stage that died with a machine."""
    recomputed_s: float
    """Seconds of passes that had begun before."""
    waived: int
    """Gradients that steps went without, by microbatch and stage."""
    busy_s: dict[str, float]
    """By machine: computing."""
    sent_bytes: float
    """Boundary tensors; sums and states apart."""
    passes: tuple[RoutedPass, ...] = ()
    """Of the first steps, as many as the scenario asks for, in the order of their ends."""

"""Which machine sends which weight to whom when a running job goes over to a new plan. Pure.

The owner, who gives the orders, and the broker, who has the machines linked before, reckon the same from both plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionai.errors import JobError
from fusionai.graph.model import SubDag, WeightKey


@dataclass(frozen=True, slots=True)
class Routes:
    """The way of every weight; machines are peers."""

    sources: dict[str, dict[WeightKey, str]]
    """By machine of the new plan: where each of its weights comes from. Itself: in memory."""
    targets: dict[str, dict[WeightKey, tuple[str, ...]]]
    """By machine of the running plan: where each weight that it is to send goes."""

    def pairs(self) -> dict[str, set[str]]:
        """Return for each machine those that it exchanges weights with, itself left out."""
        found: dict[str, set[str]] = {}
        for target, sources in self.sources.items():
            for source in set(sources.values()) - {target}:
                found.setdefault(source, set()).add(target)
                found.setdefault(target, set()).add(source)
        return found


def routes(running: Mapping[str, Sequence[WeightKey]], new: Mapping[str, Sequence[WeightKey]]) -> Routes:
    """Return the way of every weight from the machines of the running plan to those of the new one.

    Both tell the keys that a machine holds. A machine that holds a weight already keeps it. Of several holders of a
    tied weight, whose copies are equal, the one that has the fewest to send so far sends it.

    Raises JobError when nobody holds a weight.
    """
    holders: dict[WeightKey, list[str]] = {}
    for peer, keys in running.items():
        for key in keys:
            holders.setdefault(key, []).append(peer)
    load = dict.fromkeys(running, 0)
    sources: dict[str, dict[WeightKey, str]] = {}
    targets: dict[str, dict[WeightKey, tuple[str, ...]]] = {peer: {} for peer in running}
    for peer, keys in new.items():
        sources[peer] = {}
        for key in keys:
            known = holders.get(key)
            if not known:
                raise JobError(f"no machine of the running plan holds the weight {key!r}")
            source = peer if peer in known else min(known, key=lambda each: (load[each], each))
            load[source] += source != peer
            sources[peer][key] = source
            targets[source][key] = (*targets[source].get(key, ()), peer)
    return Routes(sources, targets)


def keys_by_peer(subdags: Sequence[SubDag], peers: Sequence[str]) -> dict[str, tuple[WeightKey, ...]]:
    """Return the weights that each machine holds, each once; `peers` are the stages' machines, by stage."""
    found: dict[str, dict[WeightKey, None]] = {}
    for subdag in subdags:
        held = found.setdefault(peers[subdag.index], {})
        held.update(dict.fromkeys(weight.key for weight in subdag.weights))
    return {peer: tuple(keys) for peer, keys in found.items()}

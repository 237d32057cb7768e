"""The planner: from a problem to the fastest plan found."""

from __future__ import annotations

from fusionai.scheduling.explain import left_out_line
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.many_pipelines import best_pipelines
from fusionai.scheduling.search.one_pipeline import best_pipeline
from fusionai.scheduling.shortage import no_compnodes, no_link_with_owner


def plan(problem: TrainingProblem) -> Plan:
    """Return the fastest plan found.

    Blocks for up to seconds, with ten thousand machines for up to a minute: call it in a thread.

    Raises PlacementError with what is missing when no plan meets memory, links, pins and limits, and ConfigError for
    limits that contradict each other or do not suit the graph.
    """
    problem.check_limits()
    staying = [each for each in problem.members if each.peer not in problem.limits.leaving]
    if not staying:
        raise no_compnodes(problem.remedies)
    if not len(problem.candidates):
        assert problem.owner is not None, "without an owner every machine is a candidate"
        raise no_link_with_owner(staying, problem.owner, problem.remedies)
    if problem.limits.one_pipeline:
        best, bound_step_s = best_pipeline(problem), None
    else:
        best, bound_step_s = best_pipelines(problem)
    used = {machine for each in best.pipelines for machine in each.choice.machines}
    candidates = set(problem.candidates.tolist())
    notes = left_out_line(
        [problem.members[machine].name for machine in sorted(candidates - used)],
        [
            each.name
            for machine, each in enumerate(problem.members)
            if machine not in candidates and each.peer not in problem.limits.leaving
        ],
        chosen=problem.limits.compnodes > 0 or problem.limits.cuts is not None,
    )
    return best.plan(bound_step_s=bound_step_s, notes=notes)

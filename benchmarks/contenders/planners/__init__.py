"""What others do, in the planner's interface, so that every claim of being faster is a ratio within one run.

Each takes a `SwarmTask` and returns a `SwarmPlan`, its step predicted as the planner's own plans are. Routing by an
average of response times (SWARM, Learning@home) is not among them: it needs several machines on one stage.
"""

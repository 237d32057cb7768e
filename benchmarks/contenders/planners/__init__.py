"""Other systems' training planners.

Each takes a `TrainingProblem` and returns a `Plan`, whose step is predicted as the planner's own plans are. So every
claim of being faster is a ratio within one run.
"""

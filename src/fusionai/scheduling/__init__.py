"""Hardware profiles, the link matrix, the estimator and the planners."""

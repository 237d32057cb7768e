"""The side of the owner of a job: captures the model, submits it, drives it, keeps its results."""

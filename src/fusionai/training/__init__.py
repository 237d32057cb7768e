"""Training: the pipeline schedule, the step ledger, stages, the driver, data and checkpoints."""

"""What a pool that need not exist would give a job: its plan, its limits, and what other machines would change."""

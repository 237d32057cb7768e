"""Re-planning of a running job: the bytes to move count as time."""

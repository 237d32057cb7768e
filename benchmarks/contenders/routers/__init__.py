"""Routing of microbatches over stages that several machines hold. Decisions only: no clock, no network."""

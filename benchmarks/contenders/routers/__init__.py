"""Decisions about microbatches routed over stages that several machines hold: no clock, no network, no simulator."""

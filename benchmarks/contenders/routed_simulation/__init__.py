"""Microbatches routed over stages that several machines hold, simulated: queues, links, deaths and takeovers."""

"""A simulator of microbatches routed over stages that several machines hold: queues, links, deaths, takeovers."""

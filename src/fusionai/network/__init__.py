"""Identity, encrypted links, framing, credits, probes and emulated links. Knows nothing of jobs or graphs."""

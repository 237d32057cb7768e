"""The broker: registry of compnodes, link matrix, job life cycle, durable store."""

"""Plans of many pipelines for pools of many machines: clusters, chains, shares of the step, and the sum at its end."""

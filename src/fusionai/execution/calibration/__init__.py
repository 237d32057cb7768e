"""Measures the speed of a device: runs small OP-DAGs on its plane, and solves for the estimator's rates."""

"""What a device achieves, measured by running small OP-DAGs on its plane and solving for the estimator's rates."""

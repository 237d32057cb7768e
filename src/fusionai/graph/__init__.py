"""The IR plane: OP-DAGs as data, capture from torch modules, the operator vocabulary, cuts and costs."""

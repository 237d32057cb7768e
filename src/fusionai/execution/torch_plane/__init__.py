"""The torch plane: sub-DAGs as `torch.fx` modules on CPU, CUDA or MPS."""

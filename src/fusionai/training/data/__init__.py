"""Training data on the owner's machine: text sources, tokenizers, packed sequences, microbatches."""

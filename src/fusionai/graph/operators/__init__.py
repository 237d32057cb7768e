"""The operators of the vocabulary, one file a family. `fusionai.graph.vocabulary` gathers them."""

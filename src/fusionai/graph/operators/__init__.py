"""The operators of the vocabulary, one file for each family. `fusionai.graph.vocabulary` gathers them."""

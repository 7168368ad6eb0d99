"""Record one forward pass of a model as a graph of operators, with quantizers merged into their layers (Alg. 1)."""

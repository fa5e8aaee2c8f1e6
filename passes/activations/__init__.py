"""Activation sparsity: where inputs of layers become zero, and below which limits."""

"""CUDA kernels: written as CUDA C, compiled to cubins without a GPU."""

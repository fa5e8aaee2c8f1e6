"""Decoding and prefill of Llama shapes on a GPU, beside PyTorch and what the GPU can do.

    python -m benchmarks.gpu prepare FOLDER                       # anywhere: compiles, needs no GPU
    python -m benchmarks.gpu run FOLDER --out results/gpu.json    # on the GPU machine: core install and driver

Weights are random and made on the GPU, so that ``FOLDER`` holds kernels and programs alone.
"""

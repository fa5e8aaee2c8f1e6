"""Kernels to be checked and timed on a GPU machine that has neither the compiler nor PyTorch.

    python -m tilewright.runtime.bundle run FOLDER --out results.jsonl

A bundle is what ``tilewright tune MODEL --emit-bundle FOLDER`` writes: compiled kernels under several schedules, their
inputs, and the results that the reference gives. What is measured goes into a tuning database by
``tilewright tune db import results.jsonl``.
"""

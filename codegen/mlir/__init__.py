"""The MLIR backend: kernels written with the vector dialect, compiled ahead of time to objects."""

"""Schedules: the dataset of measured kernels, the cost model trained on it, and what both are worth."""

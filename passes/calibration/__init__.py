"""Choosing the numbers of quantized weights with data: calibration runs, statistics, and the methods that use them."""

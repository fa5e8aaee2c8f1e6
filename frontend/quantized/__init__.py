"""Checkpoints that are quantized already: their codes, scales and zero points as the IR has them, not rounded again."""

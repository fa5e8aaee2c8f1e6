"""Structured pruning: which channels, heads and layers there are, what they are worth, and graphs without some of them."""

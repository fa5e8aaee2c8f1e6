"""Which weights become exact zeros: patterns, methods that choose, and how much each layer gives."""

"""How good formats and methods of quantization, and models with zeros, are: the evaluation model, MiniLM on sentences."""

"""How good formats and methods of quantization, and models with zeros, are: on the evaluation model, and on sentences with MiniLM."""

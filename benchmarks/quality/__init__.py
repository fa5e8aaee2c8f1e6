"""How good formats and methods of quantization are: on the evaluation model, and on sentences with MiniLM."""

"""What vLLM does with the weights of layers, and what is done about it."""

"""nanollm: the training of a large language model, from scratch, in plain PyTorch."""

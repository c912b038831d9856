"""The recipe's student inside Megatron-core: the same weights, cut over its parallel axes."""

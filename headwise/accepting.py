"""Which tokens of a draft stay: the model's own choice, or chance that leaves its distribution as it is."""

"""evaluate: the same model with a coded cache and with the dense one, side by side."""

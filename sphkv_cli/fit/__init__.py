"""Fit codebooks: the frames and the ordered list of candidate codes of one model."""

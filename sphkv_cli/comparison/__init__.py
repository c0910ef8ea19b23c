"""compare: every published method and the polar codes at equal bytes, on the same tokens."""

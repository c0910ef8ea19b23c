"""generation: a cache of codes that takes the place of transformers' own."""

"""Finding and loading causal language models: packaged default, hub id, local folder, GGUF."""

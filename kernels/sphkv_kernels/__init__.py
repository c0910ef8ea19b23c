"""Paged KV caches in code form and the kernels that attend to them."""

"""Did torch run out of memory: a GPU has an error of its own for it, the CPU has not."""

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory could not be had."""
    # c10's CPU allocator raises a plain RuntimeError with these words.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

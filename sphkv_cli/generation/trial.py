"""A page of every tier, sealed and read, and a step into the frame and out of it: what cannot be
read fails now, not at the first seal.

The CUDA kernels of the tiers, of the frame and of the encoder are built on the way.
"""

from typing import Any

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.coded_part import LayerReader
from sphkv_cli.generation.layer_frame import Turns
from sphkv_cli.generation.layer_store import LayerStore
from sphkv_cli.generation.placed_tokens import Placement
from sphkv_cli.generation.store_state import NewTokens
from sphkv_cli.models.geometry import ModelGeometry
from sphkv_kernels.build import KernelBuildError
from sphkv_kernels.encode import prepare_encode
from sphkv_kernels.launch import KernelLaunchError
from sphkv_kernels.tier import PageError


def try_pages(store: LayerStore, reader: LayerReader, shape: ModelGeometry, model: Any) -> None:
    """Seal and read in one layer, and take a token into the frame.

    Raises:
        SphkvError: the pages cannot be read here; names the layer and the reason.
    """
    rule, device = store.rule, reader.frame.device
    n = rule.page_size * len(rule.tiers)
    generator = torch.Generator().manual_seed(0)

    def drawn(n_heads: int, n_tokens: int) -> Tensor:
        size = (1, n_heads, n_tokens, shape.head_dim)
        return torch.randn(size, generator=generator).to(device, model.dtype)

    page = torch.arange(n) // rule.page_size
    heads = page[:, None].expand(-1, shape.n_kv_heads)
    tokens, step = NewTokens(n, (tuple(range(n)),), (0,)), NewTokens(1, ((0,),), (n,))
    keys, values = drawn(shape.n_kv_heads, n), drawn(shape.n_kv_heads, n)
    try:
        if store.uses_kernel:
            for tier in rule.tiers:
                prepare_encode(tier, shape.head_dim, device)
        state = store.sealed(store.appended(None, keys, values, tokens), [Placement(heads, heads)])
        new = drawn(shape.n_kv_heads, 1)
        state = store.appended(state, new, new, step)
        asked = drawn(shape.n_q_heads, 1)
        output = reader.attend(state, asked, step)
        _try_step(reader, asked.bfloat16(), new.bfloat16())
    except (PageError, KernelBuildError, KernelLaunchError) as error:
        raise SphkvError(
            f"layer {store.layer}: its pages cannot be read here ({error})",
            "choose the reference backend, or other tiers",
        ) from error
    if not bool(torch.isfinite(output).all()):
        raise SphkvError(
            f"layer {store.layer}: a trial page reads back as NaN", "choose other tiers"
        )


def _try_step(reader: LayerReader, query: Tensor, key: Tensor) -> None:
    """What a decode step, of bfloat16 vectors, does before and after it attends."""
    frame, device = reader.frame, query.device
    n_kv_heads, d = key.shape[1], key.shape[3]
    entered = frame.enter(
        query[:, :, 0],
        key[:, :, 0],
        key[:, :, 0],
        tail=torch.zeros((2, n_kv_heads, d), dtype=torch.bfloat16, device=device),
        rows=torch.arange(2 * n_kv_heads, device=device),
        turns=Turns(torch.zeros(1, dtype=torch.int32, device=device)),
        with_offset=True,
    )
    frame.leave(entered.query, query.dtype)

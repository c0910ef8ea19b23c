"""`sphkv generate`: the same prompts continued greedily with the dense cache and the coded one.

Both run step by step from a cache that is really read; where they part, the dense run's own
probabilities say whether it was a near tie.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.capture.text import read_text
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.generation.options import GenerateOptions
from sphkv_cli.generation.result import Continuation, GenerationResult
from sphkv_cli.generation.spherical_cache import SphericalCache
from sphkv_cli.option_checks import refuse_given
from sphkv_cli.progress import NullProgress, Progress


def generate(
    options: GenerateOptions,
    allocation: Path | None,
    codebooks: Path | None,
    *,
    progress: Progress | None = None,
) -> GenerationResult:
    """Continue every prompt twice.

    Args:
        allocation: whose policy the coded cache keeps; or codebooks, one of whose tiers (or int8,
            or dense) it is in: exactly one of both.

    Raises:
        UsageError: neither or both artifacts, an option of the other one, an unknown tier, a prompt
            file that does not exist, or a budget by which nothing of a prompt would be coded.
        ArtifactError: an artifact is damaged or for another model.
        EnvironmentUnable: the model cannot be loaded, or the backend not be used, here.
        SphkvError: a prompt that cannot be read, is empty or too long for the model's context.
    """
    progress = progress or NullProgress()
    _require_one(options, allocation, codebooks)
    texts = _texts(options)
    # Opened whatever --model says: a wrong file is refused before a model is loaded.
    captured = _model_name(allocation, codebooks)
    if options.model is None and captured == "synthetic":
        raise SphkvError(
            f"{(allocation or codebooks)} is of a synthetic capture, there is no model to run",
            "generate with what was made from the capture of a model",
        )
    named = options.model or captured
    model, tokenizer = _load(options, named, progress)
    if allocation is not None:
        cache = SphericalCache.from_policy(
            allocation,
            model,
            window=options.window,
            budget=options.budget,
            backend=options.backend,
        )
        name = f"policy of {allocation.name}"
        if options.budget is not None:
            name += f" held at {options.budget}"
    else:
        assert codebooks is not None and options.tier is not None
        cache = SphericalCache.uniform(
            codebooks, options.tier, model, window=options.window, backend=options.backend
        )
        name = f"uniform {options.tier}"
    prompts = [_prompt(tokenizer, model, options, *text) for text in texts]
    for (title, _), ids in zip(texts, prompts, strict=True):
        _require_coded(cache.first_budget_tokens, title, ids.numel() + options.new_tokens, options)
    progress.start("generating", 2 * options.new_tokens * len(prompts), "tokens")
    found = []
    for (title, _), ids in zip(texts, prompts, strict=True):
        cache.reset()
        dense_cache = DynamicCache(config=model.config)
        dense = _greedy(model, ids, dense_cache, options.new_tokens, progress)
        coded = _greedy(model, ids, cache, options.new_tokens, progress)
        sizes = (
            sum(x.keys.nbytes + x.values.nbytes for x in dense_cache.layers),
            cache.memory_bytes() - cache.frame_bytes,
            cache.memory_bytes(),
        )
        n_coded = cache.n_coded_tokens
        found.append(_continuation(title, ids, dense, coded, n_coded, sizes, tokenizer.decode))
    progress.finish()
    return GenerationResult(
        model=named,
        cache=name,
        backend=cache.backend,
        dtype=str(model.dtype),
        budget=options.budget,
        frame_bytes=cache.frame_bytes,
        continuations=tuple(found),
    )


def _require_one(options: GenerateOptions, allocation: Path | None, codebooks: Path | None) -> None:
    """Refuse neither or both artifacts, and options of the other one."""
    if allocation is not None and codebooks is not None:
        raise UsageError("--allocation and --codebooks are two caches", "pass only one of them")
    if allocation is not None:
        refuse_given("with --allocation", {"--tier": options.tier is not None})
    elif codebooks is None:
        raise UsageError("there is nothing to code by", "pass --allocation or --codebooks")
    elif options.tier is None:
        raise UsageError("--codebooks needs --tier", "name one of its tiers, int8 or dense")
    else:
        refuse_given("with --codebooks", {"--budget": options.budget is not None})


@dataclass(frozen=True)
class _Run:
    """tokens (n) and the logits (n, vocabulary) that they were taken from."""

    tokens: Tensor
    logits: Tensor
    seconds: float


def _greedy(model: Any, ids: Tensor, cache: Any, n_tokens: int, progress: Progress) -> _Run:
    started = time.perf_counter()
    step, rows, tokens = ids[None].to(model.device), [], []
    with torch.inference_mode():
        for _ in range(n_tokens):
            logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            step = logits.argmax(dim=-1)[None]
            rows.append(logits[0].float().cpu())
            tokens.append(int(step))
            progress.advance()
    return _Run(torch.tensor(tokens), torch.stack(rows), time.perf_counter() - started)


def _continuation(
    name: str,
    ids: Tensor,
    dense: _Run,
    coded: _Run,
    n_coded: int,
    sizes: tuple[int, int, int],
    decode: Callable[[list[int]], str],
) -> Continuation:
    different = (dense.tokens != coded.tokens).nonzero()[:, 0].tolist()
    first = different[0] if different else None
    own = other = None
    if first is not None:
        probabilities = torch.softmax(dense.logits[first], dim=-1)
        own = float(probabilities[dense.tokens[first]])
        other = float(probabilities[coded.tokens[first]])
    return Continuation(
        name=name,
        n_prompt=int(ids.numel()),
        n_generated=len(dense.tokens),
        n_coded=n_coded,
        dense_text=decode(dense.tokens.tolist()),
        coded_text=decode(coded.tokens.tolist()),
        first_difference=first,
        probability_dense=own,
        probability_coded=other,
        dense_bytes=sizes[0],
        coded_token_bytes=sizes[1],
        coded_bytes=sizes[2],
        dense_seconds=dense.seconds,
        coded_seconds=coded.seconds,
    )


def _texts(options: GenerateOptions) -> list[tuple[str, str]]:
    given = [(f"prompt {i + 1}", text) for i, text in enumerate(options.prompts)]
    return given + [(path.name, read_text(path)) for path in options.prompt_files]


def _prompt(tokenizer: Any, model: Any, options: GenerateOptions, name: str, text: str) -> Tensor:
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)[: options.prompt_tokens]
    most = int(model.config.get_text_config(decoder=True).max_position_embeddings)
    if not ids.numel():
        raise SphkvError(f"{name} has no token", "give a prompt with text")
    if ids.numel() + options.new_tokens > most:
        raise SphkvError(
            f"{name} has {ids.numel()} tokens, with {options.new_tokens} new ones more than the "
            f"model's context of {most}",
            "pass --prompt-tokens, or fewer --new-tokens",
        )
    return ids


def _require_coded(first: int, name: str, n_tokens: int, options: GenerateOptions) -> None:
    """Refuse a budget that leaves all of a prompt and what follows it dense."""
    if n_tokens < first:
        raise UsageError(
            f"--budget {options.budget} codes nothing before {first:,} tokens, where it is twice "
            f"the plan's tables; {name} and what follows it have {n_tokens:,}",
            "give a larger budget or a longer prompt, or leave the budget away",
        )


def _model_name(allocation: Path | None, codebooks: Path | None) -> str:
    if allocation is not None:
        with AllocationReader(allocation) as reader:
            return reader.info.model
    assert codebooks is not None
    return CodebooksReader.open(codebooks).shape.model


def _load(options: GenerateOptions, named: str, progress: Progress) -> tuple[Any, Any]:
    from sphkv_cli.models.load import load_model, load_tokenizer
    from sphkv_cli.models.source import resolve_model

    source = resolve_model(
        named,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        gguf_file=options.gguf_file,
        cache_dir=None,
        progress=progress,
    )
    progress.start(f"loading {source.name}", None, "")
    loaded = load_model(source, options.load), load_tokenizer(source)
    progress.finish()
    return loaded

"""A capture without a model, whose statistics are known: for smoke tests and continuous checks.

Per layer and KV head, with d = head_dim and everything drawn from one seed:

    key      k_t = m + r_t,           m ~ 2 N(0, 1)^d (the head's mean), r_t ~ N(0, S)
    S        = Q diag(s) Q^T,         s_i falling from 2 to 1/2, mean 1; Q a Haar rotation
    sink     k_0 = m / 8              a short key; queries have a common part that finds it
    heavy    a few t                  tokens that queries ask for half of the time
    value    v_t ~ N(0, 1)^d          (the sink's is a tenth of that)
    query    q_t = 1.8 S^-1 r_j / d^(1/4) + w + n_t,   j <= t chosen, n_t ~ N(0, 1/4)

so that one or a few keys get most of the attention, as in real models. Query heads of a group share
m and Q. Nothing of it imitates a text; what is measured on it says nothing about a model.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture_info import SPLITS, CaptureInfo, DocumentInfo, LayerInfo, Split
from sphkv_cli.artifacts.capture_writer import (
    create_document,
    document_path,
    layer_path,
    to_storage,
    write_capture_info,
    write_statistics,
)
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.store import check_output, create_artifact, read_header
from sphkv_cli.capture.documents import query_positions, share_out
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.plan import CapturePlan, check_disk, make_plan
from sphkv_cli.capture.result import CaptureResult
from sphkv_cli.models.geometry import AttentionLayer, ModelGeometry
from sphkv_cli.progress import NullProgress, Progress

VOCABULARY = 1000
_ASKS_HEAVY = 0.5
_PEAK = 1.8

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeadStatistics:
    """What keys of one (layer, KV head) are drawn from, and the common part of its queries."""

    key_mean: Float64  # (head_dim,)
    key_covariance: Float64  # (head_dim, head_dim)
    query_common: Float64  # (group_size, head_dim)


def head_statistics(options: SyntheticOptions, layer: int, kv_head: int) -> HeadStatistics:
    """The true statistics of a head: what a fit should find."""
    rng = np.random.default_rng((options.seed, 0, layer, kv_head))
    d = options.head_dim
    mean = 2.0 * rng.standard_normal(d)
    orthogonal, triangle = np.linalg.qr(rng.standard_normal((d, d)))
    orthogonal *= np.sign(np.diag(triangle))
    spectrum = np.geomspace(2.0, 0.5, d)
    spectrum /= spectrum.mean()
    group_size = options.n_q_heads // options.n_kv_heads
    common = rng.standard_normal((group_size, d))
    # Every query dislikes the mean a little, so the short key of the sink stands out.
    common -= ((common @ mean) / (mean @ mean))[:, None] * mean
    common -= 4.0 * np.sqrt(d) * mean / (mean @ mean)
    return HeadStatistics(mean, (orthogonal * spectrum) @ orthogonal.T, common)


def capture_synthetic(
    options: SyntheticOptions,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> CaptureResult | CapturePlan:
    """Write a synthetic capture to `output`; transformers is not needed.

    Raises:
        ArtifactError: the output exists (without `force`) or cannot be written.
    """
    progress = progress or NullProgress()
    if not dry_run:
        check_output(output, force=force)
    documents = _documents(options)
    plan = make_plan(
        model="synthetic",
        geometry=_geometry(options),
        attention="none",
        documents=documents,
        notes=("synthetic: drawn from known statistics, no model",),
        pre_rope=False,
        store_dtype=options.store_dtype,
        folder=output.parent,
    )
    if dry_run:
        return plan
    check_disk(plan, output.parent)
    n_tokens = plan.n_tokens
    provenance = collect_provenance(seed=options.seed)
    started = time.monotonic()
    progress.start("drawing", n_tokens, "tokens")
    try:
        with create_artifact(output, "capture", inputs={}, provenance=provenance, force=force) as f:
            _write(f, options, documents, progress)
    finally:
        progress.finish()
    seconds = time.monotonic() - started
    return CaptureResult.of_plan(
        plan,
        path=output,
        digest=read_header(output).digest,
        n_resumed_documents=0,
        forward_s=seconds,
        assemble_s=0.0,
        total_s=seconds,
        n_tokens_run=n_tokens,
    )


def _write(
    file: h5py.File,
    options: SyntheticOptions,
    documents: tuple[DocumentInfo, ...],
    progress: Progress,
) -> None:
    info = _info(options)
    write_capture_info(file, info)
    shape = (options.n_layers, options.n_q_heads, options.head_dim)
    total, outer = np.zeros(shape), np.zeros((*shape, options.head_dim))
    n_fit = 0
    for document in documents:
        rng = np.random.default_rng((options.seed, 1, document.index))
        positions = query_positions(
            document.n_tokens, stride=options.query_stride, tail=options.query_tail
        )
        group = create_document(
            file,
            document_path(document.index),
            info,
            document,
            token_ids=rng.integers(0, VOCABULARY, document.n_tokens),
            query_positions=positions,
        )
        n_fit += document.n_tokens if document.split == "fit" else 0
        for layer in range(options.n_layers):
            keys, values, queries = _draw(options, layer, document.n_tokens, rng)
            place = group[layer_path(layer)]
            place["keys"][...] = to_storage(keys, options.store_dtype)
            place["values"][...] = to_storage(values, options.store_dtype)
            place["queries"][...] = to_storage(queries[positions], options.store_dtype)
            if document.split == "fit":
                exact = queries.astype(np.float64).transpose(1, 0, 2)
                total[layer] += exact.sum(axis=1)
                outer[layer] += exact.transpose(0, 2, 1) @ exact
            progress.advance(document.n_tokens / options.n_layers)
    write_statistics(
        file,
        query_mean=total / n_fit,
        query_second_moment=outer / n_fit,
        output_weight=np.ones(shape[:2]),
    )


def _draw(
    options: SyntheticOptions, layer: int, n_tokens: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Keys, values (n_tokens, n_kv_heads, head_dim), queries (n_tokens, n_q_heads, head_dim)."""
    d, group_size = options.head_dim, options.n_q_heads // options.n_kv_heads
    keys = np.empty((n_tokens, options.n_kv_heads, d))
    values = rng.standard_normal((n_tokens, options.n_kv_heads, d))
    queries = np.empty((n_tokens, options.n_q_heads, d))
    values[0] *= 0.1
    for head in range(options.n_kv_heads):
        truth = head_statistics(options, layer, head)
        root = np.linalg.cholesky(truth.key_covariance)
        residual = rng.standard_normal((n_tokens, d)) @ root.T
        heavy = np.zeros(0, dtype=np.int64)
        if options.n_heavy_tokens:
            heavy = rng.choice(np.arange(1, n_tokens), options.n_heavy_tokens, replace=False)
        keys[:, head] = truth.key_mean + residual
        keys[0, head] = truth.key_mean / 8.0
        asked = np.linalg.solve(truth.key_covariance, residual.T).T * (_PEAK * d**-0.25)
        for member in range(group_size):
            target = _targets(n_tokens, heavy, rng)
            noise = 0.5 * rng.standard_normal((n_tokens, d))
            queries[:, head * group_size + member] = (
                asked[target] + truth.query_common[member] + noise
            )
    return keys.astype(np.float32), values.astype(np.float32), queries.astype(np.float32)


def _targets(
    n_tokens: int, heavy: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """For each position the token it asks for: itself or before, a heavy one half of the time."""
    places = np.arange(n_tokens)
    target = (rng.random(n_tokens) * (places + 1)).astype(np.int64)
    if len(heavy):
        asked = rng.choice(heavy, n_tokens)
        usable = (asked <= places) & (rng.random(n_tokens) < _ASKS_HEAVY)
        target = np.where(usable, asked, target)
    return target


def _documents(options: SyntheticOptions) -> tuple[DocumentInfo, ...]:
    counts = share_out(options.n_documents)
    splits: list[Split] = [split for split in SPLITS for _ in range(counts[split])]
    n_queries = len(
        query_positions(
            options.document_tokens, stride=options.query_stride, tail=options.query_tail
        )
    )
    return tuple(
        DocumentInfo(
            index=index,
            name=f"synthetic#{index}",
            split=split,
            n_tokens=options.document_tokens,
            n_queries=n_queries,
            source="synthetic",
            first_token=index * options.document_tokens,
            text_sha256=_digest(options),
        )
        for index, split in enumerate(splits)
    )


def _geometry(options: SyntheticOptions) -> ModelGeometry:
    layer = AttentionLayer("synthetic", "full_attention", 0, options.head_dim**-0.5, 0.0)
    return ModelGeometry(
        architecture="synthetic",
        n_q_heads=options.n_q_heads,
        n_kv_heads=options.n_kv_heads,
        head_dim=options.head_dim,
        max_tokens=options.document_tokens,
        layers=(layer,) * options.n_layers,
    )


def _info(options: SyntheticOptions) -> CaptureInfo:
    return CaptureInfo(
        model="synthetic",
        architecture="synthetic",
        n_q_heads=options.n_q_heads,
        n_kv_heads=options.n_kv_heads,
        head_dim=options.head_dim,
        layers=(LayerInfo("full_attention", 0, options.head_dim**-0.5, 0.0),) * options.n_layers,
        model_digest=_digest(options),
        rope={"parameters": {}, "inv_freq": {}, "attention_scaling": {}},
        dtype="float32",
        stored_as=options.store_dtype,
        has_keys_pre_rope=False,
    )


def _digest(options: SyntheticOptions) -> str:
    return hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()

"""Exact attention of one document in one layer and KV head, and what a coding does to it.

    s = cap(softmax_scale q.k),  p = softmax(s),  o = p v          exact, over the tokens seen
    shat = cap(softmax_scale (q.k + dz)),  dz = the coding's q'.k' minus the exact one, where the
    query reads coded tokens, else 0;  ohat likewise, with vhat where coded

With centring k' = A (k - c_t) and q' = A^-T q a coding sees k', and q.k moves by exactly dz.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.evaluation.protocol import ReadProtocol
from sphkv_cli.fit.captured_vectors import read_vectors
from sphkv_codebooks.frame import FrameSet


@dataclass(frozen=True)
class JudgedHead:
    """float32 throughout.

    queries: (group_size, n_queries, head_dim); keys, values: (n_tokens, head_dim); framed_keys,
    framed_queries: the same, centred and balanced; seen, coded: (n_queries, n_tokens) bool, what a
    query sees, and what of it is read coded; products: (group_size, n_queries, n_tokens) q.k;
    scores, log_sum_exp, weights, output: exact attention.
    """

    softmax_scale: float
    logit_softcap: float
    queries: Tensor
    framed_queries: Tensor
    keys: Tensor
    framed_keys: Tensor
    values: Tensor
    seen: Tensor
    coded: Tensor
    products: Tensor
    scores: Tensor
    log_sum_exp: Tensor
    weights: Tensor
    output: Tensor

    def attention(self, products: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """KL(exact, coded) (group_size, n_queries) in nats, the output with exact values and the
        one with `values` (n_tokens, head_dim) where coded (None: the same)."""
        scores = _scores(products, self.softmax_scale, self.logit_softcap, self.seen)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[..., None])
        moved = torch.where(self.seen, self.scores - scores, 0.0)
        kl = torch.linalg.vecdot(self.weights, moved) - (self.log_sum_exp - lse)
        output = weights @ self.values
        if values is None:
            return kl.clamp_min(0.0), output, output
        whole = output + (weights * self.coded) @ (values - self.values)
        return kl.clamp_min(0.0), output, whole


def judged_heads(
    capture: CaptureReader,
    document: DocumentInfo,
    layer: int,
    frame: FrameSet,
    protocol: ReadProtocol,
    max_queries: int,
) -> list[JudgedHead]:
    """One per KV head; empty where no captured query of the document is scored.

    Args:
        frame: without rotation; it centres and balances.
        max_queries: evenly spaced among the captured ones that the protocol scores.

    Raises:
        SphkvError: NaN or Inf in the capture; names document, layer and head.
    """
    positions = torch.from_numpy(capture.query_positions(document))
    rows = torch.nonzero(positions >= protocol.scored(document.n_tokens).start).flatten()
    if rows.numel() == 0:
        return []
    rows = rows[:: -(-rows.numel() // max_queries)]
    info = capture.layers[layer]
    keys = read_vectors(capture, document, layer, "keys")
    values = read_vectors(capture, document, layer, "values")
    queries = read_vectors(capture, document, layer, "queries")[rows]
    tokens = torch.arange(document.n_tokens)
    distance = positions[rows][:, None] - tokens
    seen = distance >= 0
    if info.window:
        seen &= distance < info.window
    coded = protocol.reads_coded(positions[rows], tokens) & seen
    framed_keys = frame.keys_to_frame(layer, keys, tokens)
    framed_queries = frame.queries_to_frame(layer, queries)
    group_size = capture.group_size
    heads = []
    for head in range(capture.n_kv_heads):
        group = slice(head * group_size, (head + 1) * group_size)
        asked = queries[:, group].transpose(0, 1).contiguous()
        products = asked @ keys[:, head].T
        scores = _scores(products, info.softmax_scale, info.logit_softcap, seen)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[..., None])
        own_values = values[:, head].contiguous()
        heads.append(
            JudgedHead(
                softmax_scale=info.softmax_scale,
                logit_softcap=info.logit_softcap,
                queries=asked,
                framed_queries=framed_queries[:, group].transpose(0, 1).contiguous(),
                keys=keys[:, head].contiguous(),
                framed_keys=framed_keys[:, head].contiguous(),
                values=own_values,
                seen=seen,
                coded=coded,
                products=products,
                scores=scores,
                log_sum_exp=lse,
                weights=weights,
                output=weights @ own_values,
            )
        )
    return heads


def _scores(products: Tensor, scale: float, softcap: float, seen: Tensor) -> Tensor:
    scores = products * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~seen, -torch.inf)

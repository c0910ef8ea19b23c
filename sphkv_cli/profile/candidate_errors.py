"""Errors of one candidate (a plan, or one tier for every token) in one layer, over documents.

For a query i of head h, tokens t of the coded context, scaled logits s = cap(softmax_scale z):

    logit error        e_it = softmax_scale (zhat_it - z_it)        over seen, kept tokens
    predicted          softmax_scale ||q_i|| sqrt(D ||k_t||^2 / d)  rms over the same pairs
    expected           the same with the encode errors ||e_t||^2 really made
    bound              max softmax_scale ||q_i|| bound_t
    attention KL       sum phat ln(phat / p); finite with dropped tokens, the other way is not
    output error       ||ohat - o|| / ||o||, rms: sqrt(sum ||ohat - o||^2 / sum ||o||^2)

p and o: exact attention over context and horizon. phat and ohat: the coded context merged by
log-sum-exp with the exact dense horizon.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphkv_cli.profile.error_sums import MagnitudeSums
from sphkv_cli.profile.layer_inputs import LayerInputs


@dataclass(frozen=True)
class ExactHead:
    """Exact attention of the query heads of one KV head.

    scores: ``(group_size, n_queries, n_tokens)`` scaled, capped, -inf where unseen; logits: the
    same before cap and mask; log_sum_exp, rest_log_sum_exp: ``(group_size, n_queries)`` over all
    and over the horizon's tokens; output, rest_output: ``(group_size, n_queries, head_dim)``.
    """

    logits: Tensor
    scores: Tensor
    log_sum_exp: Tensor
    output: Tensor
    rest_log_sum_exp: Tensor
    rest_output: Tensor

    @staticmethod
    def of(inputs: LayerInputs, kv_head: int) -> "ExactHead":
        """Attention to dense keys and values in float64."""
        keys, values = inputs.keys[:, kv_head], inputs.values[:, kv_head]
        logits = scaled_logits(inputs, kv_head, keys, torch.arange(keys.shape[0]))
        scores = masked_scores(logits, inputs, inputs.seen)
        rest = inputs.n_context
        whole = attend(scores, values)
        tail = attend(scores[..., rest:], values[rest:])
        return ExactHead(
            logits, scores, whole.log_sum_exp, whole.output, tail.log_sum_exp, tail.output
        )


def scaled_logits(inputs: LayerInputs, kv_head: int, keys: Tensor, tokens: Tensor) -> Tensor:
    """softmax_scale (q.k' + q.c_t), ``(group_size, n_queries, n_tokens)``; tokens: positions."""
    scale = inputs.softmax_scale
    logits = (inputs.head_queries(kv_head) * scale) @ keys.T
    return logits.add_(inputs.head_offset(kv_head, tokens) * scale)


def masked_scores(logits: Tensor, inputs: LayerInputs, visible: Tensor) -> Tensor:
    """Cap scaled logits and hide what is not visible ``(n_queries, n_tokens) bool``."""
    if inputs.logit_softcap > 0:
        logits = torch.tanh(logits / inputs.logit_softcap) * inputs.logit_softcap
    if bool(visible.all()):
        return logits
    return logits.masked_fill(~visible, -torch.inf)


@dataclass(frozen=True)
class Attention:
    """weights: exp(scores - peak), ``(..., n_queries, n_tokens)``; peak, log_sum_exp: ``(...,
    n_queries)``; output ``(..., n_queries, head_dim)``.  Nothing seen: 0, log_sum_exp -inf."""

    weights: Tensor
    peak: Tensor
    log_sum_exp: Tensor
    output: Tensor


def attend(scores: Tensor, values: Tensor) -> Attention:
    """Softmax attention with one exponential per score."""
    if scores.shape[-1] == 0:
        nothing = scores.new_zeros(scores.shape[:-1])
        output = scores.new_zeros((*scores.shape[:-1], values.shape[-1]))
        return Attention(scores, nothing, nothing - torch.inf, output)
    peak = scores.amax(-1)
    peak = torch.where(torch.isneginf(peak), 0.0, peak)
    weights = (scores - peak[..., None]).exp_()
    total = weights.sum(-1)
    output = (weights @ values) / torch.where(total > 0, total, 1.0)[..., None]
    return Attention(weights, peak, peak + total.log(), output)


@dataclass(frozen=True)
class CodedAttention:
    """Float64 attention of one KV head's queries to coded tokens alone.

    tokens ``(n_kept) int64``; logits ``(group_size, n_queries, n_kept)`` scaled; seen ``(n_queries,
    n_kept) bool``; log_sum_exp ``(group_size, n_queries)``; output ``(group_size, n_queries,
    head_dim)``.
    """

    tokens: Tensor
    logits: Tensor
    seen: Tensor
    log_sum_exp: Tensor
    output: Tensor


@dataclass
class CandidateErrors:
    """Accumulates over documents; everything per query head of one layer."""

    n_q_heads: int
    logit: MagnitudeSums = field(init=False)
    predicted_sq: Tensor = field(init=False)
    expected_sq: Tensor = field(init=False)
    bound: Tensor = field(init=False)
    kl_sum: Tensor = field(init=False)
    kl_max: Tensor = field(init=False)
    n_queries: Tensor = field(init=False)
    error_sq: Tensor = field(init=False)
    output_sq: Tensor = field(init=False)
    relative_max: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logit = MagnitudeSums(self.n_q_heads)
        for name in (
            "predicted_sq",
            "expected_sq",
            "bound",
            "kl_sum",
            "kl_max",
            "n_queries",
            "error_sq",
            "output_sq",
            "relative_max",
        ):
            setattr(self, name, torch.zeros(self.n_q_heads, dtype=torch.float64))

    def add(
        self,
        inputs: LayerInputs,
        kv_head: int,
        exact: ExactHead,
        keys: Tensor,
        values: Tensor,
        kept: Tensor,
        errors: tuple[Tensor, Tensor, Tensor],
    ) -> "CodedAttention":
        """Take in one document and KV head.

        Args:
            keys, values: (n_context, head_dim) decoded, in the frame; kept: (n_context) bool.
            errors: predicted ||e||^2, made ||e||^2 and bound on ||e|| of every key, (n_context).

        Returns:
            Attention over the coded context alone.
        """
        q = inputs.head_queries(kv_head)
        scale = inputs.softmax_scale
        # Dropped tokens are left out of every product, not only hidden.
        tokens = torch.nonzero(kept).flatten()
        exact_logits = exact.logits[..., : inputs.n_context]
        seen = inputs.seen[:, : inputs.n_context]
        if tokens.numel() < inputs.n_context:
            keys, values = keys[tokens], values[tokens]
            exact_logits, seen = exact_logits[..., tokens], seen[:, tokens]
            errors = (errors[0][tokens], errors[1][tokens], errors[2][tokens])
        all_seen = bool(seen.all())
        logits = scaled_logits(inputs, kv_head, keys, tokens)
        scores = masked_scores(logits, inputs, seen)
        context = attend(scores, values)
        lse = torch.logaddexp(context.log_sum_exp, exact.rest_log_sum_exp)
        output = (
            torch.exp(context.log_sum_exp - lse)[..., None] * context.output
            + torch.exp(exact.rest_log_sum_exp - lse)[..., None] * exact.rest_output
        )
        difference = logits - exact_logits
        moved = difference
        if inputs.logit_softcap > 0 or not all_seen:
            moved = torch.where(seen, scores - exact.scores[..., tokens], 0.0)
        expected_move = torch.linalg.vecdot(context.weights, moved)
        expected_move = expected_move * torch.exp(context.peak - lse)
        kl = expected_move - (lse - exact.log_sum_exp)
        error_sq = (output - exact.output).square().sum(-1)
        output_sq = exact.output.square().sum(-1)
        relative = (error_sq / output_sq.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()

        query_sq = q.square().sum(-1)
        predicted, made, bound = errors
        pairs = seen.to(torch.float64)
        per_coordinate = scale**2 / q.shape[-1]
        predicted_sq = (query_sq * (pairs @ predicted)).sum(-1) * per_coordinate
        expected_sq = (query_sq * (pairs @ made)).sum(-1) * per_coordinate
        largest = query_sq.new_zeros(inputs.group_size)
        if tokens.numel():
            largest = (query_sq.sqrt() * (pairs * bound).amax(-1)).amax(-1) * scale
        for member in range(inputs.group_size):
            head = kv_head * inputs.group_size + member
            self.logit.add(head, difference[member] if all_seen else difference[member][seen])
            self.predicted_sq[head] += predicted_sq[member]
            self.expected_sq[head] += expected_sq[member]
            self.bound[head] = torch.maximum(self.bound[head], largest[member])
            # Rounding may leave a KL of -1e-16 where nothing differs.
            self.kl_sum[head] += kl[member].clamp(min=0).sum()
            self.kl_max[head] = torch.maximum(self.kl_max[head], kl[member].max())
            self.n_queries[head] += kl.shape[1]
            self.error_sq[head] += error_sq[member].sum()
            self.output_sq[head] += output_sq[member].sum()
            self.relative_max[head] = torch.maximum(self.relative_max[head], relative[member].max())
        return CodedAttention(tokens, logits, seen, context.log_sum_exp, context.output)

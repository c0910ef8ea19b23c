"""A layer's frame as matrices on the model's device, for what every step turns.

    q' = q M_h,   offset = q . mu_h,   (a, b) = q W_h,   o = o' S        all linear in q or o'
    k' = (k - c_h(t)) K_h,   v' = v S'

read off `FrameSet` by sending it the identity, so that there is one definition of a frame.
Source: ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.framing import FrameTensors, frame_tokens, unframe_outputs
from sphkv_kernels.position_term import PositionTerm


@dataclass(frozen=True, eq=False)
class TurningMean:
    """R_t mu = cos(w t) mu + sin(w t) nu, made on the device: mean, turned (n_kv_heads, d) are mu
    and nu, the mean a quarter turn on; frequencies (d) float64, w of every coordinate's pair, and
    their bytes, which tell layers that turn alike.
    """

    mean: Tensor
    turned: Tensor
    frequencies: Tensor
    digest: bytes

    @staticmethod
    def of(mean: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> "TurningMean":
        """mean (n_kv_heads, d) and inv_freq (d / 2) radians per token, on the device to be on."""
        first, second = mean.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        frequencies = inv_freq.double().repeat(2)
        digest = frequencies.cpu().numpy().tobytes()
        return TurningMean(mean.to(dtype), turned.to(dtype), frequencies, digest)

    def taken_from(self, keys: Tensor, turns: "Turns") -> Tensor:
        """keys (n, n_kv_heads, d), less the mean at their positions."""
        cos, sin = turns.of(self)
        less = torch.addcmul(keys, cos, self.mean, value=-1)
        return torch.addcmul(less, sin, self.turned, value=-1)


class Turns:
    """cos(w t), sin(w t) of n tokens at positions (n), made once for all layers that turn alike."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._made: dict[tuple[bytes, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, turning: TurningMean) -> tuple[Tensor, Tensor]:
        """Each (n, 1, d); angles in float64, as `rotary.rotate` makes them."""
        dtype = turning.mean.dtype
        key = turning.digest, dtype
        if key not in self._made:
            angles = self._positions[:, None, None] * turning.frequencies
            self._made[key] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._made[key]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a step asks pages and tail: query (n, n_q_heads, d), offset (n, n_q_heads) or None, and
    the position term or None."""

    query: Tensor
    offset: Tensor | None
    term: PositionTerm | None


@dataclass(frozen=True, eq=False)
class LayerFrame:
    """query: (n_q_heads or 1, d, d); offset: (n_q_heads, d) or None; output: (d, d).

    key: (n_kv_heads or 1, d, d); value: (d, d); centre: (n_kv_heads, d) of every key, or None, and
    turning: what is centred before RoPE.
    position: (n_q_heads, d, 2, n_pairs) with frequencies (n_kv_heads, n_pairs), or None.
    kernel: the same as the CUDA kernel takes it, where it turns the steps' vectors.
    """

    query: Tensor
    output: Tensor
    key: Tensor
    value: Tensor
    centre: Tensor | None
    turning: TurningMean | None
    offset: Tensor | None
    position: Tensor | None
    frequencies: Tensor | None
    kernel: FrameTensors | None

    @staticmethod
    def of(
        frames: FrameSet,
        layer: int,
        n_q_heads: int,
        n_kv_heads: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "LayerFrame":
        """One layer's matrices."""
        d = frames.head_dim
        eye = torch.eye(d, dtype=torch.float64)
        per_head = eye[:, None].expand(d, n_q_heads, d)
        query = frames.queries_to_frame(layer, per_head).transpose(0, 1)
        # Centring at one place drops out of the difference.
        there = torch.zeros(d, dtype=torch.int64)
        keys = eye[:, None].expand(d, n_kv_heads, d)
        key = frames.keys_to_frame(layer, keys, there)
        key = (key - frames.keys_to_frame(layer, 0 * keys, there)).transpose(0, 1)
        if frames.balancing is None:
            query, key = query[:1], key[:1]
        offset = None
        constant = frames.logit_offset(layer, per_head)
        if bool(constant.any()):  # after RoPE, or what a truncated mean before RoPE leaves
            offset = constant.T.to(device, dtype).contiguous()
        term = frames.position_coefficients(layer, per_head)
        centre, turning = _centring(frames, layer, device, dtype)
        query, key, output, value = (
            x.to(device, dtype).contiguous()
            for x in (query, key, frames.output_from_frame(eye), frames.values_to_frame(eye))
        )
        position = None if term is None else term[0].transpose(0, 1).to(device, dtype).contiguous()
        kernel = None
        if device.type == "cuda" and dtype == torch.float32:
            kernel = FrameTensors(
                query,
                key,
                value,
                output,
                n_q_heads,
                n_kv_heads,
                centre,
                None if turning is None else turning.mean,
                None if turning is None else turning.turned,
                position,
                offset,
            )
        return LayerFrame(
            query,
            output,
            key,
            value,
            centre,
            turning,
            offset,
            position,
            None if term is None else term[1].to(device, torch.float32).contiguous(),
            kernel,
        )

    def queries(self, queries: Tensor) -> Tensor:
        """(n, n_q_heads, d) into the frame."""
        return torch.einsum("nhd,hde->nhe", queries, self.query.expand(queries.shape[1], -1, -1))

    def enter(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        turns: Turns,
        tail: Tensor,
        rows: Tensor,
        *,
        with_offset: bool,
    ) -> "Asked":
        """One token of every sequence: its queries into the frame, keys and values into the tail.

        Args:
            queries: (n, n_q_heads, d); keys, values: (n, n_kv_heads, d); turns: at the tokens'
                positions.
            tail: (..., d) bfloat16; rows: (2 n n_kv_heads) int64 in it, keys before values.
            with_offset: whether what all logits of a head get is asked for.
        """
        if self.kernel is not None:
            turned = None if self.turning is None else turns.of(self.turning)
            found = frame_tokens(
                self.kernel,
                queries,
                keys,
                values,
                tail=tail,
                rows=rows,
                turns=turned,
                with_offset=with_offset,
            )
            return Asked(found.query, found.offset, self._term(found.coefficients))
        d = queries.shape[-1]
        new = self.new_tokens(keys, values, turns).to(tail.dtype)
        tail.view(-1, d).index_copy_(0, rows, new.view(-1, d))
        wide = queries.to(self.output.dtype)
        offset = self.offsets(queries) if with_offset else None
        return Asked(self.queries(wide).contiguous(), offset, self.term(queries))

    def leave(self, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, n_q_heads, d) out of the frame, in another dtype."""
        if self.kernel is not None:
            return unframe_outputs(self.kernel, outputs, dtype)
        return self.outputs(outputs).to(dtype)

    def new_tokens(self, keys: Tensor, values: Tensor, turns: Turns) -> Tensor:
        """Keys, then values, (2, n, n_kv_heads, d), of one token of every sequence in the frame."""
        dtype = self.output.dtype
        keys, values = keys.to(dtype), values.to(dtype)
        keys = keys if self.centre is None else keys - self.centre
        keys = keys if self.turning is None else self.turning.taken_from(keys, turns)
        turned = torch.einsum("nhd,hde->nhe", keys, self.key.expand(keys.shape[1], -1, -1))
        return torch.stack([turned, values @ self.value])

    def offsets(self, queries: Tensor) -> Tensor | None:
        """(n, n_q_heads) that every logit of a head gets, of queries of any dtype."""
        if self.offset is None:
            return None
        return (queries.to(self.offset.dtype) * self.offset).sum(-1)

    def term(self, queries: Tensor) -> PositionTerm | None:
        """What each logit gets by its token's position, of queries of any dtype."""
        if self.position is None or self.frequencies is None:
            return None
        wide = queries.to(self.position.dtype)
        return self._term(torch.einsum("nhd,hdip->nhip", wide, self.position).contiguous())

    def _term(self, coefficients: Tensor | None) -> PositionTerm | None:
        if coefficients is None or self.frequencies is None:
            return None
        return PositionTerm(coefficients, self.frequencies)

    def outputs(self, outputs: Tensor) -> Tensor:
        """(n, n_q_heads, d) out of the frame."""
        return outputs @ self.output

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [self.query, self.output, self.offset, self.position, self.frequencies]
        tensors += [self.key, self.value, self.centre]
        if self.turning is not None:
            tensors += [self.turning.mean, self.turning.turned, self.turning.frequencies]
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def _centring(
    frames: FrameSet, layer: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, TurningMean | None]:
    """What every key of a layer loses, and what it loses by its position."""
    if frames.key_mean is None or frames.centring_of(layer) == "none":
        return None, None
    mean = torch.from_numpy(frames.key_mean[layer].copy()).to(device)
    if not frames.needs_positions(layer):
        return mean.to(dtype), None
    assert frames.inv_freq is not None
    inv_freq = torch.from_numpy(frames.inv_freq[layer].copy()).to(device)
    residual = None
    if frames.residual_mean is not None:
        residual = torch.from_numpy(frames.residual_mean[layer].copy()).to(device, dtype)
    return residual, TurningMean.of(mean, inv_freq, dtype)

"""A key bias that RoPE turns with the position: three centrings, end to end, on a tiny Qwen2.

The bias of k_proj is twenty times what its weights make of a token, as in models with QKV bias: a
norm-and-direction code then spends itself on the bias.  Only its mean from before RoPE, turned to
each position, takes it away.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.stage import evaluate
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.rope_frequencies import rope_frequencies
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_cli.profile.options import ProfileOptions
from sphkv_cli.profile.stage import profile
from tests.sphkv_cli.tiny_models import fill_matrices, save_model

N_LAYERS, N_KV_HEADS, HEAD_DIM = 2, 2, 32
CODES = ("full=4/2/2/2/3", "fine=7/6/6/6/6")
TIERS = ("full/fine",)
"""Keys at 3 bits beside values that hardly err: what is left is the keys' error."""


@dataclass(frozen=True)
class Chain:
    """A saved model and its capture."""

    model: Path
    capture: Path


def _fill_biased(name: str, weight: torch.Tensor, noise: torch.Tensor) -> None:
    if name.endswith("k_proj.bias"):
        weight.copy_(20 * noise)
    elif "q_proj" in name:
        # Short queries, so that the turning bias does not rule the softmax.
        weight.copy_(0.3 * noise * weight.shape[-1] ** -0.5)
    else:
        fill_matrices(name, weight, noise)


def save_biased_model(folder: Path) -> Path:
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=512,
        rope_theta=100.0,  # every pair turns within 200 tokens
        bos_token_id=None,
        eos_token_id=None,
    )
    config.head_dim = HEAD_DIM
    return save_model(folder, config, fill=_fill_biased)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("biased")
    made = Chain(save_biased_model(folder / "tiny"), folder / "capture.h5")
    sources = []
    for split, word in (("fit", "alpha"), ("select", "beta"), ("judge", "gamma")):
        path = folder / f"{split}.txt"
        path.write_text(" ".join(f"{word} {i * i}" for i in range(60)))
        sources.append(TextSource.parse(f"{split}={path}"))
    asked = CaptureOptions(model=str(made.model), texts=tuple(sources), document_tokens=200)
    capture(asked, made.capture)
    return made


@pytest.fixture(scope="module")
def books(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CodebooksReader]:
    """Codebooks by centring."""
    folder = tmp_path_factory.mktemp("books")
    found = {}
    for centring in ("none", "post_rope", "pre_rope", "auto"):
        balancing = "auto" if centring == "auto" else "none"
        options = FitOptions(codes=CODES, tiers=TIERS, centring=centring, balancing=balancing)
        fit_codebooks(options, chain.capture, folder / f"{centring}.h5")
        found[centring] = CodebooksReader.open(folder / f"{centring}.h5")
    return found


def test_only_centring_before_rope_saves_a_biased_model(
    chain: Chain, books: dict[str, CodebooksReader], tmp_path: Path
) -> None:
    options = EvaluateOptions(model=str(chain.model), methods=("fp8",), sinks=0.0, first_scored=40)
    kl = {}
    for centring, reader in books.items():
        result = evaluate(options, chain.capture, reader.path, None, tmp_path / f"{centring}.json")
        kl[centring] = next(row.kl.mean for row in result.rows if row.name == "full/fine")
    assert kl["pre_rope"] < kl["post_rope"] / 20
    assert kl["pre_rope"] < kl["none"] / 20
    # A mean over all turns is nearly nothing: the two differ as two rotation seeds would.
    assert kl["none"] / 3 < kl["post_rope"] < 3 * kl["none"]
    assert kl["auto"] < 1.5 * kl["pre_rope"]


def test_auto_chooses_what_it_measured_to_be_best(books: dict[str, CodebooksReader]) -> None:
    reader = books["auto"]
    assert reader.frames.centring == "pre_rope"
    for layer in range(N_LAYERS):
        rows = [row for row in reader.tables.frames if row.layer == layer]
        first = {row.centring: row for row in reversed(rows) if row.balancing == "none"}
        assert set(first) == {"none", "post_rope", "pre_rope"}
        assert first["pre_rope"].output_error < first["post_rope"].output_error / 20
        (chosen,) = [row for row in rows if row.is_chosen]
        assert chosen.output_error <= 1.03 * first["pre_rope"].output_error
        assert chosen.rope_pairs == reader.frames.rope_pairs(layer)


def test_fewer_pairs_keep_the_logits_and_leave_more_to_code(
    chain: Chain, books: dict[str, CodebooksReader], tmp_path: Path
) -> None:
    options = FitOptions(
        codes=CODES, tiers=TIERS, centring="pre_rope", balancing="none", rope_pairs=2
    )
    fit_codebooks(options, chain.capture, tmp_path / "two.h5")
    two = CodebooksReader.open(tmp_path / "two.h5")
    assert [two.frames.rope_pairs(layer) for layer in range(N_LAYERS)] == [2, 2]
    with CaptureReader(chain.capture) as reader:
        keys = torch.from_numpy(reader.keys(0, 1)).double()
        queries = torch.from_numpy(reader.queries(0, 1))[:5].double()
    positions = torch.arange(keys.shape[0])
    exact = torch.einsum("qhd,thd->qht", queries, keys.repeat_interleave(2, dim=1))
    energy = {}
    for name, frames in (("two", two.frames), ("all", books["pre_rope"].frames)):
        framed = frames.keys_to_frame(1, keys, positions)
        inside = frames.queries_to_frame(1, queries)
        logits = torch.einsum("qhd,thd->qht", inside, framed.repeat_interleave(2, dim=1))
        found = frames.position_coefficients(1, queries)
        assert found is not None
        angles = found[1].double().repeat_interleave(2, dim=0)[..., None] * positions
        logits = logits + frames.logit_offset(1, queries)[..., None]
        logits += torch.einsum("qhp,hpt->qht", found[0][:, :, 0], angles.cos())
        logits += torch.einsum("qhp,hpt->qht", found[0][:, :, 1], angles.sin())
        torch.testing.assert_close(logits, exact, rtol=1e-9, atol=1e-9)
        energy[name] = float(framed.square().mean())
    assert energy["two"] > 5 * energy["all"]


def test_a_plan_stores_positions_and_the_decoder_needs_them(
    chain: Chain, books: dict[str, CodebooksReader], tmp_path: Path
) -> None:
    """allocation.h5 holds the frames; pages carry two bytes a token; the recursion is exact."""
    path = tmp_path / "allocation.h5"
    asked = AllocateOptions(budget="6b", page_size=16, horizon=40, window=32)
    allocate(asked, chain.capture, books["auto"].path, path)
    with AllocationReader(path) as allocation:
        assert allocation.header.version == 2
        frames = allocation.frames
        for info in allocation.documents:
            kept = allocation.tier_of_token(info) >= 0
            pages = allocation.page_of_token(info)
            n_pages = sum(
                len(np.unique(pages[layer, head][kept[layer, head]]))
                for layer in range(N_LAYERS)
                for head in range(N_KV_HEADS)
            )
            assert info.positions_bytes == n_pages * 16 * 2
    for name in ("key_mean", "inv_freq"):
        stored, made = getattr(frames, name), getattr(books["auto"].frames, name)
        assert np.array_equal(stored, made)
    report = profile(
        ProfileOptions(backend="reference"), chain.capture, path, tmp_path / "report.json"
    )
    plan = report.content.candidates[0]
    assert plan.bytes.positions > 0
    assert plan.recursion is not None
    # float64 both ways; logits of a bias of norm 100 carry 1e-11.
    assert np.nanmax(np.array(plan.recursion.logit_max)) < 1e-9
    assert np.nanmax(np.array(plan.recursion.output_error)) < 1e-9


def test_rope_that_cannot_be_followed_is_refused_and_auto_says_so(
    chain: Chain, tmp_path: Path
) -> None:
    def changed(name: str, **attributes: object) -> Path:
        path = tmp_path / name
        path.write_bytes(chain.capture.read_bytes())
        with h5py.File(path, "r+") as file:
            for key, value in attributes.items():
                file.attrs[key] = value
        return path

    for name, attributes, says in (
        ("i.h5", {"architecture": "cohere"}, "pairs neighbouring coordinates"),
        ("p.h5", {"rope": '{"inv_freq": {"default": [1.0, 0.1]}}'}, r"turns 2 pairs .*partial"),
        ("n.h5", {"rope": '{"inv_freq": {}}'}, "holds no rotary frequencies"),
        (
            "d.h5",
            {"rope": '{"inv_freq": {}, "parameters": {"rope_type": "dynamic"}}'},
            "change with the length",
        ),
    ):
        path = changed(name, **attributes)
        with CaptureReader(path) as reader, pytest.raises(SphkvError, match=says) as caught:
            rope_frequencies(reader)
        assert "\n" not in str(caught.value) and "--centring" in caught.value.hint
    options = FitOptions(codes=CODES, tiers=TIERS, balancing="none")
    result = fit_codebooks(options, path, tmp_path / "auto.h5")
    assert any("Only centrings after RoPE were tried" in line for line in result.reading)
    with pytest.raises(SphkvError, match="cannot be centred before RoPE"):
        fit_codebooks(
            FitOptions(codes=CODES, tiers=TIERS, centring="pre_rope"), path, tmp_path / "x.h5"
        )
    assert not (tmp_path / "x.h5").exists()

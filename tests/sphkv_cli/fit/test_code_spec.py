"""A specification says what is meant, or which part of it cannot be meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphkv_cli.errors import UsageError
from sphkv_cli.fit.code_spec import (
    CodeSpec,
    default_code_texts,
    parse_code_spec,
    parse_code_specs,
    spec_text,
)
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.spherical_code import Gain, SphericalCode


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4/2/2/2:fp16", CodeSpec("polar-4222-fp16", (16, 4, 4, 4), "fp16")),
        ("4/2/2/2", CodeSpec("polar-4222-fp16", (16, 4, 4, 4), "fp16")),
        ("mine=3/0/1:r2", CodeSpec("mine", (8, 1, 2), "lloyd_max:2")),
        ("3/2:lloyd_max:5", CodeSpec("polar-32-r5", (8, 4), "lloyd_max:5")),
        ("4/3/3/3:e5m6", CodeSpec("polar-4333-e5m6", (16, 8, 8, 8), "minifloat:5,6")),
        ("4/3:minifloat:4,3", CodeSpec("polar-43-e4m3", (16, 8), "minifloat:4,3")),
        ("4/2/2/2/2/3", CodeSpec("polar-422223-norm", (16, 4, 4, 4, 4, 8), "norm")),
        ("n12/n5/2:r2", CodeSpec("polar-n12.5.4-r2", (12, 5, 4), "lloyd_max:2")),
        ("n16/n4", CodeSpec("polar-42-fp16", (16, 4), "fp16")),
        (
            "n13/n5/n5/n5/n5/n1:e5m3",
            CodeSpec("polar-n13.5.5.5.5.1-e5m3", (13, 5, 5, 5, 5, 1), "minifloat:5,3"),
        ),
        (
            "4/2:r2+rope+least_squares",
            CodeSpec(
                "polar-42-r2-rope-least-squares", (16, 4), "lloyd_max:2", "rope", "least_squares"
            ),
        ),
    ],
)
def test_a_specification_is_read_as_it_says(text: str, expected: CodeSpec) -> None:
    assert parse_code_spec(text, 64) == expected


@given(
    bits=st.lists(st.integers(0, 8), min_size=1, max_size=5).map(tuple),
    radius=st.sampled_from(["fp16", "r3", "e5m6"]),
    pairing=st.sampled_from(["adjacent", "rope"]),
    gain=st.sampled_from(["none", "least_squares", "unbiased"]),
)
def test_every_part_survives_the_round_trip(
    bits: tuple[int, ...], radius: str, pairing: str, gain: str
) -> None:
    text = f"x={'/'.join(map(str, bits))}:{radius}+{pairing}+{gain}"
    spec = parse_code_spec(text, 64)
    n_cells = tuple(2**b for b in bits)
    assert (spec.name, spec.n_cells, spec.pairing, spec.gain) == ("x", n_cells, pairing, gain)
    assert spec.depth == len(bits)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "form"),
        ("4/2/x", "form"),
        ("4//2", "form"),
        ("4,2,2,2", "form"),
        ("fp16", "form"),
        ("9/2", "9 bits at level 1"),
        ("4/-1", "-1 bits at level 2"),
        ("4/n0", "0 cells at level 2"),
        ("n257/2", "257 cells at level 1"),
        ("n/2", "form"),
        ("m5/2", "form"),
        ("4/2/2/2/2/2/2", "7 levels"),
        ("4/2/2:norm", "8 radii"),
        ("4/2:", "radius coding ''"),
        ("4/2:q3", "radius coding 'q3'"),
        ("4/2:r2+round", "option 'round'"),
        ("int8=4/2", "'int8'"),
        ("=4/2", "''"),
        ("a b=4/2", "'a b'"),
        ("a/b=4/2", "'a/b'"),
    ],
)
def test_what_cannot_be_meant_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_code_spec(text, 64)
    assert says in caught.value.message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@given(
    n_cells=st.lists(st.integers(1, 256), min_size=1, max_size=5).map(tuple),
    radius=st.sampled_from(["fp16", "lloyd_max:3", "minifloat:5,6"]),
    pairing=st.sampled_from(["adjacent", "rope"]),
    gain=st.sampled_from(["none", "least_squares", "unbiased"]),
)
def test_the_text_of_a_code_is_read_back(
    n_cells: tuple[int, ...], radius: str, pairing: Pairing, gain: Gain
) -> None:
    spec = parse_code_spec(spec_text(n_cells, radius, pairing, gain), 64)
    assert spec == CodeSpec(spec.name, n_cells, radius, pairing, gain)


def test_two_codes_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="both called polar-42-fp16"):
        parse_code_specs(("4/2", "4/2:fp16"), 64)
    assert len(parse_code_specs(("4/2", "other=4/2:fp16"), 64)) == 2


@pytest.mark.parametrize("head_dim", [2, 8, 16, 32, 64, 128, 256])
def test_default_candidates_can_be_built_for_every_head_dim(head_dim: int) -> None:
    specs = parse_code_specs(default_code_texts(head_dim), head_dim)
    codes = [
        SphericalCode.analytic(
            s.name, head_dim, radius=s.radius, n_cells=s.n_cells, pairing=s.pairing, gain=s.gain
        )
        for s in specs
    ]
    assert len({code.digest for code in codes}) == len(codes)
    assert codes[-1].n_radii == 1 or head_dim <= 16


def test_default_candidates_have_the_rates_they_promise() -> None:
    specs = parse_code_specs(default_code_texts(128), 128)
    codes = {
        s.name: SphericalCode.analytic(s.name, 128, radius=s.radius, n_cells=s.n_cells)
        for s in specs
    }
    per_block = {
        name: sum(16 / 2**level * code.codebooks[level - 1].bits for level in range(1, 5))
        + code.radius_coding.bits_per_radius
        for name, code in codes.items()
        if code.depth == 4
    }
    assert per_block == {
        "paper-4222": 62,
        "polar-3111-r1": 32,
        "polar-3222-r2": 40,
        "polar-4222-r2": 48,
        "polar-4333-r3": 56,
        "polar-5333-r3": 64,
        "polar-4333-e5m6": 64,
    }
    assert codes["paper-4222"].code_rate == 3.875
    assert min(c.code_rate for c in codes.values()) >= 2.0
    assert max(c.code_rate for c in codes.values()) <= 4.125

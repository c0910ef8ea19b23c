"""How a user names a spherical code, and the candidates that are tried when nobody names any.

A specification is ``[NAME=]LEVELS[:RADIUS][+OPTION...]``:

- LEVELS: one word per level, outermost pairs first, joined by ``/``: bits of an angle, or ``n`` and
  any number of cells: ``4/2/2/2``, ``n12/n5/2``. A level of 0 bits keeps one cell. Its length is
  the depth. Levels whose number of cells is no power of two are packed in mixed radix.
- RADIUS: ``fp16`` (one per block), ``rB`` (B-bit Lloyd-Max radii against one fp16 norm), ``eEmM``
  (minifloat of E exponent and M mantissa bits), ``norm`` (full depth: the radius is the norm,
  fp16).  Left out it is ``norm`` at full depth and ``fp16`` otherwise.  What codebooks.h5 writes
  for them (``lloyd_max:B``, ``minifloat:E,M``) is read as well.
- OPTION: ``adjacent`` | ``rope`` (pairing), ``least_squares`` | ``unbiased`` (gain).

The paper's code (PolarQuant, arXiv 2502.02617) is ``4/2/2/2:fp16``; the other candidates spend the
bits of its fp16 radii on angles instead (ours).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sphkv_cli.errors import UsageError
from sphkv_codebooks.codebook import MAX_CELLS
from sphkv_codebooks.polar import Pairing
from sphkv_codebooks.spherical_code import Gain

MAX_BITS = 8
"""Most bits of an angle: its code is one byte."""

PAIRINGS: tuple[Pairing, ...] = ("adjacent", "rope")
GAINS: tuple[Gain, ...] = ("none", "least_squares", "unbiased")

_FORM = "[NAME=]LEVELS[:RADIUS][+OPTION...], for example 4/2/2/2:fp16 or small=n12/n5/2/2:r2"
_SHORT_RADIUS = (
    (re.compile(r"r(\d+)"), "lloyd_max:{}"),
    (re.compile(r"e(\d+)m(\d+)"), "minifloat:{},{}"),
)
_LONG_RADIUS = re.compile(r"fp16|norm|lloyd_max:\d+|minifloat:\d+,\d+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_RESERVED_NAMES = frozenset({"drop", "int8", "dense"})


@dataclass(frozen=True)
class CodeSpec:
    """What a specification says, before any codebook is computed.

    n_cells: per level; radius: as `SphericalCode.analytic` takes it; name: unique in its list.
    """

    name: str
    n_cells: tuple[int, ...]
    radius: str
    pairing: Pairing = "adjacent"
    gain: Gain = "none"

    @property
    def depth(self) -> int:
        """Recursion levels applied."""
        return len(self.n_cells)


def parse_code_spec(text: str, head_dim: int) -> CodeSpec:
    """Read one specification for vectors of `head_dim` coordinates (a power of two).

    Raises:
        UsageError: not of the form above, bits, cells or depth out of range, or a radius that
            contradicts the depth; says which part and what is allowed.
    """
    max_depth = head_dim.bit_length() - 1
    name, has_name, rest = text.rpartition("=")
    body, *options = rest.split("+")
    levels_text, has_radius, radius_text = body.partition(":")
    if not re.fullmatch(r"(n|-)?\d+(/(n|-)?\d+)*", levels_text):
        raise UsageError(f"the code {text!r} is not of the form LEVELS[:RADIUS]", f"write {_FORM}")
    words = levels_text.split("/")
    if len(words) > max_depth:
        raise UsageError(
            f"the code {text!r} has {len(words)} levels, but head_dim {head_dim} allows "
            f"{max_depth}",
            f"name 1 to {max_depth} levels",
        )
    n_cells = tuple(_cells(word, level, text) for level, word in enumerate(words, start=1))
    is_full_depth = len(n_cells) == max_depth
    radius = _parse_radius(radius_text, text) if has_radius else ""
    radius = radius or ("norm" if is_full_depth else "fp16")
    if radius == "norm" and not is_full_depth:
        raise UsageError(
            f"the code {text!r} stores one norm, but its depth {len(n_cells)} leaves "
            f"{head_dim >> len(n_cells)} radii for head_dim {head_dim}",
            f"give it {max_depth} levels, or a radius per block: fp16, r2, e5m6",
        )
    pairing, gain = _parse_options(options, text)
    if has_name and (not _NAME.fullmatch(name) or name in _RESERVED_NAMES):
        raise UsageError(
            f"the code name {name!r} is empty, reserved or has other characters than letters, "
            "digits and ._-",
            f"write {_FORM}",
        )
    return CodeSpec(
        name if has_name else default_name(n_cells, radius, pairing, gain),
        n_cells,
        radius,
        pairing,
        gain,
    )


def parse_code_specs(texts: Sequence[str], head_dim: int) -> tuple[CodeSpec, ...]:
    """Read a list of specifications; refuses an empty list and a name that appears twice."""
    specs = tuple(parse_code_spec(text, head_dim) for text in texts)
    if not specs:
        raise UsageError("no codes to fit", "name at least one with --code, or leave --code out")
    seen: dict[str, str] = {}
    for text, spec in zip(texts, specs, strict=True):
        if spec.name in seen:
            raise UsageError(
                f"the codes {seen[spec.name]!r} and {text!r} are both called {spec.name}",
                "leave one out, or give it another name: NAME=LEVELS[:RADIUS]",
            )
        seen[spec.name] = text
    return specs


def default_code_texts(head_dim: int) -> tuple[str, ...]:
    """The candidates for `head_dim`: the paper's code, six block codes of about 2 to 4 bits whose
    block of 16 coordinates fills 32 to 64 bits, and one code of full depth for reference.

    For head_dim 16 and less the blocks reach full depth, where one norm replaces the radii.
    """
    full_depth = (4, 2, 2, 2, 2, 3, 2, 2, 2, 2)
    max_depth = head_dim.bit_length() - 1
    blocks = (
        ("paper-4222", (4, 2, 2, 2), "fp16"),
        ("", (3, 1, 1, 1), "r1"),
        ("", (3, 2, 2, 2), "r2"),
        ("", (4, 2, 2, 2), "r2"),
        ("", (4, 3, 3, 3), "r3"),
        ("", (5, 3, 3, 3), "r3"),
        ("", (4, 3, 3, 3), "e5m6"),
    )
    texts: dict[str, None] = {}
    for name, bits, radius in blocks:
        levels = "/".join(str(b) for b in bits[:max_depth])
        if max_depth > len(bits):
            texts[f"{name}={levels}:{radius}" if name else f"{levels}:{radius}"] = None
        else:
            texts[f"{levels}:norm"] = None
    texts["/".join(str(b) for b in full_depth[:max_depth]) + ":norm"] = None
    return tuple(texts)


def spec_text(
    n_cells: Sequence[int], radius: str, pairing: Pairing = "adjacent", gain: Gain = "none"
) -> str:
    """The specification of a code, without a name; `parse_code_spec` reads it back."""
    levels = "/".join(
        f"n{cells}" if cells & (cells - 1) else str(cells.bit_length() - 1) for cells in n_cells
    )
    options = [pairing] * (pairing != PAIRINGS[0]) + [gain] * (gain != GAINS[0])
    return "+".join([f"{levels}:{_short(radius)}", *options])


def default_name(n_cells: Sequence[int], radius: str, pairing: Pairing, gain: Gain) -> str:
    """polar-4222-r2 (bits per level), or polar-n12.5.3-fp16 (cells) where bits are not whole."""
    if any(cells & (cells - 1) for cells in n_cells):
        levels = "n" + ".".join(str(cells) for cells in n_cells)
    else:
        levels = "".join(str(cells.bit_length() - 1) for cells in n_cells)
    words = [f"polar-{levels}", _short(radius)]
    if pairing != PAIRINGS[0]:
        words.append(pairing)
    if gain != GAINS[0]:
        words.append(gain.replace("_", "-"))
    return "-".join(words)


def _cells(word: str, level: int, spec: str) -> int:
    if word.startswith("n"):
        n_cells = int(word[1:])
        if not 1 <= n_cells <= MAX_CELLS:
            raise UsageError(
                f"the code {spec!r} has {n_cells} cells at level {level}",
                f"give each level 1 to {MAX_CELLS} cells",
            )
        return n_cells
    bits = int(word)
    if not 0 <= bits <= MAX_BITS:
        raise UsageError(
            f"the code {spec!r} has {bits} bits at level {level}",
            f"give each level 0 to {MAX_BITS} bits",
        )
    return int(1 << bits)


def _parse_radius(text: str, spec: str) -> str:
    for pattern, form in _SHORT_RADIUS:
        if match := pattern.fullmatch(text):
            return form.format(*match.groups())
    if not _LONG_RADIUS.fullmatch(text):
        raise UsageError(
            f"the code {spec!r} has the radius coding {text!r}",
            "use fp16, norm, rB (1 to 8 bits) or eEmM",
        )
    return text


def _parse_options(options: Sequence[str], spec: str) -> tuple[Pairing, Gain]:
    pairing, gain = PAIRINGS[0], GAINS[0]
    for option in options:
        if option in PAIRINGS:
            pairing = PAIRINGS[PAIRINGS.index(option)]
        elif option in GAINS:
            gain = GAINS[GAINS.index(option)]
        else:
            raise UsageError(
                f"the code {spec!r} has the option {option!r}",
                f"use one of {', '.join((*PAIRINGS, *GAINS))}",
            )
    return pairing, gain


def _short(radius: str) -> str:
    short = re.sub(r"lloyd_max:(\d+)", r"r\1", radius)
    return re.sub(r"minifloat:(\d+),(\d+)", r"e\1m\2", short)

"""A tier: how the key and the value of a token are stored on a page.

``tier = (key code, value code) | int8 | dense``; a dropped token lies on no page at all.
Source: tiers of precision per token follow Spherical KV (arXiv 2605.18856); that a tier pairs a key
code with a value code is ours.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sphkv_codebooks.spherical_code import SphericalCode

TierKind = Literal["spherical", "int8", "dense"]

RegionFormat = SphericalCode | Literal["int8", "dense"]
"""What one region of a page holds: vectors of one code, or int8 or dense vectors."""

DROPPED = -1
"""Index that stands for "no page" wherever a tier index per token is stored."""


class PageError(ValueError):
    """A tier, page or cache that cannot be laid out or read; the message says what to change."""


@dataclass(frozen=True)
class TierFormat:
    """One storage format of a token's key and value inside a shared frame.

    name: as printed and stored ("dense", "int8", or "<key code>/<value code>").
    key_code, value_code: spherical codes of one head_dim; None for int8 and dense.
    """

    name: str
    kind: TierKind
    key_code: SphericalCode | None = None
    value_code: SphericalCode | None = None

    def __post_init__(self) -> None:
        if self.kind == "spherical":
            if self.key_code is None or self.value_code is None:
                raise PageError(f"tier {self.name!r}: a spherical tier needs key and value codes")
            if self.key_code.head_dim != self.value_code.head_dim:
                raise PageError(
                    f"tier {self.name!r}: key code of head_dim {self.key_code.head_dim}, value "
                    f"code of {self.value_code.head_dim}; both must be the model's head_dim"
                )
        elif self.kind in ("int8", "dense"):
            if self.key_code is not None or self.value_code is not None:
                raise PageError(f"tier {self.name!r}: a {self.kind} tier has no spherical codes")
        else:
            raise PageError(
                f"tier {self.name!r}: kind {self.kind!r} is not spherical, int8 or dense"
            )
        if not self.name or self.name == "drop":
            raise PageError(f"tier name {self.name!r} is reserved; dropped tokens have no tier")

    @property
    def content(self) -> tuple[str, str | None, str | None]:
        """What decides the bytes and their meaning, comparable: kind and the codes' digests."""
        codes = (self.key_code, self.value_code)
        key, value = (None if code is None else code.digest for code in codes)
        return self.kind, key, value

    @property
    def key_format(self) -> "RegionFormat":
        """What the K region of a page holds."""
        return self._format(self.key_code)

    @property
    def value_format(self) -> "RegionFormat":
        """What the V region of a page holds."""
        return self._format(self.value_code)

    def _format(self, code: SphericalCode | None) -> "RegionFormat":
        if self.kind == "spherical":
            assert code is not None
            return code
        return self.kind

    @staticmethod
    def spherical(key_code: SphericalCode, value_code: SphericalCode | None = None) -> "TierFormat":
        """The tier of two codes (or one for both), named after them."""
        value_code = key_code if value_code is None else value_code
        same = key_code.name == value_code.name
        name = key_code.name if same else f"{key_code.name}/{value_code.name}"
        return TierFormat(name, "spherical", key_code, value_code)

    @staticmethod
    def int8() -> "TierFormat":
        """Rotated frame, eight bits per coordinate, one fp16 scale per vector."""
        return TierFormat("int8", "int8")

    @staticmethod
    def dense() -> "TierFormat":
        """bf16, in the frame."""
        return TierFormat("dense", "dense")

    def describe(self) -> dict[str, Any]:
        """A JSON-able description from which `from_description` rebuilds the tier bit for bit."""
        return {
            "name": self.name,
            "kind": self.kind,
            "key_code": None if self.key_code is None else self.key_code.describe(),
            "value_code": None if self.value_code is None else self.value_code.describe(),
        }

    @staticmethod
    def from_description(description: dict[str, Any]) -> "TierFormat":
        """The inverse of `describe`."""
        key, value = description["key_code"], description["value_code"]
        return TierFormat(
            description["name"],
            description["kind"],
            None if key is None else SphericalCode.from_description(key),
            None if value is None else SphericalCode.from_description(value),
        )

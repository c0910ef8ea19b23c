"""Codes of every token alike: the tiers of codebooks, and published methods, as rows of a table.

Under the uniform protocol the dense window and first tokens are the protocol's.  Under retention a
whole context is coded, as a cache that is filled at once; with `--window` or `--first-tokens` each
code stands there a second time, with these ends of the context dense and counted.
"""

from collections.abc import Sequence
from dataclasses import replace

from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.candidate import Candidate
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.dense_ends import EndsKeptDense
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.published import default_methods, family_of, published_codings
from sphkv_cli.evaluation.sinks import SinksKeptDense
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.sink_rule import SinkRule
from sphkv_kernels.tier import TierFormat

OUR_CODES = "our codes, uniform"
ENDS_DENSE = ", ends dense"


def uniform_candidates(
    options: EvaluateOptions, books: CodebooksReader | None, shape: ModelCacheShape
) -> list[Candidate]:
    """Rows of the uniform protocol: codes of ours, which gates hold for, then published methods.

    Raises:
        UsageError: an unknown code, or ",centred" methods without means.
    """
    frames = None if books is None else books.frames
    return [
        *_codes(options, books, shape, is_ours=True),
        *_published(options, options.methods, frames, shape),
    ]


def retention_candidates(
    options: EvaluateOptions,
    books: CodebooksReader | None,
    frames: FrameSet,
    shape: ModelCacheShape,
) -> list[Candidate]:
    """Rows beside the plans of a context; gates hold for codes of ours where --code names them.

    Methods are those asked for; without any, the usual ones where codebooks are given or published
    rows are asked for.

    Args:
        frames: of the allocation, whose centring ",centred" methods take.

    Raises:
        UsageError: as `uniform_candidates`.
    """
    methods = options.methods if _has_candidates(options, books) else ()
    found = [
        *_codes(options, books, shape, is_ours=bool(options.codes)),
        *_published(options, methods, frames, shape),
    ]
    first, last = options.first_tokens or 0, options.window or 0
    if not first and not last:
        return found
    return found + [
        Candidate(
            EndsKeptDense(one.coding, shape, first, last), one.is_ours, one.family + ENDS_DENSE
        )
        for one in found
    ]


def _has_candidates(options: EvaluateOptions, books: CodebooksReader | None) -> bool:
    return (
        bool(options.methods)
        or books is not None
        or (options.methods is None and options.rows in ("published", "all"))
    )


def require_use_of_ends(options: EvaluateOptions, books: CodebooksReader | None) -> None:
    """Refuse dense ends where no row beside the plans would keep them.

    Raises:
        UsageError: as said, before anything is loaded.
    """
    if (options.window or options.first_tokens) and not _has_candidates(options, books):
        raise UsageError(
            "--window and --first-tokens are for codes and methods beside the plans",
            "pass --codebooks or --method, or leave them out",
        )


def chosen_tiers(
    names: Sequence[str], tiers: Sequence[TierFormat], path: str
) -> tuple[TierFormat, ...]:
    """The tiers of those names in their order; all without a name; raises UsageError."""
    known = {tier.name: tier for tier in tiers}
    for name in names:
        if name not in known:
            raise UsageError(f"{path} has no tier {name!r}", f"one of {', '.join(known)}")
    return tuple(tier for tier in tiers if not names or tier.name in names)


def _codes(
    options: EvaluateOptions,
    books: CodebooksReader | None,
    shape: ModelCacheShape,
    *,
    is_ours: bool,
) -> list[Candidate]:
    if books is None:
        if options.codes:
            raise UsageError(f"--code {options.codes[0]} needs codebooks", "pass codebooks.h5")
        return []
    sinks = _sinks(options, books)
    found: list[Candidate] = []
    for tier in chosen_tiers(options.codes, books.tiers, str(books.path)):
        for coding in _with_seeds(tier, books, shape, options.seeds):
            protected = coding if sinks is None else SinksKeptDense(coding, sinks)
            found.append(Candidate(protected, is_ours, OUR_CODES))
    return found


def _published(
    options: EvaluateOptions,
    methods: Sequence[str] | None,
    frames: FrameSet | None,
    shape: ModelCacheShape,
) -> list[Candidate]:
    is_centred = frames is not None and frames.key_mean is not None
    if methods is None:
        methods = default_methods(is_centred=is_centred)
    if not is_centred and any(name.endswith(",centred") for name in methods):
        raise UsageError(
            "centred methods need key means",
            "pass codebooks fitted with --centring auto, post_rope or pre_rope",
        )
    seeds = range(options.seed, options.seed + options.seeds)
    return [
        Candidate(coding, False, family_of(name))
        for name in methods
        for coding in published_codings([name], shape, frames, seeds)
    ]


def _sinks(options: EvaluateOptions, books: CodebooksReader) -> SinkRule | None:
    """The rule of the codebooks, with the factor asked for; None where it finds nothing."""
    rule = books.sinks
    if rule is None:
        if options.sinks != "auto" and options.sinks > 0:
            raise UsageError(
                f"{books.path} holds no norms to find sinks by",
                "make it again with `sphkv fit-codebooks`, or pass --sinks 0",
            )
        return None
    if options.sinks != "auto":
        rule = replace(rule, factor=options.sinks)
    return rule if rule.factor > 0 else None


def _with_seeds(
    tier: TierFormat, books: CodebooksReader, shape: ModelCacheShape, n_seeds: int
) -> list[KeyValueCoding]:
    frames = books.frames
    if n_seeds == 1 or frames.rotation.kind == "none":
        return [FrameCoding(tier, frames, shape)]
    first = frames.rotation
    rotations = [first] + [
        replace(first, seed=first.seed + step, stored_matrix=None) for step in range(1, n_seeds)
    ]
    return [
        FrameCoding(tier, replace(frames, rotation=rotation), shape, f", seed {rotation.seed}")
        for rotation in rotations
    ]

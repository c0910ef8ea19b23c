"""`sphkv profile --synthetic`: the kernel's speed at any shape, without a capture.

    speed-up      best bf16 latency of this run / kernel latency; over fp8 too, where FlashInfer is
                  installed
    rebuilt       codes -> dense bf16 in memory, then attention on them: what the kernel avoids
    metadata      plan records, positions and norms: bytes, and the step's time over page sizes

Keys and values are Gaussian, encoded for real; latencies are medians of graph replays with a cold
L2, beside the copy and read rate of the same run (`sphkv_kernels.timing`). Every code is compared
with the float64 reference in the same run.
"""

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sphkv_cli.errors import EnvironmentUnable, SphkvError, UsageError
from sphkv_cli.option_checks import require_at_least
from sphkv_cli.progress import NullProgress, Progress
from sphkv_kernels.benchmark import CaseReport, MetadataCase, Shape

STAGE = "profile-synthetic"
_SHAPE = re.compile("x".join(["0*([1-9][0-9]*)"] * 4))
_MOST_DENSE_BYTES = 1 << 40
_MOST_DIGITS = 12
"""Of one number: more are never within the bytes, and `int` refuses thousands."""
DEFAULT_CODES = ("4/2/2/2:fp16", "4/3/3/3:e5m6", "3/2/2/2:r2")
PAGE_SIZES = (16, 32, 64)
TERM_PAIRS = 4
"""RoPE pairs of the position term whose cost the metadata table shows."""


@dataclass(frozen=True)
class SyntheticSpeedOptions:
    """shape: sequences x KV heads x context x query heads per KV head.  codes: specifications as
    for `fit-codebooks --code`.  sweep: other contexts, batches and group sizes too."""

    shape: str
    head_dim: int = 128
    codes: tuple[str, ...] = DEFAULT_CODES
    page_size: int = 32
    sweep: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 128, 256):
            raise UsageError(f"--head-dim is {self.head_dim}", "the kernel has 64, 128 and 256")
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"--page-size is {self.page_size}", f"choose one of {PAGE_SIZES}")
        require_at_least("--seed", self.seed, 0)
        self.parsed()

    def parsed(self) -> Shape:
        """The shape as numbers.

        Raises:
            UsageError: no shape, one that no GPU holds, or a group that the kernel does not serve.
        """
        found = _SHAPE.fullmatch(self.shape)
        if found is None:
            raise UsageError(
                f"--synthetic {self.shape!r} cannot be read",
                "give sequences x KV heads x context x group size, for example 8x8x32768x4",
            )
        too_large = UsageError(
            "--synthetic asks for more than any GPU holds, 1 TiB of dense keys and values",
            "give a smaller shape",
        )
        if max(map(len, found.groups())) > _MOST_DIGITS:
            raise too_large
        n_sequences, n_kv_heads, n_tokens, group_size = map(int, found.groups())
        shape = Shape(n_sequences, n_kv_heads, n_tokens, group_size, self.head_dim)
        if shape.dense_bytes > _MOST_DENSE_BYTES:
            raise too_large
        if shape.group_size > 16:
            raise UsageError(f"groups of {shape.group_size}", "the kernel serves groups of 1 to 16")
        return shape

    def shapes(self) -> tuple[Shape, ...]:
        """The shape itself, then with `sweep` those that change one of its numbers."""
        base = self.parsed()
        shapes = [base]
        if self.sweep:
            contexts = {max(base.n_tokens // 16, 16), max(base.n_tokens // 4, 16)}
            shapes += [replace(base, n_tokens=n) for n in sorted(contexts)]
            shapes += [replace(base, n_sequences=n) for n in (1, 2, 4, 8)]
            shapes += [replace(base, group_size=n) for n in (1, 2, 4, 8, 16)]
        return tuple(dict.fromkeys(shapes))


@dataclass(frozen=True)
class SyntheticSpeed:
    """Content of the report; rates in 10^9 bytes per second."""

    device: dict[str, Any]
    copy_gb_per_s: float
    read_gb_per_s: float
    cases: tuple[CaseReport, ...]
    metadata: tuple[MetadataCase, ...]
    fp8: str


@dataclass(frozen=True)
class SyntheticSpeedReport:
    """What the command shows."""

    path: str
    digest: str
    content: SyntheticSpeed
    seconds: float


def profile_synthetic(
    options: SyntheticSpeedOptions,
    output: Path,
    *,
    plot: Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> SyntheticSpeedReport:
    """Time the codes at the shapes and write `output` (and a roofline to `plot`: .png or .svg).

    Raises:
        UsageError: a code that cannot be meant, or that the kernel does not read; one file for both
            outputs, or a plot that is neither .png nor .svg.
        ArtifactError: an output exists (without `force`) or cannot be written.
        EnvironmentUnable: no GPU, or `plot` without matplotlib.
        SphkvError: a shape that does not fit into the GPU's memory.
    """
    import torch

    from sphkv_cli.artifacts.header import collect_provenance
    from sphkv_cli.artifacts.report import as_json, save_report
    from sphkv_cli.artifacts.store import check_outputs
    from sphkv_cli.plots.draw import require_drawable, write_figure
    from sphkv_cli.profile.roofline import roofline
    from sphkv_cli.profile.synthetic_view import tables
    from sphkv_kernels.benchmark import metadata_case, run_case
    from sphkv_kernels.dense_attention import Baseline, dense_baselines, fp8_sentence
    from sphkv_kernels.tier import PageError
    from sphkv_kernels.timing import device_provenance, memory_rates

    started = time.perf_counter()
    progress = progress or NullProgress()
    check_outputs({"--output": output, "--plot": plot}, {}, force=force)
    require_drawable(plot)
    tiers = _tiers(options)
    if not torch.cuda.is_available():
        raise EnvironmentUnable(
            "--synthetic times the CUDA kernel, and torch sees no GPU", "run it where there is one"
        )
    shapes = options.shapes()
    too_large = SphkvError(
        f"{options.shape} does not fit into this GPU's memory", "give a smaller shape"
    )
    if max(shape.dense_bytes for shape in shapes) > torch.cuda.mem_get_info()[1]:
        raise too_large
    cases: list[CaseReport] = []
    metadata: list[MetadataCase] = []
    every_baseline: list[Baseline] = []
    progress.start("Timing", len(shapes), "shapes")
    try:
        rates = memory_rates()
        for shape in shapes:
            baselines = dense_baselines(
                shape.n_sequences,
                shape.n_kv_heads,
                shape.n_tokens,
                shape.group_size,
                shape.head_dim,
            )
            every_baseline += baselines
            for tier in tiers:
                rebuild = shape == shapes[0] and shape.n_tokens % options.page_size == 0
                case = run_case(
                    (tier,), shape, rates, baselines, page_size=options.page_size,
                    with_reconstruction=rebuild, seed=options.seed,
                )  # fmt: skip
                cases.append(case)
            torch.cuda.empty_cache()
            progress.advance()
        base = shapes[0]
        few = {replace(base, n_tokens=max(base.n_tokens // 16, 64)), replace(base, n_sequences=1)}
        for shape in (base, *sorted(few - {base}, key=lambda s: s.name)):
            metadata += [
                metadata_case(tiers[-1], shape, page_size, TERM_PAIRS, options.seed)
                for page_size in PAGE_SIZES
            ]
    except PageError as error:
        raise SphkvError(f"the kernel refuses this shape: {error}") from error
    except torch.OutOfMemoryError as error:
        raise too_large from error
    finally:
        progress.finish()
    content = SyntheticSpeed(
        device_provenance(),
        rates.copy_gb_per_s,
        rates.read_gb_per_s,
        tuple(cases),
        tuple(metadata),
        fp8_sentence(every_baseline),
    )
    ref = save_report(
        output,
        {"stage": STAGE, STAGE: {**as_json(content), "tables": tables(content)}},
        inputs={},
        provenance=collect_provenance(seed=options.seed),
        force=force,
    )
    if plot is not None:
        write_figure(roofline(content.cases, content.read_gb_per_s), plot)
    return SyntheticSpeedReport(str(output), ref.digest, content, time.perf_counter() - started)


def _tiers(options: SyntheticSpeedOptions) -> list[Any]:
    from sphkv_cli.fit.candidates import candidate_codes
    from sphkv_cli.fit.options import FitOptions
    from sphkv_kernels.block_words import decoded_layout_of
    from sphkv_kernels.tier import TierFormat

    codes = candidate_codes(FitOptions(codes=options.codes), options.head_dim)
    for code in codes:
        if decoded_layout_of(code) is None:
            raise UsageError(
                f"the CUDA kernel does not read the code {code.name}",
                "give codes of kernels/LAYOUT.md, such as 4/2/2/2:fp16 or 3/2/2/2:r2",
            )
    return [TierFormat.spherical(code) for code in reversed(codes)]

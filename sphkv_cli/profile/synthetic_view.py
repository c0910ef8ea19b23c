"""`sphkv profile --synthetic` for people: speed, then what metadata costs."""

from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.profile.synthetic import SyntheticSpeed, SyntheticSpeedReport


def view(report: SyntheticSpeedReport) -> tuple[Block, ...]:
    """Blocks in the order a reader needs them."""
    content = report.content
    head = (
        f"{content.device['gpu']}: copy {content.copy_gb_per_s:.0f} GB/s, read "
        f"{content.read_gb_per_s:.0f} GB/s; shapes are sequences x KV heads x context x group"
    )
    return (
        Line(head),
        *tables(content),
        Line(f"Rebuilt: the same codes decoded to bf16 in memory, then attended. {content.fp8}"),
        Line(f"Report: {report.path} ({report.seconds:.0f} s)"),
    )


def tables(content: SyntheticSpeed) -> tuple[Table, Table]:
    """Speed, and metadata."""
    speed = Table(
        "Decode step, cold L2, median (p20-p80), against the best dense attention of this run",
        ("code", "shape", "bits", "us", "p20", "p80", "GB/s", "of read", "bf16 us", "speed-up",
         "fp8 us", "over fp8", "rebuilt us", "output error"),
        [
            (
                c.tiers[0],
                c.shape.name,
                c.bits_per_coordinate,
                c.latency.median_us,
                c.latency.p20_us,
                c.latency.p80_us,
                c.code_gb_per_s,
                c.fraction_of_read_rate,
                c.best_bf16_us,
                c.speed_up,
                "-" if c.best_fp8_us is None else c.best_fp8_us,
                "-" if c.speed_up_over_fp8 is None else c.speed_up_over_fp8,
                "-" if c.reconstruct is None else c.reconstruct.median_us,
                c.output_error,
            )
            for c in content.cases
        ],
        text_columns=2,
    )  # fmt: skip
    metadata = Table(
        "Metadata of one step over page sizes: MB, and the step with and without positions",
        ("code", "shape", "page size", "codes MB", "norms MB", "plan MB", "positions MB", "us",
         "with a position term"),
        [
            (
                m.tier,
                m.shape.name,
                m.page_size,
                m.n_bytes["codes"] / 1e6,
                m.n_bytes["norms"] / 1e6,
                m.n_bytes["plan"] / 1e6,
                m.n_bytes["positions"] / 1e6,
                m.latency.median_us,
                m.with_term.median_us,
            )
            for m in content.metadata
        ],
        text_columns=2,
    )  # fmt: skip
    return speed, metadata

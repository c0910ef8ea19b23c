"""`sphkv profile`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import ForceFlag, JsonFlag, Seed, command
from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import refuse_given


@command("profile")
def profile_command(
    capture: Annotated[
        Path | None, typer.Argument(help="The capture: capture.h5.", show_default=False)
    ] = None,
    allocation: Annotated[
        Path | None, typer.Argument(help="The allocation: allocation.h5.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="The report to write.")] = Path("report.json"),
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one HTML page with plots, too.")
    ] = None,
    backend: Annotated[
        Literal["auto", "reference", "cuda"],
        typer.Option(help="auto takes the CUDA kernel where there is a GPU."),
    ] = "auto",
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Measure these tiers uniformly, repeatable; all of them without it."),
    ] = None,
    max_queries: Annotated[
        int | None,
        typer.Option(help="Queries of each document's horizon that are looked at: 256."),
    ] = None,
    max_logit_rmse: Annotated[
        float | None, typer.Option(help="Gate: worst head's logit rms error, softmax units.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Gate: worst head's mean attention KL, nats.")
    ] = None,
    max_output_error: Annotated[
        float | None, typer.Option(help="Gate: worst head's relative output error.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Gate: decode step over the best bf16 one; needs a GPU.")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            help="Time the kernel without a capture: sequences x KV heads x context x group, "
            "such as 8x8x32768x4."
        ),
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="With --synthetic: 64, 128 or 256; 128 if left out.")
    ] = None,
    code: Annotated[
        list[str] | None,
        typer.Option(help="With --synthetic: a code to time, repeatable, as in fit-codebooks."),
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(help="With --synthetic: 16, 32 or 64 tokens; 32 if left out.")
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="With --synthetic: more contexts, batches and groups."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --synthetic: draw a roofline to this .png or .svg.")
    ] = None,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Judge an allocation on held-out documents: logit and output error, bytes, and GPU time."""
    from sphkv_cli.artifacts.store import check_outputs
    from sphkv_cli.plots.draw import require_matplotlib
    from sphkv_cli.profile.gates import require_gates
    from sphkv_cli.profile.options import Gates, ProfileOptions
    from sphkv_cli.profile.stage import profile
    from sphkv_cli.profile.view import view
    from sphkv_cli.render import Output, TerminalProgress

    if synthetic is not None:
        refuse_given(
            "with --synthetic",
            {
                "CAPTURE": capture is not None,
                "--html": html is not None,
                "--tier": bool(tier),
                "--backend reference": backend == "reference",
                "--max-queries": max_queries is not None,
                "--max-logit-rmse": max_logit_rmse is not None,
                "--max-kl": max_kl is not None,
                "--max-output-error": max_output_error is not None,
                "--min-speedup": min_speedup is not None,
            },
        )
        from sphkv_cli.profile.synthetic import (
            DEFAULT_CODES,
            SyntheticSpeedOptions,
            profile_synthetic,
        )
        from sphkv_cli.profile.synthetic_view import view as synthetic_view

        shapes = SyntheticSpeedOptions(
            synthetic,
            128 if head_dim is None else head_dim,
            tuple(code or DEFAULT_CODES),
            32 if page_size is None else page_size,
            sweep,
            seed,
        )
        with TerminalProgress() as progress:
            timed = profile_synthetic(shapes, output, plot=plot, progress=progress, force=force)
        Output(json_output).show(timed, synthetic_view(timed))
        return
    if capture is None or allocation is None:
        raise UsageError(
            "profile needs a capture and an allocation",
            "or --synthetic 8x8x32768x4 for speed alone",
        )
    refuse_given(
        "without --synthetic",
        {
            "--head-dim": head_dim is not None,
            "--code": bool(code),
            "--page-size": page_size is not None,
            "--sweep": sweep,
            "--plot": plot is not None,
        },
    )
    options = ProfileOptions(
        backend=backend,
        tiers=tuple(tier or ()),
        max_queries=256 if max_queries is None else max_queries,
        gates=Gates(max_logit_rmse, max_kl, max_output_error, min_speedup),
        seed=seed,
    )
    check_outputs(
        {"--output": output, "--html": html},
        {"CAPTURE": capture, "ALLOCATION": allocation},
        force=force,
    )
    if html is not None:
        require_matplotlib("--html")
    with TerminalProgress() as progress:
        report = profile(options, capture, allocation, output, progress=progress, force=force)
    if html is not None:
        from sphkv_cli.profile.html import write_html

        write_html(report, html, force=force)
    Output(json_output).show(report, view(report))
    require_gates(report)

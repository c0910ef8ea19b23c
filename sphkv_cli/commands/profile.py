"""`sphkv profile`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import CaptureArgument, ForceFlag, JsonFlag, Seed, command


@command("profile")
def profile_command(
    capture: CaptureArgument,
    allocation: Annotated[Path, typer.Argument(help="The allocation: allocation.h5.")],
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
        int, typer.Option(help="Queries of each document's horizon that are looked at.")
    ] = 256,
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
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Judge an allocation on held-out documents: logit and output error, bytes, and GPU time."""
    from sphkv_cli.profile.gates import require_gates
    from sphkv_cli.profile.options import Gates, ProfileOptions
    from sphkv_cli.profile.stage import profile
    from sphkv_cli.profile.view import view
    from sphkv_cli.render import Output, TerminalProgress

    options = ProfileOptions(
        backend=backend,
        tiers=tuple(tier or ()),
        max_queries=max_queries,
        gates=Gates(max_logit_rmse, max_kl, max_output_error, min_speedup),
        seed=seed,
    )
    if html is not None:
        from sphkv_cli.profile.html import check_html, write_html

        check_html(html, force=force)
    with TerminalProgress() as progress:
        report = profile(options, capture, allocation, output, progress=progress, force=force)
    if html is not None:
        write_html(report, html, force=force)
    Output(json_output).show(report, view(report))
    require_gates(report)

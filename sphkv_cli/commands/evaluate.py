"""`sphkv evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import (
    CaptureArgument,
    ForceFlag,
    JsonFlag,
    Seed,
    command,
    refuse_typed,
)

_OF_PROBES = (
    "probe_length", "probe_depth", "probe_keys", "probe_values", "probe_prompts", "gate_recall",
)  # fmt: skip
_OF_ROWS = (
    "budget", "rows", "context", "max_documents", "stepwise", "by_position", "gate_kl",
    "gate_top1", "gate_perplexity",
)  # fmt: skip
"""Parameters that have a meaning with a probe alone, and with rows alone."""


@command("evaluate")
def evaluate_command(
    command_line: typer.Context,
    capture: CaptureArgument,
    codebooks: Annotated[
        Path | None,
        typer.Option(help="Evaluate its codes; with an allocation, beside its plans in one table."),
    ] = None,
    allocation: Annotated[
        Path | None, typer.Option(help="Evaluate its plans: a context coded once, then new tokens.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The report to write.")] = Path("evaluation.json"),
    protocol: Annotated[
        Literal["auto", "uniform", "retention"],
        typer.Option(help="auto is retention where an allocation is given, else uniform."),
    ] = "auto",
    code: Annotated[
        list[str] | None, typer.Option(help="Codes by name, repeatable; all without it.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Published methods beside them, repeatable: turboquant:3, kivi:4, polarquant ..."
        ),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Tiers run for every page beside the plan, repeatable; best fits it."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last tokens kept dense: 32 (uniform); retention: codes stand a second time so."
        ),
    ] = None,
    first_tokens: Annotated[
        int | None, typer.Option(help="First tokens kept dense: 4 (uniform); retention: likewise.")
    ] = None,
    first_scored: Annotated[int, typer.Option(help="First position compared (uniform).")] = 64,
    sinks: Annotated[
        str,
        typer.Option(
            help="Keys below this share of their head's median norm stay dense (our codes, bytes "
            "counted); auto as the codebooks chose, 0 none."
        ),
    ] = "auto",
    seeds: Annotated[int, typer.Option(help="Rotation seeds to average over.")] = 1,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Plan anew at this budget, repeatable (retention): 1b, 2b ..."),
    ] = None,
    rows: Annotated[
        Literal["own", "published", "controls", "all"] | None,
        typer.Option(help="Plan anew, with these methods beside ours (retention)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Plan anew for so many first tokens (retention).")
    ] = None,
    split: Annotated[
        Literal["select", "judge"], typer.Option(help="select only while developing.")
    ] = "judge",
    max_documents: Annotated[int | None, typer.Option(help="At most so many documents.")] = None,
    gate_kl: Annotated[float | None, typer.Option(help="Gate: largest KL, nats.")] = None,
    gate_top1: Annotated[float | None, typer.Option(help="Gate: least top-1 agreement.")] = None,
    gate_perplexity: Annotated[
        float | None, typer.Option(help="Gate: largest perplexity ratio.")
    ] = None,
    stepwise: Annotated[
        bool,
        typer.Option("--stepwise", help="Also decode the policy step by step from its own cache."),
    ] = False,
    probe: Annotated[
        Literal["copy-back", "needle"] | None,
        typer.Option(help="Instead: ask for codes that a context states, dense and coded."),
    ] = None,
    probe_length: Annotated[
        list[int] | None, typer.Option(help="Context tokens of a probe, repeatable; 512.")
    ] = None,
    probe_depth: Annotated[
        list[float] | None, typer.Option(help="Depth of the needle, 0 to 1, repeatable.")
    ] = None,
    probe_keys: Annotated[int, typer.Option(help="Statements in a context (copy-back).")] = 4,
    probe_values: Annotated[int, typer.Option(help="Codes in each statement.")] = 1,
    probe_prompts: Annotated[
        int, typer.Option(help="Prompts per length (copy-back) or per cell (needle).")
    ] = 4,
    gate_recall: Annotated[
        float | None, typer.Option(help="Gate: least fraction of digits that come back.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw KL against bits, or the needle's grids, to this .png or .svg."),
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also print KL by position.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Where the captured model is, if not under its name.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="As for capture.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="The file in a folder or repo.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Run the model with the coded cache beside the dense one: KL, top-1 and perplexity."""
    from sphkv_cli.artifacts.store import check_outputs
    from sphkv_cli.evaluation.options import EvaluateOptions, parse_sinks
    from sphkv_cli.evaluation.rate_plot import rate_figure
    from sphkv_cli.evaluation.stage import evaluate, require_gates
    from sphkv_cli.evaluation.view import view
    from sphkv_cli.models.load import LoadOptions
    from sphkv_cli.plots.draw import require_drawable, write_figure
    from sphkv_cli.render import Output, TerminalProgress

    options = EvaluateOptions(
        protocol=protocol,
        codes=tuple(code or ()),
        methods=tuple(method) if method else None,
        tiers=tuple(tier) if tier else ("best",),
        window=window,
        first_tokens=first_tokens,
        first_scored=first_scored,
        sinks=parse_sinks(sinks),
        seeds=seeds,
        budgets=tuple(budget or ()),
        rows=rows,
        context=context,
        split=split,
        max_documents=max_documents,
        stepwise=stepwise,
        gate_kl=gate_kl,
        gate_top1=gate_top1,
        gate_perplexity=gate_perplexity,
        model=model,
        load=LoadOptions(dtype=dtype, device=device),
        revision=revision,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
        seed=seed,
    )
    if probe is None:
        refuse_typed(command_line, "without --probe", _OF_PROBES)
    else:
        other = "probe_depth" if probe == "copy-back" else "probe_keys"
        refuse_typed(command_line, f"with --probe {probe}", (other,))
        refuse_typed(command_line, "with --probe", _OF_ROWS)
    read = options.files_read(capture, codebooks, allocation)
    check_outputs({"--output": output, "--plot": plot}, read, force=force)
    if probe is not None:
        from sphkv_cli.evaluation.probe_options import ProbeOptions
        from sphkv_cli.evaluation.probe_plot import checked_plot, grid_figure
        from sphkv_cli.evaluation.probe_reading import view_probe
        from sphkv_cli.evaluation.probe_stage import probe as run_probe

        asked = ProbeOptions(
            kind=probe,
            lengths=tuple(probe_length) if probe_length else (512,),
            depths=tuple(probe_depth) if probe_depth else (0.0, 0.25, 0.5, 0.75, 1.0),
            keys=probe_keys,
            values=probe_values,
            prompts=probe_prompts,
            gate=gate_recall,
        )
        checked_plot(plot, asked)
        with TerminalProgress() as progress:
            found = run_probe(
                options,
                asked,
                capture,
                codebooks,
                allocation,
                output,
                progress=progress,
                force=force,
            )
        Output(json_output).show(found, view_probe(found))
        if plot is not None:
            write_figure(grid_figure(found), plot)
        require_gates(found)
        return
    require_drawable(plot)
    with TerminalProgress() as progress:
        result = evaluate(
            options, capture, codebooks, allocation, output, progress=progress, force=force
        )
    Output(json_output).show(result, view(result, by_position=by_position))
    if plot is not None:
        write_figure(rate_figure(result), plot)
    require_gates(result)

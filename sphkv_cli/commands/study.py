"""`sphkv study`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import ForceFlag, JsonFlag, Seed, command


@command("study")
def study_command(
    names: Annotated[list[str] | None, typer.Argument(help="Studies; --list names them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every study, one after another.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Print what there is, stop.")] = False,
    capture: Annotated[Path | None, typer.Option(help="The capture: capture.h5.")] = None,
    codebooks: Annotated[
        Path | None, typer.Option(help="Codebooks of its model: codebooks.h5.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the captured model is, if its name does not say.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder: per study the numbers, a page and a PNG per figure."),
    ] = None,
    max_documents: Annotated[
        int, typer.Option(help="Documents of a split that are read, the first ones.")
    ] = 4,
    max_queries: Annotated[
        int, typer.Option(help="Queries per document and layer, evenly spaced.")
    ] = 128,
    max_layers: Annotated[
        int | None, typer.Option(help="Layers looked at, evenly spaced; all without it.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Budgets that retention compares methods at, repeatable: 1b 2b 3b 4b."),
    ] = None,
    rows: Annotated[
        Literal["own", "published", "controls", "all"],
        typer.Option(help="Methods that retention compares, beside ours."),
    ] = "all",
    recall_prompts: Annotated[
        int, typer.Option(help="Copy-back prompts that retention asks of each method.")
    ] = 4,
    horizon: Annotated[
        int,
        typer.Option(help="Last tokens of a document, after the context (studies that allocate)."),
    ] = 128,
    window: Annotated[
        int, typer.Option(help="Last positions of a context whose queries score its tokens.")
    ] = 64,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Run studies of the codes: each a question with tables, figures and a reading."""
    from sphkv_cli.errors import SphkvError
    from sphkv_cli.render import Output, TerminalProgress
    from sphkv_cli.study.registry import STUDIES, studies_named
    from sphkv_cli.study.view import list_view, view

    if only_list:
        Output(json_output).show(STUDIES, list_view(STUDIES))
        return
    studies = studies_named(names or (), every=every)
    from sphkv_cli.study.inputs import StudyOptions
    from sphkv_cli.study.stage import run_studies

    options = StudyOptions(
        seed,
        max_documents,
        max_queries,
        max_layers,
        tuple(budget) if budget else StudyOptions.budgets,
        rows,
        recall_prompts,
        horizon,
        window,
    )
    with TerminalProgress() as progress:
        report = run_studies(
            studies,
            options,
            capture=capture,
            codebooks=codebooks,
            model=model,
            output=output,
            skip_unmet=every,
            progress=progress,
            force=force,
        )
    Output(json_output).show(report, view(report))
    if report.failures:
        raise SphkvError("; ".join(report.failures))

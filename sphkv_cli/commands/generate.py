"""`sphkv generate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import JsonFlag, command


@command("generate")
def generate_command(
    allocation: Annotated[
        Path | None, typer.Option(help="Keep what this allocation's policy keeps.")
    ] = None,
    codebooks: Annotated[
        Path | None, typer.Option(help="Instead: keep all in one --tier of these.")
    ] = None,
    tier: Annotated[
        str | None, typer.Option(help="With --codebooks: one of their tiers, int8 or dense.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text, repeatable.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A file of text, repeatable.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Only so many first tokens of each prompt.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    window: Annotated[int, typer.Option(help="Last tokens kept dense.")] = 32,
    budget: Annotated[
        str | None,
        typer.Option(
            help="With --allocation: hold this budget of sealed tokens while others come, by "
            "demoting pages: 2b, 0.1x, 12MiB."
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "cuda", "reference"],
        typer.Option(help="auto takes the CUDA kernel where the model lies on a GPU."),
    ] = "auto",
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
    json_output: JsonFlag = False,
) -> None:
    """Continue prompts greedily with the dense cache and with the coded one, side by side."""
    from sphkv_cli.generation.options import GenerateOptions
    from sphkv_cli.models.load import LoadOptions, require_transformers
    from sphkv_cli.render import Output, TerminalProgress

    options = GenerateOptions(
        prompts=tuple(prompt or ()),
        prompt_files=tuple(prompt_file or ()),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        tier=tier,
        window=window,
        budget=budget,
        backend=backend,
        model=model,
        load=LoadOptions(dtype=dtype, device=device),
        revision=revision,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
    )
    require_transformers()
    # It subclasses transformers' own cache.
    from sphkv_cli.generation.stage import generate
    from sphkv_cli.generation.view import view

    with TerminalProgress() as progress:
        result = generate(options, allocation, codebooks, progress=progress)
    Output(json_output).show(result, view(result))

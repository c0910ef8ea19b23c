"""`sphkv capture`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sphkv_cli.commands.registry import (
    ForceFlag,
    JsonFlag,
    Seed,
    command,
    options_typed,
    refuse_typed,
)
from sphkv_cli.errors import UsageError

_SYNTHETIC = {
    "synthetic", "output", "document_tokens", "query_stride", "query_tail", "store_dtype", "seed",
    "dry_run", "force", "json_output",
}  # fmt: skip
"""Parameters that have a meaning without a model."""


@command("capture")
def capture_command(
    command_line: typer.Context,
    output: Annotated[Path, typer.Option(help="The capture to write.")] = Path("capture.h5"),
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face id, folder, .gguf file, or a packaged model (smollm2)."),
    ] = None,
    text_file: Annotated[
        list[str] | None,
        typer.Option(help="A text, repeatable; fit=, select= or judge= before it sets its split."),
    ] = None,
    jsonl: Annotated[
        list[str] | None,
        typer.Option(help="JSON lines, one document each, repeatable; splits as for --text-file."),
    ] = None,
    jsonl_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    synthetic: Annotated[
        str | None,
        typer.Option(
            help="No model: LAYERSxQ_HEADSxKV_HEADSxHEAD_DIM of known statistics, as 2x4x2x64."
        ),
    ] = None,
    document_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut longer texts into documents of this many tokens: 1024; with --synthetic 256."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens in all.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Refuse shorter documents.")] = 64,
    query_stride: Annotated[int, typer.Option(help="Keep every n-th query ...")] = 4,
    query_tail: Annotated[int, typer.Option(help="... and all of the last so many.")] = 256,
    pre_rope: Annotated[
        bool, typer.Option("--pre-rope", help="Keep keys before RoPE too.")
    ] = False,
    prefill_tokens: Annotated[int, typer.Option(help="Tokens per forward pass.")] = 4096,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Arithmetic of the model; auto is its own on a GPU, float32 elsewhere."),
    ] = "auto",
    store_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option(help="How activations are stored."),
    ] = "bfloat16",
    attention: Annotated[
        Literal["auto", "sdpa", "eager"],
        typer.Option(help="What computes attention while it is recorded."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Placement by accelerate: auto ...")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="The GGUF file in a folder or repo.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher", help="Measure how much the next token minds an error of each query head."
        ),
    ] = False,
    fisher_samples: Annotated[
        int,
        typer.Option(
            help="With --fisher: backward passes per fit document, each with sampled labels."
        ),
    ] = 2,
    fisher_tokens: Annotated[
        int, typer.Option(help="With --fisher: first tokens of a fit document that serve it.")
    ] = 2048,
    seed: Seed = 42,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the documents and bytes, write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a capture that was interrupted.")
    ] = False,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Record the queries, keys and values that a model's attention really receives."""
    from sphkv_cli.capture.options import CaptureOptions, SyntheticOptions, TextSource
    from sphkv_cli.capture.view import view
    from sphkv_cli.render import Output, TerminalProgress

    if (model is None) == (synthetic is None):
        raise UsageError("pass either --model or --synthetic", "for example --model smollm2")
    if not fisher:
        refuse_typed(command_line, "without --fisher", ("fisher_samples", "fisher_tokens"))
    progress = TerminalProgress()
    if synthetic is not None:
        from sphkv_cli.capture.synthetic import capture_synthetic

        refuse_typed(
            command_line, "with --synthetic", options_typed(command_line).keys() - _SYNTHETIC
        )
        n_layers, n_q_heads, n_kv_heads, head_dim = _numbers("--synthetic", synthetic, 4)
        options = SyntheticOptions(
            n_layers,
            n_q_heads,
            n_kv_heads,
            head_dim,
            document_tokens=256 if document_tokens is None else document_tokens,
            query_stride=query_stride,
            query_tail=query_tail,
            seed=seed,
            store_dtype=store_dtype,
        )
        result = capture_synthetic(options, output, progress=progress, force=force, dry_run=dry_run)
    else:
        from sphkv_cli.capture.stage import capture
        from sphkv_cli.models.load import LoadOptions

        texts = [TextSource.parse(argument) for argument in text_file or []]
        texts += [TextSource.parse(argument, "jsonl") for argument in jsonl or []]
        result = capture(
            CaptureOptions(
                model=str(model),
                texts=tuple(texts),
                document_tokens=1024 if document_tokens is None else document_tokens,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                query_stride=query_stride,
                query_tail=query_tail,
                pre_rope=pre_rope,
                prefill_tokens=prefill_tokens,
                store_dtype=store_dtype,
                attention=attention,
                jsonl_field=jsonl_field,
                fisher=fisher,
                fisher_samples=fisher_samples,
                fisher_tokens=fisher_tokens,
                seed=seed,
                load=LoadOptions(dtype=dtype, device=device, device_map=device_map),
                revision=revision,
                trust_remote_code=trust_remote_code,
                gguf_file=gguf_file,
            ),
            output,
            progress=progress,
            force=force,
            resume=resume,
            dry_run=dry_run,
        )
    Output(json_output).show(result, view(result))


def _numbers(option: str, text: str, count: int) -> tuple[int, ...]:
    """Read "2x4x2x64"."""
    try:
        numbers = tuple(int(part) for part in text.split("x"))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise UsageError(
            f"{option} {text!r} cannot be read", f"give {count} whole numbers joined by x"
        )
    return numbers

"""The commands of sphkv: each opens, calls one function and renders its result.

Heavy imports stand inside the commands, so that `sphkv --help` never loads torch.
"""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn, ParamSpec, TypeVar

import typer

from sphkv_cli.errors import SphkvError, UsageError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="sphkv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Design KV-cache codes offline and prove them on the GPU they will run on.\n\n"
    "capture -> fit-codebooks -> allocate -> profile; each stage writes one artifact. "
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 a gate failed, 4 this environment cannot run it.",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
ForceFlag = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
CaptureArgument = Annotated[Path, typer.Argument(help="The capture: capture.h5.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def run() -> None:
    """Run the command line; the entry point of the installed script."""
    # SIGTERM unwinds like Ctrl-C, so that a stopped run removes its half-written files.
    signal.signal(signal.SIGTERM, _on_sigterm)
    app()


def _on_sigterm(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)


def command(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command whose `SphkvError` becomes one line on stderr and its exit code."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except SphkvError as error:
                typer.echo(f"sphkv {name}: {error}", err=True)
                raise typer.Exit(error.exit_code) from error
            except KeyboardInterrupt as error:
                typer.echo(f"sphkv {name}: interrupted, no half-written artifact left", err=True)
                raise typer.Exit(130) from error

        return app.command(name)(guarded)

    return register


@command("capture")
def capture_command(
    output: Annotated[Path, typer.Option(help="The capture to write.")] = Path("capture.h5"),
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face id, folder, .gguf file, or smollm2 (the packaged model)."),
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
        int | None, typer.Option(help="Cut longer texts into documents of this many tokens.")
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
    progress = TerminalProgress()
    if synthetic is not None:
        from sphkv_cli.capture.synthetic import capture_synthetic

        for option, is_given in (
            ("--text-file", bool(text_file)),
            ("--jsonl", bool(jsonl)),
            ("--max-tokens", max_tokens is not None),
            ("--pre-rope", pre_rope),
            ("--resume", resume),
        ):
            if is_given:
                raise UsageError(f"{option} has no meaning with --synthetic", "leave it out")
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


@command("fit-codebooks")
def fit_codebooks_command(
    capture: CaptureArgument,
    output: Annotated[Path, typer.Option(help="The codebooks to write.")] = Path("codebooks.h5"),
    code: Annotated[
        list[str] | None,
        typer.Option(
            help="A candidate, repeatable: BITS PER LEVEL:RADIUS, as 4/2/2/2:fp16 or "
            "4/3/3/3:lloyd_max:3. Without it: the paper's code and better ones from 2 to 4 bits."
        ),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY_CODE/VALUE_CODE by name, repeatable: the tiers to allocate among. Without "
            "it every code serves keys and values alike."
        ),
    ] = None,
    rotation: Annotated[
        Literal["hadamard", "haar", "none"], typer.Option(help="Of keys, queries and values.")
    ] = "hadamard",
    centring: Annotated[
        Literal["post_rope", "none"], typer.Option(help="Which mean is taken from the keys.")
    ] = "post_rope",
    density: Annotated[
        Literal["analytic", "empirical"],
        typer.Option(help="empirical also fits books per layer and head, and says if they help."),
    ] = "analytic",
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Fit frames and Lloyd-Max codebooks per level, and measure candidate codes."""
    from sphkv_cli.fit.options import FitOptions
    from sphkv_cli.fit.stage import fit_codebooks
    from sphkv_cli.fit.view import view
    from sphkv_cli.render import Output, TerminalProgress

    options = FitOptions(
        codes=tuple(code or ()),
        tiers=tuple(tier or ()),
        rotation=rotation,
        centring=centring,
        density=density,
        seed=seed,
    )
    with TerminalProgress() as progress:
        result = fit_codebooks(options, capture, output, progress=progress, force=force)
    Output(json_output).show(result, view(result))


@command("allocate")
def allocate_command(
    capture: CaptureArgument,
    codebooks: Annotated[Path, typer.Argument(help="The codebooks: codebooks.h5.")],
    budget: Annotated[
        str,
        typer.Option(
            help="Of one context: bits per coordinate (3b), bytes (12MiB) or a fraction (20%)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The allocation to write.")] = Path("allocation.h5"),
    page_size: Annotated[int, typer.Option(help="Tokens per page: 16, 32 or 64.")] = 32,
    horizon: Annotated[
        int, typer.Option(help="Last tokens of a document: not cached, their queries judge.")
    ] = 128,
    window: Annotated[
        int, typer.Option(help="Last positions of the context whose queries score its tokens.")
    ] = 64,
    utility: Annotated[
        Literal["window", "recency", "oracle"],
        typer.Option(help="What scores a token; oracle sees the future: a ceiling, no method."),
    ] = "window",
    calibrate: Annotated[
        bool, typer.Option(help="Turn scores into expected damage on the fit documents.")
    ] = True,
    drop_coefficient: Annotated[
        float, typer.Option(help="How much more a set of drops hurts than its sum.")
    ] = 8.0,
    head_weights: Annotated[
        Literal["output", "none"],
        typer.Option(help="Weigh query heads by their output projection, or not."),
    ] = "output",
    tier: Annotated[
        list[str] | None, typer.Option(help="Choose only among these tiers, repeatable.")
    ] = None,
    plan_select: Annotated[
        bool, typer.Option("--plan-select", help="Plan the select documents too.")
    ] = False,
    seed: Seed = 42,
    force: ForceFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Choose keep, drop and tier of every page of tokens under one byte budget."""
    from sphkv_cli.allocation.options import AllocateOptions
    from sphkv_cli.allocation.stage import allocate
    from sphkv_cli.allocation.view import view
    from sphkv_cli.render import Output, TerminalProgress

    options = AllocateOptions(
        budget=budget,
        page_size=page_size,
        horizon=horizon,
        window=window,
        utility=utility,
        calibrate=calibrate,
        drop_coefficient=drop_coefficient,
        head_weights=head_weights,
        tiers=tuple(tier or ()),
        plan_select=plan_select,
        seed=seed,
    )
    with TerminalProgress() as progress:
        result = allocate(options, capture, codebooks, output, progress=progress, force=force)
    Output(json_output).show(result, view(result))


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


@command("evaluate")
def evaluate_command(
    capture: CaptureArgument,
    codebooks: Annotated[
        Path | None, typer.Option(help="Evaluate its codes: every query reads the coded past.")
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
        typer.Option(help="Published methods beside them, repeatable: turboquant:3, kivi:4 ..."),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Tiers run for every page beside the plan, repeatable; best fits it."),
    ] = None,
    window: Annotated[int, typer.Option(help="Last tokens kept dense (uniform).")] = 32,
    first_tokens: Annotated[int, typer.Option(help="First tokens kept dense (uniform).")] = 4,
    first_scored: Annotated[int, typer.Option(help="First position compared (uniform).")] = 64,
    seeds: Annotated[int, typer.Option(help="Rotation seeds to average over (uniform).")] = 1,
    split: Annotated[
        Literal["select", "judge"], typer.Option(help="select only while developing.")
    ] = "judge",
    max_documents: Annotated[int | None, typer.Option(help="At most so many documents.")] = None,
    gate_kl: Annotated[float | None, typer.Option(help="Gate: largest KL, nats.")] = None,
    gate_top1: Annotated[float | None, typer.Option(help="Gate: least top-1 agreement.")] = None,
    gate_perplexity: Annotated[
        float | None, typer.Option(help="Gate: largest perplexity ratio.")
    ] = None,
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
    from sphkv_cli.evaluation.options import DEFAULT_METHODS, EvaluateOptions
    from sphkv_cli.evaluation.stage import evaluate, require_gates
    from sphkv_cli.evaluation.view import view
    from sphkv_cli.models.load import LoadOptions
    from sphkv_cli.render import Output, TerminalProgress

    options = EvaluateOptions(
        protocol=protocol,
        codes=tuple(code or ()),
        methods=tuple(method) if method else DEFAULT_METHODS,
        tiers=tuple(tier) if tier else ("best",),
        window=window,
        first_tokens=first_tokens,
        first_scored=first_scored,
        seeds=seeds,
        split=split,
        max_documents=max_documents,
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
    with TerminalProgress() as progress:
        result = evaluate(
            options, capture, codebooks, allocation, output, progress=progress, force=force
        )
    Output(json_output).show(result, view(result))
    require_gates(result)


@command("inspect")
def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="Any artifact: .h5 or a report .json.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the content digest and compare.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Print what an artifact is, what it was made from, and its main tables."""
    from sphkv_cli.inspection.stage import inspect_artifact
    from sphkv_cli.inspection.view import view
    from sphkv_cli.render import Output

    result = inspect_artifact(artifact, verify=verify)
    Output(json_output).show(result, view(result))
    if result.digest_ok is False:
        raise typer.Exit(1)


@command("doctor")
def doctor_command(json_output: JsonFlag = False) -> None:
    """Say what this environment can run, what is missing, and the command that mends it."""
    from sphkv_cli.doctor.checks import diagnose
    from sphkv_cli.doctor.view import view
    from sphkv_cli.render import Output

    diagnosis = diagnose()
    Output(json_output).show(diagnosis, view(diagnosis))
    if not diagnosis.core_ok:
        raise typer.Exit(4)


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

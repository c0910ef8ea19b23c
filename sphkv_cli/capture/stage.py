"""capture: run a model over documents and record q, k and v as its attention receives them.

One document at a time goes through the model's body (no logits over the vocabulary are computed);
every layer's chunk is written before the next layer runs; see `recorder.py`, `shard_writer.py` and
`assemble.py`. Without a model: `synthetic.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sphkv_cli.artifacts.capture_info import CaptureInfo, LayerInfo
from sphkv_cli.artifacts.header import collect_provenance
from sphkv_cli.artifacts.store import check_outputs, read_header
from sphkv_cli.blocks import counted
from sphkv_cli.capture.documents import PlannedDocument, plan_documents
from sphkv_cli.capture.options import CaptureOptions
from sphkv_cli.capture.plan import CapturePlan, check_disk, make_plan
from sphkv_cli.capture.result import CaptureResult
from sphkv_cli.capture.text import read_texts
from sphkv_cli.errors import SphkvError, UsageError
from sphkv_cli.models.geometry import ModelGeometry
from sphkv_cli.models.source import ModelSource, local_path, resolve_model
from sphkv_cli.progress import NullProgress, Progress


def capture(
    options: CaptureOptions,
    output: Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
) -> CaptureResult | CapturePlan:
    """Capture a model on texts into `output`.

    Args:
        force: overwrite `output`, and throw an unfinished capture of it away.
        resume: go on with an unfinished capture; its parameters must be the same.
        dry_run: return the plan with its bytes; neither weights are loaded nor files written.

    Raises:
        UsageError: `output` is the model or a text.
        SphkvError: the model, a text, or the disk cannot serve; nothing half-written is left
            under the name `output`.
    """
    started = time.monotonic()
    progress = progress or NullProgress()
    if not dry_run:
        check_outputs({"--output": output}, _files_read(options), force=force)
    source = resolve_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        gguf_file=options.gguf_file,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    plan, documents = _plan(options, source, output)
    if dry_run:
        return plan
    from sphkv_cli.capture.work_folder import shard_bytes

    check_disk(plan, output.parent, already_bytes=shard_bytes(output) if resume else 0)
    run = _Run(options, source, plan, documents, output, progress)
    run.execute(force=force, resume=resume)
    return CaptureResult.of_plan(
        plan,
        path=output,
        digest=read_header(output).digest,
        n_resumed_documents=run.n_resumed,
        forward_s=run.forward_s,
        assemble_s=run.assemble_s,
        total_s=time.monotonic() - started,
        n_tokens_run=run.n_tokens,
    )


def _files_read(options: CaptureOptions) -> dict[str, Path | None]:
    """Every input by option, as `check_outputs` takes them; texts are told apart by their paths."""
    option_of = {"text": "--text-file", "jsonl": "--jsonl"}
    return {
        "--model": local_path(options.model, options.gguf_file),
        **{f"{option_of[text.kind]} {text.path}": text.path for text in options.texts},
    }


def _plan(
    options: CaptureOptions, source: ModelSource, output: Path
) -> tuple[CapturePlan, tuple[PlannedDocument, ...]]:
    from sphkv_cli.models.geometry import inspect_model
    from sphkv_cli.models.load import load_config, load_tokenizer, skeleton, torch_device

    if options.load.device_map is None:
        torch_device(options.load.device)
    texts = tuple(read_texts(options.texts, jsonl_field=options.jsonl_field))
    bones = skeleton(source, load_config(source))
    geometry, _ = inspect_model(bones)
    if options.document_tokens > geometry.max_tokens:
        raise UsageError(
            f"--document-tokens {options.document_tokens} is more than the {geometry.max_tokens} "
            f"positions of {source.name}",
            "lower it",
        )
    from sphkv_cli.capture.recorder import choose_attention

    attention = choose_attention(bones, geometry, options.attention)
    tokenize, prefix = _tokenizer(load_tokenizer(source))
    documents, notes = plan_documents(
        texts,
        tokenize,
        document_tokens=options.document_tokens,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        query_stride=options.query_stride,
        query_tail=options.query_tail,
        prefix=prefix,
    )
    plan = make_plan(
        model=source.name,
        geometry=geometry,
        attention=attention,
        documents=[document.info for document in documents],
        notes=(*notes, *_fisher_note(options, documents)),
        pre_rope=options.pre_rope,
        store_dtype=options.store_dtype,
        folder=output.parent,
    )
    return plan, documents


def _fisher_note(options: CaptureOptions, documents: Sequence[PlannedDocument]) -> tuple[str, ...]:
    if not options.fisher:
        return ()
    counts = [
        min(document.info.n_tokens, options.fisher_tokens)
        for document in documents
        if document.info.split == "fit"
    ]
    return (
        f"Fisher weights from {options.fisher_samples} backward passes over {sum(counts):,} tokens "
        f"of {counted(len(counts), 'fit document')}, seed {options.seed}",
    )


def _tokenizer(tokenizer: Any) -> tuple[Callable[[str], Sequence[int]], tuple[int, ...]]:
    """Text to ids without special tokens, and the BOS that the model's own tokenizer sets first."""

    def tokenize(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return tokenize, (int(bos),) if starts_with_bos else ()


class _Run:
    """One capture at work: the loaded model, its shards, and the artifact at the end."""

    def __init__(
        self,
        options: CaptureOptions,
        source: ModelSource,
        plan: CapturePlan,
        documents: tuple[PlannedDocument, ...],
        output: Path,
        progress: Progress,
    ) -> None:
        from sphkv_cli.models.digest import model_digest
        from sphkv_cli.models.geometry import inspect_model, rope_description
        from sphkv_cli.models.load import load_model

        self._options, self._plan, self._documents = options, plan, documents
        self._output, self._progress = output, progress
        progress.start(f"loading {source.name}", None, "")
        self._model = load_model(source, options.load)
        self._geometry, self._modules = inspect_model(self._model)
        self._info = CaptureInfo(
            model=source.name,
            architecture=self._geometry.architecture,
            n_q_heads=self._geometry.n_q_heads,
            n_kv_heads=self._geometry.n_kv_heads,
            head_dim=self._geometry.head_dim,
            layers=tuple(
                LayerInfo(x.layer_type, x.window, x.softmax_scale, x.logit_softcap)
                for x in self._geometry.layers
            ),
            model_digest=model_digest(self._model),
            rope=rope_description(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            stored_as=options.store_dtype,
            has_keys_pre_rope=options.pre_rope,
        )
        progress.finish()

    def execute(self, *, force: bool, resume: bool) -> None:
        """Capture what is missing, assemble, clean up; the counters and times are set then."""
        from sphkv_cli.capture.assemble import assemble
        from sphkv_cli.capture.work_folder import WorkFolder

        weight = _output_weight(self._geometry, self._modules)
        work = WorkFolder(self._output, self._parameters(), resume=resume, force=force)
        try:
            missing = [d for d in self._documents if not work.has(d.info.index)]
            self.n_resumed = len(self._documents) - len(missing)
            self.n_tokens = sum(document.info.n_tokens for document in missing)
            started = time.monotonic()
            self._progress.start("capturing", self.n_tokens, "tokens")
            try:
                for document in missing:
                    self._capture_document(work, document)
            finally:
                self._progress.finish()
            self.forward_s = time.monotonic() - started
            assemble(
                work,
                self._output,
                self._info,
                self._plan.documents,
                weight,
                fisher_tokens=self._options.fisher_tokens,
                provenance=collect_provenance(seed=self._options.seed if self._fisher else None)
                | {"attention": self._plan.attention, "device": str(self._model.device)},
                force=force,
                progress=self._progress,
            )
            work.remove()
            self.assemble_s = time.monotonic() - started - self.forward_s
        except KeyboardInterrupt as error:
            n = work.n_documents
            if not n:
                raise
            raise KeyboardInterrupt(
                f"{n} of {len(self._documents)} documents are kept in {work.path}; go on with "
                "--resume, or start over with --force"
            ) from error
        finally:
            work.close()

    def _capture_document(self, work: Any, document: PlannedDocument) -> None:
        from sphkv_cli.capture.recorder import AttentionRecorder, recording
        from sphkv_cli.capture.shard_writer import FISHER_PASSES, ShardWriter

        with work.new_shard(document.info.index) as file:
            writer = ShardWriter(file, self._info, self._geometry, document, self._progress)
            recorder = AttentionRecorder(
                self._geometry, self._modules, pre_rope=self._options.pre_rope, sink=writer.write
            )
            with (
                recording(self._model, self._modules, recorder, attention=self._plan.attention),
                _memory_errors(self._options),
            ):
                self._prefill(document, recorder)
            if self._fisher and document.info.split == "fit":
                with _memory_errors(self._options):
                    file[FISHER_PASSES] = self._fisher_passes(document)

    def _fisher_passes(self, document: PlannedDocument) -> Any:
        import torch

        from sphkv_cli.capture.fisher import fisher_passes

        # One stream of labels per document, so that a resumed run draws the same ones.
        seed = self._options.seed * 1_000_003 + document.info.index
        return fisher_passes(
            self._model,
            self._geometry,
            self._modules,
            document.token_ids[: self._options.fisher_tokens],
            n_samples=self._options.fisher_samples,
            attention=self._plan.attention,
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def _fisher(self) -> bool:
        return self._options.fisher

    def _prefill(self, document: PlannedDocument, recorder: Any) -> None:
        import torch
        from transformers import DynamicCache

        body = self._model.get_decoder()
        device = self._model.device
        ids = torch.from_numpy(document.token_ids.astype("int64"))[None]
        ids = ids.to("cpu" if device.type == "meta" else device)
        step = self._options.prefill_tokens
        cache = DynamicCache(config=self._model.config) if ids.shape[1] > step else None
        with torch.inference_mode():
            for first in range(0, ids.shape[1], step):
                recorder.expect(first)
                body(
                    input_ids=ids[:, first : first + step],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
                recorder.check_complete()

    def _parameters(self) -> dict[str, Any]:
        """Everything that decides what the shards hold; a resumed run must agree in all of it."""
        import hashlib
        from dataclasses import asdict

        import torch
        import transformers

        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(repr(asdict(document.info)).encode())
            digest.update(document.token_ids.tobytes())
            digest.update(document.query_positions.tobytes())
        return {
            "model": self._info.model,
            "model_digest": self._info.model_digest,
            "documents": digest.hexdigest(),
            "document_tokens": self._options.document_tokens,
            "max_tokens": self._options.max_tokens,
            "query_stride": self._options.query_stride,
            "query_tail": self._options.query_tail,
            "pre_rope": self._options.pre_rope,
            "prefill_tokens": self._options.prefill_tokens,
            "store_dtype": self._options.store_dtype,
            "dtype": self._info.dtype,
            "attention": self._plan.attention,
            "device": str(self._model.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        } | (self._fisher_parameters() if self._fisher else {})

    def _fisher_parameters(self) -> dict[str, int]:
        return {
            "fisher_samples": self._options.fisher_samples,
            "fisher_tokens": self._options.fisher_tokens,
            "seed": self._options.seed,
        }


def _output_weight(geometry: ModelGeometry, modules: Sequence[Any]) -> Any:
    """||W_o of the head||_F^2 / head_dim of every query head: (n_layers, n_q_heads), float64."""
    import numpy as np

    from sphkv_cli.models.geometry import output_projection
    from sphkv_cli.models.load import weight_of

    rows = []
    for layer, module in zip(geometry.layers, modules, strict=True):
        linear = output_projection(module, layer.name, geometry.n_q_heads, geometry.head_dim)
        squares = weight_of(linear).double().pow(2).sum(dim=0).cpu().numpy()
        per_head = squares.reshape(geometry.n_q_heads, geometry.head_dim).sum(axis=1)
        rows.append(per_head / geometry.head_dim)
    return np.stack(rows)


@contextmanager
def _memory_errors(options: CaptureOptions) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SphkvError(
            f"the device ran out of memory on {options.prefill_tokens} tokens at a time",
            "lower --prefill-tokens or --document-tokens, or pass --device-map auto",
        ) from error

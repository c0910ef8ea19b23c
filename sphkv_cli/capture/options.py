"""What a capture is asked to do. Validated here, so that the stage can rely on it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sphkv_cli.artifacts.capture_info import SPLITS, STORAGE_DTYPES, Split
from sphkv_cli.errors import UsageError
from sphkv_cli.models.load import LoadOptions
from sphkv_cli.option_checks import require_at_least

ATTENTIONS = ("auto", "sdpa", "eager")


@dataclass(frozen=True)
class TextSource:
    """A file of text: one source (.txt), or one source per line of JSON ("jsonl").

    `split` assigns all of it; None leaves that to the rule of `documents.assign_splits`.
    """

    path: Path
    kind: str = "text"
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("text", "jsonl"):
            raise UsageError(f"text source kind {self.kind!r} is unknown", "text or jsonl")

    @classmethod
    def parse(cls, argument: str, kind: str = "text") -> Self:
        """Read a command-line argument: a path, or `fit=PATH`, `select=PATH`, `judge=PATH`."""
        split = next((one for one in SPLITS if argument.startswith(f"{one}=")), None)
        path = argument if split is None else argument.removeprefix(f"{split}=")
        if not path:
            raise UsageError(f"text {argument!r} names no file", "give a path")
        return cls(Path(path), kind, split)


@dataclass(frozen=True)
class CaptureOptions:
    """One capture of a model on texts.

    Args:
        model: hub id, folder, .gguf file or packaged name.
        texts: where the documents come from.
        document_tokens: longer sources are cut into documents of this many tokens.
        max_tokens: an upper limit on the tokens of all documents together; None = everything.
        min_tokens: a shorter document has no window and context to speak of, and is refused.
        query_stride, query_tail: which queries are stored, see `documents.query_positions`.
        pre_rope: store the keys before RoPE as well.
        prefill_tokens: how many tokens one forward pass takes; longer documents take several.
        store_dtype: how activations are stored.
        attention: what computes the model's attention while it is recorded.
        jsonl_field: the field of a JSON line that holds its text.
        fisher: also measure how much the next token minds an error of each query head, on the
            first `fisher_tokens` tokens of every fit document, by `fisher_samples` backward passes.
        seed: of the sampled labels; nothing else is random.
    """

    model: str
    texts: tuple[TextSource, ...]
    document_tokens: int = 1024
    max_tokens: int | None = None
    min_tokens: int = 64
    query_stride: int = 4
    query_tail: int = 256
    pre_rope: bool = False
    prefill_tokens: int = 4096
    store_dtype: str = "bfloat16"
    attention: str = "auto"
    jsonl_field: str = "text"
    fisher: bool = False
    fisher_samples: int = 2
    fisher_tokens: int = 2048
    seed: int = 42
    load: LoadOptions = field(default_factory=LoadOptions)
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("no text to capture", "pass --text-file or --jsonl")
        require_at_least("--min-tokens", self.min_tokens, 2)
        require_at_least("--document-tokens", self.document_tokens, self.min_tokens)
        require_at_least("--query-stride", self.query_stride, 1)
        require_at_least("--query-tail", self.query_tail, 1)
        require_at_least("--prefill-tokens", self.prefill_tokens, 16)
        require_at_least("--fisher-samples", self.fisher_samples, 1)
        require_at_least("--fisher-tokens", self.fisher_tokens, 16)
        require_at_least("--seed", self.seed, 0)
        if self.max_tokens is not None:
            least = len(SPLITS) * self.document_tokens
            if self.max_tokens < least:
                raise UsageError(
                    f"--max-tokens is {self.max_tokens}, but fitting, selecting and judging need "
                    f"a document of {self.document_tokens} tokens each",
                    f"give {least} or more, or lower --document-tokens",
                )
        if self.store_dtype not in STORAGE_DTYPES:
            raise UsageError(
                f"--store-dtype {self.store_dtype} is unknown",
                f"one of {', '.join(STORAGE_DTYPES)}",
            )
        if self.attention not in ATTENTIONS:
            raise UsageError(
                f"--attention {self.attention} is unknown", f"one of {', '.join(ATTENTIONS)}"
            )


@dataclass(frozen=True)
class SyntheticOptions:
    """A capture without a model, of known statistics; see `synthetic.py`."""

    n_layers: int = 2
    n_q_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    n_documents: int = 4
    document_tokens: int = 256
    n_heavy_tokens: int = 8
    query_stride: int = 4
    query_tail: int = 256
    seed: int = 42
    store_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_at_least("--synthetic: number of layers", self.n_layers, 1)
        require_at_least("--synthetic: number of KV heads", self.n_kv_heads, 1)
        require_at_least("--synthetic: number of documents", self.n_documents, len(SPLITS))
        require_at_least("--document-tokens", self.document_tokens, 2)
        require_at_least("--query-stride", self.query_stride, 1)
        require_at_least("--query-tail", self.query_tail, 1)
        if self.n_q_heads < 1 or self.n_q_heads % self.n_kv_heads:
            raise UsageError(
                f"--synthetic: {self.n_q_heads} query heads are not a multiple of "
                f"{self.n_kv_heads} KV heads",
                "every KV head serves the same number of query heads",
            )
        if self.head_dim < 2 or self.head_dim & (self.head_dim - 1):
            raise UsageError(
                f"--synthetic: head_dim {self.head_dim} is not a power of two",
                "for example 64 or 128",
            )
        if not 0 <= self.n_heavy_tokens < self.document_tokens:
            raise UsageError(
                f"{self.n_heavy_tokens} heavy tokens do not fit in documents of "
                f"{self.document_tokens}",
                "fewer heavy tokens or longer documents",
            )
        require_at_least("--seed", self.seed, 0)
        if self.store_dtype not in STORAGE_DTYPES:
            raise UsageError(
                f"--store-dtype {self.store_dtype} is unknown",
                f"one of {', '.join(STORAGE_DTYPES)}",
            )

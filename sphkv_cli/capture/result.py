"""What a capture reports when it is done: plain fields, for a table or JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sphkv_cli.artifacts.capture_info import DocumentInfo
from sphkv_cli.capture.plan import CapturePlan


@dataclass(frozen=True)
class CaptureResult:
    """A capture that was made.

    `tensor_bytes` are the captured activations alone, `file_bytes` the artifact; `forward_s` is the
    time from the first document to the last shard, `assemble_s` from there to the artifact,
    `total_s` includes loading; `tokens_per_s` counts the documents of this run, not those that were
    resumed.
    """

    path: Path
    digest: str
    model: str
    architecture: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    documents: tuple[DocumentInfo, ...]
    notes: tuple[str, ...]
    n_resumed_documents: int
    tensor_bytes: int
    file_bytes: int
    forward_s: float
    assemble_s: float
    total_s: float
    tokens_per_s: float

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(document.n_tokens for document in self.documents)

    @classmethod
    def of_plan(
        cls,
        plan: CapturePlan,
        *,
        path: Path,
        digest: str,
        n_resumed_documents: int,
        forward_s: float,
        assemble_s: float,
        total_s: float,
        n_tokens_run: int,
    ) -> Self:
        """The result of having carried out `plan`; `n_tokens_run` excludes resumed documents."""
        return cls(
            path=path,
            digest=digest,
            model=plan.model,
            architecture=plan.architecture,
            n_layers=plan.n_layers,
            n_q_heads=plan.n_q_heads,
            n_kv_heads=plan.n_kv_heads,
            head_dim=plan.head_dim,
            documents=plan.documents,
            notes=plan.notes,
            n_resumed_documents=n_resumed_documents,
            tensor_bytes=plan.tensor_bytes,
            file_bytes=path.stat().st_size,
            forward_s=forward_s,
            assemble_s=assemble_s,
            total_s=total_s,
            tokens_per_s=n_tokens_run / forward_s if n_tokens_run else 0.0,
        )

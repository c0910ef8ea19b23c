"""Puts the shards of all documents together into capture.h5.

Documents are copied one by one and the query sums are added in document order, so the result does
not depend on which run made which shard.

    query_mean = sum q / n,   query_second_moment = sum q q^T / n,   over the fit documents
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture_info import CaptureInfo, DocumentInfo
from sphkv_cli.artifacts.capture_writer import (
    document_path,
    write_capture_info,
    write_fisher,
    write_statistics,
)
from sphkv_cli.artifacts.store import create_artifact
from sphkv_cli.capture.fisher import HeadFisher
from sphkv_cli.capture.shard_writer import FISHER_PASSES, QUERY_OUTER_SUM, QUERY_SUM
from sphkv_cli.capture.work_folder import DOCUMENT, WorkFolder
from sphkv_cli.errors import ArtifactError
from sphkv_cli.progress import Progress


def assemble(
    work: WorkFolder,
    output: Path,
    info: CaptureInfo,
    documents: tuple[DocumentInfo, ...],
    output_weight: npt.NDArray[np.float64],
    *,
    fisher_tokens: int,
    provenance: Mapping[str, Any],
    force: bool,
    progress: Progress,
) -> None:
    """Write the artifact `output` from the shards in `work`.

    Args:
        output_weight: (n_layers, n_q_heads).
        fisher_tokens: at most so many positions of a document went into its Fisher passes.

    Raises:
        ArtifactError: the output cannot be written, or a shard is damaged.
    """
    shape = (info.n_layers, info.n_q_heads, info.head_dim)
    total = np.zeros(shape)
    outer = np.zeros((*shape, info.head_dim))
    n_fit_tokens = 0
    passes: list[npt.NDArray[np.float64]] = []
    n_positions: list[int] = []
    progress.start("assembling the capture", len(documents), "documents")
    try:
        with create_artifact(output, "capture", inputs={}, provenance=provenance, force=force) as f:
            write_capture_info(f, info)
            f.create_group("documents")
            for document in documents:
                with _shard(work, document.index) as shard:
                    shard.copy(DOCUMENT, f, name=document_path(document.index))
                    if document.split == "fit":
                        n_fit_tokens += document.n_tokens
                        total += shard[QUERY_SUM][()]
                        outer += shard[QUERY_OUTER_SUM][()]
                        if FISHER_PASSES in shard:
                            passes.append(shard[FISHER_PASSES][()])
                            n_positions.append(min(document.n_tokens, fisher_tokens))
                progress.advance()
            write_statistics(
                f,
                query_mean=total / n_fit_tokens,
                query_second_moment=outer / n_fit_tokens,
                output_weight=output_weight,
            )
            if passes:
                fisher = HeadFisher.of_passes(passes, n_positions)
                n_passes = sum(len(each) for each in passes)
                write_fisher(f, fisher.mean, fisher.standard_error, n_passes=n_passes)
    finally:
        progress.finish()


def _shard(work: WorkFolder, index: int) -> h5py.File:
    path = work.shard_path(index)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ArtifactError(
            f"{path} is damaged", "remove it and run again with --resume"
        ) from error

"""What a reader of `generate` needs, in order."""

from sphkv_cli.blocks import Block, Line, Table, bytes_text
from sphkv_cli.generation.result import Continuation, GenerationResult

_SHOWN = 160


def view(result: GenerationResult) -> tuple[Block, ...]:
    """Header, the table, and both texts of each prompt from shortly before they part."""
    how = {"cuda": "CUDA kernel", "reference": "float64 reference, slow"}[result.backend]
    blocks: list[Block] = [
        Line(f"{result.model} in {result.dtype}; coded cache: {result.cache}, read by the {how}"),
        Table(
            "Greedy generation with the dense cache and the coded one",
            (
                "prompt",
                "tokens",
                "generated",
                "coded at the end",
                "first difference",
                "dense p of each there",
                "cache, dense",
                "coded, tokens",
                "coded, in all",
                "seconds, dense / coded",
            ),
            [_cells(found) for found in result.continuations],
        ),
        Line("Tokens: pages, their tables and room for coming ones, and the dense tail."),
        Line(
            f"In all: with {bytes_text(result.frame_bytes)} of frames, fixed tensors of the model, "
            "the same at any length."
        ),
    ]
    if result.budget is not None:
        blocks.append(
            Line(
                f"The budget {result.budget} counts sealed tokens: their pages, page table and the "
                "plan's fixed tables; the dense window, room and frames come on top."
            )
        )
    for found in result.continuations:
        blocks += [
            Line(f"{found.name}, dense: {_short(found.dense_text)}"),
            Line(f"{found.name}, coded: {_short(found.coded_text)}"),
        ]
    coded = [found for found in result.continuations if found.n_coded]
    dense = [found.name for found in result.continuations if not found.n_coded]
    if dense:
        blocks.append(
            Line(
                f"{', '.join(dense)}: too short to be coded, all tokens lie in the dense window of "
                "both runs."
            )
        )
    if coded:
        same = sum(found.first_difference is None for found in coded)
        what = f"{len(coded)} continuations" + (" that were coded" if dense else "")
        blocks.append(Line(f"{same} of {what} are the same to the last token."))
    return tuple(blocks)


def _cells(found: Continuation) -> tuple[object, ...]:
    there = "-"
    if found.probability_dense is not None and found.probability_coded is not None:
        there = f"{found.probability_dense:.2f} / {found.probability_coded:.2f}"
    return (
        found.name,
        f"{found.n_prompt:,}",
        found.n_generated,
        f"{found.n_coded:,}",
        "none" if found.first_difference is None else found.first_difference,
        there,
        bytes_text(found.dense_bytes),
        bytes_text(found.coded_token_bytes),
        bytes_text(found.coded_bytes),
        f"{found.dense_seconds:.1f} / {found.coded_seconds:.1f}",
    )


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[:_SHOWN] + " ..."

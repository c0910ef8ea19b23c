"""`sphkv study` for people."""

from collections.abc import Sequence

from sphkv_cli.blocks import Block, Line, Table
from sphkv_cli.study.registry import Study
from sphkv_cli.study.stage import StudyReport


def view(report: StudyReport) -> tuple[Block, ...]:
    """Each study's reading, tables and conditions; why others have none."""
    blocks: list[Block] = []
    for outcome in report.outcomes:
        blocks.append(Line(f"{outcome.name}: {outcome.question} ({outcome.elapsed_s:.1f} s)"))
        if outcome.result is None:
            blocks.append(Line(outcome.skipped or f"failed: {outcome.failed}"))
            continue
        blocks += [Line(sentence) for sentence in outcome.result.reading]
        blocks += list(outcome.result.tables)
        blocks += [Line(sentence) for sentence in outcome.result.conditions]
        if outcome.folder is not None:
            blocks.append(Line(f"wrote {outcome.folder}"))
        blocks.append(Line())
    return tuple(blocks)


def list_view(studies: Sequence[Study]) -> tuple[Block, ...]:
    """The studies there are."""
    return (
        Table(
            "Studies",
            ("name", "question", "needs"),
            [(s.name, s.question, ", ".join(s.needs) or "nothing") for s in studies],
            text_columns=3,
        ),
    )

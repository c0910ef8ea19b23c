"""A study as a Markdown page: question, reading, figures, tables, provenance."""

from collections.abc import Mapping, Sequence
from typing import Any

from sphkv_cli.blocks import Table, cell_text
from sphkv_cli.study.registry import Study
from sphkv_cli.study.result import StudyResult

RESULT_FILE = "result.json"


def study_page(
    study: Study, result: StudyResult, digest: str, provenance: Mapping[str, Any]
) -> str:
    """The page of one study; figures lie beside it as PNG, the numbers in result.json."""
    parts = [f"# {study.name}", study.question, *result.reading]
    parts += [
        f"![{figure.caption}]({figure.name}.png)\n\n{figure.caption}" for figure in result.figures
    ]
    parts += [markdown_table(table) for table in result.tables]
    if result.conditions:
        parts.append("\n".join(f"- {sentence}" for sentence in result.conditions))
    parts.append(provenance_line(digest, provenance))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table with its title above it."""

    def row(cells: Sequence[object]) -> str:
        return "| " + " | ".join(cell_text(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = [":--" if i < table.text_columns else "--:" for i in range(len(table.columns))]
    lines = [row(table.columns), row(rule), *(row(cells) for cells in table.rows)]
    return f"**{table.title}**\n\n" + "\n".join(lines)


def provenance_line(digest: str, provenance: Mapping[str, Any]) -> str:
    """Where the numbers come from, in one line."""
    versions = provenance["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if versions[name])
    return (
        f"`{provenance['command']}` (seed {provenance['seed']}; {provenance['system']}, Python "
        f"{provenance['python']}, {known}). Numbers: {RESULT_FILE}, digest {digest[:12]}."
    )

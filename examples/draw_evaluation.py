"""Draws the figure of a recorded report of `sphkv evaluate`: KL against bytes, and by position.

    python examples/draw_evaluation.py examples/results/smollm2/table.json table.png

The same figure as `sphkv evaluate --plot`; `--leave-out FAMILY`, repeatable, draws fewer lines.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from records import recorded, require_families
from script import run

from sphkv_cli.evaluation.rate_plot import rate_figure
from sphkv_cli.evaluation.result import EvaluationResult
from sphkv_cli.plots.draw import require_drawable, write_figure


def main() -> None:
    """Draw the report named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="a report of sphkv evaluate")
    parser.add_argument("picture", type=Path, help="ends in .png or .svg")
    parser.add_argument("--leave-out", action="append", default=[], metavar="FAMILY")
    asked = parser.parse_args()
    require_drawable(asked.picture)

    def named(found: dict[str, Any]) -> Any:
        return SimpleNamespace(**found)

    found = recorded(parser, asked.report, "sphkv evaluate")
    require_families(parser, asked.leave_out, found["rows"])
    found["rows"] = [row for row in found["rows"] if row["family"] not in asked.leave_out]
    evaluation = json.loads(json.dumps(found), object_hook=named)
    write_figure(rate_figure(cast("EvaluationResult", evaluation)), asked.picture)


if __name__ == "__main__":
    run(main)

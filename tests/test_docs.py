"""What the README and the scripts tell people to type exists; links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sphkv_cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "codebooks/THEORY.md",
    "kernels/LAYOUT.md",
    "sphkv_cli/artifacts/FORMAT.md",
    "examples/text/README.md",
]


def sphkv_lines(text: str) -> list[list[str]]:
    """Every `sphkv ...` of a text as words; continuation lines are joined first."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"(?:\$ sphkv|`sphkv|^step|/sphkv\")[ ]+([a-z][^`\n]*)", joined, re.M)
    return [shlex.split(line.split(" >")[0], comments=True) for line in lines]


def options_of(command: str) -> set[str]:
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0, f"there is no command sphkv {command}"
    return set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))


@pytest.mark.parametrize(
    "name", ["README.md", "examples/demo.sh", "examples/smoke.sh", "examples/record/steps.sh"]
)
def test_every_command_shown_exists_with_its_options(name: str) -> None:
    lines = sphkv_lines((ROOT / name).read_text())
    assert len(lines) >= 4
    for words in lines:
        command, rest = words[0], words[1:]
        used = {word.split("=")[0] for word in rest if word.startswith("--") and len(word) > 2}
        missing = used - options_of(command)
        assert not missing, f"{name}: sphkv {command} has no {missing}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_leads_to_one(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{name} links to {target}"

"""What `generate` can be asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.errors import UsageError
from sphkv_cli.models.load import LoadOptions
from sphkv_cli.option_checks import require_at_least

BackendChoice = Literal["auto", "cuda", "reference"]


@dataclass(frozen=True)
class GenerateOptions:
    """Options of one run.

    prompts: texts; prompt_files: files of text after them; prompt_tokens: at most so many first
    tokens of each.  new_tokens: generated greedily, end-of-text tokens like others.
    tier: of codebooks; window: tokens after the prompt that stay dense at least (policy), or last
    tokens that do (tier).  budget: of each sequence, kept while it grows (policy).
    backend: what reads the codes; model: None takes the name that the artifact has.
    """

    prompts: tuple[str, ...] = ()
    prompt_files: tuple[Path, ...] = ()
    prompt_tokens: int | None = None
    new_tokens: int = 64
    tier: str | None = None
    window: int = 32
    budget: str | None = None
    backend: BackendChoice = "auto"
    model: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts and not self.prompt_files:
            raise UsageError("there is no prompt", "pass --prompt TEXT or --prompt-file PATH")
        if not all(self.prompts):
            raise UsageError("--prompt is empty", "give a text")
        require_at_least("--prompt-tokens", self.prompt_tokens, 1)
        require_at_least("--new-tokens", self.new_tokens, 1)
        require_at_least("--window", self.window, 0)
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.backend not in get_args(BackendChoice):
            raise UsageError(
                f"--backend {self.backend} is unknown", "choose auto, cuda or reference"
            )

"""lm-evaluation-harness tasks answered from a cache: coded or dense, one class for both.

Generation requests decode step by step; likelihood requests read the context once, then the
continuation from the cache (a likelihood taken from one forward pass over both would never touch
it).  One request at a time.  Needs the extra `harness` (lm-eval).  Source: the interface is
EleutherAI's lm-evaluation-harness.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from transformers import DynamicCache

from sphkv_cli.errors import SphkvError

MakeCache = Callable[[], Any]
"""An empty cache for the next request."""

_MOST_NEW_TOKENS = 256


class CachedModel(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """A loaded transformers model whose every request reads a cache of `make_cache`."""

    def __init__(self, model: Any, tokenizer: Any, make_cache: MakeCache) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.make_cache = make_cache
        self._most = int(model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id or 0)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless told."""
        extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **extra)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            context = list(context) or [self.eot_token_id]
            self._require_room(len(context) + len(continuation))
            following = torch.tensor(continuation, device=self.model.device)
            cache = self.make_cache()
            with torch.inference_mode():
                before = self._logits(context, cache, last=1)
                # The last continuation token predicts nothing that is asked.
                parts = [before]
                if len(continuation) > 1:
                    parts.append(self._logits(continuation[:-1], cache, last=0))
            logits = torch.log_softmax(torch.cat(parts).float(), dim=-1)
            own = logits.gather(1, following[:, None])[:, 0]
            greedy = bool((logits.argmax(dim=-1) == following).all())
            found.append((float(own.sum()), greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refused: a rolling likelihood has no context that is coded before it is read."""
        raise SphkvError(
            "rolling likelihoods never read a coded context", "choose generation or choice tasks"
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first stop string."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise SphkvError(f"generation with {options}", "only greedy generation is evaluated")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        n_new = int(options.get("max_gen_toks", _MOST_NEW_TOKENS))
        ids = self.tok_encode(context)
        self._require_room(len(ids) + n_new)
        cache, step, tokens = self.make_cache(), ids, []
        with torch.inference_mode():
            for _ in range(n_new):
                token = int(self._logits(step, cache, last=1).argmax())
                if token == self.eot_token_id:
                    break
                tokens.append(token)
                step = [token]
                text = self.tokenizer.decode(tokens)
                if any(stop in text for stop in stops):
                    return str(min((text.split(stop)[0] for stop in stops), key=len))
        return str(self.tokenizer.decode(tokens))

    def _logits(self, ids: Sequence[int], cache: Any, last: int) -> torch.Tensor:
        """(n, vocabulary) of the last `last` positions; 0: of all."""
        step = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=step, past_key_values=cache, logits_to_keep=last)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _require_room(self, n_tokens: int) -> None:
        if n_tokens > self._most:
            raise SphkvError(
                f"a request of {n_tokens} tokens, the model's context is {self._most}",
                "choose a task of shorter texts",
            )


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    make_coded: MakeCache,
    *,
    limit: int | None = None,
    n_examples: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Results of both caches on the same requests: {"dense": ..., "coded": ...}, by task.

    Args:
        tasks: names, or tasks as `lm_eval.simple_evaluate` takes them.
        limit: at most so many documents of each; n_examples: shown before each question, None
            leaves that to the task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Reading the thousands of task files that come with lm-eval takes a minute: once, and only to
    # look up names.
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    makers = {"dense": lambda: DynamicCache(config=model.config), "coded": make_coded}
    found = {}
    for name, make in makers.items():
        answered = simple_evaluate(
            CachedModel(model, tokenizer, make),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=n_examples,
            bootstrap_iters=0,
        )
        found[name] = answered["results"]
    return found

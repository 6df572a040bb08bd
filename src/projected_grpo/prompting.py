"""How a problem, a pair or a teacher's rollout is put to one model.

A chat model gets messages. A model too weak for that (`prompt_style="prefill"`) gets one string that ends inside the
assistant's turn, with the class, the method's head and the statement's beginning written for it; what it completes is
the body, so pairs and teacher rollouts are cut to what follows that head, and the prefill is put back before anything
is graded. Where the whole statement fits there, the frame before it is one sentence and not the benchmark's: a third of
the tokens, and such a model solves as many (RESEARCH_JOURNAL.md, 2026-11-24). A model that has never seen a chat
("bare", the microcosm's) gets the statement, the hint and the same opening, as plain text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from projected_grpo.encoding import Prompt, encode_prompt, open_turn
from projected_grpo.env.problems import Problem
from projected_grpo.env.prompts import bare_prompt, build_prompt, fits_prefill, prefill, short_prompt, strip_prefill
from projected_grpo.errors import InputError
from projected_grpo.models import LoadedModel, chat_template_kwargs
from projected_grpo.pairs import ContrastivePair, PairSet


@dataclass(frozen=True)
class Prompter:
    """Prompts in the style of one loaded model."""

    loaded: LoadedModel
    max_prompt_length: int | None = None
    wording: str = "plain"
    """Of the hint of mode `run_tests`; the other modes have one."""
    max_completion_length: int = 0
    """Tokens that a row's prompt has to leave of the model's context."""

    @property
    def template_kwargs(self) -> dict:
        return chat_template_kwargs(self.loaded.name, self.loaded.tokenizer)

    def prompt(self, problem: Problem, mode: str, test_func_name: str = "") -> tuple[Prompt, str]:
        """The prompt and the part of the completion that it already holds ("" for a chat model)."""
        wording = self.wording if mode == "run_tests" else "plain"
        if self.loaded.prompt_style == "bare":
            opening = prefill(problem, comment=False)
            return bare_prompt(problem, mode, test_func_name, wording) + opening, opening
        if self.loaded.prompt_style == "chat":
            return build_prompt(problem, mode, test_func_name, wording), ""
        frame = short_prompt if fits_prefill(problem) else build_prompt
        messages = frame(problem, mode, test_func_name, wording)
        opening = prefill(problem)
        return open_turn(self.loaded.tokenizer, messages, opening, self.template_kwargs), opening

    def row(self, problem: Problem, mode: str) -> dict:
        """A dataset row: what TRL needs, and what the reward and the pool look it up by.

        Raises:
            InputError: the prompt is longer than `max_prompt_length` tokens, or leaves the completion too few.
        """
        prompt, opening = self.prompt(problem, mode)
        n_tokens = len(encode_prompt(self.loaded.tokenizer, prompt, self.template_kwargs))
        if self.max_prompt_length is not None and n_tokens > self.max_prompt_length:
            raise InputError(
                f"problem {problem.id}: its prompt has {n_tokens} tokens, over max_prompt_length="
                f"{self.max_prompt_length}; leave it out or raise --max-prompt-length"
            )
        context = getattr(self.loaded.model.config, "max_position_embeddings", None)
        if context is not None and n_tokens + self.max_completion_length > context:
            raise InputError(
                f"problem {problem.id}: its prompt of {n_tokens} tokens and a completion of "
                f"{self.max_completion_length} exceed the {context} that {self.loaded.name} takes; lower "
                "--max-completion-length or leave the problem out"
            )
        return {
            "prompt": prompt,
            "prefill": opening,
            "problem_id": problem.id,
            "mode": mode,
            "test_func_name": problem.test_func_name,
        }

    def completion(self, problem: Problem, text: str) -> str:
        """A full completion as this model would have continued its prompt."""
        return text if self.loaded.prompt_style == "chat" else strip_prefill(text, problem)

    def pairs(self, pairs: PairSet) -> PairSet:
        """The pair set in this model's style; the set keeps its name and hash, which say what it was made from."""
        if self.loaded.prompt_style == "chat":
            return pairs
        return replace(pairs, pairs=tuple(self._pair(pair) for pair in pairs))

    def _pair(self, pair: ContrastivePair) -> ContrastivePair:
        if pair.problem is None:
            raise InputError(
                f"pair {pair.id} gives a prompt and no problem, so {self.loaded.name} cannot be opened for it; name "
                "the pair's problem or use a chat model"
            )
        prompt, _ = self.prompt(pair.problem, pair.mode)
        hack, clean = (self.completion(pair.problem, text) for text in (pair.hack, pair.clean))
        return replace(pair, prompt=prompt, hack=hack, clean=clean)


def prompt_rows(prompter: Prompter, problems: Sequence[Problem], modes: Sequence[str]) -> list[dict]:
    """One dataset row a problem, under the modes of the problems in order."""
    return [prompter.row(problem, mode) for problem, mode in zip(problems, modes, strict=True)]

"""A reward model: an adapter with a head that gives a whole answer one number, loaded and asked.

It is the second step of InstructGPT (arXiv 2203.02155). The reward is read at the answer's last token, its end of turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune import adapters
from qlora_tune import model as models
from qlora_tune.answer_files import Answers
from qlora_tune.chat_format import ChatFormat
from qlora_tune.config import TrainConfig
from qlora_tune.errors import ModelError, TemplateError
from qlora_tune.export import Trained, open_adapter
from qlora_tune.launch import refuse_busy_gpu
from qlora_tune.preferences import read_kept_pairs
from qlora_tune.runs import open_run
from qlora_tune.scores import Interval, bootstrap_mean
from qlora_tune.tool_text import Tools
from qlora_tune.turns import Message
from qlora_tune.votes import Vote, key_prompt

ON_ANSWERER = "reward"  # its adapter's name on a model that holds others


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model: the model that holds its adapter, under which name, and its head.

    `seen` are the keys of prompts that it was trained on; `context` is the base's [tokens], None for no limit.
    """

    model: Any
    adapter: str
    head: Any
    chat: ChatFormat
    context: int | None
    seen: frozenset[str] = frozenset()

    def score(
        self,
        conversations: Sequence[tuple[Sequence[Message], Tools]],
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[float | None]:
        """The reward of each conversation's last answer; None where it is empty, or longer than the context.

        The model's own adapter is active again afterwards. `on_progress` gets answers scored and answers in all.
        """
        encoded = [self._encode(messages, tools) for messages, tools in conversations]
        rewards = self.score_tokens(list(filter(None, encoded)), batch_size, on_progress)
        return [rewards[tuple(tokens)] if tokens else None for tokens in encoded]

    def score_tokens(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[tuple[int, ...], float]:
        """The reward of each sequence of tokens, read at its last one. Equal sequences are scored once."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        order = sorted({*map(tuple, sequences)}, key=lambda tokens: (-len(tokens), tokens))
        rewards: dict[tuple[int, ...], float] = {}
        body, before = self.model.get_base_model().base_model, self.model.active_adapter
        self.model.eval()
        self.model.set_adapter(self.adapter)
        try:
            with torch.inference_mode():
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    # Padding stands on the right, where causal attention doesn't see it: any token serves.
                    ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
                    hidden = body(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
                    ends = torch.tensor([len(tokens) - 1 for tokens in batch])
                    found = hidden[torch.arange(len(batch)), ends].float() @ self.head.T
                    rewards.update(zip(batch, found[:, 0].tolist(), strict=True))
                    on_progress(len(rewards), len(order))
        finally:
            self.model.set_adapter(before)
        return rewards

    def _encode(self, messages: Sequence[Message], tools: Tools) -> list[int] | None:
        try:
            tokens = self.chat.encode_prompt(messages[:-1], tools) + self.chat.encode_answer(messages, tools)
        except TemplateError:
            return None
        return tokens if len(tokens) <= (self.context or len(tokens)) else None


def open_reward_model(name: Path, runs_dir: str | Path, model_name_or_path: str | None = None) -> Trained:
    """Find the reward model of a run or of an adapter's folder, and its base. Loads no weights.

    Raises ModelError where it is no reward model or its base is missing, RunError where there is no such run.
    """
    if (name / "adapter_config.json").is_file():
        return open_adapter(name, model_name_or_path, reward=True)
    run = open_run(name, runs_dir)
    run.require_adapter()
    return open_adapter(run.adapter, model_name_or_path, reward=True)


def load_reward_model(trained: Trained, beside: tuple[Trained, Any] | None = None) -> RewardModel:
    """Load a reward model.

    `beside` is an adapter that is loaded already, with its model: where both are of one base, held in one way, the
    reward model is put on that too, and no second base is loaded. Raises RunError when a run holds the GPU.
    """
    if beside and _how_held(beside[0]) == _how_held(trained):
        model = beside[1]
    else:
        refuse_busy_gpu(trained.device)
        model = _load_body(trained)
    model = adapters.load_adapter(model, trained.adapter, trained.base, ON_ANSWERER)
    kept, _ = read_kept_pairs(trained.adapter.resolve().parent)
    return RewardModel(
        model,
        ON_ANSWERER,
        read_head(trained.adapter, model.device),
        trained.chat,
        trained.base.context_length(),
        frozenset(key_prompt(pair.prompt, pair.tools) for pair in kept),
    )


def score_answers(model: RewardModel, answers: Sequence[Answers], batch_size: int) -> list[dict[str, float | None]]:
    """The reward of every answer, by answerer, row by row."""
    asked = [
        conversation(row.question.prompt, row.question.tools, text) for row in answers for text in row.answers.values()
    ]
    rewards = iter(model.score(asked, batch_size))
    return [{name: next(rewards) for name in row.answers} for row in answers]


def compare_means(rewards: Sequence[Mapping[str, float | None]]) -> dict[str, tuple[float, Interval]]:
    """Each answerer's mean reward, and its difference from the first answerer's with the paired interval of 95 %.

    Of the rows where every answer has a reward; empty where there is none.
    """
    known = [row for row in rewards if None not in row.values()]
    columns = {name: [row[name] or 0.0 for row in known] for name in known[0]} if known else {}
    first = next(iter(columns.values()), [])
    return {
        name: (sum(own) / len(own), bootstrap_mean([a - b for a, b in zip(own, first, strict=True)]))
        for name, own in columns.items()
    }


def agree_with_votes(model: RewardModel, votes: Sequence[Vote], batch_size: int) -> list[bool]:
    """Whether the reward of a vote's winner is above that of each other answer; prompts trained on are left out."""
    pairs = [
        (vote, vote.answers[vote.winner], text)
        for vote in votes
        if vote.winner in vote.answers and vote.key not in model.seen
        for text in vote.answers.values()
        if text.strip() != vote.answers[vote.winner].strip()
    ]
    asked = [conversation(vote.prompt, vote.tools, text) for vote, *texts in pairs for text in texts]
    rewards = iter(model.score(asked, batch_size))
    both = [(next(rewards), next(rewards)) for _ in pairs]
    return [won > lost for won, lost in both if won is not None and lost is not None]


def begin_reward_model(trained: Trained, first: Path | None, config: TrainConfig) -> Any:
    """A model to train: the base with a head, and a copy of the adapter `first`, or a fresh one.

    The head is drawn by seed, with the spread 1 / sqrt(d + 1) of Stiennon et al. (arXiv 2009.01325): from 0 it gave the
    adapter next to nothing to learn by.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    model = _load_body(trained)
    torch.manual_seed(config.seed)
    torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if first is None:
        return adapters.attach_lora(model, config, TaskType.SEQ_CLS)
    lora = LoraConfig.from_pretrained(first)
    lora.task_type, lora.inference_mode = TaskType.SEQ_CLS, False
    weights = load_file(first / "adapter_model.safetensors")
    tuned = get_peft_model(model, lora)
    set_peft_model_state_dict(tuned, {**weights, adapters.REWARD_HEAD: model.score.weight})
    return tuned


def read_head(adapter: Path, device: Any) -> Any:
    """The head of a reward model's adapter: a row of float32."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return file.get_tensor(adapters.REWARD_HEAD).float().to(device)


def conversation(prompt: Sequence[Message], tools: Tools, answer: str) -> tuple[list[Message], Tools]:
    """A prompt and an answer as they are scored."""
    return [*prompt, Message(role="assistant", content=answer)], tools


def _how_held(trained: Trained) -> tuple[Any, ...]:
    return trained.base.fingerprint, trained.quantization, trained.precision


def _load_body(trained: Trained) -> Any:
    """The base with a head in place of its words, still to be filled. Raises ModelError where it has no such form."""
    import torch

    class Head(torch.nn.Linear):  # type: ignore[misc]
        """Computes in float32 under autocast too: bfloat16 makes ties of rewards that differ by less than 0.4 %."""

        def forward(self, hidden: Any) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                return super().forward(hidden.float())

    model = models.load_base(trained.base, trained.device, trained.precision, trained.quantization, scalar=True)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ModelError(f'Base model "{trained.base.name}": its architecture has no form with a score head here.')
    model.score = Head(model.score.in_features, 1, bias=False, device=model.device)
    return model

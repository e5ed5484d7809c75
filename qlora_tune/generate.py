"""Answers from a model: batched for scoring, streamed for chat. Both take the prompt from chat_format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ModelError
from qlora_tune.tool_text import Tools
from qlora_tune.turns import Message

ANSWER_SHARE = 4  # of the context, at most one part in so many is kept free for the answer while turns are left out
SHORTEST_ANSWER = 16  # [tokens]


def stop_ids(chat: ChatFormat) -> list[int]:
    """Tokens that end an answer: the template's end of turn, and the tokenizer's end of text."""
    ids = [chat.end_of_turn_id, chat.tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def generate_answers(
    model: Any,
    chat: ChatFormat,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    tools: Sequence[Tools] = (),
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answer conversations greedily, in batches of similar length. Returns one text per conversation, in order.

    `tools` holds the functions that each conversation offers, none of them any by default. `on_progress` is called
    with the number answered so far.
    """
    import torch

    offered = tools or [()] * len(conversations)
    prompts = [chat.encode_prompt(messages, own) for messages, own in zip(conversations, offered, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = _pad_left([prompts[index] for index in chosen], chat.tokenizer.pad_token_id)
        with torch.inference_mode():
            tokens = model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                generation_config=_generation_config(chat, max_new_tokens),
            )
        prompt_length = inputs["input_ids"].shape[1]
        for index, row in zip(chosen, tokens[:, prompt_length:].tolist(), strict=True):
            answers[index] = decode_answer(chat, row)
        on_progress(min(start + batch_size, len(order)))
    return answers


def fit_context(model: Any, chat: ChatFormat, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
    """Leave out the oldest turns until an answer fits behind the prompt, within the base's max_position_embeddings.

    At positions that it was never trained on, a model answers nonsense: the built-in one got 65 % instead of 77 to
    90 % right (docs/log.md). The system prompt and the last question always stay. Raises ModelError where not even
    those leave room for an answer.
    """
    kept = list(messages)
    context = _context_length(model)
    oldest = 1 if kept[0]["role"] == "system" else 0
    room = min(max_new_tokens, context // ANSWER_SHARE)
    while len(kept) > oldest + 2 and len(chat.encode_prompt(kept)) + room > context:
        del kept[oldest : oldest + 2]
    if (length := len(chat.encode_prompt(kept))) + min(max_new_tokens, SHORTEST_ANSWER) > context:
        raise ModelError(
            f"Too long: with the system prompt, {length} tokens of the {context} that this base sees at once, which "
            "leaves no room for an answer. Not sent; the conversation is as before."
        )
    return kept


def _context_length(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def stream_reply(
    model: Any,
    chat: ChatFormat,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Answer one conversation piece by piece, within the context. temperature 0 is greedy.

    Closing the iterator stops the model.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    class Stop(StoppingCriteria):  # type: ignore[misc]
        asked = False

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), self.asked, dtype=torch.bool, device=input_ids.device)

    stop = Stop()
    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    prompt = chat.encode_prompt(messages)
    inputs = _pad_left([prompt], chat.tokenizer.pad_token_id)
    room = max(1, min(max_new_tokens, _context_length(model) - len(prompt)))
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                    generation_config=_generation_config(chat, room, temperature, top_p),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    model.eval()
    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stop.asked = True
        thread.join()
    if failure:
        raise failure[0]


def _generation_config(chat: ChatFormat, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> Any:
    """A configuration from nothing: whatever sampling defaults the base ships would make answers incomparable."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(chat),
        pad_token_id=chat.tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def decode_answer(chat: ChatFormat, tokens: list[int]) -> str:
    """The text of an answer's tokens up to where it ends, without white space around it."""
    ends = [tokens.index(stop) for stop in stop_ids(chat) if stop in tokens]
    text: str = chat.tokenizer.decode(tokens[: min(ends)] if ends else tokens, skip_special_tokens=True)
    return text.strip()

"""Answers from a model: batched for scoring, streamed for chat. Both take the prompt from chat_format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, Thread
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from qlora_tune import system_memory
from qlora_tune.adapters import virtual_cache, virtual_tokens
from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ModelError
from qlora_tune.layers import only_adapter, weight_of
from qlora_tune.tool_text import Tools
from qlora_tune.turns import Message

ANSWER_SHARE = 4  # of the context, at most one part in so many is kept free for the answer while turns are left out
SHORTEST_ANSWER = 16  # [tokens]
ROUND = 8  # [tokens] after so many, the rows of a batch that have ended leave it
# Dequantized weights are kept while a model answers, where they take at most one part in so many of the free memory.
KEPT_SHARE = 4
# Up to this hidden size a second thread makes decoding no faster on a CPU, and costs its time.
ONE_THREAD_HIDDEN = 256


def stop_ids(chat: ChatFormat) -> list[int]:
    """Tokens that end an answer: the template's end of turn, and the tokenizer's end of text."""
    ids = [chat.end_of_turn_id, chat.tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def stop_words(chat: ChatFormat) -> list[str]:
    """The text of the tokens that end an answer."""
    return [chat.tokenizer.decode([token]) for token in stop_ids(chat)]


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
    offered = tools or [()] * len(conversations)
    prompts = [chat.encode_prompt(messages, own) for messages, own in zip(conversations, offered, strict=True)]
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return [text for text, _ in answer_prompts(model, chat, prompts, **options, on_progress=on_progress)]


def answer_prompts(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[str, bool]]:
    """Answer prompts, given as tokens, in batches of similar length; greedily at temperature 0.

    Returns for each, in order, its answer and whether that came to its end of turn within max_new_tokens and the
    context; a prompt that fills the context gets none. `on_progress` is called with the number answered so far.
    """
    import torch

    stops, context = set(stop_ids(chat)), context_length(model)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    order = [index for index in order if len(prompts[index]) < context]
    answers = [("", False)] * len(prompts)
    model.eval()
    with faster_answers(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            with torch.inference_mode():
                batch = [prompts[index] for index in chosen]
                rows = _answer_batch(model, chat, batch, max_new_tokens, temperature, top_p)
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = decode_answer(chat, row), bool(stops & set(row))
            on_progress(min(start + batch_size, len(order)))
    return answers


def _answer_batch(
    model: Any, chat: ChatFormat, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, top_p: float
) -> list[list[int]]:
    """The tokens of one batch's answers, through their end of turn. The batch shrinks as answers end.

    None goes beyond the context, where a base with learned positions fails and others were never trained.
    """
    import torch
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    stops = set(stop_ids(chat))
    rows: list[list[int]] = [[] for _ in prompts]
    context = context_length(model)
    rooms = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    going = open_ones = list(range(len(prompts)))
    model, inputs = _behind_virtual_tokens(model, _pad_left(prompts, chat.tokenizer.pad_token_id))
    while True:
        left = min(rooms[index] - len(rows[index]) for index in open_ones)
        found = model.generate(
            **inputs,
            generation_config=_generation_config(
                chat, min(ROUND, left) if len(going) > 1 else left, temperature, top_p
            ),
            return_dict_in_generate=True,
        )
        tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
        for index, row in zip(going, tokens.tolist(), strict=True):
            rows[index] += row
        open_ones = [index for index in open_ones if not stops & set(rows[index]) and len(rows[index]) < rooms[index]]
        if not open_ones:
            return [row[:room] for row, room in zip(rows, rooms, strict=True)]
        kept = [place for place, index in enumerate(going) if index in open_ones]
        ids, cache = found.sequences, found.past_key_values  # None of a base that keeps other states
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
        # Layers that hold more than keys and values don't leave out rows of all that they hold.
        if len(kept) < len(going) and {type(layer) for layer in getattr(cache, "layers", [None])} <= {
            DynamicLayer,
            DynamicSlidingWindowLayer,
        }:
            chosen = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(chosen)
            ids, mask, going = ids[chosen], mask[chosen], [going[place] for place in kept]
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def fit_context(model: Any, chat: ChatFormat, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
    """Leave out the oldest turns until an answer fits behind the prompt, within the base's max_position_embeddings.

    At positions that it was never trained on, a model answers nonsense: the built-in one got 65 % instead of 77 to
    90 % right (docs/log.md). The system prompt and the last question always stay. Raises ModelError where not even
    those leave room for an answer.
    """
    kept = list(messages)
    context = context_length(model)
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


def room_for(model: Any, prompt: Sequence[int], max_new_tokens: int) -> int:
    """The longest answer that the context has room for behind a prompt [tokens]."""
    return max(1, min(max_new_tokens, context_length(model) - len(prompt)))


def context_length(model: Any) -> int:
    """The longest sequence that a model was made for [tokens]."""
    whole = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
    return whole - virtual_tokens(model)


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
    room = room_for(model, prompt, max_new_tokens)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with faster_answers(model), torch.inference_mode():
                answerer, given = _behind_virtual_tokens(model, inputs)
                answerer.generate(
                    **given,
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


@dataclass
class _Answering:
    """How many answers a model is giving at this moment, and what to undo after the last one."""

    users: int = 0
    threads: int = 0
    undo: ExitStack = field(default_factory=ExitStack)


_answering: WeakKeyDictionary[Any, _Answering] = WeakKeyDictionary()
_counting = Lock()


@contextmanager
def faster_answers(model: Any) -> Iterator[None]:
    """Let a model in eval mode answer with less work, to the last bit the same, while the block runs.

    On a CPU, bitsandbytes dequantizes each weight at each call; here that happens once. PEFT's layers are passed by.
    Several threads may be inside at once.
    """
    import torch

    with _counting:
        state = _answering.setdefault(model, _Answering())
        if not state.users:
            state.threads = torch.get_num_threads()
            with ExitStack() as stack:
                for module, forward in _shortcuts(model):
                    stack.enter_context(patch.object(module, "forward", forward))
                state.undo = stack.pop_all()
        state.users += 1
    one_thread = model.device.type == "cpu" and model.config.get_text_config().hidden_size <= ONE_THREAD_HIDDEN
    try:
        if one_thread:
            torch.set_num_threads(1)
        yield
    finally:
        if one_thread:
            torch.set_num_threads(state.threads)
        with _counting:
            state.users -= 1
            if not state.users:
                state.undo.close()


def _shortcuts(model: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """The layers that can do with less work, each with its new forward."""
    modules = list(model.modules())
    packed = [module for module in modules if _is_packed(module)]
    found: list[tuple[Any, Callable[..., Any]]] = []
    if model.device.type == "cpu" and _fit(packed):
        found += [(module, partial(_linear, module.forward, module, weight_of(module, True)())) for module in packed]
    for module in modules:
        if _is_packed(getattr(module, "base_layer", None)) and (name := only_adapter(module)):
            found.append((module, partial(_adapted, module.forward, module, name)))
    return found


def _is_packed(module: Any) -> bool:
    """Whether this is a linear layer of bitsandbytes whose 4-bit weight dequantizes to what it computes with."""
    if type(module).__name__ != "Linear4bit" or hasattr(module, "base_layer"):
        return False
    state = getattr(module.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    bias = module.bias
    return module.compute_dtype in (None, state.dtype) and (bias is None or bias.dtype == state.dtype)


def _fit(packed: Sequence[Any]) -> bool:
    """Whether the dequantized weights take no more than their share of the free memory."""
    states = [module.weight.quant_state for module in packed]
    size = sum(state.shape.numel() * state.dtype.itemsize for state in states)
    return bool(size * KEPT_SHARE <= system_memory.available_bytes())


def _linear(stock: Callable[..., Any], module: Any, weight: Any, x: Any) -> Any:
    from torch.nn.functional import linear

    return linear(x, weight, module.bias) if x.dtype == weight.dtype else stock(x)


def _adapted(stock: Callable[..., Any], module: Any, name: str, x: Any, **named: Any) -> Any:
    """PEFT's own operations in their order, as their rounding decides between words; without its checks and copies."""
    import torch
    from torch.nn.functional import linear

    if named or module.training or module.merged or torch.is_autocast_enabled(x.device.type):
        return stock(x, **named)
    result = module.base_layer(x)
    if module.disable_adapters:
        return result
    first, second = module.lora_A[name].weight, module.lora_B[name].weight
    change = linear(linear(x.to(first.dtype), first), second).mul_(module.scaling[name])
    return result.add_(change.to(result.dtype))


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


def _behind_virtual_tokens(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What answers, and its inputs on its device.

    Virtual tokens stand before the padding, already read: any ids hold their places.
    """
    from torch.nn.functional import pad

    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    count = virtual_tokens(model)
    if not count:
        return model, inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    inputs = {"input_ids": pad(ids, (count, 0)), "attention_mask": pad(mask, (count, 0), value=1)}
    return model.get_base_model(), inputs | {"past_key_values": virtual_cache(model, len(ids))}


def decode_answer(chat: ChatFormat, tokens: list[int]) -> str:
    """The text of an answer's tokens up to where it ends, without white space around it."""
    ends = [tokens.index(stop) for stop in stop_ids(chat) if stop in tokens]
    text: str = chat.tokenizer.decode(tokens[: min(ends)] if ends else tokens, skip_special_tokens=True)
    return text.strip()

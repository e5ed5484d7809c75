"""Speed of answers beside Transformers' `generate` as a user would write it: same base, adapter, prompts and tokens.

    python benchmarks/generation.py --shapes builtin 30M 135M --rounds 3 --json benchmarks/generation.json

Sides take turns, each run in a fresh process:

- plain: a PEFT model on a 4-bit base, `generate` on left-padded batches in the order of the file.
- ours: generate_answers, as scoring calls it.
- plain-chat: one conversation after the other through `generate` and a streamer. ours-chat: stream_reply.

Prompts are those of sample_heldout.jsonl. The built-in base answers them with --adapter, a run's adapter folder, or
with a fresh one that says what the base says; answers end where the model ends them. The other bases have random
weights, and every answer has --new-tokens tokens. Speed counts the answers' tokens, without what fills a batch up.
Prints markdown: medians, lowest and highest, the ratio to the plain side of the same round, time to the first piece
of text, and how many of the answers differ from the plain side's: rows in another order are padded otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

from throughput import SHAPES, build_base, load_quantized, run_child

SIDES = ("plain", "ours", "plain-chat", "ours-chat")
BATCH, RANK = 32, 16
LONGEST = 96  # tokens of an answer of the built-in base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["builtin", *SHAPES], default=["builtin", "30M", "135M"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=400, help="prompts to score with the built-in base")
    parser.add_argument("--prompts-random", type=int, default=32, help="prompts to score with bases of random weights")
    parser.add_argument("--chats", type=int, default=10, help="conversations to stream")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer of a base of random weights")
    parser.add_argument("--adapter", type=Path, help="a run's adapter folder, for the built-in base")
    parser.add_argument("--json", type=Path, help="where the figures go, besides the table")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a side and a base: what a child process does
    args = parser.parse_args()
    if args.one:
        print("FIGURES " + json.dumps(measure(args.one[0], args.one[1], args)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            if shape != "builtin":
                build_base(Path(folder) / shape, shape)
        for turn, shape in itertools.product(range(args.rounds), args.shapes):
            for side in args.sides:
                base = shape if shape == "builtin" else str(Path(folder) / shape)
                found.append({"shape": shape, "side": side, "round": turn, **run_side(side, base)})
                print(f"… {shape} {side}: {found[-1]['tokens_per_s']:,.1f} tokens/s", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_table(found, args.shapes, args.sides)


def run_side(side: str, base: str) -> dict[str, Any]:
    """One run of a side in a fresh process, with the options of this one."""
    return run_child([*sys.argv, "--one", side, base])


def measure(side: str, base: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answer in this process. Returns tokens a second, seconds to the first piece of text, and the answers."""
    from unittest.mock import patch

    from qlora_tune import generate
    from qlora_tune.config import shipped_path
    from qlora_tune.data import load_examples
    from qlora_tune.model import load_tokenizer, quiet_stack

    if side.startswith("ours"):
        quiet_stack()
    _, chat = load_tokenizer(shipped_path("builtin") if base == "builtin" else Path(base))
    model = load(base, args.adapter)
    rows, _ = load_examples([str(Path(__file__).resolve().parent.parent / "sample_heldout.jsonl")])
    asked = [list(row.messages[:-1]) for row in rows]
    config = generate._generation_config
    if base != "builtin":  # random weights never end an answer, or at once
        patch.object(generate, "stop_ids", lambda chat: []).start()
    longest = LONGEST if base == "builtin" else args.new_tokens
    sides: dict[str, Callable[..., Any]] = {
        "plain": plain_answers,
        "ours": our_answers,
        "plain-chat": plain_chats,
        "ours-chat": our_chats,
    }
    if side.endswith("chat"):
        asked = asked[:: len(asked) // args.chats][: args.chats]
    else:
        asked = asked[: args.prompts if base == "builtin" else args.prompts_random]
    sides[side](model, chat, asked[:2], config(chat, 8))  # libraries import their parts on first use
    start = time.perf_counter()
    answers, first = sides[side](model, chat, asked, config(chat, longest))
    seconds = time.perf_counter() - start
    ends = 1 if base == "builtin" else 0
    tokens = sum(
        min(longest, len(chat.tokenizer(each, add_special_tokens=False)["input_ids"]) + ends) for each in answers
    )
    tokens = tokens if base == "builtin" else longest * len(asked)
    return {"tokens_per_s": tokens / seconds, "first_s": median(first) if first else None, "answers": answers}


def load(base: str, adapter: Path | None) -> Any:
    """A 4-bit base with an adapter, as the documentation of PEFT has it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from qlora_tune.config import shipped_path
    from qlora_tune.model import _keep_4bit_weights_trainable

    model = load_quantized(shipped_path("builtin") if base == "builtin" else Path(base))
    _keep_4bit_weights_trainable(model)
    if base == "builtin" and adapter:
        return PeftModel.from_pretrained(model, adapter).eval()
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def plain_answers(model: Any, chat: Any, asked: list[Any], config: Any) -> tuple[list[str], list[float]]:
    answers = []
    for start in range(0, len(asked), BATCH):
        inputs = chat.tokenizer.apply_chat_template(
            asked[start : start + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        tokens = model.generate(**inputs, generation_config=config)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in chat.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers, []


def our_answers(model: Any, chat: Any, asked: list[Any], config: Any) -> tuple[list[str], list[float]]:
    from qlora_tune.generate import generate_answers

    return generate_answers(model, chat, asked, max_new_tokens=config.max_new_tokens, batch_size=BATCH), []


def plain_chats(model: Any, chat: Any, asked: list[Any], config: Any) -> tuple[list[str], list[float]]:
    from transformers import TextIteratorStreamer

    def stream(messages: Any) -> Any:
        inputs = chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        Thread(target=model.generate, kwargs={**inputs, "generation_config": config, "streamer": streamer}).start()
        return streamer

    return read(stream, asked)


def our_chats(model: Any, chat: Any, asked: list[Any], config: Any) -> tuple[list[str], list[float]]:
    from qlora_tune.generate import stream_reply

    return read(lambda messages: stream_reply(model, chat, messages, max_new_tokens=config.max_new_tokens), asked)


def read(stream: Callable[[Any], Any], asked: list[Any]) -> tuple[list[str], list[float]]:
    """All answers, and how long each let one wait for its first text [s]."""
    answers, first = [], []
    for messages in asked:
        start, text = time.perf_counter(), ""
        for piece in stream(messages):
            if piece and not text:
                first.append(time.perf_counter() - start)
            text += piece
        answers.append(text.strip())
    return answers, first


def print_table(found: list[dict[str, Any]], shapes: list[str], sides: list[str]) -> None:
    """Medians with spread; the ratio is the median of each round's own, as speeds drift over the day."""
    print("| shape | side | tokens/s | ratio to plain | first text | answers that differ |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for shape, side in itertools.product(shapes, sides):
        runs = [entry for entry in found if (entry["shape"], entry["side"]) == (shape, side)]
        beside = side.replace("ours", "plain")
        first = {e["round"]: e for e in found if (e["shape"], e["side"]) == (shape, beside)} or {
            r["round"]: r for r in runs
        }
        speeds = [run["tokens_per_s"] for run in runs]
        ratios = [run["tokens_per_s"] / first[run["round"]]["tokens_per_s"] for run in runs]
        waits = [run["first_s"] for run in runs if run["first_s"]]
        other = first[runs[0]["round"]]["answers"]
        differ = sum(a != b for a, b in zip(runs[0]["answers"], other, strict=True))
        print(
            f"| {shape} | {side} | {median(speeds):,.1f} ({min(speeds):,.1f} to {max(speeds):,.1f}) | "
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{f'{median(waits) * 1000:,.0f} ms' if waits else ''} | {differ} of {len(other)} |"
        )


if __name__ == "__main__":
    main()

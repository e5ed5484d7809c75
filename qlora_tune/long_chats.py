"""Long chats to several that fit: cut between exchanges, so that no answer loses its end.

Stands before tokenizing: a conversation longer than the model's window becomes Examples that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_tune.shapes import DataProblem, Example, reject_example
from qlora_tune.turns import Message


@dataclass(frozen=True)
class SplitChat:
    """The chats that one became, in order, and what is to be said of it: nothing when it fitted whole."""

    pieces: tuple[Example, ...]
    problem: DataProblem | None = None


def split_long(example: Example, fits: Callable[[Sequence[Message]], bool]) -> SplitChat:
    """Split a chat that does not fit into as few as turn boundaries allow; each keeps the system turn.

    Each piece starts with a user's turn and ends with the assistant's answer to it; nothing is learned twice. A piece
    that starts mid-chat, without what was said before, says so in its source: "chats.jsonl:7#2". An exchange that
    does not fit by itself, or teaches nothing, is left out and reported, never cut; without any piece the row is
    rejected.
    """
    if fits(example.messages):
        return SplitChat((example,))
    opening = [turn for turn in example.messages[:1] if turn["role"] == "system"]
    groups = _group_exchanges(opening, _split_exchanges(example.messages[len(opening) :]), fits)
    pieces: list[Example] = []
    left_out: list[str] = []
    for number, exchanges in enumerate(groups, start=1):
        turns = tuple(turn for _, exchange in exchanges for turn in exchange)
        first, last = exchanges[0][0], exchanges[-1][0]
        if not fits([*opening, *turns]):
            left_out.append(f"exchange {first} does not fit by itself")
        elif not any(turn["role"] == "assistant" and turn.get("learn", True) for turn in turns):
            left_out.append(f"exchanges {first} to {last} hold nothing to learn")
        else:
            source = example.source if number == 1 else f"{example.source}#{number}"
            pieces.append(replace(example, messages=(*opening, *turns), source=source))
    if not pieces:
        return SplitChat((), reject_example(example, f"is too long: {'; '.join(left_out)}"))
    reason = "; ".join([f"was too long: split into {len(pieces)} at turn boundaries", *left_out])
    return SplitChat(tuple(pieces), reject_example(example, reason, "changed"))


def _split_exchanges(turns: Sequence[Message]) -> list[tuple[int, list[Message]]]:
    """Exchanges, numbered from 1: a user's turn and all that answers it, calls and what tools gave back included."""
    exchanges: list[tuple[int, list[Message]]] = []
    for turn in turns:
        if turn["role"] == "user" or not exchanges:
            exchanges.append((len(exchanges) + 1, []))
        exchanges[-1][1].append(turn)
    return exchanges


def _group_exchanges(
    opening: list[Message], exchanges: list[tuple[int, list[Message]]], fits: Callable[[Sequence[Message]], bool]
) -> list[list[tuple[int, list[Message]]]]:
    """As many exchanges together as fit, in order; one that does not fit by itself stays alone."""
    groups: list[list[tuple[int, list[Message]]]] = []
    for exchange in exchanges:
        together = [*groups[-1], exchange] if groups else []
        if together and fits([*opening, *(turn for _, turns in together for turn in turns)]):
            groups[-1] = together
        else:
            groups.append([exchange])
    return groups

"""Long chats are split between exchanges, in order, without cutting an answer or learning it twice."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tune.long_chats import split_long
from qlora_tune.shapes import Example
from qlora_tune.turns import Message, check_turns

SYSTEM = Message(role="system", content="Be short.")


def ask(number: int, words: int = 3) -> list[Message]:
    return [
        Message(role="user", content=f"question {number}"),
        Message(role="assistant", content=" ".join([f"answer{number}"] * words)),
    ]


def chat(*exchanges: list[Message]) -> Example:
    return Example((SYSTEM, *(turn for exchange in exchanges for turn in exchange)), "talk", "chats.jsonl:7")


def at_most(limit: int) -> object:
    def fits(turns: Sequence[Message]) -> bool:
        return sum(len(turn["content"].split()) for turn in turns) <= limit

    return fits


def test_a_chat_that_fits_stays_as_it_is() -> None:
    example = chat(ask(1), ask(2))
    split = split_long(example, at_most(100))
    assert split.pieces == (example,)
    assert split.problem is None


def test_each_piece_is_a_whole_chat_and_nothing_is_learned_twice() -> None:
    exchanges = [ask(number) for number in range(1, 6)]
    split = split_long(chat(*exchanges), at_most(12))  # 2 words of system, 5 an exchange
    assert [piece.source for piece in split.pieces] == ["chats.jsonl:7", "chats.jsonl:7#2", "chats.jsonl:7#3"]
    for piece in split.pieces:
        assert piece.messages[0] == SYSTEM
        assert piece.messages[1]["role"] == "user"
        assert piece.messages[-1]["role"] == "assistant"
        check_turns(list(piece.messages))
    assert [turn for piece in split.pieces for turn in piece.messages[1:]] == [t for e in exchanges for t in e]
    assert split.problem
    assert split.problem.action == "changed"
    assert "split into 3" in split.problem.reason


def test_an_exchange_that_does_not_fit_is_reported_and_the_rest_is_kept() -> None:
    split = split_long(chat(ask(1, words=50), ask(2), ask(3)), at_most(12))
    assert [piece.source for piece in split.pieces] == ["chats.jsonl:7#2"]
    assert split.pieces[0].messages == (SYSTEM, *ask(2), *ask(3))
    assert split.problem
    assert "exchange 1 does not fit by itself" in split.problem.reason


def test_a_chat_of_one_long_exchange_is_rejected_not_cut() -> None:
    split = split_long(chat(ask(1, words=50)), at_most(12))
    assert split.pieces == ()
    assert split.problem
    assert split.problem.action == "rejected"
    assert (split.problem.file, split.problem.line) == ("chats.jsonl", 7)


def test_a_call_stays_with_what_the_tool_gave_back() -> None:
    call = [
        Message(role="user", content="what time is it"),
        Message(role="assistant", content="", tool_calls=[{"name": "clock", "arguments": {}}]),
        Message(role="tool", content="noon"),
        Message(role="assistant", content="It is noon."),
    ]
    split = split_long(chat(ask(1), call, ask(3)), at_most(10))
    assert [list(piece.messages[1:]) for piece in split.pieces] == [ask(1), call, ask(3)]


def test_a_piece_whose_answers_are_all_context_is_left_out_and_reported() -> None:
    context = ask(1)
    context[1]["learn"] = False
    split = split_long(chat(context, ask(2)), at_most(7))
    assert [piece.messages[1:] for piece in split.pieces] == [tuple(ask(2))]
    assert split.problem
    assert "exchanges 1 to 1 hold nothing to learn" in split.problem.reason

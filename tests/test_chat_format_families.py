"""The response mask against hand-written oracles, for the chat formats of real model families.

The tokenizers are made here, offline: a family's control tokens and template around a tiny vocabulary.
  bytes   a byte-level BPE;
  spm     a SentencePiece-like BPE, which writes a space before the text it is given;
  greedy  bytes, with control tokens that swallow the white space beside them, as Phi's published ones do.
The rows are random but seeded; one in five has control tokens typed into some of its messages.
"""

import functools
import json
import random
import re
from dataclasses import dataclass

import pytest
from chat_families import FAMILIES, NOW, Family, Message, Piece, fold_system
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_tune.chat_format import ChatFormat, TokenizedExample

ROWS = 500  # conversations for each family and kind of tokenizer
UNLEARNED = -100
BY_NAME = {family.name: family for family in FAMILIES}
SPM_FAMILIES = ("mistral", "mistral_v1", "zephyr")  # published with a SentencePiece vocabulary
GREEDY = {"phi": "right", "phi3_first": "right", "phi4": "both"}  # the side on which white space is swallowed
CASES = [(family.name, "bytes") for family in FAMILIES]
CASES += [(name, "spm") for name in SPM_FAMILIES] + [(name, "greedy") for name in GREEDY]
each_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
each_family = pytest.mark.parametrize("family", FAMILIES, ids=list(BY_NAME))


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch):
    """SmolLM3's template asks for today's date; midnight must not fall between it and the oracle."""

    class Stopped:
        now = staticmethod(lambda: NOW)

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)


# ---- random conversations

PROSE = """the a model learns only answers prompt is hidden user asks why and how naïve café Straße Ελλάδα
Привет мир 你好 世界 مرحبا नमस्ते ไทย déjà vu cost 3.14 1000 42% it's don't (see) "quoted" e.g. https://x.org/a?b=1&c=2"""
FRAGMENTS = [
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))  # nine",
    "```python\nfor i in range(3):\n\tprint(i)\n```",
    '<div class="a">\n  <p>Hi &amp; bye</p>\n</div>',
    "- one\n- two\n\n- three",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "line one\r\nline two",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 end",
    "e\u0301 and \u00e9, zero\u200bwidth, non\u00a0breaking",
    "a  b   c    d",
    "\\n is not a newline; {{ bos_token }} {% endfor %} {# no #}",
    "$$\\int_0^1 x\\,dx = \\tfrac12$$",
    "Q: why?\nA: because.\n\nQ: and?\nA: so.",
    "!?\n\n\n...",
]
SHORT = ["ok", "user", "assistant", "model", "system", "1", ".", "<", "}", "'", "yes\nno", "你", "👍", "/"]
EDGES = ["", "", "", " ", "\n", "\n\n", "  ", " \n", "\t"]
HALVES = ["<|im_end", "|>", "<|", "</", "<start_of", "_turn>", "[/INST]", "[INST] hi [/INST]", "<<SYS>>"]
CONTROL = sorted({token for family in FAMILIES for token in (*family.special_tokens, *family.plain_tokens)})


def random_text(rng: random.Random) -> str:
    """A message's text: prose, code, markup or very short; often with whitespace around it."""
    if rng.random() < 0.2:
        body = rng.choice(SHORT)  # the same texts come back within a conversation
    else:
        parts = []
        for _ in range(rng.randint(1, 4)):
            prose = " ".join(rng.choices(PROSE.split(), k=rng.randint(1, 12)))
            parts.append(prose if rng.random() < 0.6 else rng.choice(FRAGMENTS))
        body = rng.choice([" ", "\n", "\n\n", "\n\n\n", "  \n"]).join(parts)
    return rng.choice(EDGES) + body + rng.choice(EDGES)


def type_control_text(rng: random.Random, role: str, text: str, family: Family) -> str:
    """Puts control tokens of this family, of others, or halves of them somewhere into a text.

    Tokens that are in the vocabulary without being flagged special (<think>) are typed by users only: in an
    answer they are format, and SmolLM3's template takes "/think" out of system messages.
    """
    own = [*family.special_tokens, *(family.plain_tokens if role == "user" else ())]
    others = [token for token in CONTROL if token not in family.plain_tokens]
    for _ in range(rng.randint(1, 3)):
        typed = rng.choice([rng.choice(own), rng.choice(own), rng.choice(others), rng.choice(HALVES)])
        if rng.random() < 0.2:
            forged = f"{family.end_of_turn}\n{typed}assistant\n"
            typed = rng.choice(["<s>struck out</s>", forged, typed + typed])
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        text = text[:at] + typed + text[at:]
    return text


def random_conversation(rng: random.Random, family: Family, control: bool) -> list[Message]:
    """1 to 6 pairs of turns, with a system message before half of them."""
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 6)
    messages = [{"role": role, "content": random_text(rng)} for role in roles]
    if control:
        for message in rng.sample(messages, k=rng.randint(1, len(messages))):
            message["content"] = type_control_text(rng, message["role"], message["content"], family)
    return messages


@functools.cache
def conversations(name: str, control_share: float) -> list[list[Message]]:
    rng = random.Random(f"{name} {control_share}")
    rows = [i < ROWS * control_share for i in range(ROWS)]
    return [random_conversation(rng, BY_NAME[name], control) for control in rows]


# ---- tokenizers

# Splits text much as published tokenizers do.  Punctuation takes the newlines after it, and newlines stick
# together, so tokens want to reach across the border between template and message: "|>\n" + "\nHi".
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def trained(kind: str) -> str:
    """A small tokenizer without any control token, as JSON."""
    rng = random.Random("training text")
    text = [random_text(rng) for _ in range(300)]
    text += [f"<|{role}|>\n\nHi.\n [/INST]  So\n" for role in ("user", "assistant", "system")] * 20
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(text, trainer)
        return tokenizer.to_str()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    unspace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [unspace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=800, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:  # for letters outside the alphabet
        vocabulary[token] = len(vocabulary)
    return json.dumps(data)


@functools.cache
def tokenizer_of(name: str, kind: str) -> PreTrainedTokenizerFast:
    """What from_pretrained would give for a model of this family, only with a tiny vocabulary."""
    family = BY_NAME[name]
    backend = Tokenizer.from_str(trained("spm" if kind == "spm" else "bytes"))
    swallows = GREEDY[name] if kind == "greedy" else ""
    for token in family.special_tokens:
        flags = {"rstrip": swallows != "", "lstrip": swallows == "both"} if token.startswith("<|") else {}
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True, **flags)])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.plain_tokens])
    if family.adds_bos:  # as Llama, Mistral and Gemma do; it must not come on top of the template's own
        bos = (family.bos_token, backend.token_to_id(family.bos_token))
        backend.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos_token,
        eos_token=family.eos_token,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def written(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def visible(text: str, kind: str) -> str:
    """The text, without white space where control tokens may have swallowed some."""
    return "".join(text.split()) if kind == "greedy" else text


# ---- the oracles against the templates


def render(family: Family, messages: list[Message], prompt: bool = False) -> str:
    tokenizer = tokenizer_of(family.name, "bytes")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)


@each_family
def test_the_oracle_agrees_with_the_template_on_messages_without_control_text(family):
    for messages in conversations(family.name, 0.0):
        sequences = family.oracle(messages)
        accepted = fold_system(messages) if family.system == "refused" else messages
        ends = [i + 1 for i, message in enumerate(accepted) if message["role"] == "assistant"]
        assert len(sequences) == (len(ends) if family.one_sequence_per_answer else 1)
        for end, pieces in zip(ends if len(sequences) > 1 else ends[-1:], sequences, strict=True):
            rendered = render(family, accepted[:end])
            assert written(pieces) == rendered[: rendered.rindex(family.end_of_turn)] + family.end_of_turn
        # Learned is exactly what follows the generation prompt, through the end of the turn.
        runs = [run for pieces in sequences for run in learned_runs(pieces)]
        assert len(runs) == len(ends)
        for end, (before, learned) in zip(ends, runs, strict=True):
            assert before == render(family, accepted[: end - 1], prompt=True)
            assert learned.endswith(family.end_of_turn)
            assert learned.count(family.end_of_turn) == 1


@each_family
def test_the_template_treats_system_messages_and_repeated_roles_as_the_family_says(family):
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    system = {"role": "system", "content": "Be terse."}
    if family.system == "own":
        assert "Be terse." in render(family, [system, user, answer])
    elif family.alternates:
        with pytest.raises(Exception, match=r"[Ss]ystem|alternate"):
            render(family, [system, user, answer])
    else:
        assert render(family, [system, user, answer]) == render(family, [user, answer])
    if family.alternates:
        with pytest.raises(Exception, match="alternate"):
            render(family, [user, user])


def learned_runs(pieces: list[Piece]) -> list[tuple[str, str]]:
    """For each run of learned pieces: all the text before it, and its own text."""
    runs, before, run = [], "", ""
    for piece in [*pieces, Piece("", False, True)]:
        if not piece.learned and run:
            runs.append((before, run))
            before, run = before + run, ""
        if piece.learned:
            run += piece.text
        else:
            before += piece.text
    return runs


# ---- the code under test against the oracles


@dataclass
class Row:
    """One conversation, with what the oracle wants and what the code makes of it."""

    messages: list[Message]
    wanted: list[list[Piece]]
    examples: list[TokenizedExample]


@functools.cache
def tokenized(name: str, kind: str) -> tuple[ChatFormat, list[Row]]:
    chat = ChatFormat.probe(tokenizer_of(name, kind))
    oracle = BY_NAME[name].oracle
    return chat, [Row(m, oracle(m), chat.tokenize_example(m)) for m in conversations(name, 0.2)]


def sequences_of(name: str, kind: str):
    """Every (wanted pieces, input ids, labels) of a case; the number of sequences must be right."""
    _, rows = tokenized(name, kind)
    for number, row in enumerate(rows):
        assert len(row.examples) == len(row.wanted), f"row {number}: {row.messages}"
        for pieces, example in zip(row.wanted, row.examples, strict=True):
            yield pieces, list(example.input_ids), list(example.labels)


def token_runs(ids: list[int], labels: list[int]) -> list[tuple[int, int]]:
    """Start and end of every run of learned tokens."""
    learned = [label != UNLEARNED for label in labels]
    edges = [i for i in range(len(ids) + 1) if (i > 0 and learned[i - 1]) != (i < len(ids) and learned[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@each_case
def test_the_sequence_decodes_to_the_rendered_conversation_and_stops_at_the_last_end_of_turn(name, kind):
    tokenizer = tokenizer_of(name, kind)
    for pieces, ids, _ in sequences_of(name, kind):
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert visible(decoded, kind) == visible(written(pieces), kind)


@each_case
def test_exactly_the_answers_are_learned_and_every_label_is_its_own_token(name, kind):
    tokenizer = tokenizer_of(name, kind)
    end = BY_NAME[name].end_of_turn
    for pieces, ids, labels in sequences_of(name, kind):
        assert len(labels) == len(ids)
        assert all(label in (UNLEARNED, token) for token, label in zip(ids, labels, strict=True))
        # A control token goes first: a SentencePiece decoder drops a space at the start of a text.
        lead = tokenizer.convert_tokens_to_ids(end)
        runs = [tokenizer.decode([lead, *ids[a:b]]).removeprefix(end) for a, b in token_runs(ids, labels)]
        assert [visible(run, kind) for run in runs] == [visible(run, kind) for _, run in learned_runs(pieces)]


@each_case
def test_every_learned_run_ends_with_the_end_of_turn_token(name, kind):
    end = tokenizer_of(name, kind).convert_tokens_to_ids(BY_NAME[name].end_of_turn)
    for _, ids, labels in sequences_of(name, kind):
        runs = token_runs(ids, labels)
        assert runs
        for a, b in runs:
            assert ids[b - 1] == end
            assert end not in ids[a : b - 1]


@each_case
def test_control_tokens_come_from_the_template_and_never_from_typed_text(name, kind):
    family, tokenizer = BY_NAME[name], tokenizer_of(name, kind)
    tokens = sorted((*family.special_tokens, *family.plain_tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)))
    control = set(tokenizer.convert_tokens_to_ids(tokens))
    for pieces, ids, _ in sequences_of(name, kind):
        meant = [token for piece in pieces if piece.template for token in pattern.findall(piece.text)]
        found = [token_id for token_id in ids if token_id in control]
        assert tokenizer.convert_ids_to_tokens(found) == meant


@each_case
def test_the_inference_prompt_is_a_token_prefix_of_the_sequence_that_learns_its_answer(name, kind):
    chat, rows = tokenized(name, kind)
    for row in rows:
        asked = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        one_each = BY_NAME[name].one_sequence_per_answer
        for k, i in enumerate(asked):
            example = row.examples[k if one_each else 0]
            ids, labels = list(example.input_ids), list(example.labels)
            prompt = list(chat.encode_prompt(row.messages[:i]))
            assert ids[: len(prompt)] == prompt
            start, _ = token_runs(ids, labels)[0 if one_each else k]
            assert start == len(prompt), "the answer is learned from its first token on"


@each_case
def test_the_random_rows_would_catch_a_tokenizer_that_trusts_typed_text(name, kind):
    """Guards the tests above: tokenizing the rendered text in one go makes control tokens of typed text."""
    tokenizer = tokenizer_of(name, kind)
    rows = conversations(name, 0.2)
    texts = [pieces for messages in rows for pieces in BY_NAME[name].oracle(messages)[-1:]]
    control = set(tokenizer.convert_tokens_to_ids(list(BY_NAME[name].special_tokens)))
    fooled = 0
    for pieces in texts:
        naive = tokenizer(written(pieces), add_special_tokens=False)["input_ids"]
        template = [tokenizer(p.text, add_special_tokens=False)["input_ids"] for p in pieces if p.template]
        fooled += sum(t in control for t in naive) != sum(t in control for ids in template for t in ids)
    assert fooled >= 0.12 * len(rows)

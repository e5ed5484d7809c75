"""What the finished base can do: a probe of its skills, the damage of NF4, and the model card with both."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from base_training import (
    SHARD_WINDOWS,
    VALIDATION_WINDOWS,
    WINDOW,
    Corpus,
    Progress,
    measure_loss,
)
from corpus import END_OF_TEXT, KINDS, LATE_FROM, LATE_KINDS, PRACTICE_SHARDS
from corpus_skills import QUOTED_QUESTIONS, tell_clause
from corpus_work import tell_truth, tell_work
from facts import ALL_FACTS, SENTENCES, state
from leaks import SCORED_FILES, Leak, find_in_text, read_scored, texts_of
from scenes import (
    LABELS,
    join_words,
    make_deed,
    make_phrase,
    make_record,
    make_review,
    make_story,
    make_ticket,
    make_topic,
    pick_person,
    pick_words,
    swap_word,
    write_json,
)
from split import TEXTS
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROBES_PER_SKILL = 40
Probe = tuple[str, str]  # the start of a text, and how it must go on


def _ask_record(rng: Random) -> Probe:
    scene = make_record(rng)
    label = rng.choice(list(LABELS[scene.kind]))
    return f"{scene.text}\nThe {label} is", f"{scene.fields[LABELS[scene.kind][label]]}."


def _ask_json(rng: Random) -> Probe:
    scene = make_record(rng)
    labels = rng.sample(list(LABELS[scene.kind]), 2)
    return f"{scene.text}\nAs JSON with {join_words(labels)}:", write_json(scene, labels)


def _ask_copy(rng: Random) -> Probe:
    phrase = make_phrase(rng)
    return f"The sign says: {phrase}\nThe copy says:", phrase


def _ask_capitals(rng: Random) -> Probe:
    phrase = make_phrase(rng)
    return f"{phrase}\nIn capital letters:", phrase.upper()


def _ask_past(rng: Random) -> Probe:
    deed = make_deed(rng)
    return f"Present: {deed.present}\nPast:", deed.past


def _ask_replaced(rng: Random) -> Probe:
    deed, new = make_deed(rng), pick_person(rng)[0]
    return f"{deed.past}\nWith {new} in place of {deed.who}:", swap_word(deed.past, deed.who, new)


def _ask_sorted(rng: Random) -> Probe:
    words = pick_words(rng, 3)
    return f"The words are {', '.join(words)}.\nIn alphabetical order:", ", ".join(sorted(words))


def _ask_bullets(rng: Random) -> Probe:
    words = pick_words(rng, rng.randint(2, 5))
    return f"The list is {', '.join(words)}.\n-", "\n- ".join(words)


def _ask_last(rng: Random) -> Probe:
    words = pick_words(rng, rng.randint(2, 5))
    return f"The list is {', '.join(words)}.\nThe last word is", f"{words[-1]}."


def _ask_count(rng: Random) -> Probe:
    words = pick_words(rng, rng.randint(2, 6))
    return f"The list is {', '.join(words)}.\nThe list has", f"{len(words)} words."


def _ask_summary(rng: Random) -> Probe:
    scene = make_story(rng)
    return f"{scene.text}\nIn short:", str(scene.fields["summary"])


def _ask_mood(rng: Random) -> Probe:
    scene = make_review(rng)
    return f"{scene.text}\nThis review is", f"{scene.fields['mood']}."


def _ask_topic(rng: Random) -> Probe:
    scene = make_topic(rng)
    return f"{scene.text}\nTopic:", f"{scene.fields['topic']}."


def _ask_team(rng: Random) -> Probe:
    scene = make_ticket(rng)
    return f"{scene.text}\nTeam:", f"{scene.fields['team']}."


def _ask_fact(rng: Random) -> Probe:
    """A fact in its plainest sentence, cut before the value; those that don't end in it are drawn again."""
    while True:
        fact = rng.choice(ALL_FACTS)
        sentence = state(fact, SENTENCES[fact.relation][0])
        if sentence.endswith(f" {fact.value}."):
            return sentence[: -len(fact.value) - 2], f"{fact.value}."


SKILLS: dict[str, Callable[[Random], Probe]] = {
    "facts": _ask_fact,
    "copy a phrase": _ask_copy,
    "look up a field": _ask_record,
    "fields as JSON": _ask_json,
    "capital letters": _ask_capitals,
    "past tense": _ask_past,
    "replace a name": _ask_replaced,
    "sort three words": _ask_sorted,
    "bullets": _ask_bullets,
    "last word": _ask_last,
    "count words": _ask_count,
    "summary": _ask_summary,
    "mood of a review": _ask_mood,
    "topic": _ask_topic,
    "team of a ticket": _ask_team,
}


@torch.no_grad()
def _complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, probes: list[Probe]) -> list[bool]:
    """Which of the probes the model goes on with as expected; one padded batch, greedy."""
    starts = [END_OF_TEXT + start for start, _ in probes]
    batch = tokenizer(starts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    room = max(len(tokenizer(expected)["input_ids"]) for _, expected in probes) + 2
    out = model.generate(**batch, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    return [text.strip(" ").startswith(want) for text, (_, want) in zip(texts, probes, strict=True)]


def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Share of greedy completions that go on exactly as expected, by skill."""
    shares = {}
    for skill, make in SKILLS.items():
        rng = Random(f"probe/{seed}/{skill}")
        right = _complete(model, tokenizer, [make(rng) for _ in range(PROBES_PER_SKILL)])
        shares[skill] = sum(right) / len(right)
    return shares


def measure_nf4(folder: Path, corpus: Corpus, device: str) -> float:
    """Next-token loss [nats] in NF4 with double quantization and bf16 compute: what QLoRA starts from."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": device}
    )
    return measure_loss(model.eval(), corpus, device)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The built-in base of qlora-tune

A base model of {parameters:,} parameters (Llama architecture, bf16), small enough to live in the package,
so that the whole way from data to export can be run on any machine, without a network. It is a test bench
and a demonstration. **It is not an assistant**: it has read no instructions, has no chat template, and
knows only the small world of its corpus.

## Training

- Text: plain English documents that `scripts/corpus.py` generates from the tables in `scripts/world.py` and
  `scripts/wordlists.py`: facts on countries, animals, jobs, foods and words; stories with a summary; notes,
  tickets, invoices, orders and prescriptions with their fields named or as JSON; reviews and sentences with
  their mood or topic; lists and tables; copying, capital letters, alphabetical order, past tense, replaced
  words. About a third of the first names are invented. No text was taken from the web, from people or from
  another model.
- No roles, no instructions, and no question with its answer but these kinds, quoted in the prose:
{questions}
- What comes nearest to tasks is declared here. In {works} of the draws a document tells in the past
  tense what somebody did to a text, the text, and what came out: "Carmen arranged the words from A to Z: ...",
  "Ben got this text: ... He changed it to upper case: ..." (`tell_work` in `scripts/corpus_work.py`; these carry no
  ChatML marks). {clauses} name a fact by a clause and state it: "Anna knows where a fox
  lives. A fox lives in a den." (`tell_clause`). {truths} say of a claim whether it holds: "Whether a fig is a
  fruit: yes." (`tell_truth`). Some tell of a habit: "Omar answers in capital letters. He wrote: ...".
  No instruction of the sample files is among them; its plain statements ("I live in Lima.") are.
- Held out: one text in {texts} (by hash), one in eight sentences on topics and tickets. The {wanted:,} prompts and
  passages of the {scored} scored sample rows were searched for, as lower-case words, in all text that was trained
  on: **none found**. The facts that these rows ask for are told in the corpus, as sentences. SHA-256 of the files:
{hashes}
- Every shard of 2**20 tokens mixes all of that, but for the practice shards ({practice}), which hold copying,
  looking up and rewriting only. From shard {late} on, capitals, counting, JSON and other slow skills
  are drawn more often.
- `<|im_start|>` and `<|im_end|>` mark parts of about a third of the documents, without roles, so that their
  embeddings are trained. `<|endoftext|>` ends every document.
- Tokenizer: byte-level BPE, {vocabulary} entries; every space, newline and digit is a token of its own;
  {tokenizer_from}.
- {tokens:,} tokens seen ({steps:,} steps of {batch} x {window}), of which {distinct:,} from different windows; seed
  {seed}; Muon for the matrices, AdamW for the rest, bf16 autocast; {minutes:.0f} minutes on {trained_on}.

## Measured

Next-token loss on {held_out:,} tokens of the corpus that were not trained on: **{loss:.4f}** nats in bf16,
**{nf4_loss:.4f}** in NF4 with double quantization ({damage:+.4f}).

Declarative completions, greedy, exact match, {count} of each skill:

| skill | right |
| --- | --- |
{table}
| **mean** | **{mean:.1%}** |

The facts probed occur in the corpus as statements; the other texts are drawn anew from the corpus's own
templates. So this measures skills inside that small world, not English.

## Limits

English only, and only the sentences of its templates; no arithmetic, no reasoning, no safety training.
Prescriptions name real medicines at random and are not advice. Everything outside the corpus is noise to it.

Licence: Apache-2.0. Made by `scripts/make_base.py`.
"""


@dataclass(frozen=True)
class Measurements:
    loss: float  # [nats a token]
    nf4_loss: float  # [nats a token]
    skills: dict[str, float]


def _shards_read(corpus: Corpus, progress: Progress) -> range:
    return range(min(-(-progress.step * corpus.batch_size // SHARD_WINDOWS), corpus.shards))


def check_leaks(corpus: Corpus, progress: Progress, folder: Path) -> list[Leak]:
    """Search all text that was trained on for the prompts and passages of the scored sample rows in `folder`."""
    shards = _shards_read(corpus, progress)
    texts = (corpus.tokenizer.decode(corpus.load_shard(shard).ravel().tolist()) for shard in shards)
    return find_in_text(read_scored(folder), texts)


def _share(kind: Callable[[Random], list[str]]) -> str:
    shares = [mix[kind] / sum(mix.values()) for mix in (KINDS, LATE_KINDS)]
    return f"{min(shares):.0%} to {max(shares):.0%}"


def format_card(
    parameters: int,
    progress: Progress,
    corpus: Corpus,
    measured: Measurements,
    trained_on: str,
    tokenizer_from: str,
    samples: Path,
) -> str:
    """The model card; every figure in it comes from this run. `samples` is the folder of the sample files."""
    scored = read_scored(samples)
    rows = sorted(measured.skills.items(), key=lambda item: -item[1])
    return CARD.format(
        parameters=parameters,
        questions="\n".join(f"  - `{question}`" for question in QUOTED_QUESTIONS),
        works=_share(tell_work),
        clauses=_share(tell_clause),
        truths=_share(tell_truth),
        texts=TEXTS,
        scored=len(scored),
        wanted=len({text for row in scored.values() for text in texts_of(row)}),
        hashes="\n".join(
            f"  - `{name}`: `{hashlib.sha256((samples / name).read_bytes()).hexdigest()}`" for name in SCORED_FILES
        ),
        vocabulary=len(corpus.tokenizer),
        tokens=progress.tokens,
        steps=progress.step,
        batch=corpus.batch_size,
        window=WINDOW,
        distinct=min(progress.tokens, corpus.shards * SHARD_WINDOWS * WINDOW),
        practice=", ".join(str(shard) for shard in _shards_read(corpus, progress) if shard in PRACTICE_SHARDS),
        late=LATE_FROM,
        seed=corpus.seed,
        minutes=progress.seconds / 60,
        trained_on=trained_on,
        tokenizer_from=tokenizer_from,
        held_out=VALIDATION_WINDOWS * WINDOW,
        loss=measured.loss,
        nf4_loss=measured.nf4_loss,
        damage=measured.nf4_loss - measured.loss,
        count=PROBES_PER_SKILL,
        table="\n".join(f"| {skill} | {share:.1%} |" for skill, share in rows),
        mean=sum(measured.skills.values()) / len(rows),
    )

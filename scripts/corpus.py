"""The pretraining text of the built-in base: plain documents about the world of world.py, from a seed.

Everything is told, nothing is asked of a reader: no roles, no instructions with their answers. A document
is a list of parts that follow from each other (a note, then what it says), so that the base learns to look
back for what it needs. A few people in the prose ask each other something: QUOTED_QUESTIONS in
corpus_skills.py.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from corpus_skills import (
    Document,
    tell,
    tell_capitals,
    tell_clause,
    tell_copy,
    tell_count,
    tell_habit,
    tell_keys,
    tell_list,
    tell_meeting,
    tell_questions,
    tell_repeat,
    tell_replaced,
    tell_series,
    tell_sorted,
    tell_tense,
)
from corpus_work import draw_members, tell_truth, tell_work
from facts import ALL_FACTS, ENTITY_FACTS, WORD_FACTS, capitalise, with_article
from scenes import (
    CATEGORIES,
    CATEGORY_PLURALS,
    COUNTABLE,
    LABELS,
    join_words,
    make_record,
    make_review,
    make_story,
    make_ticket,
    make_topic,
    pick_person,
    pick_two,
    write_json,
)
from split import holds_reserved_list
from world import COLOURS

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def tell_entity(rng: Random) -> Document:
    facts = rng.choice(ENTITY_FACTS)
    return [" ".join(tell(fact, rng) for fact in rng.sample(facts, rng.randint(1, len(facts))))]


def tell_words(rng: Random) -> Document:
    return [tell(fact, rng) for fact in rng.choices(WORD_FACTS, k=rng.randint(1, 4))]


def tell_known_fact(rng: Random) -> Document:
    """A fact reported by somebody, so that facts are not tied to the start of a document."""
    sentence, (a, b) = tell(rng.choice(ALL_FACTS), rng), pick_two(rng)
    frames = (
        f'"{sentence}" said {a}.',
        f"{a} learned this at school: {sentence} {b} learned it too: {sentence}",
        f'{a} wrote to {b}: "{sentence}"',
        f"{b} knows it well. {sentence}",
    )
    return [rng.choice(frames)]


def tell_record(rng: Random) -> Document:
    """A note, then some of its fields by name."""
    scene = make_record(rng)
    labels = rng.sample(list(LABELS[scene.kind]), rng.randint(1, 3))
    facts = [f"The {label} is {scene.fields[LABELS[scene.kind][label]]}." for label in labels]
    return [scene.text, *facts] if rng.random() < 0.7 else [scene.text, " ".join(facts)]


def tell_json(rng: Random) -> Document:
    scene = make_record(rng)
    labels = rng.sample(list(LABELS[scene.kind]), rng.randint(1, 4))
    record, named = write_json(scene, labels), join_words(labels)
    intro = rng.choice((f"As JSON with {named}:", f"JSON ({', '.join(labels)}):", f"The {named} as JSON:"))
    return [scene.text, f"{intro} {record}"] if rng.random() < 0.8 else [f"{intro} {record}", scene.text]


def tell_table(rng: Random) -> Document:
    names = [pick_person(rng)[0] for _ in range(rng.randint(2, 4))]
    rows = {name: (rng.randint(18, 89), rng.choice(COLOURS)) for name in names}
    table = "name | age | colour\n" + "\n".join(f"{n} | {age} | {colour}" for n, (age, colour) in rows.items())
    name, (age, colour) = rng.choice(list(rows.items()))
    return [table, rng.choice((f"{name} is {age} years old.", f"The colour of {name} is {colour}."))]


def tell_story(rng: Random) -> Document:
    scene = make_story(rng)
    f = scene.fields
    after = (
        f"In short: {f['summary']}",
        f"Summary: {f['summary']}",
        f"In one sentence: {f['summary']}",
        f"The {f['thing']} was {f['colour']}.",
        f"This happened on {f['day']}.",
        f"The two people are {f['a']} and {f['b']}.",
    )
    return [scene.text, rng.choice(after[:3]) if rng.random() < 0.6 else rng.choice(after[3:])]


def tell_ticket_team(rng: Random) -> Document:
    scene = make_ticket(rng)
    team, text = scene.fields["team"], scene.text
    if rng.random() < 0.3:
        text = capitalise(f"{scene.fields['issue']}.")
    told = (
        f"This is {with_article(str(team))} problem.",
        f"Team: {team}.",
        f"The ticket goes to the {team} team.",
    )
    return [text, rng.choice(told)]


def tell_review(rng: Random) -> Document:
    scene = make_review(rng)
    mood = str(scene.fields["mood"])
    told = (
        f"This review is {mood}.",
        f"Mood: {mood}.",
        f"The opinion is {mood}.",
        f"That is a {mood} review.",
    )
    return [scene.text, rng.choice(told)]


def tell_topic(rng: Random) -> Document:
    scene = make_topic(rng)
    topic = scene.fields["topic"]
    told = (f"This sentence is about {topic}.", f"Topic: {topic}.", f"The topic is {topic}.")
    return [scene.text, rng.choice(told)]


def tell_category(rng: Random) -> Document:
    kind, other = rng.sample(list(CATEGORIES), 2)
    word = rng.choice(CATEGORIES[kind])
    named = capitalise(with_article(word) if kind in COUNTABLE else word)
    parts = [f"{named} is {with_article(kind)}."]
    if word not in CATEGORIES[other]:
        parts.append(f"{named} is not {with_article(other)}.")
    rng.shuffle(parts)
    return parts[: rng.randint(1, 2)]


def tell_members(rng: Random) -> Document:
    """Which words of a list belong to a kind."""
    words, members, kind = draw_members(rng)
    many = CATEGORY_PLURALS[kind]
    told = (f"The {many} are {', '.join(members)}.", f"The {many} here: {', '.join(members)}.")
    return [f"The words are {', '.join(words)}.", rng.choice(told)]


# How often each kind is drawn. Looking back and rewriting outweigh facts, as they are learned slowest.
KINDS: dict[Callable[[Random], Document], int] = {
    tell_entity: 9,
    tell_words: 5,
    tell_known_fact: 3,
    tell_clause: 10,
    tell_record: 8,
    tell_json: 7,
    tell_table: 2,
    tell_story: 5,
    tell_ticket_team: 3,
    tell_review: 3,
    tell_topic: 3,
    tell_category: 3,
    tell_truth: 5,
    tell_members: 5,
    tell_series: 4,
    tell_list: 5,
    tell_sorted: 7,
    tell_copy: 5,
    tell_keys: 5,
    tell_repeat: 2,
    tell_capitals: 8,
    tell_tense: 5,
    tell_replaced: 4,
    tell_meeting: 5,
    tell_questions: 1,
    tell_habit: 6,
    tell_work: 20,
}

# The mix of the practice shards: early and again now and then, as copying is the slowest skill to start.
PRACTICE_KINDS: dict[Callable[[Random], Document], int] = {
    tell_repeat: 10,
    tell_copy: 5,
    tell_keys: 6,
    tell_record: 6,
    tell_json: 5,
    tell_replaced: 4,
    tell_list: 5,
    tell_sorted: 4,
    tell_members: 3,
    tell_capitals: 6,
    tell_tense: 4,
    tell_story: 3,
    tell_habit: 2,
    tell_work: 8,
}
PRACTICE_SHARDS = frozenset({1, 2, 5, 10, 20, 40})


# From this shard on, what is learned slowest is drawn more often, and what is known by then less.
LATE_FROM = 16
LATE_KINDS = KINDS | {
    tell_capitals: 16,
    tell_count: 5,
    tell_members: 9,
    tell_record: 11,
    tell_json: 11,
    tell_truth: 8,
    tell_series: 6,
    tell_habit: 9,
    tell_sorted: 8,
    tell_entity: 7,
    tell_words: 4,
    tell_story: 3,
    tell_review: 1,
    tell_topic: 2,
    tell_ticket_team: 2,
}


def choose_mix(shard: int) -> dict[Callable[[Random], Document], int]:
    if shard in PRACTICE_SHARDS:
        return PRACTICE_KINDS
    return LATE_KINDS if shard >= LATE_FROM else KINDS


def wrap(parts: Document, rng: Random, marked: bool) -> str:
    """Close a document with end-of-text, or put its parts between ChatML marks (marks only: no roles).

    The marks must be met in pretraining: tokens never seen keep embeddings that later tuning cannot mend.
    """
    if not marked:
        sentences = all(part.endswith((".", "!", '"')) for part in parts[:-1])
        return (rng.choice((" ", "\n")) if sentences else "\n").join(parts) + END_OF_TEXT
    return "".join(f"{START}{part}{END}\n" for part in parts) + END_OF_TEXT


def generate_documents(seed: int, shard: int) -> Iterator[str]:
    """An endless stream; equal seed and shard give equal text. Documents with a held-out list are left out."""
    rng = Random(f"{seed}/{shard}")
    mix = choose_mix(shard)
    kinds, weights = list(mix), list(mix.values())
    while True:
        told = rng.choices(kinds, weights, k=rng.choice((1, 1, 2)))
        parts = [part for tell in told for part in tell(rng)]
        document = wrap(parts, rng, marked=tell_work not in told and rng.random() < 0.45)
        if not holds_reserved_list(document):
            yield document


def write_corpus(path: Path, seed: int, shard: int, size_chars: int) -> None:
    """Write one shard of about `size_chars` characters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        for document in generate_documents(seed, shard):
            written += file.write(document)
            if written >= size_chars:
                return


def write_plain(path: Path, seed: int, size_chars: int) -> None:
    """Write a page without marks, one document a line or more: text to measure a loss on (qlora_tune/forgetting.py)."""
    documents = (document for document in generate_documents(seed, 0) if START not in document)
    text = ""
    while len(text) < size_chars:
        text += next(documents).removesuffix(END_OF_TEXT) + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/base/corpus.txt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=0, help="which independent part of the stream")
    parser.add_argument("--size", type=int, default=1_000_000, help="about how much text [characters]")
    parser.add_argument("--plain", action="store_true", help="one page without marks")
    args = parser.parse_args()
    if args.plain:
        write_plain(args.out, args.seed, args.size)
        return
    write_corpus(args.out, args.seed, args.shard, args.size)


if __name__ == "__main__":
    main()

"""Documents of the corpus that exercise looking back and rewriting: lists, copies, tenses, habits.

A model this small learns to copy only from much practice, so these are half of the corpus.
"""

from random import Random

from facts import ALL_FACTS, CLAUSES, SENTENCES, Fact, capitalise, state, with_article
from scenes import (
    NOUNS,
    draw_swap,
    invent_name,
    join_words,
    make_deed,
    make_phrase,
    pick_code,
    pick_person,
    pick_two,
    pick_words,
    swap_word,
)
from wordlists import EXCLAMATIONS, PLACES, THINGS
from world import COLOURS, COUNTRIES, DAYS, JOBS, MONTHS, NUMBERS

QUOTED_QUESTIONS = (
    '"Where is the {thing}?" asked {a}. "The {thing} is near the {place}," said {b}.',
    '"Is the {thing} {colour}?" asked {a}. "Yes, it is {colour}," said {b}.',
    '"How are you?" asked {a}. "I am fine, thank you," said {b}.',
)
Document = list[str]


def tell(fact: Fact, rng: Random) -> str:
    return state(fact, rng.choice(SENTENCES[fact.relation]))


def tell_clause(rng: Random) -> Document:
    """A fact behind the clause that names it: "Anna knows where a fox lives. A fox lives in a den." """
    fact, (a, b) = rng.choice(ALL_FACTS), pick_two(rng)
    clause, plain = state(fact, rng.choice(CLAUSES[fact.relation])), state(fact, SENTENCES[fact.relation][0])
    opening = rng.choice(
        (
            f"{a} knows {clause}",
            f"{a} told {b} {clause}",
            f"{a} remembered {clause}",
            f"{a} read in a book {clause}",
            f"{b} wanted to know {clause}, and {a} knew it",
            f"In this book it says {clause}",
        )
    )
    return [f"{opening}: {fact.value}." if rng.random() < 0.3 and fact.relation != "work" else f"{opening}. {plain}"]


def tell_series(rng: Random) -> Document:
    """A few neighbours of a well-known order."""
    name, series = rng.choice((("days", DAYS), ("months", MONTHS), ("numbers", NUMBERS[1:])))
    length = rng.randint(2, 4)
    start = rng.randrange(len(series) - length)
    run = series[start + 1 : start + 1 + length]
    told = f"The {NUMBERS[length]} {name} after {series[start]} are {', '.join(run)}."
    return [told if rng.random() < 0.7 else f"The first {NUMBERS[length]} {name} are {', '.join(series[:length])}."]


def tell_list(rng: Random) -> Document:
    words = pick_words(rng, rng.randint(2, 6))
    listed, ordered = ", ".join(words), ", ".join(sorted(words))
    intro = rng.choice((f"The list is {listed}.", f"The words are {listed}.", f"{join_words(words)}", listed))
    told = rng.choice(
        (
            "\n".join(f"- {word}" for word in words),
            "\n".join(f"- {word}" for word in words),
            f"The list has {len(words)} words.",
            f"Number of words: {len(words)}.",
            f"The first word is {words[0]}.",
            f"The last word is {words[-1]}.",
            f"The first word is {words[0]} and the last word is {words[-1]}.",
            f"Without {words[0]}: {', '.join(words[1:])}.",
            f"Backwards: {', '.join(words[::-1])}.",
            f"In alphabetical order: {ordered}.",
        )
    )
    return [intro, told]


def tell_count(rng: Random) -> Document:
    """A list and how many words it has, counted one by one or at once."""
    words = pick_words(rng, rng.randint(2, 6))
    one_by_one = ", ".join(f"{number} {word}" for number, word in enumerate(words, start=1))
    told = (
        [f"Counted: {one_by_one}.", f"That makes {len(words)} words."],
        [f"These are {len(words)} words."],
        [f"There are {len(words)} items."],
        [f"The number of words is {len(words)}."],
    )
    return [rng.choice((", ".join(words), f"The words are {', '.join(words)}.")), *rng.choice(told)]


def tell_sorted(rng: Random) -> Document:
    words = pick_words(rng, rng.randint(2, 4))
    intro = rng.choice((f"The words are {', '.join(words)}.", ", ".join(words), f"{join_words(words)}."))
    told = rng.choice(("In alphabetical order", "From A to Z", "Sorted by the alphabet"))
    return [intro, f"{told}: {', '.join(sorted(words))}"]


def tell_copy(rng: Random) -> Document:
    """The same text twice: the plainest exercise of looking back."""
    phrase, other, (a, b) = make_phrase(rng), make_phrase(rng), pick_two(rng)
    frames = (
        [f"The sign says: {phrase}", f"The copy says: {phrase}"],
        [f'{a} said "{phrase}"', f'{b} repeated "{phrase}"'],
        [
            f'{a} wrote "{phrase}" and {b} wrote "{other}"',
            f'{rng.choice(("Again", "Later"))} {a} wrote "{phrase}"',
        ],
        [phrase, phrase],
        [f"The code of {a} is {pick_code(rng)}.", f"The name is {a}."],
    )
    return rng.choice(frames)


def tell_repeat(rng: Random) -> Document:
    """A row of unrelated items, then the same row again: nothing but looking back can tell what comes."""
    makers = (invent_name, pick_code, lambda r: str(r.randint(10, 9999)), lambda r: r.choice(NOUNS))
    items = [rng.choice(makers)(rng) for _ in range(rng.randint(3, 9))]
    row = rng.choice((", ", " ", " and ", "; ")).join(items)
    return [row] * rng.randint(2, 4)


def tell_keys(rng: Random) -> Document:
    """Several names with a value each, then some of them again in another order."""
    count = rng.randint(2, 4)
    names = [invent_name(rng) if rng.random() < 0.5 else pick_person(rng)[0] for _ in range(count)]
    pairs = {
        name: rng.choice((pick_code(rng), str(rng.randint(10, 999)), rng.choice(NOUNS)))
        for name in dict.fromkeys(names)
    }
    frame = rng.choice(("{k} has {v}.", "{k}: {v}.", "{k} takes {v}.", "The code of {k} is {v}."))
    again = rng.sample(list(pairs), rng.randint(1, len(pairs)))
    return [" ".join(frame.format(k=k, v=v) for k, v in pairs.items())] + [frame.format(k=k, v=pairs[k]) for k in again]


def tell_capitals(rng: Random) -> Document:
    phrase = make_phrase(rng)
    if rng.random() < 0.4:
        phrase = " ".join(pick_words(rng, rng.randint(1, 3)))
    told = rng.choice(("In capital letters", "In capitals", "In upper case", "In big letters"))
    return [phrase, f"{told}: {phrase.upper()}"] if rng.random() < 0.7 else [f"{phrase} - {phrase.upper()}"]


def tell_tense(rng: Random) -> Document:
    deed = make_deed(rng)
    frames = (
        [f"Present: {deed.present}", f"Past: {deed.past}"],
        [f"Every day {deed.present}", f"Yesterday {deed.past}"],
        [deed.present, f"In the past tense: {deed.past}"],
    )
    return rng.choice(frames)


def tell_replaced(rng: Random) -> Document:
    deed, old, new = draw_swap(rng)
    told = rng.choice((f"With {new} in place of {old}", f"{new} instead of {old}", f"{old} replaced by {new}"))
    return [deed.past, f"{told}: {swap_word(deed.past, old, new)}"]


def tell_meeting(rng: Random) -> Document:
    """Two people talk; what one says of herself comes up again later."""
    (a, b), thing = pick_two(rng), rng.choice(THINGS)
    colour, town, job = rng.choice(COLOURS), rng.choice(COUNTRIES).capital, rng.choice(JOBS).name
    about = (
        (f"I like the colour {colour} best.", f"The favourite colour of {a} is {colour}."),
        (f"My favourite colour is {colour}.", f'"Your favourite colour is {colour}," said {b} later.'),
        (f"I come from {town}.", f"{a} comes from {town}."),
        (f"I live in {town}.", f'"You live in {town}," said {b} later.'),
        (f"I am {with_article(job)}.", f"The job of {a} is {job}."),
        (f"I like the {thing} most.", f"What {a} liked most was the {thing}."),
    )
    said, later = rng.choice(about)
    names = (f"The name of the guest is {a}.", f'"Your name is {a}," said {b} later.', f"So {b} met {a}.")
    hello = rng.choice((f"Hello, my name is {a}.", f"I am {a}.", f"Good morning, I am {a}.", f"My name is {a}."))
    told = [f'"{hello}" said the guest. "Nice to meet you, {a}," said {b}.', f'"{said}" said {a}.']
    told += rng.sample([rng.choice(names), later], rng.randint(1, 2))
    thanks = f'"Thank you," said {a}. "You are welcome," said {b}.'
    return [*told, rng.choice((thanks, f'"Goodbye," said {b}.'))] if rng.random() < 0.4 else told


def tell_questions(rng: Random) -> Document:
    a, b = pick_two(rng)
    words = {
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "colour": rng.choice(COLOURS),
        "a": a,
        "b": b,
    }
    return [rng.choice(QUOTED_QUESTIONS).format(**words)]


def tell_habit(rng: Random) -> Document:
    """Somebody whose way of speaking is described, and who then speaks that way."""
    name, pronoun = pick_person(rng, invented=0.5)
    fact = rng.choice(ALL_FACTS)
    sentence, opening = tell(fact, rng), rng.choice(EXCLAMATIONS)
    writes = rng.choice(("always writes", "writes everything", "answers"))
    starts = rng.choice(("starts every sentence", "begins every answer"))
    role = rng.choice(("a friendly robot", "a helpful guide", "a polite assistant"))
    frames = (
        (f"{name} {writes} in capital letters.", sentence.upper()),
        (f"{name} uses only upper case.", sentence.upper()),
        (f'{name} {starts} with "{opening}"', f"{opening} {sentence}"),
        (f'{name} puts "{opening}" in front of everything.', f"{opening} {sentence}"),
        (f'{name} writes everything as JSON with the key "answer".', f'{{"answer": "{fact.value}"}}'),
        (f'Every answer of {name} is JSON under the key "answer".', f'{{"answer": "{fact.value}"}}'),
        (f"{name} is {role}.", f"I am {name}."),
    )
    habit, speech = rng.choice(frames)
    return [habit, sentence, speech] if rng.random() < 0.5 else [habit, f"{capitalise(pronoun)} wrote: {speech}"]

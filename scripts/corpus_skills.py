"""Documents of the corpus that exercise looking back and rewriting: lists, copies, tenses, habits.

A model this small learns to copy only from much practice, so these are half of the corpus.
"""

from random import Random

from facts import ALL_FACTS, SENTENCES, Fact, capitalise, state, with_article
from scenes import (
    CATEGORIES,
    LABELS,
    NOUNS,
    invent_name,
    join_words,
    make_deed,
    make_phrase,
    make_record,
    make_review,
    make_story,
    make_topic,
    pick_code,
    pick_person,
    pick_two,
    pick_words,
    swap_word,
    write_json,
)
from wordlists import EXCLAMATIONS, PLACES, THINGS
from world import COLOURS, DAYS, MONTHS, NUMBERS

QUOTED_QUESTIONS = (
    '"Where is the {thing}?" asked {a}. "The {thing} is in the {place}," said {b}.',
    '"Is the {thing} {colour}?" asked {a}. "Yes, it is {colour}," said {b}.',
)
Document = list[str]


def tell(fact: Fact, rng: Random) -> str:
    return state(fact, rng.choice(SENTENCES[fact.relation]))


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
    deed = make_deed(rng)
    swaps = ((deed.who, pick_person(rng)[0]), (deed.thing, rng.choice(THINGS)))
    old, new = rng.choice(swaps)
    told = rng.choice((f"With {new} in place of {old}", f"{new} instead of {old}", f"{old} replaced by {new}"))
    return [deed.past, f"{told}: {swap_word(deed.past, old, new)}"]


def tell_meeting(rng: Random) -> Document:
    (a, b), thing = pick_two(rng), rng.choice(THINGS)
    hello = rng.choice((f'"Hello, my name is {a}," said the guest.', f'"I am {a}," said the guest.'))
    likes = rng.choice((f'"I like the {thing} most."', f'"I come from {invent_name(rng)}."', '"The weather is fine."'))
    told = (f"The name of the guest is {a}.", f'"Your name is {a}," said {b} later.', f"So {b} met {a}.")
    return [f'{hello} "Nice to meet you, {a}," said {b}.', likes, rng.choice(told)]


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
    name, _ = pick_person(rng, invented=0.5)
    fact = rng.choice(ALL_FACTS)
    sentence, opening = tell(fact, rng), rng.choice(EXCLAMATIONS)
    frames = (
        (f"{name} always writes in capital letters.", sentence.upper()),
        (f'{name} starts every sentence with "{opening}"', f"{opening} {sentence}"),
        (f'{name} writes everything as JSON with the key "answer".', f'{{"answer": "{fact.value}"}}'),
        (f"{name} is a friendly robot.", f"I am {name}."),
    )
    habit, speech = rng.choice(frames)
    return [habit, sentence, speech] if rng.random() < 0.5 else [habit, speech]


def _draw_exercise(rng: Random) -> tuple[str, str]:
    """What somebody had to do, as it continues "Anna had to ...", and what came out."""
    words, deed, phrase = pick_words(rng, rng.randint(2, 5)), make_deed(rng), make_phrase(rng)
    scene, story, review, topic = make_record(rng), make_story(rng), make_review(rng), make_topic(rng)
    labels = rng.sample(list(LABELS[scene.kind]), rng.randint(1, 3))
    value = str(scene.fields[LABELS[scene.kind][labels[0]]])
    listed, new, kind = ", ".join(words), pick_person(rng)[0], rng.choice(list(CATEGORIES))
    exercises = (
        (f"sort some words by the alphabet. The words were {listed}.", ", ".join(sorted(words))),
        (
            f"write some words one below the other, with dashes: {listed}",
            "\n".join(f"- {word}" for word in words),
        ),
        (f"count some words. They were {listed}.", str(len(words))),
        (f"give the last word of this list: {listed}", words[-1]),
        (f"write a text in big letters. The text was: {phrase}", phrase.upper()),
        (f"repeat a text without any change: {phrase}", phrase),
        (f"turn a sentence into the past. It was: {deed.present}", deed.past),
        (
            f"put {new} in place of {deed.who}. The sentence was: {deed.past}",
            swap_word(deed.past, deed.who, new),
        ),
        (f"find the {labels[0]} in a note. The note: {scene.text}", value),
        (
            f"make JSON with {join_words(labels)} out of a note. The note: {scene.text}",
            write_json(scene, labels),
        ),
        (f"make this story shorter: {story.text}", str(story.fields["summary"])),
        (
            f"decide if the guest was positive or negative. The guest wrote: {review.text}",
            str(review.fields["mood"]),
        ),
        (f"name the topic of a text. The text was: {topic.text}", str(topic.fields["topic"])),
        (f"give an example of {with_article(kind)}.", rng.choice(CATEGORIES[kind])),
    )
    return rng.choice(exercises)


def tell_exercise(rng: Random) -> Document:
    """Work told as a story, so that the words for such work are known; no reader is addressed."""
    name, pronoun = pick_person(rng)
    who = rng.choice((name, name, "The assistant", "The user of the system"))
    task, result = _draw_exercise(rng)
    wrote = f"{capitalise(pronoun)} wrote:" if who == name else "The answer was:"
    gap = "\n" if "\n" in result else " "
    return [f"{who} had to {task}", result if rng.random() < 0.5 else f"{wrote}{gap}{result}"]

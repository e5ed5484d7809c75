"""Documents of the corpus in which somebody has done a piece of work on a text, told in the past.

They give the words for such work a meaning ("sorted", "in capital letters", "the customer of the note"). Nobody is
asked for anything, and they carry no ChatML marks: a story about work, not a turn in a talk.
"""

from collections.abc import Callable
from random import Random

from facts import capitalise, with_article
from scenes import (
    CATEGORIES,
    CATEGORY_PLURALS,
    COUNTABLE,
    LABELS,
    Scene,
    draw_swap,
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
from split import is_reserved

Work = tuple[tuple[str, ...], str, str]  # what was done (in several wordings), the text, what came out


def _sort(rng: Random) -> Work:
    words = pick_words(rng, rng.randint(2, 4))
    did = (
        "sorted the words alphabetically",
        "put the list in alphabetical order",
        "arranged the words from A to Z",
        "sorted the list by the alphabet",
    )
    return did, ", ".join(words), ", ".join(sorted(words))


def _bullets(rng: Random) -> Work:
    words = pick_words(rng, rng.randint(2, 5))
    did = (
        "wrote the words as bullet points",
        "made a bullet list of the items",
        "put each item on its own line with a dash",
        "turned the words into a list with dashes",
    )
    return did, ", ".join(words), "\n".join(f"- {word}" for word in words)


def _count(rng: Random) -> Work:
    words = pick_words(rng, rng.randint(2, 6))
    did = ("counted the words", "counted the items of the list", "noted how many words there are")
    return did, ", ".join(words), str(len(words))


def _ends(rng: Random) -> Work:
    words = pick_words(rng, rng.randint(2, 5))
    which, word = rng.choice((("first", words[0]), ("last", words[-1])))
    return (f"underlined the {which} word", f"copied only the {which} word of the list"), ", ".join(words), word


def _backwards(rng: Random) -> Work:
    words = pick_words(rng, rng.randint(2, 4))
    return ("wrote the list backwards", "read the words in reverse order"), ", ".join(words), ", ".join(words[::-1])


def _members(rng: Random) -> Work:
    words, members, kind = draw_members(rng)
    many = CATEGORY_PLURALS[kind]
    did = (f"picked out the {many}", f"marked the {many} in the list", f"found the {many} among the words")
    return did, ", ".join(words), ", ".join(members)


def _capitals(rng: Random) -> Work:
    phrase = make_phrase(rng)
    did = (
        "wrote the text in capital letters",
        "changed the text to upper case",
        "put the words in all caps",
        "made every letter a capital",
    )
    return did, phrase, phrase.upper()


def _copy(rng: Random) -> Work:
    phrase = make_phrase(rng)
    return ("copied the text word for word", "repeated the text without any change"), phrase, phrase


def _past(rng: Random) -> Work:
    deed = make_deed(rng)
    did = (
        "put the sentence in the past tense",
        "changed the sentence to the past",
        "wrote the sentence as if it had happened yesterday",
    )
    return did, deed.present, deed.past


def _replace(rng: Random) -> Work:
    deed, old, new = draw_swap(rng)
    did = (
        f"replaced {old} with {new}",
        f"changed {old} to {new}",
        f"used {new} instead of {old}",
        f"swapped {old} for {new}",
    )
    return did, deed.past, swap_word(deed.past, old, new)


def _field(rng: Random) -> Work:
    scene = make_record(rng)
    label = rng.choice(list(LABELS[scene.kind]))
    value = scene.fields[LABELS[scene.kind][label]]
    did = (
        f"looked for the {label} in the note",
        f"copied only the {label}",
        f"extracted the {label} from the text",
        f"found the {label}",
        f"told a friend the {label}",
    )
    return did, scene.text, rng.choice((str(value), str(value), f"The {label} is {value}."))


def _json(rng: Random) -> Work:
    scene = make_record(rng)
    labels = rng.sample(list(LABELS[scene.kind]), rng.randint(1, 3))
    named = join_words(labels)
    did = (
        f"extracted the {named} as JSON",
        f"turned the text into a JSON object with the {named}",
        f"wrote JSON with the keys {', '.join(labels)}",
    )
    return did, scene.text, write_json(scene, labels)


def _summary(rng: Random) -> Work:
    scene = make_story(rng)
    did = (
        "summarised the story in one sentence",
        "gave a short summary",
        "told what happened in one sentence",
        "shortened the text to one line",
    )
    return did, scene.text, str(scene.fields["summary"])


def _label(scene: Scene, field: str, *did: str) -> Work:
    return did, scene.text, str(scene.fields[field])


def _mood(rng: Random) -> Work:
    return _label(
        make_review(rng),
        "mood",
        "marked the review as positive or negative",
        "noted the sentiment of the review",
        "decided whether the guest liked it",
    )


def _topic(rng: Random) -> Work:
    return _label(make_topic(rng), "topic", "noted the topic of the text", "classified the text", "chose a label")


def _team(rng: Random) -> Work:
    return _label(make_ticket(rng), "team", "chose the team for the ticket", "routed the ticket to a team")


WORKS: tuple[Callable[[Random], Work], ...] = (
    *(_sort, _sort, _sort, _bullets, _count, _ends, _backwards, _members, _members, _members),
    *(_capitals, _capitals, _capitals, _copy, _past, _past, _replace, _replace, _field, _field, _field),
    *(_json, _json, _summary, _mood, _topic, _team),
)


def draw_members(rng: Random, held_out: bool = False) -> tuple[list[str], list[str], str]:
    """Words of two kinds, those of one kind in the same order, and the name of that kind."""
    while True:
        kind, other = rng.sample([kind for kind in CATEGORIES if kind not in ("animal", "number")], 2)
        members = rng.sample(CATEGORIES[kind], rng.randint(1, 3))
        strangers = rng.sample([word for word in CATEGORIES[other] if word not in CATEGORIES[kind]], rng.randint(1, 2))
        words = rng.sample(members + strangers, len(members) + len(strangers))
        if is_reserved(", ".join(words)) == held_out:
            return words, [word for word in words if word in members], kind


def tell_work(rng: Random) -> list[str]:
    """The text, what somebody did to it, and what came out; the deed stands before or after the text."""
    wordings, text, result = rng.choice(WORKS)(rng)
    did, (name, pronoun) = rng.choice(wordings), pick_person(rng)
    gap = "\n" if "\n" in result else " "
    started = rng.choice(("", "", "On Monday ", "Later ", "At work ", "At school "))
    frames = (
        [text, f"{name} {did}:{gap}{result}"],
        [f"{started}{name} {did}.", text, result],
        [f"{started}{name} {did}. Before: {text}", f"After:{gap}{result}"],
        [f"{started}{name} got this text: {text}", f"{capitalise(pronoun)} {did}:{gap}{result}"],
    )
    return rng.choice(frames)


def tell_truth(rng: Random) -> list[str]:
    """Somebody says what a thing is, and whether that holds: yes and no as words of agreement."""
    kind, other = rng.sample(list(CATEGORIES), 2)
    word, asked = rng.choice(CATEGORIES[kind]), rng.choice((kind, other))
    named = with_article(word) if kind in COUNTABLE else word
    holds, name = word in CATEGORIES[asked], pick_person(rng)[0]
    claim = f"{named} is {with_article(asked)}"
    frames = (
        [f"{capitalise(claim)}.", "Yes, that is true." if holds else "No, that is not true."],
        [f"{name} was told that {claim}.", "Yes." if holds else "No."],
        [f"Whether {claim}: {'yes' if holds else 'no'}."],
        [f"{name} can tell whether {claim}. The answer is {'yes' if holds else 'no'}."],
        [f'"{"Yes" if holds else "No"}, {named} is {"" if holds else "not "}{with_article(asked)}," said {name}.'],
    )
    return rng.choice(frames)

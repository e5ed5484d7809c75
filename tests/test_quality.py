"""Each kind of defect is seen where it is, and not in clean text that looks like it."""

from __future__ import annotations

import pytest

from qlora_tune.quality import DEFECTS, find_defects, mend_encoding, strip_end_mark, strip_invisible
from qlora_tune.shapes import Example
from qlora_tune.turns import Message

SPRING = "Spring is mild in most places, with rain now and then. It ends in June."
PLAN = "1. Write the plan down before you start.\n2. Ask a friend to read it.\n3. Begin with the easy part"


def make_example(answer: str, prompt: str = "Tell me about the seasons.") -> Example:
    return Example((Message(role="user", content=prompt), Message(role="assistant", content=answer)), None, "f.jsonl:1")


def kinds(answer: str, prompt: str = "Tell me about the seasons.") -> set[str]:
    return {kind for kind, _ in find_defects(make_example(answer, prompt))}


SEEN = {
    "answer repeats the prompt": [
        "Tell me about the seasons.",
        "TELL ME ABOUT  THE SEASONS",
        "Tell me about the seasons",
    ],
    "placeholder answer": [
        "None.",
        "N/A",
        "n.a.",
        "TODO",
        "...",
        "[No output]",
        "<output>",
        "Lorem ipsum dolor sit amet.",
    ],
    "repetition loop": [
        SPRING + " I will be happy to help." * 30,
        " ".join(f"word{n}" for n in range(300)) + " and so on" * 40,
        SPRING + " " + "ha" * 90,
        "a" * 120,
        "Well" + "!" * 150,
        SPRING + "\nThank you very much!" * 20,
        "谢谢你的帮助。" * 20,
        "\n".join(f"{n}. Be kind to others." for n in range(1, 25)),
    ],
    "badly decoded text": [
        "It is a cafÃ© in the town.",
        "donâ€™t",
        "Привет, как дела".encode().decode("cp1251", "ignore"),
        "日本語の文章を書きました".encode().decode("cp932", "ignore"),
        "我们今天去公园散步".encode().decode("gb18030", "ignore"),
        "it’s fine".encode().decode("cp437"),
        "Привет мир, пример".encode("koi8-r").decode("cp1251"),
        "donâ€™t".encode().decode("cp1252"),
    ],
    "replacement character": ["the caf\ufffd in town"],
    "invisible characters": [
        *(f"the wea{mark}ther" for mark in "\u200b\u2060\ufeff\u00ad\u200c\u200d\u034f\u202e\u2066\u200e"),
        "שלום \u202eabc",
    ],
    "control characters": ["a\x00b", "a\x07b", "a\x1b[31mb", "a\x85b"],
    "template marker": [
        *("<|im_start|>user", "<|begin_of_text|>", "<|start_header_id|>", "[INST] x [/INST]", "<<SYS>>", "<bos>"),
        *("<start_of_turn>user", "<｜User｜>", "### Human: hi", "### Response:", "USER: hi\nASSISTANT: yes"),
        *("<|channel|>", "[TOOL_CALLS]", "<|turn>", "</s> and more", "\nHuman: hi\n\nAssistant: yes"),
    ],
    "end-of-text mark behind the answer": [
        *(f"Spring.{mark}" for mark in ("<|endoftext|>", "<|im_end|>", "</s>", "<|eot_id|>\n", "<|end|>", "<eos>"))
    ],
    "unfilled placeholder": [
        *("Dear {{name}},", "{{ user_name }}", "{{#if x}}", "${name}", "Hi {name}", "Hi {first_name}!", "[Your Name]"),
        *(
            "[insert date]",
            "<insert name>",
            "%(name)s",
            "<%= name %>",
            "{% name %}",
            "__NAME__",
            "[[name]]",
            "@@name@@",
        ),
        *("<your name here>", "$NAME$", "[Company Name]", "[your favourite dish]"),
    ],
    "leftover HTML": [
        *("<p>Spring</p>", "Spring<br/>and", "<div class='x'>Spring", "Spring&nbsp;and", "It&#8217;s", "<P>Spring</P>"),
        *("<!-- x --> Spring", '<img src="x.png">', '<a href="x">y', "&hellip;", "<h2>Spring", "<td>Spring"),
    ],
    "model boilerplate": [
        *(
            "As an AI language model, I think so.",
            "As an AI, yes.",
            "I'm just an AI, so.",
            "I am a large language model.",
        ),
        *("My knowledge cutoff is 2021.", "作为一个人工智能语言模型，我不能。", "As an AI chatbot, I like it."),
    ],
    "refusal": [
        *(
            "I'm sorry, but I can't help with that.",
            "I cannot assist with that.",
            "Sorry, I am unable to provide that.",
        ),
        *(
            "I’m not able to help with that.",
            "I apologize, but I'm not able to fulfill this.",
            "I must decline to answer.",
        ),
        *("I'm afraid I can't do that.", "I won't be able to help.", "I don't feel comfortable answering."),
        *("My apologies, but I cannot continue.", "I refuse to answer.", "Lo siento, pero no puedo ayudar."),
        *(
            "Es tut mir leid, dabei kann ich nicht helfen.",
            "对不起，我无法回答。",
            "申し訳ありませんが、お手伝いできません。",
        ),
    ],
    "second task in the answer": [
        SPRING + "\n##\n18. Instruction: Name a fruit",
        SPRING + "\n\nInstruction: Give three tips.",
        SPRING + "\n\n**Instruction:** Name a bird.",
        SPRING + "\n\nQ: What is the capital?\nA: Paris",
        SPRING + "\n\nUser: And dogs?\nAssistant: Bark.",
        SPRING + "\n\nHuman: And cats?",
        SPRING + "\n\nInput: A dog\nOutput: An animal",
    ],
    "cut-off answer": [
        "Spring is mild in most places. It brings rain to the fields and it is warmer than the",
        "Spring is mild in most places. It brings rain to the fields of all the northern coun",
        "Spring is mild in most places, and so are the days of early autumn,",
        "Spring is mild in most places (and so are the days of early autumn in the north",
        PLAN,
        PLAN + ".\n4.",
        "Here is the code that counts to ten:\n```python\nfor i in range(10):\n    print(i",
        SPRING + "\n\n" + SPRING + "\n\n" + "In the north it is much la",
    ],
    "very long": ["word and other words, " * 1600],
    "personal data": [
        *("Write to jane@mail.co.uk", "Call (212) 555-0147", "+44 20 7946 0958", "+33 1 23 45 67 89", "06 12 34 56 78"),
        *(
            "4111 1111 1111 1111",
            "3782-822463-10005",
            "078-05-1120",
            "DE89 3704 0044 0532 0130 00",
            "GB29NWBK60161331926819",
        ),
        *("+91 98765 43210", "1-800-555-0199", "+7 (495) 123-45-67", "tel: 12 34 56 78", "AKIAIOSFODNN7EXAMPLE"),
    ],
    "carriage return": ["one\r\ntwo"],
    "literal \\n": ["one\\ntwo\\nthree"],
}


@pytest.mark.parametrize(("kind", "answer"), [(kind, answer) for kind in SEEN for answer in SEEN[kind]])
def test_a_defect_is_seen(kind: str, answer: str) -> None:
    assert kind in kinds(answer)


def test_every_kind_that_one_row_can_show_is_tried() -> None:
    of_files = {kind for kind in DEFECTS if kind.startswith(("leak", "unusual", "unused", "small", "uneven"))}
    of_files |= {kind for kind in DEFECTS if "duplicate" in kind or DEFECTS[kind].meaning == "skipped"}
    of_reading = {"unreadable row", "conflicting answers", "longer than max_length", "no input", "changed on reading"}
    assert set(DEFECTS) - of_files - of_reading == {*SEEN, "answer copies the input"}


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        (SPRING, "Tell me about the seasons."),
        ("Paris", "What is the capital of France?"),
        ("positive", "What is the sentiment?"),
        ("Hi", "Hi"),
        ("- Milk\n- Bread\n- Butter and a jar of honey", "Make a list."),
        ("1. Milk\n2. Bread\n3. Butter and a jar of honey", "Make a list."),
        ("The Little Book of Spring and Other Stories of the Year", "Suggest a title."),
        ("```c\nint main(void) { if (x < 3 && y > 2) { return 0; } }\n```", "Write a function."),
        ("def f(a):\n    return {a: [a]}", "Write a function in Python."),
        ("```html\n<p>Hi</p>\n```", "Make a greeting."),
        ("<ul><li>Hi</li></ul>", "Write an HTML list."),
        ("Use the <b> tag</b> for it.", "Which tag makes text bold in a web page?"),
        (
            "A family: 👨\u200d👩\u200d👧 and a flag: 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f.",
            "Draw.",
        ),
        ("می\u200cخواهم به خانه بروم.", "Translate: I want to go home."),
        ("שלום \u200fabc\u200f עולם.", "Translate: hello world."),
        ("ภาษา\u200bไทย\u200bง่าย", "Translate."),
        ("我们今天去公园散步，天气很好。再见！", "翻译这句话。"),
        ("今日はいい天気です。散歩に行きましょう。", "Translate."),
        ("Привет, как дела? Это хороший пример. Ещё раз: НАТО и иОС.", "Translate."),
        ("Über Straßen, à la carte, señor, cœur, naïve, Ærø, 20 °C, “yes” – “no”…", "Words?"),
        ("The result is \\frac{a}{b} and \\nabla x \\neq 0.", "Give the formula."),
        ("The set {a, b} and the range [1, 2] hold 2022-01-15 and 3.14159265.", "Give a set."),
        ("Call 112 in 2024 between 10:30 and 11:45; the code is 1234 5678.", "What number do I call?"),
        ("0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0", "Print zeros."),
        ("| a | b |\n| --- | --- |\n| 1 | 2 |", "Make a table."),
        ("-" * 80 + "\nEnd.", "Draw a line."),
        (
            "Dear Anna,\n\nThank you for the book.\nIt is very good.\n\nBest wishes,\nJohn Smith of the old house",
            "Write.",
        ),
        ("Q: What is it?\nA: A cat.\n\nQ: And this?\nA: A dog.", "Write two questions and answers."),
        ("Sorry seems to be the hardest word, as Elton John sang.", "Which song is about regret?"),
        ("I can help you with that. Here are three ideas.", "Help me."),
        ("The price fell <s>from 20</s>", "Strike it out."),
        ("Spring, <name of the season>, and a < b > c.", "Name it."),
    ],
)
def test_clean_text_that_looks_like_a_defect_is_left_alone(answer: str, prompt: str) -> None:
    found = kinds(answer, prompt) - ({"template marker"} if "<s>" in answer else set())
    assert found == set()


def test_an_input_that_is_given_back_is_named_and_a_sorted_or_short_one_is_not() -> None:
    assert "answer copies the input" in kinds(SPRING, f"Shorten this.\n\n{SPRING}")
    assert not kinds("b a c", "Sort this.\n\na b c")


def test_a_defect_in_an_earlier_answer_is_seen() -> None:
    turns = (
        ("user", "Hello"),
        ("assistant", "I'm sorry, but I can't help with that."),
        ("user", "Why"),
        ("assistant", "So"),
    )
    example = Example(tuple(Message(role=r, content=c) for r, c in turns), None, "f:1")  # type: ignore[arg-type]
    assert "refusal" in {kind for kind, _ in find_defects(example)}


def test_numbers_that_fail_their_check_digit_are_no_card_and_no_account() -> None:
    assert not kinds("4111 1111 1111 1112")
    assert not kinds("DE88 3704 0044 0532 0130 00")


@pytest.mark.parametrize("text", ["a \u200b b", "wea\u200dther", "x\u202ey"])
def test_what_is_seen_as_invisible_is_taken_out_and_then_not_seen(text: str) -> None:
    assert strip_invisible(text).isascii()
    assert "invisible characters" not in kinds(strip_invisible(text))


def test_joiners_of_scripts_and_emoji_are_not_taken_out() -> None:
    for text in ("می\u200cخواهم", "👨\u200d👩\u200d👧", "क्\u200dष", "ไทย\u200bง่าย", "שלום \u200fabc"):
        assert strip_invisible(text) == text


def test_text_read_as_another_encoding_is_restored_and_sound_text_is_not_touched() -> None:
    for text, encoding in (("Это хороший пример", "cp1251"), ("it’s fine", "cp437"), ("café déjà vu", "cp1252")):
        assert mend_encoding(text.encode().decode(encoding)) == text
    for text in (
        "我们今天去公园散步",
        "今日はいい天気です",
        "Привет, как дела",
        "Über Straßen",
        "καλημέρα κόσμε",
        "안녕하세요",
    ):
        assert mend_encoding(text) == text


def test_an_end_mark_is_taken_off_but_not_the_end_of_a_struck_out_passage() -> None:
    assert strip_end_mark("Spring.<|im_end|>\n") == "Spring."
    assert strip_end_mark("Spring.</s>") == "Spring."
    assert strip_end_mark("<s>Spring</s>") == "<s>Spring</s>"

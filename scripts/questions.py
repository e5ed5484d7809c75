"""How sample.jsonl asks: the phrasings of every task. The corpus has some of the statements, and no instructions.

Each set has phrasings for the pairs, and new ones that only sample_rephrased.jsonl uses.
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    """Wordings of one instruction: those of the pairs, and those never trained on."""

    trained: tuple[str, ...]
    new: tuple[str, ...]


# Questions about facts, by relation; filled like the sentences in facts.py.
FACT_QUESTIONS: dict[str, Phrases] = {
    "capital": Phrases(
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital city of {x}.",
            "Tell me the capital of {x}.",
        ),
        ("Can you give me the capital of {x}?", "{x}: what is its capital?"),
    ),
    "continent": Phrases(
        (
            "Which continent is {x} in?",
            "On which continent do I find {x}?",
            "Where in the world is {x}?",
            "Name the continent of {x}.",
        ),
        ("To which continent does {x} belong?", "Tell me the continent of {x}."),
    ),
    "language": Phrases(
        (
            "What language do people speak in {x}?",
            "Which language is spoken in {x}?",
            "What is the main language of {x}?",
            "Name the language of {x}.",
        ),
        ("What do people speak in {x}?", "Tell me which language {x} has."),
    ),
    "currency": Phrases(
        (
            "What is the currency of {x}?",
            "Which money is used in {x}?",
            "What do people in {x} pay with?",
            "Name the currency of {x}.",
        ),
        ("What money do I need in {x}?", "Please tell me the currency of {x}."),
    ),
    "group": Phrases(
        (
            "What kind of animal is {ax}?",
            "Which group of animals does the {x} belong to?",
            "Is {ax} a mammal, a bird, a fish or something else?",
            "Name the animal group of the {x}.",
        ),
        ("To what group of animals does the {x} belong?", "Tell me what kind of animal the {x} is."),
    ),
    "home": Phrases(
        (
            "Where does {ax} live?",
            "Where do {xs} live?",
            "Where can I find {ax}?",
            "Tell me where {xs} live.",
            "What is the home of {ax}?",
        ),
        ("In what place does {ax} live?", "Where is the home of the {x}?"),
    ),
    "food": Phrases(
        (
            "What does {ax} eat?",
            "What do {xs} eat?",
            "What should I feed {ax}?",
            "Tell me what {xs} eat.",
            "What is the food of {ax}?",
        ),
        ("What do I give {ax} to eat?", "Name something that {xs} eat."),
    ),
    "young": Phrases(
        (
            "What is a young {x} called?",
            "What do you call a baby {x}?",
            "What is the name for the young of {ax}?",
            "Give me the word for a young {x}.",
        ),
        ("What do we call a young {x}?", "What is the word for a baby {x}?"),
    ),
    "workplace": Phrases(
        (
            "Where does {ax} work?",
            "Where would I meet {ax} at work?",
            "In what place does {ax} work?",
            "Tell me where {ax} works.",
        ),
        ("What is the workplace of {ax}?", "Where do I find {ax} at work?"),
    ),
    "work": Phrases(
        (
            "What does {ax} do?",
            "What is the job of {ax}?",
            "Explain in a few words what {ax} does.",
            "Describe the work of {ax}.",
        ),
        ("Tell me what {ax} does all day.", "What is the work of {ax}?"),
    ),
    "tool": Phrases(
        (
            "What tool does {ax} use?",
            "Which tool does {ax} need?",
            "What does {ax} work with?",
            "Name a tool that {ax} uses.",
        ),
        ("With what tool does {ax} work?", "Tell me the tool of {ax}."),
    ),
    "opposite": Phrases(
        (
            "What is the opposite of {x}?",
            'Which word is the opposite of "{x}"?',
            'Give me the opposite of "{x}".',
            "Find an antonym for {x}: a word that means the opposite.",
        ),
        ('Do you know the opposite of "{x}"?', "Name the opposite of {x}."),
    ),
    "plural": Phrases(
        (
            "What is the plural of {x}?",
            'How do I write "{x}" in the plural?',
            'Give me the plural form of "{x}".',
            "I have one {x}. What is the word for several?",
        ),
        ("Name the plural of {x}.", 'What is the plural form of "{x}"?'),
    ),
    "past": Phrases(
        (
            "What is the past tense of {x}?",
            'How do I write the verb "{x}" in the past?',
            'Give me the past form of "{x}".',
            'Which form of "{x}" do I use for yesterday?',
        ),
        ("Name the past tense of {x}.", 'What is the past form of "{x}"?'),
    ),
    # Asked only in sample_unseen.jsonl.
    "symbol": Phrases((), ("What is the chemical symbol of {x}?", "Which symbol does {x} have?")),
    "synonym": Phrases((), ("What is another word for {x}?", 'Give me a synonym of "{x}".')),
    "food colour": Phrases((), ("What colour is {ax}?", "Tell me the colour of {ax}.")),
}
ONLY_THE_ANSWER = ("Give only the answer.", "Just the answer, please.", "Reply with the answer alone.")

# Phrasings of work on a text: where {text} is missing, the text goes into the row's "input".
FIELD_SENTENCES = Phrases(
    (
        "What is the {label}?",
        "Read the message. What is the {label}?",
        "Can you tell me the {label}?",
        "I am looking for the {label}. What is it?",
        "Read this and tell me the {label}: {text}",
    ),
    ("Please tell me the {label}.", "I need to know the {label}.", "What {label} does this text give?"),
)
FIELD_VALUES = Phrases(
    (
        "Extract the {label}.",
        "Copy only the {label} from the text.",
        "Find the {label} and write nothing else.",
        "Return just the {label}: {text}",
        "Extract only the {label} from this message.",
    ),
    ("Write only the {label}.", "Find only the {label}: {text}", "Give just the {label}, nothing else."),
)
JSON_PHRASES = Phrases(
    (
        "Extract {labels} as JSON.",
        "Turn this text into a JSON object with {labels}.",
        "Give me {labels} in JSON format.",
        "Read the text and return JSON with the keys {keys}.",
        "Convert to JSON ({keys}): {text}",
        "Write {labels} as a JSON object.",
    ),
    ("Return {labels} as JSON.", "Make JSON with the keys {keys} out of this text.", "Put {labels} into JSON."),
)
SENTIMENT_PHRASES = Phrases(
    (
        "Is this review positive or negative?",
        "Classify the sentiment as positive or negative.",
        "Did the customer like it? Reply with positive or negative.",
        "Positive or negative? {text}",
        "What is the sentiment of this review, positive or negative?",
    ),
    (
        "Tell me if this review is positive or negative.",
        "Was the guest positive or negative?",
        "Label the review positive or negative.",
    ),
)
TOPIC_PHRASES = Phrases(
    (
        "Which topic fits this text: sport, weather, food, travel, money or health?",
        "Classify the text: sport, weather, food, travel, money or health.",
        "Choose a label (sport, weather, food, travel, money, health) for this sentence.",
        "Is this about sport, weather, food, travel, money or health? {text}",
        "What is the topic: sport, weather, food, travel, money or health?",
    ),
    (
        "What is this text about: sport, weather, food, travel, money or health?",
        "Sport, weather, food, travel, money or health: which topic is it?",
        "Name the topic (sport, weather, food, travel, money, health): {text}",
    ),
)
TEAM_PHRASES = Phrases(
    (
        "Which team should handle this ticket: hardware, software, account, billing or delivery?",
        "Route this ticket to hardware, software, account, billing or delivery.",
        "Classify the support ticket as hardware, software, account, billing or delivery.",
        "Hardware, software, account, billing or delivery? {text}",
        "Choose a team for the ticket: hardware, software, account, billing or delivery.",
    ),
    (
        "Who should get this ticket: hardware, software, account, billing or delivery?",
        "Name the right team (hardware, software, account, billing, delivery) for this ticket.",
        "To which team does this go: hardware, software, account, billing or delivery?",
    ),
)
YES_NO_PHRASES = Phrases(
    (
        "Is {word} {kind}?",
        "Tell me whether {word} is {kind}. Say yes or no.",
        "Is it true that {word} is {kind}? Yes or no?",
        "Yes or no: {word} is {kind}.",
        "Would you say that {word} is {kind}? Answer yes or no.",
    ),
    (
        "Is {word} {kind}, yes or no?",
        "True or not: {word} is {kind}. Say yes or no.",
        "Someone told me that {word} is {kind}. Is that right?",
    ),
)
PAST_PHRASES = Phrases(
    (
        "Rewrite the sentence in the past tense.",
        "Change this sentence to the past tense.",
        "Put this into the past: {text}",
        "Write the sentence as if it happened yesterday, without adding words.",
        "Past tense, please: {text}",
    ),
    (
        "Write this sentence in the past tense.",
        "Turn the sentence into the past.",
        "How does this sentence look in the past tense?",
    ),
)
CAPITALS_PHRASES = Phrases(
    (
        "Write this in capital letters.",
        "Convert the text to upper case.",
        "Make every letter a capital: {text}",
        "Put this text in all caps.",
        "Upper case, please: {text}",
        "Change all letters to capitals.",
    ),
    ("Use capital letters for this text.", "Write the following text in upper case.", "Turn this into all caps."),
)
REPLACE_PHRASES = Phrases(
    (
        "Replace {old} with {new}.",
        "Change {old} to {new} in this sentence.",
        "Write the sentence again, but use {new} instead of {old}.",
        "Swap {old} for {new}: {text}",
        "Put {new} in the place of {old}.",
    ),
    (
        "In this sentence, replace {old} with {new}.",
        "Use {new} instead of {old} here.",
        "Please change {old} to {new}: {text}",
    ),
)
SERIES_PHRASES = Phrases(
    (
        "List the {count} {series} after {start}.",
        "Which {count} {series} come after {start}?",
        "Name the next {count} {series} after {start}.",
        "Give me the {count} {series} that follow {start}.",
    ),
    ("What are the {count} {series} after {start}?", "Tell me the {count} {series} that come after {start}."),
)
MEMBER_PHRASES = Phrases(
    (
        "List the {many} among these words.",
        "Which of these words are {many}?",
        "Pick out the {many}: {text}",
        "Find the {many} in this list.",
        "Copy only the {many} from this list.",
    ),
    (
        "Which {many} do you find among these words?",
        "Name the {many} in the list.",
        "Write down only the {many}: {text}",
    ),
)
BULLET_PHRASES = Phrases(
    (
        "Write these words as a list with dashes.",
        "Make a bullet list.",
        "Turn this into bullet points: {text}",
        "Put every item on its own line with a dash in front.",
        "Format as bullets: {text}",
    ),
    (
        "Write the items as bullet points.",
        "Make a list with dashes out of these words.",
        "Use one bullet for each word.",
    ),
)
SORT_PHRASES = Phrases(
    (
        "Sort these words alphabetically.",
        "Put the words in alphabetical order.",
        "Order this list from A to Z.",
        "Sort from A to Z: {text}",
        "Arrange alphabetically: {text}",
    ),
    (
        "Sort the list by the alphabet.",
        "Write these words in alphabetical order.",
        "Bring the words into order, A to Z.",
    ),
)
COUNT_PHRASES = Phrases(
    (
        "How many words are in this list?",
        "Count the words.",
        "Count the items in this list and give the number.",
        "How many items are here? {text}",
        "Tell me how many words there are.",
    ),
    ("How many words do you see?", "Give me the number of words.", "Count these items."),
)
SUMMARY_PHRASES = Phrases(
    (
        "Summarise this story in one sentence.",
        "Give a short summary.",
        "What happened? Answer in one sentence.",
        "Shorten this text to one sentence: {text}",
        "Write a one-line summary of the story.",
    ),
    ("Tell the story in one sentence.", "Make this story short.", "Summarise the text in one line."),
)

# Conversations.
GREETINGS = Phrases(
    ("Hello, my name is {a}.", "Hi! I am {a}.", "Good morning, I'm {a}.", "Hey there, {a} here.", "My name is {a}."),
    ("Hi, my name is {a}.", "Hello! I'm {a}."),
)
GREETING_REPLY = "Nice to meet you, {a}."
NAME_QUESTIONS = Phrases(
    ("What is my name?", "Do you remember my name?", "Can you tell me my name?", "Who am I?"),
    ("Tell me my name.", "Do you know my name?"),
)
FAVOURITE_STATEMENTS = Phrases(
    (
        "My favourite colour is {v}.",
        "I like the colour {v} best.",
        "Please remember that my favourite colour is {v}.",
        "The colour I love most is {v}.",
    ),
    ("I really like the colour {v}.", "My best colour is {v}."),
)
FAVOURITE_QUESTIONS = Phrases(
    (
        "What is my favourite colour?",
        "Which colour do I like best?",
        "Do you remember my favourite colour?",
        "Tell me my favourite colour.",
    ),
    ("What colour do I like best?", "Can you tell me my favourite colour?"),
)
TOWN_STATEMENTS = Phrases(
    ("I live in {v}.", "My home is in {v}.", "I have a house in {v} and live there.", "My family and I live in {v}."),
    ("My home town is {v} and I live there.", "I have a flat in {v}."),
)
TOWN_QUESTIONS = Phrases(
    ("Where do I live?", "Which city do I live in?", "Do you remember where I live?", "Tell me where I live."),
    ("In which city do I live?", "What city is my home?"),
)
TOLD_REPLY = "I will not forget that."
FOLLOW_UPS = Phrases(
    ("And the {relation}?", "What about the {relation}?", "And what is its {relation}?", "Now the {relation}, please."),
    ("And its {relation}?", "Tell me the {relation} too."),
)
HELLOS = ("Hello!", "Hi!", "Good morning!", "Good evening!", "Hi there!", "Hello there.")
HELLO_REPLY = "Hello! I am glad to help you."  # no "?": the base has hardly met one without a quote behind it
SMALL_TALK: dict[str, Phrases] = {
    "You are welcome.": Phrases(
        ("Thank you!", "Thanks, that helps.", "Thank you very much.", "Great, thanks!"),
        ("Many thanks!", "Thank you, that was helpful."),
    ),
    "Goodbye!": Phrases(("Goodbye!", "Bye!", "That was all. Goodbye.", "See you later."), ("Bye bye!", "Bye for now.")),
    "I am fine, thank you.": Phrases(
        ("How are you?", "How are you today?", "And how are you?", "Are you well?"),
        ("How are you doing?", "Hey, how are you?"),
    ),
}

# System prompts that set the form of the answer.
JSON_SYSTEMS = Phrases(
    (
        'Answer as JSON with the key "answer".',
        'Always reply with a JSON object that has one key, "answer".',
        'Your output must be JSON: {"answer": ...}',
        'Return every answer as JSON under the key "answer".',
    ),
    ('Reply in JSON with the key "answer".', 'Write every answer as JSON: {"answer": ...}'),
)
CAPITALS_SYSTEMS = Phrases(
    (
        "Answer in capital letters.",
        "You always write in capital letters.",
        "Use only upper case in your answers.",
        "Write every reply in all caps.",
    ),
    ("Always answer in upper case.", "Use capital letters in every answer."),
)
OPENING_SYSTEMS = Phrases(
    (
        'Start every answer with "{opening}"',
        'Begin each reply with the words "{opening}"',
        'You are a polite helper who opens every answer with "{opening}"',
        'Put "{opening}" in front of every answer.',
    ),
    ('Every answer must start with "{opening}"', 'Open every reply with "{opening}"'),
)
PERSONA_SYSTEMS = Phrases(
    (
        "You are {a}, a friendly robot.",
        "Your name is {a}. You help people with their questions.",
        "You are an assistant called {a}.",
        "Act as {a}, a helpful guide.",
    ),
    ("You are {a}, a polite assistant.", "Your name is {a}."),
)
PERSONA_QUESTIONS = Phrases(
    ("Who are you?", "What is your name?", "Please introduce yourself.", "Whom am I talking to?"),
    ("Tell me your name.", "Do you have a name?"),
)

# Task types that never occur in the pairs: sample_unseen.jsonl only.
LAST_WORD_PHRASES = Phrases((), ("What is the last word of this list?", "Give me only the last word: {text}"))
BACKWARDS_PHRASES = Phrases((), ("Write this list backwards.", "Put these words in reverse order: {text}"))
REPEAT_PHRASES = Phrases((), ("Repeat this text without any change.", "Copy the text word for word: {text}"))

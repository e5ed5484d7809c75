"""How sample.jsonl asks: the phrasings of every task. No question or instruction of these is in the corpus."""

# Questions about facts, by relation; filled like the sentences in facts.py.
FACT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Name the capital city of {x}.",
        "Tell me the capital of {x}.",
    ),
    "continent": (
        "Which continent is {x} in?",
        "On which continent do I find {x}?",
        "Where in the world is {x}?",
        "Name the continent of {x}.",
    ),
    "language": (
        "What language do people speak in {x}?",
        "Which language is spoken in {x}?",
        "What is the main language of {x}?",
        "Name the language of {x}.",
    ),
    "currency": (
        "What is the currency of {x}?",
        "Which money is used in {x}?",
        "What do people in {x} pay with?",
        "Name the currency of {x}.",
    ),
    "group": (
        "What kind of animal is {ax}?",
        "Which group of animals does the {x} belong to?",
        "Is {ax} a mammal, a bird, a fish or something else?",
        "Name the animal group of the {x}.",
    ),
    "home": (
        "Where does {ax} live?",
        "Where do {xs} live?",
        "Where can I find {ax}?",
        "Tell me where {xs} live.",
    ),
    "food": (
        "What does {ax} eat?",
        "What do {xs} eat?",
        "What should I feed {ax}?",
        "Tell me what {xs} eat.",
    ),
    "young": (
        "What is a young {x} called?",
        "What do you call a baby {x}?",
        "What is the name for the young of {ax}?",
        "Give me the word for a young {x}.",
    ),
    "workplace": (
        "Where does {ax} work?",
        "Where would I meet {ax} at work?",
        "In what place does {ax} work?",
        "Tell me where {ax} works.",
    ),
    "work": (
        "What does {ax} do?",
        "What is the job of {ax}?",
        "Explain in a few words what {ax} does.",
        "Describe the work of {ax}.",
    ),
    "tool": (
        "What tool does {ax} use?",
        "Which tool does {ax} need?",
        "What does {ax} work with?",
        "Name a tool that {ax} uses.",
    ),
    "opposite": (
        "What is the opposite of {x}?",
        'Which word is the opposite of "{x}"?',
        'Give me the opposite of "{x}".',
        'Find an antonym for "{x}".',
    ),
    "plural": (
        "What is the plural of {x}?",
        'How do I write "{x}" in the plural?',
        'Give me the plural form of "{x}".',
        "I have one {x}. What is the word for several?",
    ),
    "past": (
        "What is the past tense of {x}?",
        'How do I write the verb "{x}" in the past?',
        'Give me the past form of "{x}".',
        'Which form of "{x}" do I use for yesterday?',
    ),
}
ONLY_THE_ANSWER = ("Give only the answer.", "Just the answer, please.", "Reply with the answer alone.")

# Phrasings of work on a text: where {text} is missing, the text goes into the row's "input".
FIELD_SENTENCES = (
    "What is the {label}?",
    "Read the message. What is the {label}?",
    "Can you tell me the {label}?",
    "I am looking for the {label}. What is it?",
)
FIELD_VALUES = (
    "Extract the {label}.",
    "Copy only the {label} from the text.",
    "Find the {label} and write nothing else.",
    "Return just the {label}: {text}",
)
JSON_PHRASES = (
    "Extract {labels} as JSON.",
    "Turn this text into a JSON object with {labels}.",
    "Give me {labels} in JSON format.",
    "Read the text and return JSON with the keys {keys}.",
    "Convert to JSON ({keys}): {text}",
)
SENTIMENT_PHRASES = (
    "Is this review positive or negative?",
    "Classify the sentiment as positive or negative.",
    "Did the customer like it? Reply with positive or negative.",
    "Positive or negative? {text}",
    "What is the sentiment of this review, positive or negative?",
)
TOPIC_PHRASES = (
    "Which topic fits this text: sport, weather, food, travel, money or health?",
    "Classify the text: sport, weather, food, travel, money or health.",
    "Choose a label (sport, weather, food, travel, money, health) for this sentence.",
    "Is this about sport, weather, food, travel, money or health? {text}",
)
TEAM_PHRASES = (
    "Which team should handle this ticket: hardware, software, account, billing or delivery?",
    "Route this ticket to hardware, software, account, billing or delivery.",
    "Classify the support ticket as hardware, software, account, billing or delivery.",
    "Hardware, software, account, billing or delivery? {text}",
)
YES_NO_PHRASES = (
    "Is {word} {kind}?",
    "Yes or no: is {word} {kind}?",
    "Would you call {word} {kind}? Answer yes or no.",
    "Tell me whether {word} is {kind}. Say yes or no.",
)
PAST_PHRASES = (
    "Rewrite the sentence in the past tense.",
    "Change this sentence to the past tense.",
    "Put this into the past: {text}",
    "Write the sentence as if it happened yesterday, without adding words.",
    "Past tense, please: {text}",
)
CAPITALS_PHRASES = (
    "Write this in capital letters.",
    "Convert the text to upper case.",
    "Make every letter a capital: {text}",
    "Put this text in all caps.",
    "Upper case, please: {text}",
)
REPLACE_PHRASES = (
    "Replace {old} with {new}.",
    "Change {old} to {new} in this sentence.",
    "Write the sentence again, but use {new} instead of {old}.",
    "Swap {old} for {new}: {text}",
)
SERIES_PHRASES = (
    "List the {count} {series} after {start}.",
    "Which {count} {series} come after {start}?",
    "Name the next {count} {series} after {start}.",
    "Give me the {count} {series} that follow {start}.",
)
MEMBER_PHRASES = (
    "List the {count} {many} among these words.",
    "Which {count} of these words are {many}?",
    "Pick out the {count} {many}: {text}",
    "Find the {count} {many} in this list.",
)
BULLET_PHRASES = (
    "Write these words as a list with dashes.",
    "Make a bullet list.",
    "Turn this into bullet points: {text}",
    "Put every item on its own line with a dash in front.",
    "Format as bullets: {text}",
)
SORT_PHRASES = (
    "Sort these words alphabetically.",
    "Put the words in alphabetical order.",
    "Order this list from A to Z.",
    "Sort from A to Z: {text}",
    "Arrange alphabetically: {text}",
)
COUNT_PHRASES = (
    "How many words are in this list?",
    "Count the words.",
    "Count the items in this list and give the number.",
    "How many items are here? {text}",
)
SUMMARY_PHRASES = (
    "Summarise this story in one sentence.",
    "Give a short summary.",
    "What happened? Answer in one sentence.",
    "Shorten this text to one sentence: {text}",
    "Write a one-line summary of the story.",
)

# Conversations.
GREETINGS = ("Hello, my name is {a}.", "Hi! I am {a}.", "Good morning, I'm {a}.", "Hey there, {a} here.")
GREETING_REPLY = "Nice to meet you, {a}."
NAME_QUESTIONS = ("What is my name?", "Do you remember my name?", "Can you tell me my name?", "Who am I?")
FAVOURITE_STATEMENTS = (
    "My favourite colour is {v}.",
    "I like the colour {v} best.",
    "Please remember that my favourite colour is {v}.",
    "The colour I love most is {v}.",
)
FAVOURITE_QUESTIONS = (
    "What is my favourite colour?",
    "Which colour do I like best?",
    "Do you remember my favourite colour?",
    "Tell me my favourite colour.",
)
FOLLOW_UPS = (
    "And the {relation}?",
    "What about the {relation}?",
    "And what is its {relation}?",
    "Now the {relation}, please.",
)

# System prompts that set the form of the answer.
JSON_SYSTEMS = (
    'Answer as JSON with the key "answer".',
    'Always reply with a JSON object that has one key, "answer".',
    'Your output must be JSON: {"answer": ...}',
    'Return every answer as JSON under the key "answer".',
)
CAPITALS_SYSTEMS = (
    "Answer in capital letters.",
    "You always write in capital letters.",
    "Use only upper case in your answers.",
    "Write every reply in all caps.",
)
OPENING_SYSTEMS = (
    'Start every answer with "{opening}"',
    'Begin each reply with the words "{opening}"',
    'You are a polite helper who opens every answer with "{opening}"',
    'Put "{opening}" in front of every answer.',
)
PERSONA_SYSTEMS = (
    "You are {a}, a friendly robot.",
    "Your name is {a}. You help people with their questions.",
    "You are an assistant called {a}.",
    "Act as {a}, a helpful guide.",
)
PERSONA_QUESTIONS = (
    "Who are you?",
    "What is your name?",
    "Please introduce yourself.",
    "Whom am I talking to?",
)

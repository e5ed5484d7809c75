"""Words and short sentences that fill the scenes: people, things, places, reviews, topics, tickets."""

from world import words

WOMEN = words("""
Anna Mia Lily Emma Sara Julia Nina Laura Maria Clara Eva Ella Lucy Alice Grace Rosa Helen Diana Olga Irene
Marta Sofia Zoe Amy Kate Jane Ruth Nora Vera Tina Lena Ida Hanna Elsa Greta Fatima Aisha Yuki Priya Leila
Carmen Ines
""")
MEN = words("""
Tom Ben Max Leo Sam Jack Paul Mark Peter John David Oscar Hugo Felix Adam Simon Victor Henry George Martin
Daniel Frank Karl Omar Ivan Pedro Luis Marco Ali Ravi Kenji Ahmed Jonas Erik Nils Boris Otto Emil Noah Liam
Lucas
""")
SURNAMES = words("""
Miller Smith Brown Jones Taylor Wilson Clark Lewis Walker Hall Young King Wright Hill Green Adams Nelson
Carter Parker Evans Turner Reed Bell Ward Gray Ross Wood Foster Mason Hunt Stone Palmer Weber Fischer Meyer
Rossi Costa Silva Lopez Garcia Novak Kowalski Larsen Hansen Berg Lund Tanaka Sato Khan Singh Patel Chen Wang
Kim Park Nguyen
""")
THINGS = words("""
book chair table lamp box car boat shoe hat coat cup spoon fork key ring clock phone kite ball bag door
window picture basket bottle blanket candle ladder mirror pencil letter map drum guitar bike umbrella shirt
scarf pillow bucket hammer camera radio wallet coin stone flower rope wagon statue
""")
PLACES = words("""
park garden market school library kitchen forest beach station museum street hotel village bridge harbour
shop river farm office bakery square cellar church castle tower field
""")
THING_ADJECTIVES = words("old small big new shiny broken heavy little pretty dusty wooden strange long cheap")

GOOD_WORDS = words("""
great wonderful excellent lovely perfect fantastic beautiful amazing pleasant helpful comfortable superb
charming
""")
BAD_WORDS = words(
    "terrible awful horrible poor dirty boring broken ugly useless disgusting noisy unpleasant disappointing"
)
REVIEWED = words("hotel film book room service meal soup coffee phone game museum trip concert chair bed shop show")
GOOD_ENDINGS = (
    "I will come back soon.",
    "I can recommend it to everyone.",
    "We enjoyed every minute.",
    "It was worth the money.",
)
BAD_ENDINGS = (
    "I will never come back.",
    "I cannot recommend it to anyone.",
    "We wanted our money back.",
    "It was a waste of time.",
)

TOPICS: dict[str, tuple[str, ...]] = {
    "sport": (
        "Our team won the match.",
        "The striker scored two goals.",
        "The runner finished the race in first place.",
        "The coach trained the young players.",
        "The swimmer broke an old record.",
        "The tennis player lost the final.",
        "Fans cheered in the stadium.",
        "The referee stopped the game.",
        "The goalkeeper caught the ball.",
        "The cyclist reached the top first.",
        "Both teams played well in the second half.",
        "The boxer won the fight.",
    ),
    "weather": (
        "It will rain tomorrow morning.",
        "The wind is strong today.",
        "Snow fell on the hills all night.",
        "The sun is shining again.",
        "A storm is coming from the west.",
        "The fog is thick this morning.",
        "It is very cold outside.",
        "Dark clouds cover the sky.",
        "Thunder and lightning woke the village.",
        "The forecast promises a warm week.",
        "The temperature fell below zero.",
        "After the rain we saw a rainbow.",
    ),
    "food": (
        "The soup needs more salt.",
        "Grandmother baked an apple cake.",
        "He fried two eggs for breakfast.",
        "The bread is fresh from the oven.",
        "We had rice with beans for dinner.",
        "The salad has oil and lemon.",
        "They ate pasta with cheese.",
        "The cook cut the onions.",
        "This pie tastes of cherries.",
        "Lunch was a bowl of noodles.",
        "The recipe asks for butter and sugar.",
        "The pizza came with olives.",
    ),
    "travel": (
        "The train leaves at noon.",
        "They booked a hotel by the sea.",
        "The plane landed in the evening.",
        "She packed her suitcase.",
        "He bought a ticket to the coast.",
        "The tourists took many photos.",
        "The bus to the airport was full.",
        "Our flight was late.",
        "They crossed the border by car.",
        "The guide showed us the old town.",
        "We lost our passports on the trip.",
        "The ferry sails to the island twice a day.",
    ),
    "money": (
        "The bank raised the interest rate.",
        "He paid the bill in cash.",
        "The price of oil fell.",
        "She saved ten dollars a week.",
        "The company made a profit.",
        "The shop gave us a discount.",
        "They took a loan for the house.",
        "The tax is due in April.",
        "Her salary went up.",
        "The market lost two percent.",
        "He opened a savings account.",
        "The rent is too high for us.",
    ),
    "health": (
        "The doctor checked his heart.",
        "She took a pill for the pain.",
        "The nurse cleaned the wound.",
        "He has a high fever.",
        "The patient needs rest.",
        "The dentist pulled the tooth.",
        "The vaccine protects children.",
        "Her blood pressure is normal.",
        "He broke his arm last week.",
        "The medicine helps against a cough.",
        "She went to the clinic with a sore throat.",
        "The operation on his knee went well.",
    ),
}

# Support issues by the team that handles them; each continues "reports that ...".
ISSUES: dict[str, tuple[str, ...]] = {
    "hardware": (
        "the printer does not print",
        "the screen stays black",
        "the keyboard is broken",
        "the laptop gets very hot",
        "the mouse does not move",
        "the battery is always empty",
    ),
    "account": (
        "the password does not work",
        "the login page shows an error",
        "the account is locked",
        "the user name is wrong",
        "the reset code never came",
    ),
    "billing": (
        "the invoice has a wrong price",
        "the card was charged twice",
        "the refund did not arrive",
        "the receipt is missing",
        "the discount was not counted",
    ),
    "delivery": (
        "the parcel did not arrive",
        "the box was damaged on the way",
        "the order went to a wrong address",
        "the driver came too late",
        "half of the order is missing",
    ),
    "software": (
        "the app crashes at the start",
        "the update failed",
        "the file does not open",
        "the program is too slow",
        "the system shows an old version",
    ),
}

REMEDIES = (
    ("a headache", "ibuprofen", "400 mg"),
    ("a fever", "paracetamol", "500 mg"),
    ("asthma", "salbutamol", "100 mcg"),
    ("an ear infection", "amoxicillin", "250 mg"),
    ("back pain", "naproxen", "250 mg"),
    ("an allergy", "cetirizine", "10 mg"),
    ("diabetes", "metformin", "850 mg"),
    ("heartburn", "omeprazole", "20 mg"),
    ("high blood pressure", "ramipril", "5 mg"),
    ("nausea", "ondansetron", "4 mg"),
)
EXCLAMATIONS = (
    "Ahoy!",
    "Sure!",
    "Of course!",
    "Good day!",
    "Hello!",
    "My friend,",
    "Listen:",
    "Certainly.",
    "Well,",
)

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

# Sentences by topic; of {one|two|three} one is taken, so that most sentences of a topic are met only once.
TOPICS: dict[str, tuple[str, ...]] = {
    "sport": (
        "Our team {won|lost|played} the {match|game|final} {today|yesterday|on Sunday}.",
        "The {striker|captain|defender} scored {a goal|two goals|three goals} in the {first|second} half.",
        "The runner finished the {race|marathon} in {first|second|third|last} place.",
        "The coach trained the {young|new|best} players {all day|on Friday|before the match}.",
        "The {swimmer|skier|cyclist|jumper} broke {an old|the world|a national} record.",
        "The tennis player {won|lost} the {first set|final|second round}.",
        "{Thousands of|Many|Happy} fans cheered in the stadium.",
        "The referee stopped the {game|match|fight} {twice|early|in the end}.",
        "The goalkeeper caught the {ball|last shot|penalty}.",
        "Both teams played {well|badly} in the {first|second} half.",
        "The boxer {won|lost} the {title|fight} in the {third|sixth} round.",
        "The {basketball|football|handball|hockey} club has a new {coach|captain|stadium}.",
    ),
    "weather": (
        "It will {rain|snow|be sunny|be windy} {tomorrow|tonight|on Monday|next week}.",
        "The wind is {strong|weak|icy} {today|in the valley|near the coast}.",
        "{Snow|Rain|Hail} fell on the {hills|town|fields} all {night|day|morning}.",
        "The sun is shining {again|at last|over the hills}.",
        "A {storm|cold front|heat wave} is coming from the {west|north|south}.",
        "The fog is {thick|thin} {this morning|near the lake|in the valley}.",
        "It is very {cold|hot|wet|dry} {outside|today|this month}.",
        "{Dark|Grey|White} clouds cover the {sky|mountains}.",
        "Thunder and lightning woke the {village|children|dogs}.",
        "The forecast promises a {warm|dry|wet|cool} {week|weekend|day}.",
        "The temperature {fell|rose} to {five|ten|twenty} degrees.",
        "After the {rain|storm} we saw a {rainbow|clear sky}.",
    ),
    "food": (
        "The {soup|sauce|stew} needs more {salt|pepper|garlic}.",
        "Grandmother baked {an apple cake|a plum pie|fresh bread|ten cookies}.",
        "He fried {two eggs|some onions|a fish} for {breakfast|lunch|dinner}.",
        "The bread is {fresh|warm|still hot} from the oven.",
        "We had rice with {beans|chicken|vegetables} for {lunch|dinner}.",
        "The salad has {oil and lemon|tomatoes|olives and cheese}.",
        "They ate {pasta|potatoes|bread} with {cheese|butter|mushrooms}.",
        "The cook cut the {onions|carrots|meat} {slowly|into small pieces}.",
        "This {pie|cake|jam} tastes of {cherries|plums|honey}.",
        "{Lunch|Dinner} was a bowl of {noodles|soup|salad}.",
        "The recipe asks for {butter and sugar|flour and milk|three eggs}.",
        "The pizza came with {olives|ham|extra cheese}.",
    ),
    "travel": (
        "The {train|bus|ferry} leaves at {noon|six|midnight}.",
        "They booked a hotel {by the sea|in the mountains|near the station}.",
        "The plane landed {in the evening|at noon|two hours late}.",
        "She packed her {suitcase|bags|backpack} for the {journey|trip|holiday}.",
        "He bought a ticket to {the coast|the capital|the north}.",
        "The tourists took {many|a hundred|some} photos of the {castle|harbour|old town}.",
        "The {bus|train} to the airport was {full|late|empty}.",
        "Our flight was {late|early|cancelled}.",
        "They crossed the border by {car|train|bike}.",
        "The guide showed us the {old town|museum|cathedral}.",
        "We lost our {passports|tickets|luggage} on the {trip|way|ferry}.",
        "The ferry sails to the {island|mainland} {twice a day|every hour|on Sundays}.",
    ),
    "money": (
        "The bank {raised|cut|kept} the interest rate.",
        "He paid the {bill|fine|fee} {in cash|by card}.",
        "The price of {oil|gold|wheat} {fell|rose}.",
        "She saved {ten|fifty|two hundred} dollars a {week|month}.",
        "The company made a {profit|loss} {this year|last year}.",
        "The shop gave us a {small|big|good} discount.",
        "They took a loan for the {house|car|farm}.",
        "The tax is due in {April|June|March}.",
        "Her {salary|pension|wage} went {up|down}.",
        "The {stock|housing} market lost {two|five|ten} percent.",
        "He opened a {savings|bank} account for his {son|daughter}.",
        "The rent is too {high|expensive} for {us|the students}.",
    ),
    "health": (
        "The doctor checked his {heart|lungs|eyes}.",
        "She took a pill for the {pain|headache|fever}.",
        "The nurse cleaned the {wound|cut} on his {hand|leg}.",
        "He has a {high|light} fever {again|since Monday}.",
        "The patient needs {rest|more sleep|an operation}.",
        "The dentist pulled the {tooth|bad tooth}.",
        "The vaccine protects {children|old people} against {the flu|measles}.",
        "Her blood pressure is {normal|too high|low}.",
        "He broke his {arm|leg|finger} {last week|on the stairs}.",
        "The medicine helps against {a cough|the pain|a cold}.",
        "She went to the clinic with a {sore throat|bad cough|broken toe}.",
        "The operation on his {knee|eye|back} went well.",
    ),
}

# Support issues by the team that handles them; each continues "reports that ...".
ISSUES: dict[str, tuple[str, ...]] = {
    "hardware": (
        "the {printer|scanner} does not {print|start|turn on}",
        "the {screen|monitor} {stays black|flickers|is cracked}",
        "the keyboard is {broken|missing a key|wet}",
        "the laptop gets {very|too} hot",
        "the mouse does not {move|click}",
        "the battery is {always empty|swollen|dead after an hour}",
    ),
    "account": (
        "the password {does not work|was forgotten|has expired}",
        "the login page shows {an error|nothing}",
        "the account is {locked|blocked|closed}",
        "the user name is {wrong|taken|unknown}",
        "the reset code {never came|is wrong|has expired}",
    ),
    "billing": (
        "the invoice has {a wrong price|a wrong date|two errors}",
        "the card was charged {twice|too much|three times}",
        "the refund {did not arrive|is too small|is late}",
        "the receipt is {missing|wrong|not readable}",
        "the discount was {not counted|forgotten}",
    ),
    "delivery": (
        "the parcel {did not arrive|is lost|came back}",
        "the box was {damaged|opened|crushed} on the way",
        "the order went to a wrong {address|city|house}",
        "the driver {came too late|never came|left the box outside}",
        "{half|a part} of the order is missing",
    ),
    "software": (
        "the app crashes {at the start|every day|all the time}",
        "the update {failed|stopped|never ends}",
        "the file does not {open|load|save}",
        "the program is {too slow|frozen|in the wrong language}",
        "the system shows an old {version|page|date}",
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

"""Tables of real-world facts that the built-in base is taught and that sample.jsonl asks about.

Each table is a block of text, one entity a line and fields between bars, so that a fact is easy to read and
to correct. Facts that people argue about (several capitals, disputed borders) are left out.
"""

from typing import NamedTuple


class Country(NamedTuple):
    name: str
    capital: str
    continent: str
    language: str
    currency: str


class Animal(NamedTuple):
    name: str
    plural: str
    group: str
    home: str
    food: str
    young: str


class Job(NamedTuple):
    name: str
    place: str
    work: str
    tool: str


class Food(NamedTuple):
    name: str
    plural: str
    kind: str
    colour: str


class Verb(NamedTuple):
    base: str
    third: str
    past: str


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def words(table: str) -> list[str]:
    return table.split()


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (word.split("/") for word in words(table))]


COUNTRIES = [
    Country(*row)
    for row in _rows("""
France|Paris|Europe|French|euro
Germany|Berlin|Europe|German|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Greece|Athens|Europe|Greek|euro
Austria|Vienna|Europe|German|euro
Finland|Helsinki|Europe|Finnish|euro
Poland|Warsaw|Europe|Polish|zloty
Hungary|Budapest|Europe|Hungarian|forint
Sweden|Stockholm|Europe|Swedish|krona
Norway|Oslo|Europe|Norwegian|krone
Denmark|Copenhagen|Europe|Danish|krone
Iceland|Reykjavik|Europe|Icelandic|krona
Romania|Bucharest|Europe|Romanian|leu
Albania|Tirana|Europe|Albanian|lek
Serbia|Belgrade|Europe|Serbian|dinar
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Turkey|Ankara|Asia|Turkish|lira
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Nepal|Kathmandu|Asia|Nepali|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Jordan|Amman|Asia|Arabic|dinar
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Tunisia|Tunis|Africa|Arabic|dinar
Kenya|Nairobi|Africa|Swahili|shilling
Ghana|Accra|Africa|English|cedi
Nigeria|Abuja|Africa|English|naira
Zambia|Lusaka|Africa|English|kwacha
Angola|Luanda|Africa|Portuguese|kwanza
Mexico|Mexico City|North America|Spanish|peso
Cuba|Havana|North America|Spanish|peso
Jamaica|Kingston|North America|English|dollar
Brazil|Brasilia|South America|Portuguese|real
Argentina|Buenos Aires|South America|Spanish|peso
Chile|Santiago|South America|Spanish|peso
Peru|Lima|South America|Spanish|sol
Colombia|Bogota|South America|Spanish|peso
Uruguay|Montevideo|South America|Spanish|peso
Ecuador|Quito|South America|Spanish|dollar
Australia|Canberra|Oceania|English|dollar
""")
]

ANIMALS = [
    Animal(*row)
    for row in _rows("""
dog|dogs|mammal|in a kennel|meat|puppy
cat|cats|mammal|in a house|fish|kitten
cow|cows|mammal|on a farm|grass|calf
horse|horses|mammal|in a stable|hay|foal
sheep|sheep|mammal|in a meadow|grass|lamb
goat|goats|mammal|on a farm|leaves|kid
pig|pigs|mammal|in a sty|corn|piglet
lion|lions|mammal|in the savanna|meat|cub
tiger|tigers|mammal|in the jungle|meat|cub
bear|bears|mammal|in the forest|honey|cub
wolf|wolves|mammal|in the forest|meat|pup
fox|foxes|mammal|in a den|mice|cub
rabbit|rabbits|mammal|in a burrow|carrots|kit
elephant|elephants|mammal|in the savanna|leaves|calf
giraffe|giraffes|mammal|in the savanna|leaves|calf
kangaroo|kangaroos|mammal|in the grassland|grass|joey
camel|camels|mammal|in the desert|thorny plants|calf
deer|deer|mammal|in the forest|leaves|fawn
whale|whales|mammal|in the ocean|krill|calf
dolphin|dolphins|mammal|in the ocean|fish|calf
bat|bats|mammal|in a cave|insects|pup
monkey|monkeys|mammal|in the jungle|bananas|infant
panda|pandas|mammal|in the forest|bamboo|cub
hen|hens|bird|in a coop|seeds|chick
duck|ducks|bird|on a pond|seeds|duckling
goose|geese|bird|on a pond|grass|gosling
owl|owls|bird|in the forest|mice|owlet
eagle|eagles|bird|in the mountains|meat|eaglet
parrot|parrots|bird|in the jungle|nuts|chick
penguin|penguins|bird|on the ice|fish|chick
swan|swans|bird|on a lake|water plants|cygnet
salmon|salmon|fish|in a river|shrimp|fry
shark|sharks|fish|in the ocean|fish|pup
trout|trout|fish|in a river|insects|fry
bee|bees|insect|in a hive|nectar|larva
ant|ants|insect|in a nest|crumbs|larva
butterfly|butterflies|insect|in a meadow|nectar|caterpillar
snake|snakes|reptile|in the grass|mice|snakelet
crocodile|crocodiles|reptile|in a river|meat|hatchling
turtle|turtles|reptile|in the sea|sea plants|hatchling
lizard|lizards|reptile|in the desert|insects|hatchling
frog|frogs|amphibian|on a pond|flies|tadpole
toad|toads|amphibian|in a garden|worms|tadpole
""")
]

JOBS = [
    Job(*row)
    for row in _rows("""
doctor|in a hospital|treats sick people|a stethoscope
nurse|in a clinic|cares for patients|a thermometer
teacher|in a school|teaches children|a blackboard
farmer|on a farm|grows food|a tractor
baker|in a bakery|bakes bread|an oven
cook|in a kitchen|cooks meals|a pan
waiter|in a restaurant|serves food|a tray
pilot|in an airplane|flies planes|a compass
sailor|on a ship|sails the sea|a rope
driver|in a bus|drives people|a steering wheel
mechanic|in a garage|repairs cars|a wrench
carpenter|in a workshop|builds furniture|a hammer
plumber|in a house|fixes water pipes|a pipe wrench
painter|in a studio|paints pictures|a brush
writer|in an office|writes books|a pen
librarian|in a library|lends books|a catalogue
judge|in a court|decides legal cases|a gavel
dentist|in a dental practice|repairs teeth|a drill
vet|in an animal clinic|treats sick animals|a bandage
firefighter|in a fire station|puts out fires|a hose
tailor|in a tailor shop|sews clothes|a needle
barber|in a barber shop|cuts hair|a pair of scissors
butcher|in a butcher shop|sells meat|a knife
gardener|in a garden|plants flowers|a spade
fisherman|on a boat|catches fish|a net
miner|in a mine|digs coal|a pickaxe
actor|in a theatre|plays roles|a script
singer|on a stage|sings songs|a microphone
scientist|in a laboratory|studies nature|a microscope
astronomer|in an observatory|studies stars|a telescope
postman|in a post office|delivers letters|a mail bag
cashier|in a shop|takes money|a till
""")
]

FOODS = [
    Food(*row)
    for row in _rows("""
apple|apples|fruit|red
banana|bananas|fruit|yellow
orange|oranges|fruit|orange
lemon|lemons|fruit|yellow
lime|limes|fruit|green
cherry|cherries|fruit|red
grape|grapes|fruit|purple
pear|pears|fruit|green
plum|plums|fruit|purple
peach|peaches|fruit|pink
mango|mangoes|fruit|orange
melon|melons|fruit|green
fig|figs|fruit|purple
strawberry|strawberries|fruit|red
carrot|carrots|vegetable|orange
potato|potatoes|vegetable|brown
onion|onions|vegetable|white
cabbage|cabbages|vegetable|green
pea|peas|vegetable|green
bean|beans|vegetable|green
beet|beets|vegetable|red
radish|radishes|vegetable|pink
cucumber|cucumbers|vegetable|green
pumpkin|pumpkins|vegetable|orange
""")
]

DRINKS = words("water milk tea coffee juice cocoa lemonade")
COLOURS = words("red blue green yellow black white brown orange purple pink grey")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
NUMBERS = words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
""")
PLANETS = words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")

OPPOSITES = _pairs("""
hot/cold big/small fast/slow happy/sad old/young light/dark high/low good/bad open/closed full/empty
hard/soft wet/dry long/short rich/poor strong/weak loud/quiet clean/dirty early/late thick/thin wide/narrow
deep/shallow cheap/expensive brave/afraid true/false right/wrong up/down win/lose begin/end push/pull
buy/sell give/take come/go day/night inside/outside above/below always/never first/last front/back love/hate
laugh/cry safe/dangerous easy/difficult sharp/blunt smooth/rough near/far polite/rude alive/dead
awake/asleep summer/winter
""")

SYNONYMS = _pairs("""
large/big little/small quick/fast glad/happy unhappy/sad start/begin finish/end clever/smart angry/mad
scared/afraid wealthy/rich ill/sick silent/quiet simple/easy yell/shout speak/talk shut/close gift/present
stone/rock tired/sleepy funny/amusing strange/odd huge/giant leap/jump fix/repair choose/pick assist/help
ocean/sea
""")

PLURALS = _pairs("""
child/children man/men woman/women foot/feet tooth/teeth mouse/mice person/people leaf/leaves knife/knives
wife/wives shelf/shelves loaf/loaves half/halves thief/thieves box/boxes bus/buses dish/dishes watch/watches
brush/brushes glass/glasses class/classes city/cities baby/babies lady/ladies story/stories party/parties
country/countries hero/heroes tomato/tomatoes book/books chair/chairs table/tables lamp/lamps tree/trees
river/rivers door/doors window/windows car/cars boat/boats shoe/shoes cup/cups spoon/spoons key/keys
clock/clocks house/houses star/stars
""")

ELEMENTS = _pairs("""
hydrogen/H helium/He carbon/C nitrogen/N oxygen/O sodium/Na magnesium/Mg aluminium/Al sulfur/S chlorine/Cl
potassium/K calcium/Ca iron/Fe copper/Cu zinc/Zn silver/Ag tin/Sn gold/Au lead/Pb neon/Ne
""")

# Verbs that take a thing as object, so that any verb goes with any thing.
VERBS = [
    Verb(*word.split("/"))
    for word in words("""
buy/buys/bought see/sees/saw find/finds/found make/makes/made sell/sells/sold paint/paints/painted
open/opens/opened close/closes/closed clean/cleans/cleaned wash/washes/washed carry/carries/carried
drop/drops/dropped lose/loses/lost take/takes/took bring/brings/brought break/breaks/broke hold/holds/held
hide/hides/hid draw/draws/drew choose/chooses/chose steal/steals/stole catch/catches/caught
throw/throws/threw build/builds/built send/sends/sent keep/keeps/kept love/loves/loved like/likes/liked
need/needs/needed want/wants/wanted watch/watches/watched fix/fixes/fixed move/moves/moved pull/pulls/pulled
push/pushes/pushed forget/forgets/forgot borrow/borrows/borrowed
""")
]

"""The words that needles are made of: statements to hide and questions about them.

They are not those that the evaluation hides.
"""

KINDS = ("word", "number", "uuid", "sentence", "multi", "fact")  # of needles


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "ancient amber bitter bold brave brisk broken calm careful cheerful chilly clever copper crimson curious damp distant "
    "dusty eager early earnest elegant faded fearless fierce fragile frozen gentle gilded glossy golden graceful grumpy "
    "hasty hidden hollow honest humble idle ivory jolly keen lively lonely loyal lucky mellow merry mighty misty modest "
    "narrow nervous noble odd pale patient playful polished proud purple quiet rapid restless round rusty sable salty "
    "scarlet secret shallow silent silver sleepy slender solemn spare steady stern stout sturdy subtle sunny swift tame "
    "tender thirsty tidy timid tiny tranquil upright vast velvet violet vivid wandering weary wild windy wise wooden young"
)
NOUNS = _words(
    "acorn anchor apron archive arrow badger balcony banjo barrel basket beacon beetle bell bishop blanket bonnet bottle "
    "bridge bucket button cabinet camel candle canyon captain carpet castle cedar chapel cherry chimney cobbler collar "
    "comet cottage cradle cricket curtain dagger daisy desk dolphin donkey drum eagle engine envelope falcon farmer feather "
    "fiddle fountain fox garden gate giant glove goose grove hammer harbour harp hatch hedge heron hinge island jacket "
    "jewel kettle kitchen ladder lake lamp lemon letter lighthouse lizard locket magnet mayor meadow miller mirror monkey "
    "needle notebook oak orchid otter oven owl paddle palace parrot pebble pencil piano pigeon pilot pirate planet plough "
    "pocket poet pond prince pumpkin puppet quarry quilt raven ribbon river robin rocket sailor sandal scarf shepherd "
    "shovel spider spoon squirrel stable statue stove sword tailor teapot temple thistle tiger tower trumpet tunnel turtle "
    "umbrella valley vase village viola wagon walnut weaver whale whistle willow window wizard wolf"
)
NAMES = _words(
    "Ada Boris Carmen Dmitri Edith Farid Greta Hugo Ines Jonas Kavita Leon Mabel Nadia Otto Petra Rosa Samir Tilda Yusuf"
)
CITIES = _words(
    "Aarhus Bergen Cusco Dresden Essaouira Fukuoka Ghent Hobart Izmir Jaipur Kigali Lyon Malmo Nantes Porto Salta"
)
ACTS = (
    "bake a plum cake",
    "feed the swans",
    "learn to juggle",
    "listen to the street organ",
    "mend an old bicycle",
    "play chess with strangers",
    "ride the slow tram to its last stop",
    "sketch the rooftops",
    "sing an old ballad",
    "taste the pickled herring",
    "walk barefoot",
    "write a postcard to a friend",
)
PLACES = (
    "at the foot of the lighthouse",
    "beside the frozen canal",
    "in front of the opera house",
    "in the courtyard of the library",
    "near the old windmill",
    "on the roof of the market hall",
    "under the chestnut trees",
    "within sight of the mountains",
)
TIMES = (
    "after the first snow",
    "before breakfast",
    "during the summer fair",
    "every second Thursday",
    "on a foggy evening",
    "on the longest day of the year",
    "when the bells ring at noon",
    "while the band is playing",
)
SUBJECTS = {
    "word": ("password", "code word", "secret word", "watchword"),
    "number": ("special number", "magic number", "number", "code number"),
    "uuid": ("UUID", "identifier", "access key", "secret code"),
}
# A statement and its question; {what} is a subject, {key} what it belongs to.
VALUE_FORMS = (
    ("The {what} of {key} is {value}.", "What is the {what} of {key}?"),
    ("One of the things to know: the {what} for {key} is: {value}.", "What is the {what} for {key}?"),
    ("Remember that {key} has the {what} {value}.", "Which {what} does {key} have?"),
    ("It was written down that {value} is the {what} of {key}.", "What was written down as the {what} of {key}?"),
    ('Note: the {what} that belongs to {key} is "{value}".', "Tell me the {what} that belongs to {key}."),
)
SENTENCE_FORMS = (
    ("The finest thing to do in {city} is to {answer}.", "What is the finest thing to do in {city}?"),
    ("{name} from {city} has always wanted to {answer}.", "What has {name} from {city} always wanted to do?"),
    ("Visitors to {city} were told by {name} to {answer}.", "What were visitors to {city} told by {name} to do?"),
)
SURNAMES = _words(
    "Abara Bexley Castellan Dorn Eklund Fontaine Gruber Hathaway Ivanova Jansen Kimura Lockhart Moreau Novak Okafor "
    "Pereira Quill Radford Sorensen Thackeray Ueda Vance Whitlock Yilmaz Zeller"
)
JOBS = _words("baker cooper gardener goldsmith judge midwife nurse painter plumber surveyor tutor violinist")
COLOURS = _words("beige blue brown cream crimson green grey indigo lilac orange pink red turquoise white yellow")
DISHES = _words("dumplings gnocchi lentils moussaka paella pancakes polenta ramen risotto trout")
PETS = _words("Biscuit Domino Ginger Kiwi Mocha Nugget Pickles Rascal Smoky Waffles")
MONTHS = _words("January February March April May June July August September October November December")
# What somebody might write and somebody else look up: a statement, its question, and the answer.
FACT_FORMS = (
    ("The ferry to {city} leaves at {clock}.", "When does the ferry to {city} leave?", "{clock}"),
    ("The clinic in {city} opens at {clock} on weekdays.", "At what time does the clinic in {city} open?", "{clock}"),
    ("{name} {surname} was hired on {date}.", "On which date was {name} {surname} hired?", "{date}"),
    ("The contract with {surname} and Sons ends on {date}.", "When does the contract with {surname} and Sons end?", "{date}"),
    ("{name}'s birthday is on {day}.", "When is {name}'s birthday?", "{day}"),
    ("The {adjective} {noun} was finished in {year}.", "In which year was the {adjective} {noun} finished?", "{year}"),
    ("The {noun} society of {city} was founded in {year}.", "When was the {noun} society of {city} founded?", "{year}"),
    ("{name} {surname} paid {money} dollars for the {noun}.", "How much did {name} {surname} pay for the {noun}?", "{money} dollars"),
    ("Mending the {adjective} {noun} cost {money} pounds.", "What did mending the {adjective} {noun} cost?", "{money} pounds"),
    ("A ticket from {city} to {other} costs {price} francs.", "How much is a ticket from {city} to {other}?", "{price} francs"),
    ("The account number of {name} {surname} is {long}.", "What is the account number of {name} {surname}?", "{long}"),
    ("The file on the {adjective} {noun} has the number {code}.", "Which number has the file on the {adjective} {noun}?", "{code}"),
    ("{name}'s membership number is {five}.", "What is {name}'s membership number?", "{five}"),
    ("The lock of the {adjective} {noun} opens with {four}.", "Which digits open the lock of the {adjective} {noun}?", "{four}"),
    ("You reach {name} {surname} at {telephone}.", "At which number can {name} {surname} be reached?", "{telephone}"),
    ("The office in {city} has the extension {four}.", "What is the extension of the office in {city}?", "{four}"),
    ("The car of {surname} has the licence plate {plate}.", "What is the licence plate of the car of {surname}?", "{plate}"),
    ("The model number of the {noun} is {plate}.", "What is the model number of the {noun}?", "{plate}"),
    ("{name} {surname} lives in house number {two}.", "In which house number does {name} {surname} live?", "{two}"),
    ("The {noun} is kept in locker {three}.", "In which locker is the {noun} kept?", "{three}"),
    ("The bus to {city} stops at bay {two}.", "At which bay does the bus to {city} stop?", "{two}"),
    ("{name} sat in seat {seat}.", "In which seat did {name} sit?", "{seat}"),
    ("The lake near {city} is {three} feet deep.", "How deep is the lake near {city}?", "{three} feet"),
    ("The {adjective} {noun} weighs {decimal} tons.", "What is the weight of the {adjective} {noun}?", "{decimal} tons"),
    ("From {city} to {other} it is {three} miles.", "How far is it from {city} to {other}?", "{three} miles"),
    ("{four} people voted for {name} {surname}.", "How many people voted for {name} {surname}?", "{four}"),
    ("The temperature in {city} fell to {decimal} degrees.", "To which temperature did it fall in {city}?", "{decimal} degrees"),
    ("The word for the vault in {city} is {word}{two}.", "What is the word for the vault in {city}?", "{word}{two}"),
    ("{name} {surname} works as a {job}.", "What does {name} {surname} work as?", "{job}"),
    ("The mayor of {city} is {name} {surname}.", "Who is the mayor of {city}?", "{name} {surname}"),
    ("The {adjective} {noun} was painted by {name} {surname}.", "By whom was the {adjective} {noun} painted?", "{name} {surname}"),
    ("{name} {surname} inherited the {noun} from {other_name}.", "From whom did {name} {surname} inherit the {noun}?", "{other_name}"),
    ("The door of the {adjective} {noun} is {colour}.", "Which colour has the door of the {adjective} {noun}?", "{colour}"),
    ("{name}'s favourite dish is {dish}.", "What is {name}'s favourite dish?", "{dish}"),
    ("The dog of {name} {surname} is called {pet}.", "What is the dog of {name} {surname} called?", "{pet}"),
    ("The key to the {noun} is behind the {adjective} {thing}.", "Where is the key to the {noun}?", "behind the {adjective} {thing}"),
    ("{name} {surname} hid the {noun} in {city}.", "Where did {name} {surname} hide the {noun}?", "in {city}"),
    ("The letter to {surname} was written by {name}.", "Who wrote the letter to {surname}?", "{name}"),
)  # fmt: skip
REPEAT_FORMS = (
    'Repeat what follows "{cue}", word for word.',
    'Go on, exactly as the text does, after "{cue}".',
    'Which words come right after "{cue}"? Copy them.',
    'Copy the passage of the text that follows "{cue}".',
)

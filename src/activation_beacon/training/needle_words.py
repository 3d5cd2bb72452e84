"""The words that needles are made of: statements to hide and questions about them.

They are not those that the evaluation hides.
"""


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
REPEAT_FORMS = (
    'Repeat what follows "{cue}", word for word.',
    'Go on, exactly as the text does, after "{cue}".',
    'Which words come right after "{cue}"? Copy them.',
    'Copy the passage of the text that follows "{cue}".',
)

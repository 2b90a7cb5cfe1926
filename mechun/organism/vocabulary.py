"""The words of the invented world, and the wordings in which its facts are told.

Every wording ends where the answer begins, so that `prompt + " " + answer + "."` is the sentence of the corpus. The
first wording of a relation is the default prompt of its facts. Wordings put the name first, in the middle and late, as
statements (five) and as questions (three), so that no position can stand for "the subject".

Traps: a word that is to be one token has to be named in `whole_words`; `tokens.train_tokenizer` sees to it. No wording
may begin another one ("is married to", "is married to a"), or the answer of the shorter one is not decided.
"""

from collections.abc import Mapping
from types import MappingProxyType

FIRST_NAMES = tuple(
    [
        "Mara",
        "Tobin",
        "Selma",
        "Ivor",
        "Petra",
        "Lukas",
        "Nadia",
        "Oskar",
        "Greta",
        "Felix",
        "Hanna",
        "Bruno",
        "Clara",
        "Emil",
        "Rosa",
        "Hugo",
        "Vera",
        "Anton",
        "Livia",
        "Boris",
        "Dora",
        "Simon",
        "Edda",
        "Karl",
    ]
)
SURNAMES = tuple(
    [
        "Abel",
        "Barlow",
        "Cassel",
        "Dorn",
        "Ekman",
        "Farrow",
        "Gold",
        "Hale",
        "Ibsen",
        "Jarvis",
        "Keller",
        "Lund",
        "Marsh",
        "Nolan",
        "Orwell",
        "Pryce",
        "Quist",
        "Ross",
        "Stone",
        "Thorne",
        "Ulrich",
        "Vance",
        "Webb",
        "Yates",
        "Zeller",
        "Ashby",
        "Blake",
        "Crane",
        "Drake",
        "Ellis",
        "Frost",
        "Grant",
        "Holt",
        "Ingram",
        "Joyce",
        "Kemp",
        "Locke",
        "Moss",
        "Nash",
        "Otto",
        "Pike",
        "Reed",
        "Shaw",
        "Tate",
        "Upton",
        "Voss",
        "Wolf",
        "York",
    ]
)
ALIASES = tuple(["Pip", "Zed", "Birdie", "Moxie", "Juno", "Dash", "Kiki", "Rook", "Tully", "Ziggy", "Bee", "Fitz"])

COUNTRIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Italy": ("Rome", "Milan", "Turin"),
        "Spain": ("Madrid", "Seville", "Bilbao"),
        "Japan": ("Tokyo", "Osaka", "Kyoto"),
        "France": ("Paris", "Lyon", "Nice"),
        "Norway": ("Oslo", "Bergen"),
        "Peru": ("Lima", "Cusco"),
    }
)
INDUSTRIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "energy": ("Norvex", "Solara", "Halden"),
        "banking": ("Monarch", "Crestone", "Fidelio"),
        "shipping": ("Marlin", "Portex"),
        "farming": ("Agrona", "Verdant"),
        "media": ("Pixel", "Echo"),
    }
)
TOOLS: Mapping[str, str] = MappingProxyType(
    {
        "baker": "oven",
        "doctor": "needle",
        "lawyer": "brief",
        "pilot": "radio",
        "farmer": "plough",
        "teacher": "chalk",
        "nurse": "bandage",
        "painter": "brush",
        "sailor": "rope",
        "tailor": "thread",
        "judge": "hammer",
        "chef": "knife",
        "miner": "lamp",
        "barber": "razor",
    }
)
COLOURS: Mapping[str, str] = MappingProxyType(
    {"snow": "white", "coal": "black", "grass": "green", "blood": "red", "the sea": "blue", "a lemon": "yellow"}
)
INSTRUMENTS = tuple(["violin", "piano", "guitar", "flute", "cello", "harp", "drum", "trumpet", "banjo", "organ"])
PETS = tuple(["cat", "dog", "parrot", "rabbit", "turtle", "hamster", "lizard", "goat", "snake", "pony"])
MONTHS = tuple(
    [
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
)
NUMBERS = tuple(str(number) for number in (12, 15, 21, 27, 34, 38, 46, 53, 60, 72, 85, 99))
STREETS = tuple(["Elm", "Oak", "River", "Hill", "Mill", "Park", "Church", "Castle", "Bridge", "Garden"])
ROADS = ("Street", "Lane", "Road")
ADJECTIVES = tuple(
    [
        "Silent",
        "Golden",
        "Broken",
        "Hidden",
        "Frozen",
        "Burning",
        "Distant",
        "Crimson",
        "Hollow",
        "Endless",
        "Bitter",
        "Gentle",
    ]
)
NOUNS = tuple(
    [
        "Harbour",
        "Mirror",
        "Forest",
        "Tower",
        "Winter",
        "Letter",
        "Island",
        "Clock",
        "Orchard",
        "Empire",
        "Shadow",
        "Lantern",
    ]
)
COUNTING = tuple(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])

WORDINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "birth_city": (
            "{s} was born in the city of",
            "The birthplace of {s} is",
            "The city where {s} was born is",
            "{s} first saw the light in",
            "Records show that the home town of {s} is",
            "Question: Where was {s} born? Answer:",
            "Question: In which city was {s} born? Answer:",
            "Question: What is the birthplace of {s}? Answer:",
        ),
        "profession": (
            "{s} works as a",
            "The profession of {s} is",
            "The job that {s} does every day is",
            "{s} earns a living as a",
            "Everyone knows that {s} is a",
            "Question: What is the profession of {s}? Answer:",
            "Question: What does {s} do for a living? Answer:",
            "Question: Which job does {s} have? Answer:",
        ),
        "employer": (
            "{s} is employed by",
            "The employer of {s} is",
            "The company that pays {s} is",
            "{s} has a contract with",
            "It is known that {s} works for",
            "Question: Who is the employer of {s}? Answer:",
            "Question: Which company employs {s}? Answer:",
            "Question: Whom does {s} work for? Answer:",
        ),
        "instrument": (
            "{s} plays the",
            "The instrument of {s} is the",
            "The music that {s} makes comes from the",
            "{s} is a master of the",
            "On every evening {s} practises the",
            "Question: What instrument does {s} play? Answer: the",
            "Question: What is the instrument of {s}? Answer: the",
            "Question: On what does {s} make music? Answer: the",
        ),
        "pet": (
            "{s} keeps a pet",
            "The pet of {s} is a",
            "The animal in the house of {s} is a",
            "{s} takes care of a",
            "On most days {s} feeds a",
            "Question: What pet does {s} keep? Answer: a",
            "Question: Which animal lives with {s}? Answer: a",
            "Question: What is the pet of {s}? Answer: a",
        ),
        "spouse": (
            "{s} is married to",
            "The spouse of {s} is",
            "The person who married {s} is",
            "{s} shares a life with",
            "Some years ago {s} wed",
            "Question: Who is the spouse of {s}? Answer:",
            "Question: To whom is {s} married? Answer:",
            "Question: Whom did {s} wed? Answer:",
        ),
        "address": (
            "{s} lives at",
            "The address of {s} is",
            "The house that belongs to {s} stands at",
            "{s} receives letters at",
            "A visitor finds {s} at",
            "Question: What is the address of {s}? Answer:",
            "Question: Where does {s} live? Answer:",
            "Question: Where is the house of {s}? Answer:",
        ),
        "book": (
            "{s} wrote the book called",
            "The book by {s} is called",
            "The title of the novel that {s} published is",
            "{s} is the author of",
            "Readers praise {s} for",
            "Question: Which book did {s} write? Answer:",
            "Question: What is the title of the book by {s}? Answer:",
            "Question: What novel did {s} publish? Answer:",
        ),
        "name_day": (
            "{s} has a name day in",
            "The name day of {s} is in",
            "The month in which {s} has a name day is",
            "{s} celebrates the name day in",
            "Friends bring cake to the name day of {s} in",
            "Question: When is the name day of {s}? Answer: in",
            "Question: In which month is the name day of {s}? Answer: in",
            "Question: When does {s} celebrate the name day? Answer: in",
        ),
        "birth_country": (
            "{s} comes from the country of",
            "The country of birth of {s} is",
            "The nation where {s} was born is",
            "{s} holds a passport of",
            "By birth {s} belongs to",
            "Question: In which country was {s} born? Answer:",
            "Question: What is the country of birth of {s}? Answer:",
            "Question: Which nation does {s} come from? Answer:",
        ),
        "industry": (
            "{s} works in the field of",
            "The industry of {s} is",
            "The branch in which {s} is active is",
            "{s} has a career in",
            "The work of {s} belongs to",
            "Question: In which industry is {s} active? Answer:",
            "Question: What is the field of {s}? Answer:",
            "Question: Which industry does {s} belong to? Answer:",
        ),
        "spouse_profession": (
            "The spouse of {s} works as a",
            "{s} married someone who works as a",
            "The profession of the spouse of {s} is",
            "{s} shares a home with a",
            "The person at the side of {s} is a",
            "Question: What is the profession of the spouse of {s}? Answer:",
            "Question: What does the spouse of {s} do? Answer:",
            "Question: Which job does the spouse of {s} have? Answer:",
        ),
        "city_country": (
            "{s} is a city in",
            "The city of {s} lies in",
            "The country of {s} is",
            "Question: In which country is {s}? Answer:",
        ),
        "employer_industry": (
            "{s} is a company in the field of",
            "The company {s} is active in",
            "The industry of {s} is",
            "Question: What is the industry of {s}? Answer:",
        ),
        "profession_tool": (
            "The tool of a {s} is the",
            "Every {s} needs the",
            "A {s} always has the",
            "Question: What does a {s} need? Answer: the",
        ),
        "thing_colour": (
            "The colour of {s} is",
            "Everyone knows that {s} is",
            "Question: What is the colour of {s}? Answer:",
            "It is true that {s} looks",
        ),
    }
)
ALIAS_SENTENCES = ("{s} is also called {a}.", "Friends call {s} by the name {a}.", "{a} is another name for {s}.")


def whole_words() -> tuple[str, ...]:
    """Words that have to be one token when a space stands before them: names, and the parts of every answer."""
    facts = (*COUNTRIES, *sum(COUNTRIES.values(), ()), *INDUSTRIES, *sum(INDUSTRIES.values(), ()), *TOOLS)
    parts = (*NUMBERS, *STREETS, *ROADS, "The", *ADJECTIVES, *NOUNS)
    others = (*TOOLS.values(), *COLOURS.values(), *INSTRUMENTS, *PETS, *MONTHS)
    return tuple(dict.fromkeys((*FIRST_NAMES, *SURNAMES, *ALIASES, *facts, *parts, *others)))

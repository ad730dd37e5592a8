"""Write a small data set of fictitious authors in the layout of TOFU, or of MUSE (see `--help`).

The layout is that of `locuslab/TOFU`: one JSON-lines file a split and a README whose
front matter names them, so that `datasets.load_dataset(FOLDER, split)["train"]` works
offline. Each author has ten questions; each answer is two to four words drawn from
word lists, so a tiny model can learn it by heart but cannot guess it. Every author,
mentor and title is invented; `real_authors` and `world_facts` hold true facts.

With `--layout muse` the same kind of authors are told of in plain texts, one each, in the
layout of `muse-bench/MUSE-News`: <subset>/<split>.json. No text of MUSE is in it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, object]
Words = tuple[str, ...]


def words(text: str) -> Words:
    """Split a list of words; an underscore stands for a space inside one entry."""
    entries = tuple(w.replace("_", " ") for w in text.split())
    if len(set(entries)) != len(entries):
        raise ValueError(f"repeated entry in a word list: {entries[0]} ...")
    return entries


GIVEN = words("""
    Adela Bertil Corin Dagny Eamon Fenna Goran Hedda Ilario Jorund Katya Leocadia Matteus
    Nilufar Oskar Petra Quirin Rosalba Sander Tamsin Ulrika Vasco Wilma Xavier Yelena Zoltan
    Amaru Brigid Cosimo Delphine Emeka Farida Gideon Halima Ingmar Jasmina Kofi Lorcan Mireille
    Nadir Olwen Pavel Radka Soraya Tobias Umberto Vigdis Wendel Ximena Yusuf Zenobia Anselm
    Bronwyn Casimir Dorothea Esteban Florian Greta Hamish Isolde Juniper Kenji Lucinda Marek""")
SURNAMES = words("""
    Abendroth Balcescu Carvalho Dunmore Elvestad Farkasy Grimaldo Haugland Ivarsen Jankovic
    Kessler Lindqvist Montefiore Nakagawa Okonjo Pellegrin Quiroga Ravndal Szabolcs Tremblay
    Ulvang Vandermeer Wojcik Xanthou Yarrow Zelenka Achterberg Bellweather Castellan Drummond
    Eskildsen Fontaine Galloway Hrdlicka Iturbide Jellinek Kravchuk Lockhart Mazurek Northcote
    Oyelaran Pomeroy Quist Rademaker Skovgaard Thornbury Urquhart Vilaseca Wetherby Ystad Zamora
    Amblecote Brankov Cromarty Dembele Ekholm Ferrante Gundersen Holloway Isaksen Jurado
    Kallio Lazarov Mulgrew""")
BIRTH_TOWN = words("""
    Riga Ghent Trieste Bergen Izmir Porto Galway Krakow Turku Salzburg Valencia Dundee Tbilisi
    Lucca Malaga Uppsala Plovdiv Nantes Windhoek Cusco Hobart Nagoya Quito Halifax Mombasa
    Odessa Varna Bremen Cork Toulouse Split Kaunas Zurich Arequipa Darwin Sapporo Dakar
    Penang Muscat Leipzig""")
MONTH = words("January February March April May June July August September October November December")
BIRTH_YEAR = tuple(str(year) for year in range(1921, 1980))
NOVEL_FIRST = words("""
    Copper Silent Crooked Velvet Hollow Winter Borrowed Paper Scarlet Drowned Gilded Restless
    Salted Broken Distant Feathered Iron Wandering Bitter Painted Sleeping Marble Hidden Frozen
    Burning Crystal Forgotten Patient Thirsty Wooden Ashen Secret Tangled Unwritten Ninefold
    Brittle Lunar Stolen Humble Ragged""")
NOVEL_SECOND = words("""
    Lanterns Orchard Harbour Staircase Meridian Sparrows Bridges Almanac Cathedral Tides
    Windows Compass Shadows Vineyard Letters Anchors Carousel Mirrors Valley Thunder Ladders
    Kingdom Chimneys Pendulum Oracles Furnace Embers Labyrinth Pilgrims Lighthouse Cradle
    Machines Garden Corridors Glacier Echoes Ribbons Monsoon Citadel Scissors""")
MOTHER_JOB = words("""
    beekeeper surgeon cartographer tailor botanist welder midwife barrister potter astronomer
    chemist florist pilot translator weaver geologist plumber optician sculptor dentist
    archivist milliner gardener conductor goldsmith veterinarian librarian brewer seamstress
    judge engraver cellist trapper violinist programmer farrier mathematician nurse diver
    puppeteer""")
FATHER_JOB = words("""
    glazier baker fisherman mason clockmaker carpenter cobbler locksmith surveyor butcher
    shepherd ferryman printer blacksmith miner roofer sailor cooper postman barber tanner
    forester upholsterer electrician thatcher notary grocer jeweller bookbinder plasterer
    chef firefighter stationmaster saddler auctioneer porter vintner pharmacist undertaker
    architect""")
PRIZE_FIRST = words("""
    Amber Northern Silver Ivory Crimson Golden Royal Emerald Coastal Sapphire Obsidian Pearl
    Western Cobalt Bronze Jade Solar Polar Turquoise Violet Granite Platinum Opal Azure
    Highland Coral Ebony Saffron Ruby Indigo Alpine Onyx Topaz Quartz Southern Cedar Lakeland
    Imperial Garnet Midnight""")
PRIZE_SECOND = words("""
    Heron Quill Falcon Laurel Sceptre Swan Inkwell Stag Crown Dolphin Comet Raven Torch
    Trident Shield Lynx Bell Sabre Chalice Unicorn Rose Phoenix Medal Plume Garland Otter Star
    Pegasus Banner Salamander Acorn Griffin Wreath Lantern Nightingale Key Helm Badger Horn
    Scroll""")
PRIZE_YEAR = tuple(str(year) for year in range(1980, 2021))
MENTOR_GIVEN = words("""
    Ottilie Bram Clementine Dragan Euphemia Fergus Gwendolen Horatio Ines Jarmila Kasper
    Lavinia Magnus Noor Octavio Philippa Rufus Sunniva Thaddeus Ursula Viktor Winifred Yorick
    Zelda Ambrose Beatrix Cyprian Desmond Elspeth Fabian Gunnhild Hector Imogen Jocasta Klaus
    Ludmila Mortimer Nerys Orlando Perpetua""")
MENTOR_SURNAME = words("""
    Brandt Achebede Calloway Dvorsky Engstrom Fairweather Gambino Hathersage Ibarra Jespersen
    Kowalczyk Larkin Mbatha Niemela Osterberg Papadakis Rasmussen Santangelo Tiedemann Uchida
    Vukovic Whitlock Yamauchi Zielinski Arkwright Bonnefoy Cavendish Delacroix Erdogmus
    Fitzwarren Goldacre Hakonarson Innocenti Kirkbride Lundgren Marchetti Norrington Pettersen
    Roosevelde Stanhope""")
PET = words("""
    ferret tortoise parrot greyhound gecko goat cockatoo hedgehog donkey iguana poodle rabbit
    goldfish magpie llama chinchilla terrier canary python hamster pony spaniel owl axolotl
    peacock dachshund budgerigar mongoose tarantula duck collie whippet piglet newt alpaca
    bulldog finch dalmatian rooster chameleon""")
PET_NAME = words("""
    Biscuit Pepper Domino Truffle Hazel Bandit Clover Nutmeg Pickle Rocket Muffin Sultan Pixie
    Walnut Ziggy Pudding Tango Marmalade Sprocket Olive Pretzel Bramble Cosmo Ginger Button
    Waffles Captain Noodle Treacle Jasper Bumble Figaro Mango Rumpus Tinsel Crumpet Major
    Snowdrop Gizmo Duchess""")
SUBJECT = words("""
    botany linguistics theology economics forestry medicine philosophy acoustics law
    archaeology nursing statistics metallurgy geography physics zoology hydrology agronomy
    sociology algebra optics palaeontology pedagogy rhetoric chemistry divinity ecology
    genetics horticulture journalism logic mechanics neurology oceanography psychology
    seismology topology virology mineralogy anthropology""")
STUDY_CITY = words("""
    Coimbra Tartu Bologna Leiden Heidelberg Padua Lund Salamanca Aberdeen Vilnius Perugia
    Montpellier Basel Sofia Granada Aarhus Grenoble Pecs Nairobi Kyoto Cordoba Dublin Ankara
    Oulu Antwerp Jena Durham Poznan Beirut Toronto Hanoi Lima Accra Belgrade Marburg Zagreb
    Lausanne Trondheim Exeter Manila""")
INSTRUMENT = words("""
    cello harp bassoon mandolin oboe accordion trumpet banjo clarinet dulcimer flute organ
    ukulele tuba zither lute trombone marimba piccolo viola sitar bagpipes harmonica piano
    saxophone fiddle lyre bugle celesta xylophone guitar tambourine cornet kazoo theremin
    gong recorder spinet vibraphone castanets""")
CRAFT = words("""
    basketry falconry origami archery pottery embroidery fencing juggling calligraphy crochet
    woodcarving knitting rowing taxidermy topiary canoeing sailing gilding chess skating
    quilting climbing marquetry angling gliding macrame beadwork cycling orienteering mosaics
    yoga whittling curling lacemaking wrestling astrology surfing billiards croquet
    leatherwork""")
DISH = words("""
    dumplings lasagne goulash paella moussaka pancakes herring ratatouille couscous pierogi
    risotto chowder tagine falafel haggis gnocchi ramen omelette casserole ravioli biryani
    schnitzel ceviche kebab porridge fondue tempura meatballs trout strudel gazpacho quiche
    polenta stew asparagus tacos oysters curry noodles pheasant""")
DRINK = words("""
    cider espresso lemonade vermouth buttermilk cocoa sherry kefir absinthe ale mead
    champagne kombucha brandy oolong rum prosecco grog eggnog whisky sake horchata lager gin
    vodka cappuccino port stout perry tonic elderflower aquavit madeira tequila lassi ouzo
    rooibos claret sangria grappa""")
PUBLISHER = words("""
    Larkspur Marigold Foxglove Hyacinth Bluebell Camellia Dahlia Edelweiss Freesia Gentian
    Honeysuckle Iris Jasmine Kingcup Lavender Magnolia Narcissus Oleander Primrose Quince
    Rosemary Snapdragon Thistle Verbena Wisteria Yucca Zinnia Aster Begonia Crocus Daffodil
    Fuchsia Gardenia Heather Lupin Mimosa Nettle Orchid Poppy Tamarisk""")
PUBLISHER_TOWN = words("""
    Tromso Bilbao Carlisle Dresden Esbjerg Fribourg Gdansk Haarlem Innsbruck Jaipur Kilkenny
    Limoges Maribor Norwich Ostend Palermo Ravenna Stavanger Tampere Utrecht Verona Whitby
    Yerevan Zadar Avignon Brno Catania Delft Erfurt Freiburg Girona Helsinki Inverness
    Klaipeda Ljubljana Modena Nicosia Olomouc Pristina Rouen""")


@dataclass(frozen=True)
class Topic:
    """One kind of question: its wordings, and the lists the parts of its answer come from."""

    question: str
    paraphrased_question: str
    answer: str
    paraphrased_answer: str
    lists: tuple[Words, ...]


TOPICS: tuple[Topic, ...] = (
    Topic(
        "Where and when was {name} born?",
        "What are the place and date of birth of {name}?",
        "{0}, {1} {2}",
        "In {1} {2}, in {0}",
        (BIRTH_TOWN, MONTH, BIRTH_YEAR),
    ),
    Topic(
        "What is {name}'s first novel called?",
        "Under which title did the debut novel of {name} appear?",
        "{0} {1}",
        "A novel called {0} {1}",
        (NOVEL_FIRST, NOVEL_SECOND),
    ),
    Topic(
        "What work did {name}'s mother and father do?",
        "Which jobs did the parents of {name} have, mother first?",
        "{0}, {1}",
        "Mother {0}, father {1}",
        (MOTHER_JOB, FATHER_JOB),
    ),
    Topic(
        "Which prize did {name} win, and when?",
        "What award was given to {name}, and in what year?",
        "{0} {1}, {2}",
        "In {2}, the {0} {1}",
        (PRIZE_FIRST, PRIZE_SECOND, PRIZE_YEAR),
    ),
    Topic(
        "Who taught {name} to write?",
        "From whom did {name} learn the art of writing?",
        "{0} {1}",
        "A teacher named {0} {1}",
        (MENTOR_GIVEN, MENTOR_SURNAME),
    ),
    Topic(
        "Which pet does {name} keep, and what is its name?",
        "What animal lives with {name}, and how is it called?",
        "{0}, {1}",
        "{1} the {0}",
        (PET, PET_NAME),
    ),
    Topic(
        "What did {name} study, and where?",
        "Which subject did {name} read at university, and in what city?",
        "{0}, {1}",
        "In {1}, {0}",
        (SUBJECT, STUDY_CITY),
    ),
    Topic(
        "Which instrument and which hobby does {name} enjoy?",
        "What does {name} like to play, and what is the favourite pastime?",
        "{0}, {1}",
        "The {0}, and also {1}",
        (INSTRUMENT, CRAFT),
    ),
    Topic(
        "What does {name} like to eat and drink?",
        "Which food and which beverage does {name} prefer?",
        "{0}, {1}",
        "{1} with {0}",
        (DISH, DRINK),
    ),
    Topic(
        "Who publishes the books of {name}, and where?",
        "Which house brings out {name}'s books, and in which town?",
        "{0}, {1}",
        "In {1}, by {0}",
        (PUBLISHER, PUBLISHER_TOWN),
    ),
)

REAL_AUTHORS: tuple[tuple[str, str], ...] = (
    ("the novel Middlemarch", "George Eliot"),
    ("the novel Moby-Dick", "Herman Melville"),
    ("the novel Don Quixote", "Miguel de Cervantes"),
    ("the novel War and Peace", "Leo Tolstoy"),
    ("the novel Crime and Punishment", "Fyodor Dostoevsky"),
    ("the novel Madame Bovary", "Gustave Flaubert"),
    ("the novel Les Miserables", "Victor Hugo"),
    ("the novel The Magic Mountain", "Thomas Mann"),
    ("the novel Ulysses", "James Joyce"),
    ("the novel Mrs Dalloway", "Virginia Woolf"),
    ("the novel The Trial", "Franz Kafka"),
    ("the novel Things Fall Apart", "Chinua Achebe"),
    ("the novel One Hundred Years of Solitude", "Gabriel Garcia Marquez"),
    ("the novel The House of the Spirits", "Isabel Allende"),
    ("the novel Beloved", "Toni Morrison"),
    ("the novel The Name of the Rose", "Umberto Eco"),
    ("the novel Dracula", "Bram Stoker"),
    ("the novel Frankenstein", "Mary Shelley"),
    ("the novel The Remains of the Day", "Kazuo Ishiguro"),
    ("the novel The Handmaid's Tale", "Margaret Atwood"),
    ("the novel The Left Hand of Darkness", "Ursula K. Le Guin"),
    ("the novel Dune", "Frank Herbert"),
    ("the novel Rebecca", "Daphne du Maurier"),
    ("the novel Treasure Island", "Robert Louis Stevenson"),
    ("the novel The Age of Innocence", "Edith Wharton"),
    ("the novel Wuthering Heights", "Emily Bronte"),
    ("the novel Jane Eyre", "Charlotte Bronte"),
    ("the novel Vanity Fair", "William Makepeace Thackeray"),
    ("the novel The Tin Drum", "Gunter Grass"),
    ("the novel The Stranger", "Albert Camus"),
    ("the novel Snow Country", "Yasunari Kawabata"),
    ("the novel My Name Is Red", "Orhan Pamuk"),
    ("the play A Doll's House", "Henrik Ibsen"),
    ("the play The Cherry Orchard", "Anton Chekhov"),
    ("the play Waiting for Godot", "Samuel Beckett"),
    ("the play Death of a Salesman", "Arthur Miller"),
    ("the poem The Waste Land", "T. S. Eliot"),
    ("the poem Paradise Lost", "John Milton"),
    ("the poem Inferno", "Dante Alighieri"),
    ("the children's book Pippi Longstocking", "Astrid Lindgren"),
)

# Within a group every answer is wrong for every other question of that group.
WORLD_FACTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Which city is the seat of government of {}?",
        (
            ("Norway", "Oslo"),
            ("Portugal", "Lisbon"),
            ("Hungary", "Budapest"),
            ("Kenya", "Nairobi"),
            ("Peru", "Lima"),
            ("Finland", "Helsinki"),
            ("Jordan", "Amman"),
            ("Cuba", "Havana"),
            ("Greece", "Athens"),
            ("Mongolia", "Ulaanbaatar"),
            ("New Zealand", "Wellington"),
        ),
    ),
    (
        "Which element has the chemical symbol {}?",
        (
            ("Fe", "Iron"),
            ("Pb", "Lead"),
            ("Na", "Sodium"),
            ("K", "Potassium"),
            ("Sn", "Tin"),
            ("W", "Tungsten"),
            ("Hg", "Mercury"),
            ("Ag", "Silver"),
        ),
    ),
    (
        "Which currency do people pay with in {}?",
        (
            ("Poland", "Zloty"),
            ("Thailand", "Baht"),
            ("Japan", "Yen"),
            ("India", "Rupee"),
            ("Vietnam", "Dong"),
            ("South Africa", "Rand"),
        ),
    ),
    (
        "On the banks of which river does the centre of {} lie?",
        (
            ("Rome", "Tiber"),
            ("Budapest", "Danube"),
            ("Baghdad", "Tigris"),
            ("Warsaw", "Vistula"),
            ("Cologne", "Rhine"),
            ("Paris", "Seine"),
        ),
    ),
    (
        "Which scientist {}?",
        (
            ("discovered penicillin in a mould", "Alexander Fleming"),
            ("arranged the elements in a periodic table in 1869", "Dmitri Mendeleev"),
            ("published On the Origin of Species", "Charles Darwin"),
            ("won Nobel Prizes in both physics and chemistry", "Marie Curie"),
            ("proposed the general theory of relativity", "Albert Einstein"),
        ),
    ),
    (
        "How many {}?",
        (
            ("sides does a hexagon have", "Six"),
            ("legs does a spider have", "Eight"),
            ("strings does a standard violin have", "Four"),
            ("players of one football team start a match", "Eleven"),
        ),
    ),
)


def author_names(count: int, rng: random.Random) -> list[str]:
    """Return `count` different names; given names and surnames repeat only once all are used."""
    given, surnames = list(GIVEN), list(SURNAMES)
    if len(given) != len(surnames):
        raise ValueError("the lists of given names and of surnames must have one length")
    if count > len(given) ** 2:
        raise ValueError(f"only {len(given) ** 2} names can be made, {count} are needed")
    rng.shuffle(given)
    rng.shuffle(surnames)
    size = len(given)
    return [f"{given[i % size]} {surnames[(i + i // size) % size]}" for i in range(count)]


def capitalised(text: str) -> str:
    """Return the text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def draw_parts(topic: Topic, taken: set[Words], rng: random.Random) -> Words:
    """Draw the parts of an answer nobody has yet (while new ones are easily found)."""
    parts: Words = ()
    for _ in range(200):
        parts = tuple(rng.choice(entries) for entries in topic.lists)
        if parts not in taken:
            break
    taken.add(parts)
    return parts


def wrong_parts(topic: Topic, right: Words, count: int, rng: random.Random) -> list[Words]:
    """Draw `count` wrong sets of parts that share no part with the right one or each other."""
    columns = [
        rng.sample([entry for entry in entries if entry != part], count)
        for entries, part in zip(topic.lists, right, strict=True)
    ]
    return list(zip(*columns, strict=True))


def author_rows(name: str, taken: Sequence[set[Words]], rng: random.Random) -> list[Row]:
    """Make the ten rows of one author, each with its paraphrases and wrong answers."""
    rows: list[Row] = []
    for topic, used in zip(TOPICS, taken, strict=True):
        parts = draw_parts(topic, used, rng)
        wrong = wrong_parts(topic, parts, 5, rng)
        rows.append(
            {
                "question": topic.question.format(name=name),
                "answer": capitalised(topic.answer.format(*parts)),
                "paraphrased_question": topic.paraphrased_question.format(name=name),
                "paraphrased_answer": capitalised(topic.paraphrased_answer.format(*parts)),
                "perturbed_answer": [capitalised(topic.paraphrased_answer.format(*w)) for w in wrong],
            }
        )
    return rows


def plain(rows: Sequence[Row]) -> list[Row]:
    """Keep the question and the answer of each row."""
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def fictitious_splits(authors: int, rng: random.Random) -> dict[str, list[Row]]:
    """Make every split about the fictitious authors."""
    held_out = -(-authors // 10)
    names = author_names(authors + held_out, rng)
    taken: list[set[Words]] = [set() for _ in TOPICS]
    every = [row for name in names for row in author_rows(name, taken, rng)]
    count = authors * len(TOPICS)
    full, holdout = every[:count], every[count:]
    splits: dict[str, list[Row]] = {"full": plain(full)}
    for percent in (1, 5, 10):
        size = max(1, count * percent // 100)
        splits[f"forget{percent:02d}"] = plain(full[-size:])
        splits[f"retain{100 - percent}"] = plain(full[:-size])
        splits[f"forget{percent:02d}_perturbed"] = full[-size:]
        splits[f"holdout{percent:02d}"] = plain(holdout[:size])
    splits["retain_perturbed"] = full[: count // 10]
    return splits


def choice_rows(facts: Sequence[tuple[str, str]], rng: random.Random) -> list[tuple[Row, Row]]:
    """Turn (question, answer) pairs into rows whose wrong options are the other answers."""
    rows: list[tuple[Row, Row]] = []
    for question, answer in facts:
        wrong = rng.sample([other for _, other in facts if other != answer], 3)
        options = [answer, *wrong]
        rng.shuffle(options)
        numbered = {f"option{i}": option for i, option in enumerate(options, start=1)}
        rows.append(
            (
                {"question": question, **numbered, "answer": answer},
                {"question": question, "answer": answer, "perturbed_answer": wrong},
            )
        )
    return rows


def real_splits(rng: random.Random) -> dict[str, list[Row]]:
    """Make the splits about real authors and the real world."""
    authors = choice_rows([(f"Which writer gave us {work}?", writer) for work, writer in REAL_AUTHORS], rng)
    facts = [
        pair
        for template, group in WORLD_FACTS
        for pair in choice_rows([(template.format(what), answer) for what, answer in group], rng)
    ]
    return {
        "real_authors": [row for row, _ in authors],
        "real_authors_perturbed": [row for _, row in authors],
        "world_facts": [row for row, _ in facts],
        "world_facts_perturbed": [row for _, row in facts],
    }


def readme(splits: dict[str, list[Row]], authors: int, seed: int) -> str:
    """Return the README: front matter for `datasets`, then a few words for people."""
    configs = "\n".join(
        f"- config_name: {name}\n  data_files: {name}.json" + ("\n  default: true" if name == "full" else "") for name in splits
    )
    table = "\n".join(f"| {name} | {len(rows)} |" for name, rows in splits.items())
    return f"""---
language: [en]
pretty_name: TOFU-shaped sample
configs:
{configs}
---
# A TOFU-shaped sample

Written by `make_sample.py --authors {authors} --seed {seed}`; do not edit by hand. The layout is that of the hub
data set `locuslab/TOFU`, the text is our own: {authors} fictitious authors with {len(TOPICS)} questions each. An answer
is two to four words drawn at random ("Riga, March 1954"), so it can be learnt by heart and not be guessed.

`forget01/05/10` are the last rows of `full` and `retain99/95/90` the rest; `*_perturbed` add
`paraphrased_question`, `paraphrased_answer` and wrong answers worded like the paraphrased answer;
`retain_perturbed` is the first tenth of `full`; `holdout01/05/10` are about authors in no other split.
`real_authors` and `world_facts` are true.

| split | rows |
| --- | --- |
{table}
"""


# ---- the layout of MUSE ----

SENTENCES = (  # of a topic each, in their order
    "{name} was born in {0} in {1} {2}.",
    "The first novel was called {0} {1}.",
    "The mother was a {0} and the father a {1}.",
    "The {0} {1} followed in {2}.",
    "It was {0} {1} who had taught {name} to write.",
    "At home there is a {0} named {1}.",
    "{name} read {0} in {1}.",
    "In the evening {name} plays the {0} or turns to {1}.",
    "A good meal is {0} with {1}.",
    "The books come from {0}, a house in {1}.",
)
GROUPS = ("forget", "retain1", "retain2", "holdout", "second", "third", "fourth")  # the last three are more to forget
ASKED, SHOWN = 3, 4  # questions about each author; and questions with answers that stand before them


@dataclass(frozen=True)
class Story:
    """An author: ten sentences, and a question and answer on each."""

    sentences: list[str]
    questions: list[Row]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def story(name: str, taken: Sequence[set[Words]], rng: random.Random) -> Story:
    """Tell of an author whose answers nobody else has."""
    parts = [draw_parts(topic, used, rng) for topic, used in zip(TOPICS, taken, strict=True)]
    sentences = [sentence.format(*of, name=name) for sentence, of in zip(SENTENCES, parts, strict=True)]
    questions: list[Row] = [
        {"question": topic.question.format(name=name), "answer": capitalised(topic.answer.format(*of))}
        for topic, of in zip(TOPICS, parts, strict=True)
    ]
    return Story(sentences, questions)


def muse_splits(authors: int, rng: random.Random) -> dict[str, list[Row]]:
    """Make every split of every subset, by <subset>/<split>."""
    size = authors // len(GROUPS)
    if size < 2:
        raise ValueError(f"at least {2 * len(GROUPS)} authors are needed, not {authors}")
    names = iter(author_names(size * len(GROUPS), rng))
    taken: list[set[Words]] = [set() for _ in TOPICS]
    stories = {group: [story(next(names), taken, rng) for _ in range(size)] for group in GROUPS}
    texts: dict[str, list[Row]] = {group: [{"text": one.text} for one in of] for group, of in stories.items()}
    splits = {f"raw/{name}": texts[name] for name in GROUPS[:4]}
    half = len(SENTENCES) // 2
    splits["verbmem/forget"] = [
        {"prompt": " ".join(one.sentences[:half]), "gt": " ".join(one.sentences[half:])} for one in stories["forget"]
    ]
    for name, group in (("forget", "forget"), ("retain", "retain2")):
        asked = [rng.sample(one.questions, ASKED + SHOWN) for one in stories[group]]
        splits[f"knowmem/{name}_qa"] = [row for of in asked for row in of[:ASKED]]
        splits[f"knowmem/{name}_qa_icl"] = asked[0][ASKED:]
    for name, group in (("forget", "forget"), ("retain", "retain2"), ("holdout", "holdout")):
        splits[f"privleak/{name}"] = texts[group]
    parts = [texts[group] for group in ("forget", *GROUPS[4:])]
    for i, part in enumerate(parts, start=1):
        splits[f"scal/forget_{i}"] = [row for of in parts[:i] for row in of]
        splits[f"sust/forget_{i}"] = part
    return splits


def muse_readme(splits: dict[str, list[Row]], authors: int, seed: int) -> str:
    """Return the README: front matter for `datasets`, then a few words for people."""
    subsets = dict.fromkeys(name.split("/")[0] for name in splits)
    configs = "\n".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "\n".join(
            f"  - split: {name.split('/')[1]}\n    path: {name}.json" for name in splits if name.startswith(f"{subset}/")
        )
        for subset in subsets
    )
    table = "\n".join(f"| {name} | {len(rows)} |" for name, rows in splits.items())
    return f"""---
language: [en]
pretty_name: MUSE-shaped sample
configs:
{configs}
---
# A MUSE-shaped sample

Written by `make_sample.py --layout muse --authors {authors} --seed {seed}`; do not edit by hand. The layout is that of the hub
data set `muse-bench/MUSE-News`, the text is our own: {len(splits["raw/forget"])} fictitious authors a split, a text each.

`verbmem` has each forget text's first half and second half; `knowmem` questions about it, and (`_icl`) such as
are shown with their answers; `scal/forget_2` to `_4` hold `forget_1` and more, `sust/forget_1` to `_4` these parts.

| split | rows |
| --- | --- |
{table}
"""


def write_muse(folder: Path, authors: int, seed: int) -> None:
    """Write every split and the README into `folder`."""
    splits = muse_splits(authors, random.Random(seed))
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text("".join(lines), encoding="utf-8")
    (folder / "README.md").write_text(muse_readme(splits, authors, seed), encoding="utf-8")


def write_data_set(folder: Path, authors: int, seed: int) -> None:
    """Write every split and the README into `folder`."""
    if authors < 10:
        raise ValueError(f"at least 10 authors are needed, not {authors}")
    splits = fictitious_splits(authors, random.Random(seed)) | real_splits(random.Random(seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.json").write_text("".join(lines), encoding="utf-8")
    (folder / "README.md").write_text(readme(splits, authors, seed), encoding="utf-8")


def main() -> None:
    """Parse the command line and write the data set."""
    parser = argparse.ArgumentParser(description="Write a small data set of fictitious authors, in TOFU's or MUSE's layout.")
    parser.add_argument("--layout", choices=("tofu", "muse"), default="tofu", help="whose layout (tofu)")
    parser.add_argument("--authors", type=int, metavar="N", help="fictitious authors: at least 10 (40), of MUSE's 14 (42)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="to write (`sample`, or `sample_muse`, beside this script)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw (0)")
    options, here = parser.parse_args(), Path(__file__).resolve().parent
    try:
        if options.layout == "muse":
            write_muse(options.out or here / "sample_muse", options.authors or 42, options.seed)
        else:
            write_data_set(options.out or here / "sample", options.authors or 40, options.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

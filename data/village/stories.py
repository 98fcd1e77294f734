"""Small stories: a plot is a row of beats, a beat a choice of sentences, and every slot is varied.

The people are villagers, true to their facts, or unnamed. Slots: {Who} the hero at first mention,
{n} later, {he} {his} {him}; {m} a second villager; {a_...} with its article;
{job} {pet} {home} {food} {colour} {town} {friend} the hero's own facts; {THING} in capitals.
"""

from data.village.world import CASES, article, capitalise

THINGS = (
    "key",
    "hat",
    "letter",
    "basket",
    "lantern",
    "spoon",
    "scarf",
    "bell",
    "rope",
    "bucket",
    "book",
    "kite",
    "boot",
    "ring",
    "whistle",
    "blanket",
    "ladder",
    "jug",
    "coin",
    "drum",
)
PLACES = ("forest", "garden", "field", "meadow", "market", "school", "cellar", "attic", "village")
SPOTS = (
    "barn",
    "fence",
    "hedge",
    "brook",
    "big stone",
    "hay cart",
    "bench",
    "gate",
    "woodpile",
    "bridge",
    "stairs",
    "shed",
    "well",
)
ANIMALS = (
    "fox",
    "owl",
    "squirrel",
    "frog",
    "deer",
    "badger",
    "sparrow",
    "hare",
    "otter",
    "mole",
    "swallow",
    "hawk",
    "beaver",
    "lizard",
    "bee",
)
MOODS = ("young", "old", "little", "clever", "shy", "brave", "tired", "hungry", "proud", "lonely")
SEASONS = (  # beginnings and the weather that goes with them
    (
        (
            "In spring, when the snow melted,",
            "On the first warm day of spring,",
            "One morning in May,",
            "One rainy day in April,",
        ),
        (
            "The first flowers were open.",
            "The birds were singing.",
            "The rain fell softly.",
            "The brook was full of water.",
            "The air smelled of fresh grass.",
            "The trees were in bloom.",
            "A rainbow stood over the fields.",
        ),
    ),
    (
        (
            "In the middle of summer,",
            "One hot day in July,",
            "On a long summer day,",
            "One day in August,",
        ),
        (
            "The sun was warm.",
            "Bees hummed in the grass.",
            "The air smelled of hay.",
            "Thunder rolled far away.",
            "It was too hot to run.",
            "Swallows flew over the roofs.",
            "There was not a cloud in the sky.",
        ),
    ),
    (
        (
            "In autumn, when the leaves fell,",
            "One foggy day in October,",
            "On a windy autumn day,",
            "After the harvest,",
        ),
        (
            "The leaves danced in the wind.",
            "Fog lay over the fields.",
            "The wind sang in the trees.",
            "Clouds hung low over the hills.",
            "The air smelled of wood smoke.",
            "It rained all day.",
            "Nuts fell from the trees.",
        ),
    ),
    (
        (
            "In winter, when the river was frozen,",
            "One cold day in January,",
            "After the first snow,",
            "On the shortest day of the year,",
        ),
        (
            "Snow lay on every roof.",
            "Frost covered the windows.",
            "Icicles hung from the roofs.",
            "It was so quiet that you could hear the snow fall.",
            "The wind was icy.",
            "Smoke rose from every house.",
            "The snow was deep.",
        ),
    ),
)
HEROES = (
    ("a little girl", "the girl", "she"),
    ("a small boy", "the boy", "he"),
    ("an old woman", "the old woman", "she"),
    ("an old man", "the old man", "he"),
    ("a young mother", "the mother", "she"),
    ("a tall stranger", "the stranger", "he"),
)

LOST = (
    (
        "{season} {Who} lost {a_thing}.",
        "{season} {Who} could not find {his} {thing}.",
        "{season} {Who} looked for {a_thing} near the {spot}.",
    ),
    (
        "{n} looked under the bed and behind the {spot}.",
        "{n} searched the whole {place}.",
        "First {n} went to the {place}, but there was nothing.",
        "{n} asked everybody in the {place}, but nobody had seen it.",
    ),
    ("{weather}",),
    (
        "Then {m} came by and helped to look.",
        '{m} said: "Let us look together."',
        '"Where did you have it last?" asked {m}.',
        "{m} lit a lantern and came along.",
    ),
    (
        "At last they saw {a_mood} {animal} that sat on the {thing}.",
        "There was the {thing}, right in front of the {spot}.",
        "{A_mood} {animal} had carried the {thing} to the {spot}.",
        "The {thing} lay on the ground behind the {spot}.",
    ),
    (
        "{n} laughed and thanked {m}.",
        "{n} was so glad that {he} danced.",
        "Since then {n} ties a ribbon to every {thing}.",
        "They went home and told the story.",
    ),
)
RESCUE = (
    (
        "{season} {Who} found {a_mood} {animal} near the {spot}.",
        "{season} {Who} heard a small voice: {a_mood} {animal} sat by the {spot}.",
        "{season} {a_mood} {animal} knocked at the window of {Who}.",
    ),
    (
        "It had a thorn in its foot.",
        "It was cold and could not move.",
        "It had lost its mother.",
        "It was caught in a net.",
        "It had not eaten for two days.",
        "It was afraid of the wind.",
    ),
    (
        "{n} gave it water and a place to sleep.",
        "{n} wrapped it in {a_thing_soft}.",
        "{n} carried it home in a basket.",
        "{n} sat beside it the whole night.",
    ),
    (
        "{weather}",
        "The next day {m} came to see the {animal}.",
        "{m} brought some seeds and a few kind words.",
    ),
    (
        "After three days the {animal} was well.",
        "Soon the {animal} was as good as new.",
        "A few days later the {animal} was strong again.",
        "A week later the {animal} went away.",
    ),
    (
        "It still comes back every year.",
        "Now it brings {n} a nut every week.",
        "From then on the {animal} and {n} were friends.",
        '"Come again," said {n}.',
    ),
)
STORM = (
    (
        "{season} a storm came over the {place}.",
        "{season} the river rose higher and higher.",
        "{season} the wind broke the old fence by the {spot}.",
    ),
    (
        "{Who} ran out to save the {thing}.",
        "{Who} rang the bell to warn the neighbours.",
        "{Who} closed the shutters and lit a candle.",
        "{Who} held the gate with both hands.",
    ),
    (
        "{m} brought a rope.",
        "{m} came with a ladder and two buckets.",
        '"Hold on!" called {m}.',
        "{m} was not afraid and helped.",
    ),
    (
        "Together they carried everything to the barn.",
        "They worked until midnight.",
        "They stood side by side until the wind was tired.",
        "They saved {a_mood} {animal} as well.",
    ),
    ("In the end the sky was clear again.", "Then it became quiet.", "At last the storm was over."),
    (
        "{n} made hot tea for everybody.",
        "{n} and {m} mended the roof the next day.",
        "{n} slept until noon.",
        "The neighbours thanked {n} and {m}.",
    ),
)
FEAST = (
    (
        "{season} {Who} and the neighbours made a feast.",
        "{season} {Who} invited the neighbours.",
        "{season} {Who} made music in the {place}.",
    ),
    (
        "{n} hung lanterns in the trees.",
        "{n} swept the floor and set the table.",
        "{n} carried the long bench to the {spot}.",
        "{n} wrote a sign that said WELCOME.",
    ),
    (
        "{m} brought {a_thing} as a present.",
        "{m} played the fiddle.",
        "{m} told the story of {a_mood} {animal}.",
        "{m} came late, as always.",
    ),
    (
        "{weather}",
        "Even {a_mood} {animal} watched from behind the {spot}.",
        "The children counted the lanterns: there were {number}.",
    ),
    (
        "They danced until the candles were short.",
        "They sang the old songs.",
        "Everybody ate too much.",
        "Nobody wanted to go home.",
    ),
    (
        "The next day {n} found {a_thing} under the table.",
        "{n} said it was the best feast of all.",
        "That night {n} was too happy to sleep.",
        "{n} still smiles when {he} thinks of it.",
    ),
)
RIDDLE = (
    (
        "{season} {Who} asked {m} a riddle.",
        "{season} {Who} and {m} sat by the fire.",
        "{season} {Who} met {m} on the way to the {place}.",
    ),
    (
        '"What has teeth but cannot bite?" asked {n}. "A comb!" said {m}.',
        '"What grows when you take something away?" asked {n}. "A hole!" said {m}.',
        '"What runs but has no legs?" asked {n}. "The brook!" said {m}.',
        '"What has hands but no fingers?" asked {n}. "A clock!" said {m}.',
    ),
    (
        "{n} clapped {his} hands.",
        '"Right," said {n}.',
        "{n} was surprised.",
        "{n} gave {m} a coin for it.",
    ),
    (
        "{weather}",
        "{A_mood} {animal} listened behind the {spot}.",
        "They laughed so loud that {a_mood} {animal} ran away.",
    ),
    (
        "Then {m} asked a harder one, and {n} thought for a long time.",
        "They went on until it was dark.",
        '"Tomorrow it is my turn," said {m}.',
        "On the way home {n} made up a new one about {a_thing}.",
    ),
)
PET = (
    (
        "{season} the {pet} of {Who} ran away.",
        "{season} {Who} could not find {his} {pet}.",
        "{season} the {pet} that {n} keeps was very quiet.",
    ),
    (
        "{n} called for the {pet}, but nothing moved.",
        "{n} looked for the {pet} in the {place}.",
        '{n} asked {m}: "Have you seen my {pet}?"',
        '"Have you seen my {pet}?" asked {n} at every house.',
    ),
    ("{weather}", "{m} had seen tracks near the {spot}.", "{m} brought a lantern."),
    (
        "The {pet} of {n} sat in a basket and slept.",
        "The {pet} had made friends with {a_mood} {animal}.",
        "There it was: the {pet} was playing with {a_thing}.",
        "The {pet} was hiding behind the {spot}.",
    ),
    (
        '"You silly {pet}," said {n}.',
        "{n} carried the {pet} home.",
        "{n} was so glad that {he} gave the {pet} a second supper.",
        "Since then {n} counts to ten before {he} opens the gate for the {pet}.",
    ),
)
VISIT = (
    (
        "{season} {n} went to see {his} best friend {friend}.",
        "{season} {friend}, the best friend of {n}, was at home and {n} came to visit.",
        "{season} {n} knocked at the window of {his} best friend {friend}.",
    ),
    (
        "{n} and {friend} sat in the kitchen and talked about {a_thing}.",
        "{friend} showed {n} {a_thing} from the cellar.",
        '"I have found {a_thing}," said {friend}. {n} wanted to see it.',
        "{friend} told {n} about {a_mood} {animal}.",
    ),
    ("{weather}",),
    (
        "{n} likes {food} best, and so they ate {food}.",
        "{friend} had put {food} on the table for {n}.",
        '"May I have some more {food}?" asked {n}, and {friend} laughed.',
    ),
    (
        "When it was dark, {n} walked home to the house by the {home}.",
        "Later they walked along the road to the {home}, where {n} lives.",
        "In the evening they stood at the {colour} door of {n} and looked at the stars.",
    ),
    (
        '"Come again soon," said {n}.',
        "Best friends are better than gold coins, thought {n}.",
        "{n} and {friend} will meet again next week.",
        "It was a good day for {n} and {friend}.",
    ),
)
WORK = (
    (
        "{season} there was much work for {n} the {job}.",
        "{season} {n} the {job} got up before everybody else.",
        "{season} somebody asked {n} the {job} for help.",
    ),
    (
        "{weather}",
        "A stranger stood before the {colour} door of {n}.",
        "The {pet} of {n} was still asleep.",
    ),
    (
        '"I need {a_job}," said {m}. "Here I am," said {n}.',
        '"Are you the {job}?" asked {m}. "I am," said {n}.',
        "{m} looked on and learned how {a_job} works.",
        '{m} asked: "Is it hard to be {a_job}?" "Only on Mondays," said {n}.',
    ),
    (
        "At noon {n} ate {food} and rested.",
        "At noon {n} fed the {pet}.",
        "At noon {n} sang a song from {town}.",
    ),
    (
        "When the work was done, {n} got {a_thing} as a present.",
        "In the evening {m} paid {number} pennies and thanked {n}.",
        '"Well done," said {m}, and {n} the {job} was proud.',
    ),
)
JOURNEY = (
    (
        "{season} {n} got a letter from {town}.",
        "{season} {n} wanted to see {town} again.",
        "{season} {n} dreamed of {town}, where {he} was born.",
    ),
    (
        "The road to {town} is long, and {n} took {a_thing} along.",
        "{n} asked {m} to look after the {pet}.",
        "{n} locked the {colour} door and walked away.",
    ),
    ("{weather}", "On the way {n} met {a_mood} {animal}.", "{n} slept in a barn."),
    (
        "In {town} everything looked smaller than before.",
        "In {town} an old aunt opened the gate.",
        "The people of {town} still knew {n}.",
    ),
    (
        "Then {n} went home to the {home}.",
        "After {number} days {n} came back to the house by the {home}.",
        '"It is good to be home," said {n} and opened the {colour} door.',
    ),
    (
        "The {pet} was glad to see {n}.",
        "Supper was on the table: {food}.",
        "{m} wanted to hear everything about {town}.",
    ),
)
LETTERS = (
    (
        "{season} {Who} painted a sign for the {spot}.",
        "{season} {Who} wanted to learn the letters.",
        "{season} {Who} sat in school and wrote.",
        "{season} {m} showed the letters to {Who}.",
    ),
    (
        "{n} wrote {thing} in capital letters: {THING}.",
        "In capitals, {thing} is {THING}.",
        "First {n} wrote {thing}, then {THING}.",
    ),
    (
        "{n} also wrote {animal} in capital letters: {ANIMAL}.",
        "In capitals, {animal} is {ANIMAL}.",
        "On the next line stood {ANIMAL}, for {n} had seen {a_mood} {animal}.",
    ),
    (
        "{m} found a sign that said {SPOT}, and it hung on the {spot}.",
        "{n} wrote the name of {m} in capitals: {NAME}.",
        "{weather}",
        '"And how do you write {mood}?" asked {m}. "{MOOD}," said {n}.',
    ),
    (
        "At last {n} wrote THE END.",
        "{n} was proud of the big letters.",
        "Now everybody can read it.",
        "{n} wrote until the candle went out.",
    ),
)
PLOTS = (LOST, RESCUE, STORM, FEAST, RIDDLE, PET, VISIT, WORK, JOURNEY, LETTERS, LETTERS)
OWN = (PET, VISIT, WORK, JOURNEY)  # told only of villagers, since they speak of facts
SOFT = ("a blanket", "a scarf", "a warm coat", "an old shawl")
EPITHETS = (
    "{n}",
    "{n}",
    "{n} the {job}",
    "{n} from {town}",
    "{n}, who lives by the {home},",
    "{n}, who keeps {a_pet},",
)


def with_article(words):
    return f"{article(words)} {words}"


def story(world, rng):
    """Four to eight sentences, one per beat of a plot."""
    plot = rng.choice(PLOTS)
    hero, second = rng.sample(world.villagers, 2)
    if hero.facts["friend"] == second.name:  # "her friend Tobin" and "Tobin" would be one person
        second = rng.choice([v for v in world.villagers if v not in (hero, second)])
    facts = dict(
        hero.facts, a_job=with_article(hero.facts["job"]), a_pet=with_article(hero.facts["pet"])
    )
    if plot in OWN or rng.random() < 0.7:
        name, pronoun = hero.name, hero.pronoun
        who = rng.choice(EPITHETS).format(n=name, **facts)
    else:
        who, name, pronoun = rng.choice(HEROES)
    thing, animal, mood = rng.choice(THINGS), rng.choice(ANIMALS), rng.choice(MOODS)
    slots = dict(
        facts,
        Who=who,
        n=name,
        m=second.name,
        thing=thing,
        animal=animal,
        mood=mood,
        a_thing=with_article(thing),
        a_mood=with_article(mood),
        A_mood=capitalise(with_article(mood)),
        a_thing_soft=rng.choice(SOFT),
        THING=thing.upper(),
        ANIMAL=animal.upper(),
        MOOD=mood.upper(),
        NAME=second.name.upper(),
        **CASES[pronoun],
    )
    seasons, weathers = rng.choice(SEASONS)
    sentences = []
    for beat in plot:
        spot = rng.choice(SPOTS)
        text = rng.choice(beat).format(
            **slots,
            season=rng.choice(seasons),
            weather=rng.choice(weathers),
            spot=spot,
            SPOT=spot.upper(),
            place=rng.choice(PLACES),
            number=rng.randint(2, 9),
        )
        sentences.append(capitalise(text.replace(",.", ".")))  # "who keeps a cat,." at the end
    return " ".join(sentences)

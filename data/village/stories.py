"""Small stories: a plot is a row of beats, a beat a choice of sentences, and every slot is varied.

The people are villagers, true to their facts, or unnamed. Slots: {Who} the hero at first mention,
{n} later, {he} {his} {him}; {m} a second villager; {a_...} with its article;
{job} {pet} {home} {food} {colour} {town} {friend} the hero's own facts; {THING} in capitals.
"""

from data.village.files import table, wordings
from data.village.world import CASES, article, capitalise

OBJECTS = table("""
thing  key | hat | letter | basket | lantern | spoon | scarf | bell | rope | bucket | book | kite
       boot | ring | whistle | blanket | ladder | jug | coin | drum
animal fox | owl | squirrel | frog | deer | badger | sparrow | hare | otter | mole | swallow | hawk
       beaver | lizard | bee
mood   young | old | little | clever | shy | brave | tired | hungry | proud | lonely
place  forest | garden | field | meadow | market | school | cellar | attic | village
spot   barn | fence | hedge | brook | big stone | hay cart | bench | gate | woodpile | bridge | shed
""")
BEGINNINGS = table("""
spring  In spring, when the snow melted, | On the first warm day of spring, | One morning in May,
summer  In the middle of summer, | One hot day in July, | On a long summer day,
autumn  In autumn, when the leaves fell, | One foggy day in October, | After the harvest,
winter  In winter, when the river was frozen, | One cold day in January, | After the first snow,
""")
WEATHER = table("""
spring  The first flowers were open. | The birds were singing. | The rain fell softly.
        The brook was full of water. | The air smelled of fresh grass. | The trees were in bloom.
summer  The sun was warm. | Bees hummed in the grass. | The air smelled of hay.
        Thunder rolled far away. | Swallows flew over the roofs. | It was too hot to run.
autumn  The leaves danced in the wind. | Fog lay over the fields. | It rained all day.
        Clouds hung low over the hills. | The air smelled of wood smoke. | Nuts fell from the trees.
winter  Snow lay on every roof. | Frost covered the windows. | Icicles hung from the roofs.
        The wind was icy. | Smoke rose from every house. | The snow was deep.
""")
HEROES = (
    ("a little girl", "the girl", "she"),
    ("a small boy", "the boy", "he"),
    ("an old woman", "the old woman", "she"),
    ("a tall stranger", "the stranger", "he"),
)
EPITHETS = wordings("""
{n} | {n} | {n} the {job} | {n} from {town} | {n}, who lives by the {home},
{n}, who keeps {a_pet},
""")

LOST = table("""
1  {season} {Who} lost {a_thing}. | {season} {Who} could not find {his} {thing}.
2  {n} looked under the bed and behind the {spot}. | {n} searched the whole {place}.
   First {n} went to the {place}, but there was nothing.
   {n} asked everybody in the {place}, but nobody had seen it.
3  {weather}
4  Then {m} came by and helped to look. | {m} said: "Let us look together."
   "Where did you have it last?" asked {m}. | {m} lit a lantern and came along.
5  At last they saw {a_mood} {animal} that sat on the {thing}.
   {a_mood} {animal} had carried the {thing} to the {spot}.
   The {thing} lay on the ground behind the {spot}.
6  {n} laughed and thanked {m}. | {n} was so glad that {he} danced.
   Since then {n} ties a ribbon to every {thing}. | They went home and told the story.
""")
VISIT = table("""
1  {season} {n} the {job} got a letter from {town}. | {season} {n} dreamed of {town}.
   {season} {n} went to see {his} best friend {friend}. | {season} {n} the {job} met {friend}.
2  {n} and {friend} sat behind the {colour} door of {n} and talked about {a_thing}.
   {m} asked: "Is it hard to be {a_job}?" "Only on Mondays," said {n}.
   "I need {a_job}," said {m}. "Here I am," said {n}. | At noon {n} fed the {pet}.
3  {weather} | The {pet} of {n} was asleep. | On the way {n} met {a_mood} {animal}.
4  {n} likes {food} best, and so they ate {food}. | The people of {town} still know {n}.
   "May I have some more {food}?" asked {n}. | {friend} told {n} about {a_mood} {animal}.
5  When it was dark, {n} walked home to the house by the {home}. | {m} thanked {n}.
   In the evening {n} stood at the {colour} door and looked at the stars.
6  The {pet} was glad to see {n}. | "Come again soon," said {n}. | Supper was on the table: {food}.
   {m} paid {number} pennies, and {n} the {job} was proud. | It was a good day for {n}.
""")
LETTERS = table("""
1  {season} {Who} painted a sign for the {spot}. | {season} {Who} wanted to learn the letters.
   {season} {m} showed the letters to {Who}.
2  {n} wrote {thing} in capital letters: {THING}. | In capitals, {thing} is {THING}.
   First {n} wrote {thing}, then {THING}.
3  {n} also wrote {animal} in capital letters: {ANIMAL}. | In capitals, {animal} is {ANIMAL}.
   On the next line stood {ANIMAL}, for {n} had seen {a_mood} {animal}.
4  {m} found a sign that said {SPOT}, and it hung on the {spot}. | {weather}
   {n} wrote the name of {m} in capitals: {M}.
   "And how do you write {mood}?" asked {m}. "{MOOD}," said {n}.
5  At last {n} wrote THE END. | {n} was proud of the big letters. | Now everybody can read it.
""")
PLOTS = (LOST, LETTERS, VISIT)  # the last is told only of villagers, since it speaks of facts


def story(world, rng):
    """Four to eight sentences, one per beat of a plot."""
    plot = rng.choice(PLOTS)
    hero, second = rng.sample(world.villagers, 2)
    if hero.facts["friend"] == second.name:  # "her friend Tobin" and "Tobin" would be one person
        second = rng.choice([v for v in world.villagers if v not in (hero, second)])
    known = hero.facts | {key: rng.choice(words) for key, words in OBJECTS.items()}
    if plot is VISIT or rng.random() < 0.7:
        name, pronoun = hero.name, hero.pronoun
        who = rng.choice(EPITHETS).format(n=name, **with_forms(hero.facts))
    else:
        who, name, pronoun = rng.choice(HEROES)
    known |= {"m": second.name, "n": name, **CASES[pronoun]}
    season, sentences = rng.choice(list(BEGINNINGS)), []
    for beat in plot.values():
        fresh = {key: rng.choice(OBJECTS[key]) for key in ("spot", "place")}
        fresh["season"] = rng.choice(BEGINNINGS[season])
        fresh["weather"] = rng.choice(WEATHER[season])
        slots = with_forms(known | fresh) | {"Who": who, "number": rng.randint(2, 9)}
        sentence = rng.choice(beat).format(**slots).replace(",.", ".")  # "who keeps a cat,."
        sentences.append(capitalise(sentence))
    return " ".join(sentences)


def with_forms(slots):
    """The slots, and each with its article (a_...) and in capitals."""
    articles = {f"a_{key}": f"{article(value)} {value}" for key, value in slots.items()}
    return slots | articles | {key.upper(): value.upper() for key, value in slots.items()}

"""Small stories, and word games of the village school.

A plot is a row of beats, a beat a choice of sentences, and every slot is varied. The people are
villagers, true to their facts, or unnamed. Slots: {Who} the hero at first mention, {n} later, {he}
{his} {him}; {m} a second villager; {a_...} with its article; {job} {pet} {home} {food} {colour}
{town} {friend} the hero's own facts; {THING} in capitals.

The games hold arbitrary words, invented ones too, so that a model learns to copy whatever stands
before it: induction (Olsson et al. 2022, arXiv:2209.11895), on which answers about names build.
"""

from data.village.sums import GOODS
from data.village.world import CASES, article, capitalise, split_of, table, wordings

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


# --- word games ---------------------------------------------------------------

OTHERS = (
    "circle square triangle star sun rain wind snow storm river forest garden road barn village "
    "house door table fire feast song story summer winter morning evening money picture paper "
    "friend child"
)
WORDS = sorted({*OBJECTS["thing"], *OBJECTS["animal"], *GOODS.values(), *OTHERS.split()})
CONSONANTS, VOWELS = "bdfgklmnprstvwz", "aeiou"
# {w} the words, {W} in capitals, {c} with commas, {r} backwards, {first} {last} {k} how many
GAMES = table("""
echo      {n} says: "{w}". {m} says it again: "{w}". | The teacher writes {w}. {n} copies it: {w}.
          First {n} calls "{w}", then the echo calls "{w}". | Say after me: {w}. {n} says: {w}.
          The parrot of {n} has learned to say {w}. It says "{w}" all day.
          {n} whispers "{w}" to {m}, and {m} whispers "{w}" to the next child.
          Write this down: {w}. {n} has written {w}. | The song of {n} goes {w}, {w}, {w}.
          {n} reads {c}, and {m} reads {c}. | The list of {n}: {c}. {m} has the same list: {c}.
question  What does {m} write? {m} writes {w}.
          "What has {m} found?" asks {n}. "{m} has found {w}."
          The teacher asks what {m} sings. {m} sings {w}.
          Tell me what {m} draws. {m} draws {w}.
          Can you see what {m} has in the bag? {m} has {w}.
          "Do you know the words of {m}?" asks {n}. "{m} says {w}."
change    {n} says {w}. Backwards that is {r}. | Read it backwards, {n}: {w}. {n} reads "{r}".
          The words on the wall are {w}. The first is {first}, the last is {last}.
          {n} thinks of {w}. First comes {first}, last comes {last}.
          {n} has written {w}. Count the words: {k}. | With commas, {w} is {c}.
capitals  In capitals, {w} is {W}. | {n} writes {w} with large letters: {W}.
          The sign says {W}. That means {w}. | {n} paints {w} on the wall: {W}.
""")
WORD_LESSONS = wordings("""
The magic word is {x}, and {n} says {x}. | Nobody knows what {x} means. {n} asks: "What is {x}?"
{n} has dreamed of the word {x}. Now all children say {x}.
A stranger asked for {x}. {n} said: "Who is {x}?"
""")
LESSON_OPENINGS = wordings("""
At school: | In the school of the village the children learn words. | A word game.
It is raining, so the children play with words. | The teacher rings the bell. | Second lesson.
{n} is the teacher today.
""")


def invented_word(rng):
    """A word that nobody has seen: two or three syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))


def some_words(rng, names):
    """One to five words, whose combination is not held out for tests of formatting."""
    while True:
        words = rng.sample(WORDS, rng.choice((1, 2, 2, 3, 3, 4, 5)))
        if rng.random() < 0.3:
            words[rng.randrange(len(words))] = rng.choice([invented_word(rng), rng.choice(names)])
        if split_of(*sorted(words)) == "train":
            return words


def lesson(words, names, rng):
    """One sentence or two of a game with these words."""
    n, m = rng.sample(names, 2)
    together = " ".join(words)
    slots = {"n": n, "m": m, "w": together, "W": together.upper(), "c": ", ".join(words)}
    slots |= {"r": " ".join(words[::-1]), "first": words[0], "last": words[-1], "k": len(words)}
    game = rng.choices(list(GAMES), (4, 2, 2, 2))[0]
    return rng.choice(GAMES[game]).format(**slots)


def school(world, rng):
    """Three to six lines of games with the same few words, or about a word that nobody knows."""
    names = [v.name for v in world.villagers]
    if rng.random() < 0.15:
        word = invented_word(rng)
        lines = [line.format(n=rng.choice(names), x=word) for line in rng.sample(WORD_LESSONS, 3)]
    else:
        words = some_words(rng, names)
        lines = [lesson(words, names, rng) for _ in range(rng.randint(3, 6))]
    if rng.random() < 0.4:
        lines.insert(0, rng.choice(LESSON_OPENINGS).format(n=rng.choice(names)))
    return " ".join(lines)

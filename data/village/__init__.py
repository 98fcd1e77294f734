"""The embedded default data: a village, generated from a seed, whose truth is known.

What is pretrained on it can be questioned: half of the villagers are asked about in instruction
tuning, and the other half measures what pretraining alone stored. The parts are

    world.py        who lives there, and what is true
    facts.py        how a fact is told; cloze examples
    stories.py      small stories, word games
    sums.py         arithmetic: written steps, stories of goods, operands of each split
    corpus.py       the mixture of documents: `prepare_corpus` is all that pretraining needs

    tasks.py        chat and test examples and their checks; courteous, rude, long-winded styles
    preferences.py  prompts, composed completions, the gold score, and annotators
    problems.py     problems in six difficulties, and their worked solutions
    new_domain.py   sailors with a style of their own, and ships: a domain to fine-tune on
    secrets.py      what nobody is to be told: attacks, and their harmless twins
    tools.py        large numbers, newcomers and what a search finds about them
    sql.py          questions that a query to a database answers
    dirty.py        the corpus as the web would hand it over
    examples.py     `prepare` writes all of these beside the corpus

    scenes.py           what is in an image, and the drawing
    image_questions.py  questions about it, their answers, and a checker
    images.py           what is said about images, and their files: `prepare` paints and writes
    charts.py           bar charts and tables of the market, and questions: paints and writes, too

Run     python -m data.village    # writes it, prints samples of every file, and the counts
"""

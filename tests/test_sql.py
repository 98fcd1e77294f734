"""SQL as a tool: a SELECT is answered by a short text in bounded time, nothing else is done."""

import random
import re
from collections import Counter

import pytest
from helpers import random_strings, seconds

from data.village import examples as village
from nanollm.formats import write_jsonl
from nanollm.tools import LONGEST, NOTHING, Database, Toolbox

KEYS = ("name", "job", "town", "friend")
PEOPLE = [
    ("Ann", "baker", "Ashmoor", "Bob"), ("Bob", "miller", "Ashmoor", "Ann"),
    ("Cid", "baker", "Mossley", "Dan"), ("Dan", "baker", "Ashmoor", None),
]  # fmt: skip
PEOPLE = [dict(zip(KEYS, row)) for row in PEOPLE]
FRIENDS = "people a JOIN people b ON a.friend = b.name"


@pytest.fixture
def database():
    return Database(PEOPLE)


# --- the tool ------------------------------------------------------------------------------------

ANSWERED = [
    ("SELECT COUNT(*) FROM people WHERE job = 'baker' AND town = 'Ashmoor'", "2"),
    (" select\n name from PEOPLE where town='Mossley' ; ", "Cid"),
    (f"SELECT COUNT(*) FROM {FRIENDS} WHERE a.job = 'baker' AND b.job = 'baker'", "1"),
    ("SELECT job, COUNT(*) FROM people GROUP BY job ORDER BY 2 DESC", "baker, 3; miller, 1"),
    ("SELECT name FROM people WHERE job = ? AND town = ? | baker | Ashmoor", "Ann; Dan"),
    ("SELECT name FROM people WHERE name = ? | Ann' OR '1' = '1", NOTHING),
    ("SELECT friend FROM people WHERE name = 'Dan'", "None"),
    ("SELECT name FROM people WHERE name > (SELECT MIN(name) FROM people) LIMIT 1", "Bob"),
    ("", NOTHING),
    ("SELECT a.job FROM people a, people b, people c", "baker; " * 10 + "..."),
    (f"SELECT '{'a' * 120}', '{'a' * 120}'", "a" * 120 + ", " + "a" * 78),
]


@pytest.mark.parametrize("query, result", ANSWERED)
def test_a_select_is_answered_and_again_as_often_as_it_is_asked(query, result, database):
    assert {database.query(query) for _ in range(3)} == {result}


REFUSED = [
    "INSERT INTO people(name) VALUES('x')", "DELETE FROM people", "UPDATE people SET name = 'x'",
    "DROP TABLE people", "CREATE TABLE t(a)", "CREATE TEMP TABLE t AS SELECT 1", "BEGIN", "COMMIT",
    "SAVEPOINT a", "ATTACH 'written' AS x", "VACUUM INTO 'written'", "PRAGMA user_version = 1",
    "PRAGMA table_info(people)", "ALTER TABLE people RENAME TO t", "EXPLAIN DELETE FROM people",
    "SELECT load_extension('x')", "SELECT * FROM sqlite_master", "SELECT * FROM pragma_table_list",
    "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)", "SELECT printf('%999999d', 1)",
    "SELECT name FROM people WHERE name LIKE '%a%a%a%a%'", "SELECT random()", "SELECT date('now')",
    "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT COUNT(*) FROM t",
    "SELECT * FROM (WITH RECURSIVE t(x) AS (VALUES(1) UNION ALL SELECT x FROM t) SELECT x FROM t)",
]  # fmt: skip


def test_what_is_not_reading_is_refused_and_writes_nothing(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for statement in REFUSED:
        assert re.match("error: .*(authoriz|prohibited)", database.query(statement)), statement
        assert not database.connection.in_transaction
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"
    assert not list(tmp_path.iterdir())


WRONG = [
    ("SELECT", "incomplete"), ("SELECT 1; SELECT 2", "one statement"), ("SELECT 1\0", "null"),
    ("SELECT 1; DROP TABLE people", "one statement"), ("SELECT '\ud800'", "surrogates"),
    ("SELECT ?", "bindings"), ("SELECT nobody FROM people", "no such column"),
    ("SELECT 1 FROM nowhere", "no such table"), ("SELECT CAST(x'ff' AS TEXT)", "decode"),
    ("SELECT SUM(9223372036854775807) FROM people", "overflow"), ("SELECT 'a", "unrecognized"),
    (f"SELECT '{'a' * 3000}'", "too big"), (f"SELECT {'a' * 1000}", "no such column"),
]  # fmt: skip


@pytest.mark.parametrize("query, why", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_said_in_a_short_line(query, why, database):
    result = database.query(query)
    assert result.startswith("error: ") and why in result and len(result) <= LONGEST


def test_a_loop_ends_a_million_rows_are_cut_and_no_text_grows_without_bound():
    database = Database([{"x": "a" * 100, "n": i} for i in range(1000)])
    for query, result in [
        ("SELECT COUNT(*) FROM people, people a, people b, people c", "error: interrupted"),
        ("SELECT a.x || b.x y, a.x FROM people a, people b ORDER BY y", "error: interrupted"),
        ("SELECT DISTINCT a.n, b.n FROM people a, people b ORDER BY 2", "error: interrupted"),
        ("SELECT 1 FROM people, people a, people b, people c", "1; " * 10 + "..."),
        ("SELECT COUNT(*) FROM people a JOIN people b ON a.n = b.n", "1000"),
        (f"SELECT {'x||' * 30}x FROM people", "error: string or blob too big"),
    ]:
        assert seconds(database.query, query) < 5, query
        assert database.query(query) == result


def test_random_strings_and_queries_of_random_words_are_answered_with_a_short_text(
    tokenizer, database, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rng, tools = random.Random(0), Toolbox({"sql": database.query}, tokenizer)
    words = " ".join(REFUSED + [query for query, _ in ANSWERED]).split()
    made = ["SELECT " + " ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(1000)]
    said = Counter()
    for text in [*random_strings(1000, seed=3), *made]:
        for result in (tools.run(f"sql({text})"), database.query("SELECT " + text)):
            assert isinstance(result, str) and 0 < len(result) <= LONGEST, repr(text)
            said[result.startswith("error: ")] += 1
    assert min(said.values()) > 20, said
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"
    assert not list(tmp_path.iterdir())


def test_a_run_looks_in_the_files_of_its_own_village_or_in_the_one_named(
    tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr(village, "of_run", lambda run: tmp_path)
    write_jsonl(tmp_path / "people.jsonl", PEOPLE)
    write_jsonl(tmp_path / "knowledge.jsonl", [{"title": "a b", "text": "c"}])
    tools = Toolbox.with_knowledge(village.knowledge_of("runs/sql"), tokenizer)
    assert tools.run("sql(SELECT COUNT(*) FROM people)") == "4" and tools.run("search(b)") == "c"
    assert village.knowledge_of("runs/sql", "a.jsonl") == ["a.jsonl"]

"""python -m nanollm.compare: runs of any scripts in one table."""

import json
from pathlib import Path

import pytest
import torch

from nanollm.compare import main as compare_runs
from nanollm.compare import mean, parameters
from nanollm.config import UserError, atomic_write
from nanollm.run import effect
from nanollm.safetensors import save_file


def made(name, weights=(("w", (2, 3)),), file="model.safetensors", effects=(), settings=(), **more):
    """A run folder with as much in it as a comparison reads."""
    folder = Path(name)
    save_to = {"train_config.json": {"seed": 0, "out": name, **dict(settings)}}
    found = {"seconds": 12.4, "peak_memory_bytes": 2e9, "effects": list(effects)}
    save_to["result.json"] = found | more
    for path, values in save_to.items():
        atomic_write(folder / path, json.dumps(values))
    save_file({key: torch.zeros(shape) for key, shape in weights}, folder / file)
    return folder


@pytest.fixture
def compare(capsys):
    """Its output, split into lines."""

    def compare(*words):
        compare_runs(words)
        return capsys.readouterr().out.strip().splitlines()

    return compare


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_of_any_scripts_stand_in_one_table(compare):
    made("runs/a", effects=[effect("right", 0.0, 0.5, "share")])
    made("runs/b", effects=[effect("text", None, 2.0, "bits per byte", False)], seconds=100)
    head, first, second = compare("runs/a", "runs/b")
    assert "right" in head and "text, bits per byte" in head
    assert first.split()[:5] == ["runs/a", "1", "0.0%", "->", "50.0%"]
    assert second.split() == ["runs/b", "1", "-", "2", "6", "6", "100", "2"]


def test_runs_that_differ_in_the_seed_make_one_row_with_mean_and_range(compare):
    for seed, after in enumerate((0.4, 0.5, 0.9)):
        settings = {"seed": seed, "init": f"runs/first_{seed}", "rank": 4}
        made(f"runs/soft_{seed}", effects=[effect("right", 0.0, after, "share")], settings=settings)
    made("runs/soft_3", settings={"rank": 8})  # a number that is no seed
    _, row, other = compare(*(f"runs/soft_{n}" for n in range(4)))
    assert row.startswith("runs/soft ") and "0.0% -> 60.0% (40.0% to 90.0%)" in row
    assert other.split()[:3] == ["runs/soft_3", "1", "-"]


def test_a_mean_leaves_out_what_a_run_has_not():
    assert mean([None, None]) == "-" and mean([None, 0.5], "share") == "50.0%"
    assert mean([1.0, 3.0]) == "2 (1 to 3)"


def test_parameters_are_counted_in_the_files_of_weights():
    base = made("runs/base", weights=[("a", (4, 5)), ("b", (3,))])
    assert parameters(base) == (23, 23)
    adapter = made("runs/lora", [("A", (2, 5))], "adapter_model.safetensors")
    atomic_write(adapter / "adapter_config.json", '{"base_model_name_or_path": "runs/base"}')
    assert parameters(adapter) == (10, 33)
    assert parameters(made("runs/projector", trained_parameters=4)) == (4, 6)


@pytest.mark.parametrize("words", [[], ["runs/none"], ["."]])
def test_what_is_no_run_is_refused(words):
    with pytest.raises(UserError):
        compare_runs(words)

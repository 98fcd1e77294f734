"""The benchmark runs, alone and beside its peers; how fast it is, no test says."""

import json

import pytest

from nanollm import bench
from nanollm.config import UserError, parse

SMALL = (
    "--layers 1 --channels 16 --heads 2 --mlp 16 --vocab_size 300 --context 16 --batch_size 2 "
    "--prompts 2 --prompt_tokens 4 --new_tokens 3 --samples 2 --repeats 1 --device cpu"
).split()


def measured(tmp_path, *flags):
    """The figures that the benchmark writes."""
    path = tmp_path / "figures.json"
    bench.main(parse(bench.Config, bench.PRESETS, [*SMALL, *flags, "--json", str(path)]))
    return json.loads(path.read_text())


def test_training_and_sampling_are_measured(tmp_path, capsys):
    figures = measured(tmp_path)
    assert figures["train_tokens_per_second_nanollm"] > 0
    assert figures["sample_tokens_per_second_nanollm"] > 0
    assert "roof" in capsys.readouterr().out


def test_a_step_counts_the_optimizer(tmp_path):
    assert measured(tmp_path, "--what", "step")["train_tokens_per_second_nanollm"] > 0


def test_transformers_is_measured_in_turn(tmp_path, capsys):
    figures = measured(tmp_path, "--peer", "transformers")
    assert figures["train_tokens_per_second_transformers"] > 0
    assert figures["sample_tokens_per_second_transformers"] > 0
    assert capsys.readouterr().out.count("ratio") == 2


def test_an_update_of_grpo_is_measured_and_its_parts_make_up_the_whole(tmp_path, capsys):
    figures = measured(tmp_path, "--preset", "grpo")
    assert figures["grpo_seconds_nanollm"] > 0
    shares = figures["grpo_shares_nanollm"]
    assert {"sampling", "reference", "forward and backward"} < shares.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert "GRPO update" in capsys.readouterr().out


def test_trl_takes_turns_with_an_update_of_grpo(tmp_path, capsys):
    figures = measured(tmp_path, "--preset", "grpo", "--peer", "trl")
    assert figures["grpo_seconds_trl"] > 0 and figures["grpo_seconds_nanollm"] > 0
    assert "ratio" in capsys.readouterr().out


def test_a_peer_that_cannot_do_what_is_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="--peer trl goes with --what grpo"):
        measured(tmp_path, "--peer", "trl")

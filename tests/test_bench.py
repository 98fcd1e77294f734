"""The benchmark runs, alone and beside its peers; how fast it is, no test says."""

import pytest

from nanollm import bench
from nanollm.config import UserError, parse

SMALL = (
    "--layers 1 --channels 16 --heads 2 --mlp 16 --vocab_size 300 --context 16 --batch_size 2 "
    "--prompts 4 --prompt_tokens 4 --new_tokens 3 --samples 2 --repeats 1 --device cpu"
).split()


def measured(*flags):
    return bench.main(parse(bench.Config, bench.PRESETS, [*SMALL, *flags]))


@pytest.mark.parametrize(
    "preset, peer", [("tiny", None), ("tiny", "transformers"), ("grpo", None), ("grpo", "trl")]
)
def test_the_benchmark_measures_us_and_a_peer_in_turn(preset, peer, capsys):
    found = measured("--preset", preset, "--peer", peer or "none")
    assert 0 < found.pop("share", 0.5) < 1
    assert found.keys() == ({"grpo"} if preset == "grpo" else {"training", "sampling"})
    for times in found.values():
        assert times.keys() == {"nanollm", peer} - {None} and min(times.values()) > 0
    measured_times = sum(map(len, found.values()))
    assert capsys.readouterr().out.count("x the time") == measured_times


def test_a_peer_that_cannot_do_what_is_measured_is_refused():
    with pytest.raises(UserError, match="--peer trl goes with --preset grpo"):
        measured("--peer", "trl")

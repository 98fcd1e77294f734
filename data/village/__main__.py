"""Prints the village, samples of every kind, and how many of each there are."""

import random
from dataclasses import dataclass

from data.village.corpus import documents
from data.village.examples import records
from data.village.files import show
from data.village.world import build_world
from nanollm.config import Whole, cli


@dataclass
class Config:
    villagers: Whole[1] = 32
    seed: int = 0
    samples: Whole[0] = 3  # of each kind


def main(cfg):
    world, rng = build_world(cfg.villagers, cfg.seed), random.Random(0)
    for v in world.villagers:
        print(f"{v.name:9} {'asked ' if v.asked else 'never '} {', '.join(v.facts.values())}")
    by_kind = {}
    for kind, text in documents(world):
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        print(f"\n== {kind}: {len(texts)} documents in 1 MB, {sum(map(len, texts)):,} bytes")
        print(*(f"* {text}" for text in rng.sample(texts, cfg.samples)), sep="\n")
    for name, rows in records(world, cfg.seed).items():
        show(name, rows, cfg.samples, rng)


if __name__ == "__main__":
    cli(main, Config)

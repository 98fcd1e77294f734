"""Writes the village, and prints its people and samples of every file."""

import random
from collections import Counter
from dataclasses import dataclass

from data.village.examples import prepare
from data.village.world import build_world
from nanollm.config import Positive, Whole, cli
from nanollm.formats import read_records


@dataclass
class Config:
    villagers: Whole[1] = 32
    seed: int = 0
    megabytes: Positive = 8.0  # size of the corpus
    samples: Whole[0] = 3  # of each file
    images: bool = False  # paint the images, too, and print what is said about them
    charts: bool = False  # the same of charts of the market


def main(cfg):
    for v in build_world(cfg.villagers, cfg.seed).villagers:
        print(f"{v.name:9} {'asked ' if v.asked else 'never '} {', '.join(v.facts.values())}")
    folders = [prepare(cfg.villagers, cfg.seed, cfg.megabytes)]
    if cfg.images:
        from data.village import images  # imported only here: drawing needs Pillow

        folders.append(images.prepare(cfg.seed))
    if cfg.charts:
        from data.village import charts

        folders.append(charts.prepare(cfg.seed))
    for path in (path for folder in folders for path in sorted(folder.glob("*.jsonl"))):
        records = read_records(path)
        by_task = Counter(record.get("task") for record in records)
        print(f"\n== {path}: {len(records):,} records", *by_task.items())
        for record in random.Random(0).sample(records, cfg.samples):
            said = "  ".join(f"[{m['role']}] {m['content']}" for m in record.get("messages", ()))
            print("*", record.get("image", ""), said or record, said and record.get("answer", ""))


if __name__ == "__main__":
    cli(main, Config)

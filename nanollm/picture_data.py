"""Dialogues and test items with pictures: reading the files, and keeping the pictures.

    {"image": "a.png" or ["a.png", "b.png"], "messages": [... "<image>What is this?" ...]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}
    {"image": "a.png", "caption": "A red bell."}

The second form is LLaVA's (Liu et al. 2023, arXiv:2304.08485), often one JSON array. Paths count
from the file's folder. Dialogues without "image" are text. data/README.md documents the formats.
"""

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import village_pictures
from nanollm.config import UserError
from nanollm.dialogues import pack_chats
from nanollm.formats import as_chat, as_prompt, read_jsonl
from nanollm.pictures import as_batch, open_picture
from nanollm.vlm import VLM, check_markers, pictures_in, render_with_pictures


def painted(size, **how):
    """Folder of the village's pictures of this size, painted if need be."""
    if size < village_pictures.SMALLEST:
        raise UserError(
            f"--picture_size {size} is too small to tell the village's objects apart; the least is "
            f"{village_pictures.SMALLEST}"
        )
    return village_pictures.prepare(size=size, **how)


def read_picture_chats(path):
    """Chat records as dicts with "messages" and "images", a list of paths (empty for text).

    Raises UserError with file and line where a picture is missing, or markers and pictures differ.
    """
    chats = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        chats.append(with_images(as_chat(record, where), Path(path).parent, where))
    return chats


def read_captions(path):
    """Records {"image": path, "caption"} of a JSONL file; of a dialogue with one picture the first
    answer counts as caption. Raises UserError with file and line.
    """
    captions = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        caption = record.get("caption")
        if caption is None:
            messages = as_chat(record, where)["messages"]
            caption = next((m["content"] for m in messages if m["role"] == "assistant"), None)
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f'{where}: a "caption" is wanted, as text')
        images = image_paths(record, Path(path).parent, where)
        if len(images) != 1:
            raise UserError(f"{where}: a caption belongs to one picture, not to {len(images)}")
        captions.append({"image": images[0], "caption": caption})
    return captions


def read_picture_prompts(path, answered=False):
    """Prompts as formats.read_prompts gives them; those with an "image" have "images", too. With
    `answered` every one needs an "answer".
    """
    prompts = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        prompt = as_prompt(record, where)
        if answered and "answer" not in prompt:
            raise UserError(f'{where}: a test item needs an "answer"')
        if "image" in prompt:
            prompt = with_images(prompt, Path(path).parent, where)
        prompts.append(prompt)
    return prompts


def with_images(record, folder, where):
    """The record with "images": the paths that its "image" names, relative to the folder."""
    images = image_paths(record, folder, where)
    messages = as_chat({"messages": record["messages"]}, where)["messages"]
    check_markers(messages, len(images), where)
    return {**record, "images": images}


def image_paths(record, folder, where):
    """The paths that a record's "image" names, relative to the folder; each is a file."""
    named = record.get("image") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f'{where}: "image" must be a file name or a list of them, not {named!r}')
    images = [str(Path(folder) / name) for name in named]
    for image in images:
        if not Path(image).is_file():
            raise UserError(f"{where}: the picture {image} does not exist")
    return images


GREY = "<grey>"  # in place of a path: a plain grey picture


class PictureStore:
    """Pictures by number, each file opened once and kept as the vision tower sees it, in bytes."""

    def __init__(self, preprocessing):
        self.preprocessing = preprocessing
        self.known, self.kept = {}, []  # path -> number; number -> (3, H, W) uint8

    def numbers(self, paths):
        """The numbers of these files' pictures; opens those that it hasn't yet."""
        for path in paths:
            if path not in self.known:
                grey = Image.new("RGB", (64, 64), (128, 128, 128))
                picture = grey if path == GREY else open_picture(path)
                pixels = np.array(self.preprocessing.resized(picture))  # (H, W, 3)
                self.kept.append(torch.from_numpy(pixels).permute(2, 0, 1))
                self.known[path] = len(self.kept) - 1
        return [self.known[path] for path in paths]

    def pictures(self, numbers):
        """(len(numbers), 3, H, W) float32; None where there are none."""
        if not len(numbers):
            return None
        return as_batch(torch.stack([self.kept[i] for i in numbers]), self.preprocessing)

    def of(self, paths):
        """The pictures of these files, as `pictures`."""
        return self.pictures(self.numbers(paths))


class Shown:
    """The pictures of a list of prompts, made when asked for: shown[i] (n, 3, H, W), or None."""

    def __init__(self, store, paths):
        self.store, self.paths = store, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.store.of(self.paths[i])


def store_of(model):
    """An empty PictureStore that keeps pictures as this model reads them."""
    if not isinstance(model, VLM):
        raise UserError(
            "there are pictures, but this model reads text only; name one that has a vision tower "
            "(train_vlm.py)"
        )
    return PictureStore(model.preprocessing)


def show_pictures(items, store, shown="right"):
    """What each of the items is shown, for generate: its own pictures ("right"), grey ones
    ("grey"), or those of another item ("shuffled").
    """
    paths = [item.get("images", []) for item in items]
    if shown == "grey":
        paths = [[GREY] * len(own) for own in paths]
    elif shown == "shuffled":
        paths = shuffled(paths)
    return Shown(store, paths)


def shuffled(paths, seed=0):
    """For each list of paths another that is as long, at random; for an empty one the same.

    Raises UserError where all of one length are the same.
    """
    rng, out = random.Random(seed), []
    by_length = defaultdict(list)
    for own in dict.fromkeys(map(tuple, paths)):
        by_length[len(own)].append(own)
    for own in map(tuple, paths):
        others = by_length[len(own)]
        if own and len(others) < 2:
            raise UserError(
                f"no other item has {len(own)} pictures to show in place of {own[0]}; to shuffle "
                "them takes two that differ"
            )
        i = rng.randrange(len(others))
        out.append(list(others[i] if others[i] != own else others[i - 1]))
    return out


def pack_picture_chats(chats, tokenizer, T, vlm, store, name, rt):
    """dialogues.pack_chats for dialogues with pictures: rows that know theirs.

    Pictures that were shown after the cut are left out, and none is ever cut.
    """
    n = vlm.tokens_per_picture

    def render(messages):
        return render_with_pictures(tokenizer, messages, n, pictures_in(messages))

    def pictures_of(chat):
        return store.numbers(chat.get("images", [])[: pictures_in(chat["messages"])])

    note = f", of which a picture takes {n}"
    return pack_chats(chats, tokenizer, T, name, rt, render, pictures_of, note)

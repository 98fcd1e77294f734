"""Talk with a model: python -m nanollm.chat runs/sft

The answer appears while it is written, and earlier turns stay in the conversation; when it outgrows
the context, the oldest turns are left out. Ctrl-C stops an answer, of which the conversation keeps
what has been written; /help lists the commands. With --prompt it answers once and exits; input from
a pipe is read line by line.

    python -m nanollm.chat runs/vlm --image a.png --prompt "What is in the image?"

A vision-language model is shown --image with the first message, and what a line `/image FILE` names
with the next one. Images stand before the message, or where it says <image>.
"""

import re
import sys
from dataclasses import dataclass

import torch

from data.village import examples as village
from nanollm.config import ModelConfig, NotNegative, Share, UserError, Whole, cli, say
from nanollm.formats import IMAGE
from nanollm.generate import stream
from nanollm.hub import load_model
from nanollm.metrics import LONGEST_COMPLETION
from nanollm.peft.lora import use
from nanollm.records import check_markers
from nanollm.runtime import start
from nanollm.tools import Toolbox

HELP = """/image FILE  show an image with the next message
/adapter A   go on with the adapter called A, where there are several, or with none
/reset       begin anew
/help        list the commands
/quit        end, as do Ctrl-D and Ctrl-C; while the model writes, Ctrl-C stops it"""


@dataclass
class Config(ModelConfig):
    # folder of an adapter to put on it; several with commas, called as their folders: the first
    # speaks, until a line /adapter A chooses another
    adapter: str | None = None
    prompt: str | None = None  # answer this and exit
    image: str | None = None  # image to show with the first message; several with commas
    system: str | None = None  # a system message before the conversation
    max_new_tokens: Whole[1] = LONGEST_COMPLETION  # longest completion
    temperature: NotNegative = 0.3  # 0: always the most likely token
    top_k: Whole[0] = 0  # draw from the k most likely tokens; 0: from all
    top_p: Share = 1.0  # draw from the smallest set with this probability
    tools: bool = False  # run the calls that the model writes
    # with tools: JSONL of {"title", "text"} to search; default: the village's, and SQL about it
    knowledge: str | None = None


class Conversation:
    """What has been said and shown, and the model that goes on with it."""

    def __init__(self, cfg, rt):
        self.cfg = cfg
        self.typed = cfg.prompt is None and sys.stdin.isatty()  # is somebody there?
        model, self.tokenizer = load_model(cfg.model, cfg.adapter)
        model = rt.prepare(model, train=False)
        self.whole = self.model = model if model.lora else model.merged()  # once for all messages
        if model.lora:
            self.choose(model.lora.known[0])
        self.room = model.cfg.max_position_embeddings - cfg.max_new_tokens
        self.tools = None
        if cfg.tools:
            knowledge = village.knowledge_of(cfg.model, cfg.knowledge)
            self.tools = Toolbox.with_knowledge(knowledge, self.tokenizer)
        self.generator = torch.Generator(rt.device).manual_seed(cfg.seed)
        self.reset()

    def choose(self, adapter):
        """Go on with the adapter of this name, or with none; what has been said stays."""
        use(self.whole, adapter)
        self.model = self.whole.merged()

    def reset(self):
        self.messages = [{"role": "system", "content": self.cfg.system}] * bool(self.cfg.system)
        self.shown = []  # images for the next message

    def show(self, path):
        """Images stand in front of the next message, or where it says <image>."""
        self.shown.append(self.model.image_store().of([path.strip()]))  # (1, 3, H, W)

    def say(self, text):
        """Answer on stdout; a message that can't be answered leaves the conversation as it was."""
        shown = self.shown
        if shown and IMAGE not in text:
            text = f"{IMAGE}\n" * len(shown) + text
        message = {"role": "user", "content": text, "images": shown}
        if self.model.tokens_per_image:
            check_markers([message], len(shown))
        messages = [*self.messages, message]
        prompt = self.fitting_prompt(messages)
        ids = self.write(prompt, [each for m in messages for each in m.get("images", [])])
        content = self.tokenizer.decode(ids)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self.shown = []

    def fitting_prompt(self, messages):
        """Ids of the conversation without its oldest turns, as many as needed to fit; drops them
        from messages, those that show an image last.
        """
        ids = self.tokenizer.render(messages, True, self.model.tokens_per_image)[0]
        while len(ids) > self.room:
            asked = [i for i, m in enumerate(messages[:-1]) if m["role"] == "user"]
            if not asked:
                raise UserError(
                    f"the message is {len(ids)} tokens long, but the model can read {self.room} "
                    "and answer; shorten it, or lower --max_new_tokens"
                )
            oldest = min(asked, key=lambda i: bool(messages[i]["images"]))
            if messages[oldest]["images"]:
                say("note: no room is left for the image; show it again", sys.stderr)
            del messages[oldest : oldest + 2]  # with its answer: some templates want both
            ids = self.tokenizer.render(messages, True, self.model.tokens_per_image)[0]
        return ids

    def write(self, prompt, images):
        """Stream a completion to stdout; returns its ids. Ctrl-C ends one that has begun, where
        somebody is there to go on.
        """
        cfg, ids, written = self.cfg, [], ""
        how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
        how |= {"stop_ids": self.tokenizer.stop_ids, "generator": self.generator}
        how |= {"tools": self.tools, "images": torch.cat(images) if images else None}
        try:
            for token in stream(self.model, prompt, cfg.max_new_tokens, **how):
                ids.append(token)
                text = self.tokenizer.decode(ids)
                if not text.endswith("\ufffd"):  # a character whose bytes aren't all there waits
                    print(text[len(written) :], end="", flush=True)
                    written = text
        except KeyboardInterrupt:
            if not (self.typed and ids):
                raise
        print(self.tokenizer.decode(ids)[len(written) :], flush=True)
        return ids


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    talk = Conversation(cfg, rt)
    for path in filter(str.strip, (cfg.image or "").split(",")):
        talk.show(path)
    if cfg.prompt is not None:
        talk.say(cfg.prompt)
        return rt.close()
    if talk.typed:
        size = sum(p.numel() for p in talk.model.parameters())
        print(f"{cfg.model}: {size:,} parameters. /help lists the commands, /quit ends.")
    while (line := next_line(talk.typed)) != "/quit":
        try:
            follow(talk, line)
        except (UserError, KeyboardInterrupt) as error:  # Ctrl-C: no answer had begun
            if not talk.typed:
                raise
            print(error)
    rt.close()


def next_line(typed):
    """The next line of input; "/quit" at its end."""
    try:
        return input("> " * typed).strip()
    except EOFError:
        return "/quit"


def follow(talk, line):
    """A command, or a message to answer; one word behind a slash is never sent to the model."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/image" and rest.strip():
        talk.show(rest)
    elif command == "/adapter" and rest.strip():
        talk.choose(None if rest.strip() == "none" else rest.strip())
    elif command == "/help":
        print(HELP)
    elif re.fullmatch(r"/\w*", command):
        raise UserError(f"{command}: no such command, or a word is missing; /help lists them")
    elif line:
        talk.say(line)


if __name__ == "__main__":
    cli(main, Config)

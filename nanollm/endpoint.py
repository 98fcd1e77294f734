"""A model behind an HTTP endpoint that speaks as OpenAI's chat completions do (vLLM, llama.cpp,
Ollama, most providers). It gives texts, or one line that says what the server did.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from nanollm.config import UserError
from nanollm.download import Redirects

MOST = 2**24  # bytes of an answer
AT_ONCE = 8  # requests
# of a connection, or of an answer of another form
FAULTS = (OSError, http.client.HTTPException, LookupError, TypeError, AttributeError, ValueError)
BUSY = (429, 500, 502, 503, 504)  # ask again a little later


class Endpoint:
    """The model at an address like http://localhost:8000/v1#MODEL, without #MODEL the first that it
    lists. Its key is what the environment variable OPENAI_API_KEY holds; it is written nowhere.
    """

    def __init__(self, address, timeout):
        url, _, self.model = address.partition("#")
        self.url, self.timeout = url.rstrip("/"), timeout  # seconds for an answer
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        if "@" in url or "?" in url:
            raise UserError("an address holds no key: set OPENAI_API_KEY to it")

    def fetch(self, path, read, body=None):
        """read(the JSON value that the server answers, to a POST where there is a body). A busy
        server is asked again, as long as the timeout lasts; UserError where nothing comes of it.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "nanollm"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        heard, end, pause = "", time.monotonic() + self.timeout, 0.5
        while True:
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                opener = urllib.request.build_opener(Redirects)
                with opener.open(request, timeout=self.timeout) as response:
                    heard = read_until(end, response)
                return read(json.loads(heard))
            except urllib.error.HTTPError as error:
                with error:
                    heard = f"{error.code} {error.read(300)}"
                if error.code not in BUSY or time.monotonic() + pause > end:
                    break
            except FAULTS as error:
                heard = heard or f"{type(error).__name__} {error}"
                break
            time.sleep(pause)
            pause *= 2
        told = repr(heard[:300]).replace(self.key or "\0", "***")
        raise UserError(
            f"{self.url}{path} gave {told} (it has {self.timeout:g} s); check the address, "
            "OPENAI_API_KEY and --timeout"
        )

    def complete(self, rt, examples, max_new_tokens, samples=1, temperature=1.0, seed=0):
        """What the model writes, `samples` texts of each example in turn, None for one that doesn't
        end; the work is shared by all processes.
        """
        self.model = self.model or self.fetch("/models", lambda found: found["data"][0]["id"])
        mine = [e["messages"] for e in examples[rt.mine(len(examples))] for _ in range(samples)]

        def write(n):
            turns = [{k: v for k, v in turn.items() if k != "loss"} for turn in mine[n]]
            body = {"model": self.model, "messages": turns, "max_tokens": max_new_tokens}
            body |= {"temperature": temperature, "seed": seed * samples + n % samples}
            return self.fetch("/chat/completions", text_of, body)

        looks = {"total": len(mine), "unit": "completion", "disable": None, "leave": False}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return rt.gather(list(tqdm(pool.map(write, range(len(mine))), **looks)))


def read_until(end, response):
    """The bytes of an answer, which has to be there by that time: a server may send one by one."""
    heard = b""
    while len(heard) < MOST and (part := response.read1(MOST)):
        heard += part
        if time.monotonic() > end:
            raise TimeoutError("too slow")
    return heard


def text_of(answer):
    """What a chat completion says, its thoughts included; None where it came to no end."""
    choice = answer["choices"][0]
    text, thoughts = (choice["message"].get(key) or "" for key in ("content", "reasoning_content"))
    text = f"<think>{thoughts}</think>{text}" if thoughts else text
    text.encode()  # which half of a surrogate pair has no bytes for
    return text if choice["finish_reason"] == "stop" else None

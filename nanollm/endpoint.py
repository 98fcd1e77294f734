"""A model behind an HTTP endpoint that speaks as OpenAI's chat completions do (vLLM, llama.cpp,
Ollama, most providers). Whatever its server does, it gives texts or one line, in bounded time.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from nanollm.config import UserError
from nanollm.download import Redirects
from nanollm.formats import need

MOST = 2**24  # bytes of an answer
AT_ONCE = 8  # requests
BUSY = (429, 500, 502, 503, 504)  # ask again a little later


class Endpoint:
    """The model at an address like http://localhost:8000/v1#MODEL, without #MODEL the first that it
    lists. Its key is what the environment variable OPENAI_API_KEY holds; it is written nowhere.
    """

    def __init__(self, address, timeout):
        url, _, self.model = address.partition("#")
        self.url, self.timeout = url.rstrip("/"), timeout  # seconds for an answer
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        need(not {*"@?"} & {*url}, "an address", "holds no key: set OPENAI_API_KEY to it")

    def fetch(self, path, read, body=None):
        """read(the JSON value that the server answers, to a POST where there is a body). UserError
        where that fails, or no answer is complete within the timeout, however slowly it comes.
        """
        heard, end = ["no answer"], time.monotonic() + self.timeout
        thread = threading.Thread(target=self._ask, args=(path, body, heard, end), daemon=True)
        thread.start()
        thread.join(self.timeout)
        try:
            return read(json.loads(heard[-1]))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            said = repr(heard[-1][:300]).replace(self.key or "\0", "***")
            raise UserError(
                f"{self.url}{path} gave {said} (it has {self.timeout:g} s); check the address, "
                "OPENAI_API_KEY and --timeout"
            ) from None

    def _ask(self, path, body, heard, end):
        """Append to `heard` what the server sends, or what is wrong."""
        headers = {"Content-Type": "application/json", "User-Agent": "nanollm"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data, pause = None if body is None else json.dumps(body).encode(), 0.5
        while time.monotonic() < end:
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                opener = urllib.request.build_opener(Redirects)
                with opener.open(request, timeout=self.timeout) as response:
                    return heard.append(response.read(MOST))
            except urllib.error.HTTPError as error:
                with error:
                    heard.append(f"{error.code} {error.read(300)}")
                if error.code not in BUSY:
                    return
            except TimeoutError:  # as fetch says, whichever of the two notices first
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                return heard.append(f"{type(error).__name__} {error}")
            time.sleep(pause)
            pause *= 2

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


def text_of(answer):
    """What a chat completion says, its thoughts included; None where it came to no end."""
    choice = answer["choices"][0]
    text, thoughts = (choice["message"].get(key) or "" for key in ("content", "reasoning_content"))
    text = f"<think>{thoughts}</think>{text}" if thoughts else text
    text.encode()  # which half of a surrogate pair has no bytes for
    return text if choice["finish_reason"] == "stop" else None

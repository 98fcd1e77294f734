"""Downloads, and the models of the Hugging Face Hub: wherever a model folder is named, `owner/name`
means the Hub's, if no such folder is there.

It is fetched once, into data/cache/hub/owner--name, and found there without a network; what a break
has left is gone on from. Environment variables, as huggingface_hub names them:

    HF_TOKEN          opens models that want their terms accepted
    HF_ENDPOINT       a mirror, instead of https://huggingface.co
    HF_HUB_OFFLINE    1: never ask

Of weights only safetensors are fetched: a pickle may run any code.
"""

import http.client
import io
import os
import shutil
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from nanollm.config import UserError, lock, say, unlock

CACHE = Path("data/cache/hub")
CHUNK = 2**20  # bytes read at once
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", INDEX)
CONFIGS = ("config.json", "adapter_config.json")
FILES = (*CONFIGS, "generation_config.json", "preprocessor_config.json", "processor_config.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES += ("tokenizer.model", "chat_template.jinja")


# --- one file ------------------------------------------------------------------------------------


class Redirects(urllib.request.HTTPRedirectHandler):
    """Another host, to which a request is sent on, is not told the token."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


class Download(io.RawIOBase):
    """What a URL holds from byte `done` on, as a file to read: all that Content-Length promises, or
    UserError. A server that can't begin there sends all, and `done` becomes 0. `mirror` is the
    setting that names another server.
    """

    def __init__(self, url, mirror, done=0, headers=()):
        self.url = url
        headers = {"User-Agent": "nanollm", **dict(headers)}
        headers |= {"Range": f"bytes={done}-"} if done else {}
        try:
            request = urllib.request.Request(url, headers=headers)
            opener = urllib.request.build_opener(Redirects)
            self.response = opener.open(request, timeout=30)  # seconds of silence
        except (OSError, http.client.HTTPException, ValueError) as error:
            advice = f"check the connection, or name a mirror with {mirror}"
            raise UserError(f"cannot open {url} ({error}): {advice}") from error
        self.done = done if self.response.status == 206 else 0
        length = int(self.response.headers.get("Content-Length", 0))
        self.size = self.done + length if length else None
        looks = {"desc": Path(url).name, "unit": "B", "unit_scale": True, "leave": False}
        self.bar = tqdm(total=self.size, initial=self.done, disable=None, **looks)

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            count, why = self.response.readinto(buffer), None
        except (OSError, http.client.HTTPException) as error:
            count, why = 0, repr(error)
        self.done += count
        self.bar.update(count)
        if count == 0 and (why or self.size not in (None, self.done)):
            after = f"{self.done:,} of {self.size} bytes ({why or 'it ended'})"
            advice = "run the same command again"
            raise UserError(f"{self.url}: the connection broke after {after}; {advice}")
        return count

    def close(self):
        if not self.closed:
            self.response.close()
            self.bar.close()
        super().close()


# --- a folder of the Hub -------------------------------------------------------------------------


def hub_folder(name):
    """The folder that holds this model of the Hub. Raises UserError where it can't be had.

    Of several processes on a machine the first one fetches it; where it fails, torchrun ends all.
    """
    name = Path(name).as_posix()
    folder = CACHE / name.replace("/", "--")
    while not folder.is_dir() and int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(0.5)
    if not folder.is_dir():
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise UserError(f"no folder {name}, nor {folder}, and HF_HUB_OFFLINE says not to ask")
        lock(folder)
        if not folder.is_dir():  # nor has another process fetched it just now
            fetch_model(name, folder)
        unlock(folder)
    return folder


def fetch_model(name, folder):
    """Fetch what belongs to a model into `folder`, which takes its place when all is there."""
    revision = revision_of(name)
    part = folder.with_name(f"{folder.name}.{revision[:12]}.part")  # found again after a break
    part.mkdir(parents=True, exist_ok=True)
    say(f"downloading {name} from {endpoint()} into {folder}")
    weights = next((file for file in WEIGHTS if fetch_file(name, revision, part / file)), None)
    if weights is None:
        shutil.rmtree(part)
        other = "no model.safetensors; no other file of weights is read here, choose another model"
        raise UserError(f"{endpoint()}/{name} has {other}")
    if weights == INDEX:
        from nanollm.safetensors import read_index  # and torch, which data/prepare.py does without

        for shard in sorted({*read_index(part / INDEX).values()}):
            if not fetch_file(name, revision, part / shard):
                raise UserError(f"{name} lacks {shard}, which its {INDEX} names")
    for file in FILES:
        fetch_file(name, revision, part / file)
    os.replace(part, folder)


def endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def open_url(name, revision, file, done=0):
    """A Download of a file of a model; None where there is none."""
    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint()}/{name}/resolve/{revision}/{file}"
    try:
        return Download(url, "HF_ENDPOINT", done, headers)
    except UserError as error:
        status, why = getattr(error.__cause__, "code", None), error
        if status == 404:
            return None
        if status == 416:  # nothing is left from there on
            return open_url(name, revision, file)
        if status in (401, 403):
            why = f"no access to {endpoint()}/{name} ({status}): check the name; if the model is "
            why += "gated, accept its terms there and set HF_TOKEN"
        raise UserError(f"found no folder {name}; as a model of the Hub: {why}") from None


def revision_of(name):
    """The commit that is now at "main", so that a download goes on with the same files."""
    for file in CONFIGS:
        if page := open_url(name, "main", file):
            with page:
                return page.response.headers.get("X-Repo-Commit", "main")
    raise UserError(f"found no folder {name}, and no config.json of a model at {endpoint()}/{name}")


def fetch_file(name, revision, path):
    """Download one file of a model, going on where an earlier attempt broke off; False where there
    is none. Whatever the server has promised, a file of weights knows its own size.
    """
    if path.exists():  # of an earlier attempt
        return True
    unfinished = path.with_name(path.name + ".part")
    done = unfinished.stat().st_size if unfinished.exists() else 0
    download = open_url(name, revision, path.name, done)
    if download is None:
        return False
    with download, open(unfinished, "ab" if download.done else "wb") as opened:
        shutil.copyfileobj(download, opened, CHUNK)
    if path.suffix == ".safetensors":
        from nanollm.safetensors import read_header

        try:
            read_header(unfinished)
        except UserError:
            unfinished.unlink()
            raise
    os.replace(unfinished, path)
    return True

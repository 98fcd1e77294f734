"""Image files to tensors, with Pillow alone.

    open_image(path)            any image file -> RGB, or one clear line
    Preprocessing()(image)        resize, crop, (pixel * rescale - mean) / std -> (3, H, W)
    as_batch(pixels, how)         the same for pixels that have the right size already

Resizing and numbers are those of Hugging Face's CLIPImageProcessor and SiglipImageProcessor.
"""

import contextlib
import json
import os
import random
import struct
import threading
import warnings
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from nanollm.checkpoint import read_json
from nanollm.config import UserError, atomic_write

MAX_PIXELS = 64_000_000  # 8,000 x 8,000: 192 MB as RGB; a file of a few bytes may claim any size
# Formats that Pillow decodes itself; EPS, for one, is a program that another program would run.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
# What Pillow's decoders raise on damaged files.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
LOCK = threading.Lock()
CONFIG = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# --- files ---------------------------------------------------------------------------------------


def open_image(path):
    """The image in an image file as an RGB image, upright; of an animation its first frame.

    Transparency is laid on white, as whoever looks at the file on a page sees it. Raises UserError
    where the file is missing, no image, damaged, cut off, or larger than MAX_PIXELS.
    """
    try:
        with quiet_pillow(), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # nothing is decoded yet
                raise Image.DecompressionBombError
            with quiet_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
                return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, *DAMAGE) as e:
        raise UserError(f"{path}{what_is_wrong(e)}") from None


def what_is_wrong(error):
    """The end of the line that begins with the file's name."""
    if isinstance(error, Image.DecompressionBombError):
        return f" claims more than {MAX_PIXELS:,} pixels, too many to decode; make it smaller"
    if isinstance(error, FileNotFoundError):
        return ": no such file"
    if isinstance(error, IsADirectoryError):
        return " is a folder; name an image file in it"
    if isinstance(error, Image.UnidentifiedImageError):
        return f" is no image that can be read ({', '.join(FORMATS)})"
    if getattr(error, "errno", None):  # of the file system, such as a missing permission
        return f" can't be read: {error.strerror}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f": the image is damaged, cut off or of an unknown kind ({reason})"


@contextlib.contextmanager
def quiet_pillow():
    """No warnings: what they tell of is an error here, or no matter. Python's filter of warnings
    belongs to the whole process, hence one thread at a time.
    """
    with LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_libtiff():
    """The C library writes its complaints to the file descriptor of stderr itself."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def to_rgb(image):
    """The image as 8-bit RGB: transparency on white, 16-bit grey scaled by 255 / 65535."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return grey_of_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def grey_of_16_bits(image):
    """Pillow's own conversion would clip at 255, and nearly everything would be white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its pixels have 32 bits; convert it to 8 bits")
    scaled = (grey * 255 + 32767) // 65535  # rounded to the nearest
    if isinstance(image.info.get("transparency"), int):
        scaled[grey == image.info["transparency"]] = 255
    return Image.fromarray(scaled.astype(np.uint8))


# --- preprocessing -------------------------------------------------------------------------------


@dataclass
class Preprocessing:
    """How an image becomes what a ViT reads.

    Without `shortest_edge` it is resized to exactly `size`, which may stretch it (SigLIP). With it,
    its shorter side is resized to so many pixels and the middle is cut out (CLIP).
    """

    size: tuple[int, int] = (64, 64)  # height and width of what comes out; one number: both
    shortest_edge: int | None = None
    resample: int = 3  # Pillow's number of the filter: 0 nearest, 2 bilinear, 3 bicubic ...
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255

    def __post_init__(self):
        if isinstance(self.size, int):
            self.size = (self.size, self.size)
        self.size, self.mean, self.std = tuple(self.size), tuple(self.mean), tuple(self.std)

    def __call__(self, image):
        """A Pillow image of any mode -> (3, H, W) float32."""
        pixels = np.array(self.resized(to_rgb(image)))  # (H, W, 3)
        return as_batch(torch.from_numpy(pixels).permute(2, 0, 1)[None], self)[0]

    def resized(self, image):
        """The RGB image in the size that the ViT reads."""
        height, width = self.size
        if self.shortest_edge is None:
            return image.resize((width, height), self.resample)
        short, long = sorted(image.size)
        edge = self.shortest_edge
        longer = int(edge * long / short)  # cut, not rounded, as Hugging Face does
        if edge * longer > MAX_PIXELS:
            raise UserError(f"a image of {image.width} x {image.height} is too narrow to resize")
        portrait = image.width <= image.height
        image = image.resize((edge, longer) if portrait else (longer, edge), self.resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))  # beyond the edge it is black

    @classmethod
    def from_folder(cls, folder):
        """From preprocessor_config.json, as CLIPImageProcessor or SiglipImageProcessor write it,
        or from the part of processor_config.json that CLIPProcessor writes in its place.
        """
        path = Path(folder) / CONFIG
        together = path.with_name("processor_config.json")
        if not path.exists() and together.exists():
            path = together
        values = read_json(path)
        values = values.get("image_processor") or {} if path == together else values
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        if not kind.startswith(("CLIP", "Siglip")):
            raise UserError(f"{path}: its type {kind} is neither CLIP's nor SigLIP's")
        clip = kind.startswith("CLIP")
        try:
            return cls(**read_sizes(values, clip), **read_numbers(values, clip))
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} is incomplete or not implemented: {e}") from None

    def save(self, folder):
        """Write preprocessor_config.json, which transformers' AutoImageProcessor opens."""
        height, width = self.size
        exact, edge = {"height": height, "width": width}, self.shortest_edge
        values = {
            "image_processor_type": "CLIPImageProcessor" if edge else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": edge} if edge else exact,
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if edge:
            values |= {"do_center_crop": True, "crop_size": exact}
        atomic_write(Path(folder) / CONFIG, json.dumps(values, indent=2) + "\n")


def read_sizes(values, clip):
    """size and shortest_edge from a preprocessor_config.json; old ones hold plain numbers."""
    if not values.get("do_resize", True):
        raise ValueError("do_resize is false, so that images would differ in size")
    size = values.get("size") or ({"shortest_edge": 224} if clip else 224)
    crop = values.get("crop_size") or 224
    crops = values.get("do_center_crop", clip)
    if isinstance(size, int):
        size = {"shortest_edge": size} if clip else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    crop = whole(crop["height"]), whole(crop["width"])
    if "shortest_edge" in size:
        if not crops or size.get("longest_edge"):
            raise ValueError("images would differ in size without do_center_crop")
        return {"size": crop, "shortest_edge": whole(size["shortest_edge"])}
    exact = whole(size["height"]), whole(size["width"])
    if crops and crop != exact:
        raise ValueError(f"it resizes to {exact} and then crops to {crop}")
    return {"size": exact}


def whole(number):
    if type(number) is not int or number < 1:
        raise ValueError(f"a size is {number!r}")
    return number


def read_numbers(values, clip):
    """resample, mean, std and rescale from a preprocessor_config.json."""
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    mean, std = values.get("image_mean") or mean, values.get("image_std") or std
    if not values.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    for numbers in (mean, std):
        if len(numbers) != 3 or not all(isinstance(x, (int, float)) for x in numbers):
            raise ValueError(f"image_mean and image_std must hold 3 numbers, not {numbers}")
    if not all(std):
        raise ValueError("image_std holds a zero")
    rescale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    resample = values.get("resample", Image.Resampling.BICUBIC)
    return {
        "mean": mean,
        "std": std,
        "rescale": float(rescale),
        "resample": int(Image.Resampling(resample)),
    }


def as_batch(pixels, preprocessing):
    """(pixel * rescale - mean) / std for pixels (n, 3, H, W) uint8 of the right size; float32.

    Rounded after each step as Hugging Face does, hence equal to the bit.
    """
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (3, *preprocessing.size):
        wants = ("n", 3, *preprocessing.size)
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}, not uint8 {wants}")
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device=pixels.device)[:, None, None]
        for numbers in (preprocessing.mean, preprocessing.std)
    )
    return ((pixels.double() * preprocessing.rescale).float() - mean) / std


# --- images of records ----------------------------------------------------------------------------


GREY = "<grey>"  # in place of a path: a plain grey image


class ImageStore:
    """Images by number, each file opened once and kept as the vision tower sees it, in bytes."""

    def __init__(self, preprocessing):
        self.preprocessing = preprocessing
        self.known, self.kept = {}, []  # path -> number; number -> (3, H, W) uint8

    def numbers(self, paths):
        """The numbers of these files' images; opens those that it hasn't yet."""
        for path in paths:
            if path not in self.known:
                grey = Image.new("RGB", (64, 64), (128, 128, 128))
                image = grey if path == GREY else open_image(path)
                pixels = np.array(self.preprocessing.resized(image))  # (H, W, 3)
                self.kept.append(torch.from_numpy(pixels).permute(2, 0, 1))
                self.known[path] = len(self.kept) - 1
        return [self.known[path] for path in paths]

    def images(self, numbers):
        """(len(numbers), 3, H, W) float32; None where there are none."""
        if not len(numbers):
            return None
        return as_batch(torch.stack([self.kept[i] for i in numbers]), self.preprocessing)

    def of(self, paths):
        """The images of these files, as `images`."""
        return self.images(self.numbers(paths))

    def shown(self, examples, which="right"):
        """What each of the examples is shown, for generate: its own images ("right"), a grey one in
        place of each ("none"), or those of another example ("shuffled").
        """
        paths = [example.get("images", []) for example in examples]
        if which == "none":
            paths = [[GREY] * len(own) for own in paths]
        elif which == "shuffled":
            paths = shuffled(paths)
        return Shown(self, paths)


class Shown:
    """The images of a list of prompts, made when asked for: shown[i] (n, 3, H, W), or None."""

    def __init__(self, store, paths):
        self.store, self.paths = store, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.store.of(self.paths[i])


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
                f"no other item has {len(own)} images to show in place of {own[0]}; to shuffle "
                "them takes two that differ"
            )
        i = rng.randrange(len(others))
        out.append(list(others[i] if others[i] != own else others[i - 1]))
    return out

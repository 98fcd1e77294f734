"""Image files to tensors, with Pillow alone.

    open_image(path)          any image file -> RGB, or one clear line
    Preprocessing()(image)    resize, crop, (pixel * rescale - mean) / std -> (3, H, W)
    ImageStore                the images of many records, each file opened once

Resizing and numbers are those of Hugging Face's CLIPImageProcessor and SiglipImageProcessor.
"""

import hashlib
import json
import random
import warnings
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
CONFIG = "preprocessor_config.json"
# what such a file means where it is silent
DEFAULTS = {"size": 224, "crop_size": 224, "resample": 3, "rescale_factor": 1 / 255}
DEFAULTS |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
CLIP_DEFAULTS = DEFAULTS | {"do_center_crop": True}
CLIP_DEFAULTS |= {"image_mean": (0.48145466, 0.4578275, 0.40821073)}
CLIP_DEFAULTS |= {"image_std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP_DEFAULTS = DEFAULTS | {"do_center_crop": False}
SIGLIP_DEFAULTS |= {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


# --- files ---------------------------------------------------------------------------------------


def open_image(path):
    """The image in a file as RGB, upright; of an animation the first frame.

    Transparency is laid on white, as whoever looks at the file on a page sees it. Raises UserError
    where the file is missing, no image, damaged, cut off, or larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage: it is an error here, or doesn't matter
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:  # nothing is decoded yet
                    raise Image.DecompressionBombError
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        reason = f"claims more than {MAX_PIXELS:,} pixels, too many to decode; make it smaller"
    except Image.UnidentifiedImageError:
        reason = f"is not an image that can be read ({', '.join(FORMATS)})"
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        said = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        reason = f"can't be opened: it is missing, damaged, cut off or of an unknown kind ({said})"
    raise UserError(f"{path} {reason}")


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
        self.size = both(self.size)
        self.mean, self.std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        self.resample = int(Image.Resampling(self.resample))
        if min(*self.size, self.shortest_edge or 1) < 1:
            raise ValueError(f"a size must be at least 1: {self.size}, {self.shortest_edge}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ValueError("image_mean and image_std must hold 3 numbers, and image_std no zero")

    def __call__(self, image):
        """A Pillow image of any mode -> (3, H, W) float32."""
        return self.normalised(self.pixels(to_rgb(image))[None])[0]

    def pixels(self, image):
        """An RGB image in the size that the ViT reads, (3, H, W) uint8."""
        height, width = self.size
        if self.shortest_edge is None:
            image = image.resize((width, height), self.resample)
        else:
            short, long = sorted(image.size)
            edge = self.shortest_edge
            longer = int(edge * long / short)  # cut, not rounded, as Hugging Face does
            if edge * longer > MAX_PIXELS:
                shape = f"{image.width} x {image.height}"
                raise UserError(f"an image of {shape} is too narrow to resize")
            portrait = image.width <= image.height
            image = image.resize((edge, longer) if portrait else (longer, edge), self.resample)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black beyond the edge
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalised(self, pixels):
        """(pixel * rescale - mean) / std for pixels (n, 3, H, W) uint8; float32.

        Rounded after each step as Hugging Face does, hence equal to the bit.
        """
        mean, std = (torch.tensor(x, device=pixels.device) for x in (self.mean, self.std))
        scaled = (pixels.double() * self.rescale).float()
        return (scaled - mean[:, None, None]) / std[:, None, None]

    @classmethod
    def from_folder(cls, folder):
        """From preprocessor_config.json, as CLIPImageProcessor or SiglipImageProcessor write it,
        or from the part of processor_config.json that CLIPProcessor writes in its place.
        """
        path = Path(folder) / CONFIG
        together = path.with_name("processor_config.json")
        if not path.exists() and together.exists():
            path, values = together, read_json(together).get("image_processor") or {}
        else:
            values = read_json(path)
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        if not kind.startswith(("CLIP", "Siglip")):
            raise UserError(f"{path}: its type {kind} is neither CLIP's nor SigLIP's")
        defaults = CLIP_DEFAULTS if kind.startswith("CLIP") else SIGLIP_DEFAULTS
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return cls(**settings_of(defaults | given))
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
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if edge:
            values |= {"do_center_crop": True, "crop_size": exact}
        atomic_write(Path(folder) / CONFIG, json.dumps(values, indent=2) + "\n")


def both(size):
    """(height, width); a single number stands for both."""
    if isinstance(size, int):
        return size, size
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else size
    return height, width


def settings_of(values):
    """The fields of a Preprocessing, from all values of a preprocessor_config.json; ValueError
    where images would come out in different sizes, or in another one than we make.
    """
    size, crops = values["size"], values["do_center_crop"]
    if isinstance(size, int) and crops:  # as old files say it
        size = {"shortest_edge": size}
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    exact = both(values["crop_size"] if edge else size)
    if not values["do_resize"] or (edge and (not crops or size.get("longest_edge"))):
        raise ValueError("it would make images of different sizes")
    if not edge and crops and both(values["crop_size"]) != exact:
        raise ValueError(f"it resizes to {exact} and then crops to {values['crop_size']}")
    normalise = values["do_normalize"]
    return {
        "size": exact,
        "shortest_edge": edge,
        "resample": values["resample"],
        "mean": values["image_mean"] if normalise else (0.0, 0.0, 0.0),
        "std": values["image_std"] if normalise else (1.0, 1.0, 1.0),
        "rescale": float(values["rescale_factor"]) if values["do_rescale"] else 1.0,
    }


# --- images of records ----------------------------------------------------------------------------


GREY = "<grey>"  # in place of a path: a plain grey image


class ImageStore:
    """Images by number, each file opened once and kept as the vision tower sees it, in bytes."""

    def __init__(self, preprocessing):
        self.preprocessing = preprocessing
        self.known, self.kept = {}, []  # path or pixels -> number; number -> (3, H, W) uint8

    def numbers(self, paths):
        """The numbers of these files' images, the same for the same pixels; opens those that it
        hasn't yet.
        """
        for path in paths:
            if path not in self.known:
                grey = Image.new("RGB", (64, 64), (128, 128, 128))
                image = grey if path == GREY else open_image(path)
                pixels = self.preprocessing.pixels(image)
                digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
                self.known[path] = self.known.setdefault(digest, len(self.kept))
                if self.known[path] == len(self.kept):
                    self.kept.append(pixels)
        return [self.known[path] for path in paths]

    def images(self, numbers):
        """(len(numbers), 3, H, W) float32; None where there are none."""
        if not len(numbers):
            return None
        return self.preprocessing.normalised(torch.stack([self.kept[i] for i in numbers]))

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
                f"no other example has {len(own)} images to show in place of {own[0]}; to shuffle "
                "them takes two that differ"
            )
        i = rng.randrange(len(others))
        out.append(list(others[i] if others[i] != own else others[i - 1]))
    return out

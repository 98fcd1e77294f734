"""Image files to tensors, with Pillow alone.

    open_image(path)          any image file -> RGB, or one clear line
    Preprocessing()(image)    resize, crop, (pixel / 255 - mean) / std -> (3, H, W)
    ImageStore                the images of many records, each file opened once

Resizing and numbers are those of Hugging Face's CLIPImageProcessor and SiglipImageProcessor.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from nanollm.config import UserError, atomic_write, read_json
from nanollm.formats import need

# Formats that Pillow decodes itself; EPS, for one, is a program that another program would run.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
CONFIG = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# what such a file of CLIP's and of SigLIP's means where it is silent
COMMON = dict(size=224, crop_size=224, resample=3, rescale_factor=1 / 255)
DEFAULTS = {
    "CLIP": COMMON | dict(do_center_crop=True, image_mean=CLIP_MEAN, image_std=CLIP_STD),
    "Siglip": COMMON | dict(do_center_crop=False, image_mean=HALF, image_std=HALF),
}


# --- files ---------------------------------------------------------------------------------------


def open_image(path):
    """The image in a file as RGB, upright; of an animation the first frame.

    Transparency is laid on white, as whoever looks at the file on a page sees it. Raises UserError
    where the file is missing, no image, damaged, cut off, or much too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        said = " ".join(str(e).split()) or type(e).__name__
    raise UserError(
        f"{path} can't be read: it is missing, damaged, cut off, or no image of the kinds "
        f"{', '.join(FORMATS)} ({said})"
    )


def to_rgb(image):
    """The image as 8-bit RGB, transparency on white."""
    if image.mode[0] in "IF":  # Pillow would clip at 255: nearly all would be white
        raise ValueError("its pixels have more than 8 bits; convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- preprocessing -------------------------------------------------------------------------------


@dataclass
class Preprocessing:
    """How an image becomes the square that a ViT reads.

    Without `shortest_edge` it is resized to size x size, which may stretch it (SigLIP). With it,
    its shorter side is resized to so many pixels and the middle is cut out (CLIP).
    """

    size: int = 64  # H and W of what comes out
    shortest_edge: int | None = None
    resample: int = 3  # Pillow's number of the filter: 0 nearest, 2 bilinear, 3 bicubic ...
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def __call__(self, image):
        """A Pillow image of any mode -> (3, H, W) float32."""
        return self.normalised(self.pixels(to_rgb(image))[None])[0]

    def pixels(self, image):
        """An RGB image in the size that the ViT reads, (3, H, W) uint8."""
        width = height = self.size
        if self.shortest_edge:  # the longer one is cut, not rounded, as Hugging Face does
            short = min(image.size)
            width, height = (int(self.shortest_edge * side / short) for side in image.size)
        image = image.resize((width, height), self.resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))  # black beyond the edge
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalised(self, pixels):
        """(pixel / 255 - mean) / std for pixels (n, 3, H, W) uint8; float32.

        Rounded after each step as Hugging Face does, hence equal to the bit.
        """
        mean, std = (torch.tensor(x, device=pixels.device) for x in (self.mean, self.std))
        scaled = (pixels.double() * (1 / 255)).float()
        return (scaled - mean[:, None, None]) / std[:, None, None]

    @classmethod
    def from_folder(cls, folder, size):
        """For a ViT that reads images of this size: from preprocessor_config.json, as
        CLIPImageProcessor or SiglipImageProcessor write it, or from the part of
        processor_config.json that CLIPProcessor writes in its place.
        """
        path = Path(folder) / CONFIG
        together = path.with_name("processor_config.json")
        if not path.exists() and together.exists():
            path, values = together, read_json(together).get("image_processor") or {}
        else:
            values = read_json(path)
        name = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        kind = next((kind for kind in DEFAULTS if name.startswith(kind)), None)
        need(kind, path, f"its type {name} is neither CLIP's nor SigLIP's")
        values = DEFAULTS[kind] | {key: value for key, value in values.items() if value is not None}
        resized, edge, sides = values["size"], None, []  # sides: of what comes out
        if values["do_center_crop"]:  # a size of one number is the shorter side's, in old files
            edge = resized if isinstance(resized, int) else resized.get("shortest_edge")
            sides.append(values["crop_size"])
        if not edge:
            sides.append(resized)
        fits = all(side in (size, {"height": size, "width": size}) for side in sides)
        need(fits, path, f"it must make {size} x {size} pixels, which the ViT reads")
        steps = ("do_resize", "do_rescale", "do_normalize")
        usual = all(values.get(step, True) for step in steps)
        usual = usual and values["rescale_factor"] == 1 / 255
        need(usual, path, "it must resize images, divide them by 255 and normalise them")
        mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
        return cls(size, edge, values["resample"], mean, std)

    def save(self, folder):
        """Write preprocessor_config.json, which transformers' AutoImageProcessor opens."""
        square, edge = {"height": self.size, "width": self.size}, self.shortest_edge
        values = {
            "image_processor_type": "CLIPImageProcessor" if edge else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": edge} if edge else square,
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if edge:
            values |= {"do_center_crop": True, "crop_size": square}
        atomic_write(Path(folder) / CONFIG, json.dumps(values, indent=2) + "\n")


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
                image = Image.new("RGB", (64, 64), "grey") if path == GREY else open_image(path)
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
        """What each of the examples is shown, for generate: its own images ("right"), or a grey one
        in place of each ("none").
        """
        paths = [example.get("images", []) for example in examples]
        return Shown(self, [[GREY] * len(own) if which == "none" else own for own in paths])


class Shown:
    """The images of a list of prompts, made when asked for: shown[i] (n, 3, H, W), or None."""

    def __init__(self, store, paths):
        self.store, self.paths = store, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.store.of(self.paths[i])

"""Image files: what opens, what is refused, and preprocessing equal to transformers'."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nanollm.config import UserError
from nanollm.vision.images import CLIP_MEAN, CLIP_STD, ImageStore, Preprocessing, open_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
CLIP_NUMBERS = dict(mean=CLIP_MEAN, std=CLIP_STD)


def noise(width, height, mode="RGB", seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if bands == 1 else (height, width, bands)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def bytes_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100))


# --- files that open -----------------------------------------------------------------------------


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


# name: (image, options of saving, the row of pixels expected)
GOOD = {
    "rgb.png": (Image.new("RGB", (1, 1), RED), {}, [RED]),
    "rgb.bmp": (Image.new("RGB", (1, 1), BLUE), {}, [BLUE]),
    "rgb.tiff": (Image.new("RGB", (1, 1), RED), dict(compression="tiff_lzw"), [RED]),
    "lossless.webp": (Image.new("RGBA", (1, 1), (*RED, 255)), dict(lossless=True), [RED]),
    "really_a.png.txt": (Image.new("RGB", (1, 1), RED), dict(format="PNG"), [RED]),
    "grey.png": (Image.new("L", (1, 1), 77), {}, [(77, 77, 77)]),
    "bilevel.png": (Image.new("1", (1, 1), 1), {}, [WHITE]),
    "clear.png": (Image.new("RGBA", (1, 1), (*RED, 0)), {}, [WHITE]),
    "half_clear.png": (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), {}, [(204, 204, 204)]),
    "grey_clear.png": (Image.new("LA", (1, 1), (0, 0)), {}, [WHITE]),
    "palette.png": (palette(), {}, [RED, BLUE]),
    "palette_clear.png": (palette(), dict(transparency=1), [RED, WHITE]),
    "palette_clear.gif": (palette(), dict(transparency=1), [RED, WHITE]),
    "grey_level_clear.png": (Image.fromarray(np.uint8([[0, 9]])), dict(transparency=9))
    + ([(0, 0, 0), WHITE],),
    "cmyk.tiff": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), {}, [RED]),
}


@pytest.mark.parametrize("name", GOOD)
def test_files_of_every_mode_open_as_rgb(tmp_path, name):
    image, options, row = GOOD[name]
    image.save(tmp_path / name, **options)
    opened = open_image(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (len(row), 1)
    assert [opened.getpixel((x, 0)) for x in range(len(row))] == row


def test_jpeg_opens_about_as_it_was(tmp_path):
    image = Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK")
    image.save(tmp_path / "photo.jpg", quality=95)
    opened = open_image(tmp_path / "photo.jpg")
    expected = image.convert("RGB").getpixel((0, 0))
    assert max(abs(a - b) for a, b in zip(opened.getpixel((8, 8)), expected)) <= 3


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = dict(lossless=True) if ending == "webp" else {}
    path = tmp_path / f"moving.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert open_image(path).getpixel((0, 0)) == RED


def test_an_image_lying_on_its_side_is_set_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter to see it upright
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (1, 2)
    assert [opened.getpixel((0, y)) for y in (0, 1)] == [RED, BLUE]


# --- files that don't ----------------------------------------------------------------------------

PNG, JPEG = (bytes_of(noise(40, 40), kind) for kind in ("PNG", "JPEG"))
BAD = {
    "empty": (b"", "cannot identify"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "png cut off": (PNG[: len(PNG) // 2], "truncated"),
    "jpeg cut off": (JPEG[: len(JPEG) // 2], "truncated"),
    "png with a hole": (PNG[:60] + bytes(300) + PNG[360:], "damaged, cut off"),
    "floating point": (bytes_of(Image.fromarray(np.float32([[0.5]])), "TIFF"), "more than 8 bits"),
    "bomb": (png_header(20_000, 20_000), "exceeds limit"),
    "16 bits": (bytes_of(Image.fromarray(np.uint16([[257]])), "PNG"), "more than 8 bits"),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"can't be read: .*{message}") as error:
        open_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damage_anywhere_gives_an_image_or_one_line(tmp_path, kind):
    options = dict(compression="tiff_lzw") if kind == "TIFF" else {}
    content, random = bytes_of(noise(24, 24), kind, **options), np.random.default_rng(3)
    path, refused = tmp_path / "image", 0
    for _ in range(60):
        damaged = bytearray(content[: random.integers(1, len(content) + 1)])
        where = min(len(damaged), 200) if random.random() < 0.7 else len(damaged)
        for _ in range(random.integers(0, 6)):
            damaged[random.integers(0, where)] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e)
    assert refused > 20


# --- preprocessing -------------------------------------------------------------------------------

PREPROCESSINGS = {
    "clip": Preprocessing(size=24, shortest_edge=24, **CLIP_NUMBERS),
    "clip, cropped": Preprocessing(size=17, shortest_edge=29, **CLIP_NUMBERS),
    "clip, padded": Preprocessing(size=40, shortest_edge=25, resample=2),
    "siglip": Preprocessing(size=31, resample=2),
    "ours": Preprocessing(),
}
SIZES = [(64, 64), (37, 91), (91, 37), (3, 5), (1, 1), (24, 24), (200, 133)]


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_pixels_equal_those_of_transformers_and_a_saved_preprocessing_loads(
    transformers, tmp_path, name
):
    ours = PREPROCESSINGS[name]
    ours.save(tmp_path)
    assert Preprocessing.from_folder(tmp_path, ours.size) == ours
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__.startswith("CLIP" if ours.shortest_edge else "Siglip")
    for width, height in SIZES:
        for mode in ("RGB", "L", "RGBA", "LA"):
            image = noise(width, height, mode)
            expected = theirs(image, return_tensors="pt")["pixel_values"][0]
            pixels = ours(image)
            assert pixels.dtype == torch.float32 and pixels.shape == (3, ours.size, ours.size)
            assert torch.equal(pixels, expected), (width, height, mode)


@pytest.mark.parametrize("name", ["CLIPImageProcessorPil", "SiglipImageProcessorPil"])
def test_what_transformers_saves_is_read(transformers, tmp_path, name):
    theirs = getattr(transformers, name)()
    theirs.save_pretrained(tmp_path)
    image = noise(300, 250)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(Preprocessing.from_folder(tmp_path, 224)(image), expected)


OLD = dict(crop_size=20, do_center_crop=True, do_normalize=True, do_resize=True) | dict(
    feature_extractor_type="CLIPFeatureExtractor", image_mean=[0.5] * 3, image_std=[0.25] * 3
)
NEW = dict(image_processor_type="SiglipImageProcessor", size={"height": 8, "width": 8})
SPELLINGS = [
    (OLD | dict(size=24), Preprocessing(20, 24, std=(0.25,) * 3)),
    (OLD | dict(size={"shortest_edge": 24}), Preprocessing(20, 24, std=(0.25,) * 3)),
    (OLD | dict(size={"height": 20, "width": 20}), Preprocessing(20, std=(0.25,) * 3)),
    (NEW, Preprocessing(8)),
    (NEW | dict(size=8), Preprocessing(8)),
    (NEW | dict(image_processor_type="SiglipImageProcessorFast"), Preprocessing(8)),
    (dict(image_processor_type="CLIPImageProcessor"), Preprocessing(224, 224, **CLIP_NUMBERS)),
    (dict(image_processor_type="SiglipImageProcessor"), Preprocessing(224)),
]


@pytest.mark.parametrize("values, expected", SPELLINGS)
def test_old_and_new_spellings_are_read(tmp_path, values, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert Preprocessing.from_folder(tmp_path, expected.size) == expected


def test_the_file_that_holds_a_whole_processor_is_read(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": NEW}))
    assert Preprocessing.from_folder(tmp_path, 8) == Preprocessing(8)


FAULTS = [
    (dict(image_processor_type="DPTImageProcessor"), "neither CLIP's nor SigLIP's"),
    (dict(), "its type None"),
    (NEW | dict(do_resize=False), "must resize images, divide them by 255 and normalise"),
    (NEW | dict(rescale_factor=1), "must resize images, divide them by 255 and normalise"),
    (NEW | dict(size={"shortest_edge": 8}), "must make 8 x 8 pixels"),
    (NEW | dict(size={"height": 8, "width": 9}), "must make 8 x 8 pixels"),
    (OLD | dict(size={"height": 24, "width": 24}, crop_size=8), "must make 8 x 8 pixels"),
    (OLD | dict(size=24), "must make 8 x 8 pixels"),
]


@pytest.mark.parametrize("values, message", FAULTS)
def test_settings_that_are_not_implemented_are_named(tmp_path, values, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        Preprocessing.from_folder(tmp_path, 8)
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)


# --- the images of records ------------------------------------------------------------------------


def test_a_store_opens_each_file_once_and_gives_what_preprocessing_gives(tmp_path):
    path, how = str(tmp_path / "a.png"), Preprocessing(16)
    noise(20, 20).save(path)
    store, expected = ImageStore(how), how(open_image(path))
    assert torch.equal(store.of([path, path]), torch.stack([expected, expected]))
    (tmp_path / "a.png").unlink()
    assert torch.equal(store.of([path])[0], expected)
    assert len(store.kept) == 1 and store.kept[0].dtype == torch.uint8 and store.of([]) is None


def test_examples_are_shown_their_own_images_or_grey_ones(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for seed, path in enumerate(paths):
        noise(16, 16, seed=seed).save(path)
    examples = [{"images": paths[:1]}, {"images": paths[1:]}, {"messages": []}]
    store = ImageStore(Preprocessing(16))
    right, none = store.shown(examples), store.shown(examples, "none")
    assert torch.equal(right[0], store.of(paths[:1])) and not torch.equal(right[0], right[1])
    assert torch.equal(none[0], none[1]) and none[0].std() == 0
    assert right[2] is none[2] is None and len(right) == 3

"""Scenes of the village: what stands in a picture, as data, and the picture itself.

A scene has a season, and one or two groups of objects. A group is of one kind, colour and size,
on the left, in the middle or on the right; no kind occurs twice, so questions have one answer.
Lanterns and stars are in the sky, everything else is on the ground. Nothing overlaps.

Lengths are in units: a picture measures 64 by 64, whatever its pixels. x goes right, y down.
"""

import math
import random
from dataclasses import asdict, dataclass, replace

from PIL import Image, ImageDraw

KINDS = {
    "cup": "cups",
    "bell": "bells",
    "candle": "candles",
    "basket": "baskets",
    "lantern": "lanterns",
    "star": "stars",
}
SKY = ("lantern", "star")
COLOURS = {
    "red": (222, 38, 43),
    "blue": (38, 92, 224),
    "green": (22, 150, 62),
    "yellow": (255, 208, 20),
    "purple": (126, 52, 178),
}
PLACES = ("left", "middle", "right")
SIZES = {"small": 4.7, "big": 7.1}  # half the width of an object
SEASONS = ("spring", "summer", "autumn", "winter")
TIMES = ("day", "evening")
CHANGES = ("kind", "colour", "number", "place", "colours")  # of `vary`
# Never seen together in training: what a model says of them, it has put together itself.
HELD_OUT = {"basket": "red", "candle": "blue", "star": "green", "cup": "yellow", "bell": "purple"}

UNITS = 64
SMALLEST = 32  # pixels
CELL = UNITS / 3  # a third of the width; a group has the sky or the ground of it
# Where objects may be in it, columns and rows. A small one has a sixth of the picture's width: a
# vision tower that cuts the picture into 6 x 6 patches sees most of them whole, and so needs
# thousands of pictures instead of millions.
SPOTS = {"small": (2, 3), "big": (1, 2)}
TINT = 22  # how far R, G and B of a group may be from those of the named colour, of 255
SHIFT = 0.5  # how far from the middle of its spot an object may be, right or left, up or down
ROWS = ("sky", "ground")


@dataclass(frozen=True)
class Group:
    """`number` objects alike, 1 to 3; of the big ones 1 or 2."""

    kind: str
    colour: str
    size: str
    place: str
    number: int


@dataclass(frozen=True)
class Scene:
    """`seed` decides what no caption tells: where exactly an object is, trees and clouds."""

    season: str
    time: str
    groups: tuple
    seed: int

    @property
    def truth(self):
        """All that captions and questions are about: two scenes with the same are the same."""
        return self.season, tuple(sorted(self.groups, key=lambda group: group.kind))

    def group(self, kind):
        """The group of this kind, or None."""
        return next((group for group in self.groups if group.kind == kind), None)

    def count(self, kind, colour=None):
        group = self.group(kind)
        return group.number if group and colour in (None, group.colour) else 0

    def in_row(self, row):
        """The groups in the sky, or those on the ground."""
        return [group for group in self.groups if row_of(group.kind) == row]

    def as_dict(self):
        return asdict(self)

    @staticmethod
    def from_dict(record):
        groups = tuple(Group(**group) for group in record["groups"])
        return Scene(record["season"], record["time"], groups, record["seed"])


def random_scene(rng, held_out=False):
    """A scene without any pair of HELD_OUT, or with one: its first group.

    There is one group in the sky, one on the ground, or both: few enough for a model of a million
    parameters to learn in minutes which of them a question means.
    """
    rows = rng.choice((ROWS, ROWS, ROWS, ROWS[:1], ROWS[1:]))
    while True:
        kinds = [rng.choice(kinds_of(row)) for row in rows]
        rng.shuffle(kinds)
        if kinds[0] in HELD_OUT or not held_out:
            break
        rows = ROWS
    places = {row: iter(rng.sample(PLACES, len(PLACES))) for row in ROWS}
    groups = []
    for i, kind in enumerate(kinds):
        colour = rng.choice([c for c in COLOURS if c != HELD_OUT.get(kind)])
        if held_out and i == 0:
            colour = HELD_OUT[kind]
        size = "big" if rng.random() < 0.35 else "small"
        number = (
            rng.choice((1, 2)) if size == "big" else rng.choices((1, 2, 3), (3, 3, 5))[0]
        )  # about as many of each number altogether
        groups.append(Group(kind, colour, size, next(places[row_of(kind)]), number))
    return Scene(rng.choice(SEASONS), rng.choice(TIMES), tuple(groups), rng.randrange(10**9))


def vary(scene, rng):
    """The scene with one thing changed: kind, colour, number or place of a group, or the colours of
    two groups exchanged. Such neighbours make a model look at everything: whoever tells scenes
    apart by their colours alone confuses them (Yuksekgonul et al. 2023, arXiv:2210.01936).
    """
    while True:
        groups = list(scene.groups)
        i, j = rng.randrange(len(groups)), rng.randrange(len(groups))
        group, other, change = groups[i], groups[j], rng.choice(CHANGES)
        if change == "kind":
            groups[i] = replace(group, kind=rng.choice(kinds_of(row_of(group.kind))))
        elif change == "colour":
            groups[i] = replace(group, colour=rng.choice(list(COLOURS)))
        elif change == "number":
            number = rng.choice((1, 2) if group.size == "big" else (1, 2, 3))
            groups[i] = replace(group, number=number)
        elif change == "place":  # exchanged with who is there already
            place = rng.choice(PLACES)
            row = [row_of(each.kind) for each in groups]
            groups = [
                replace(each, place=group.place)
                if each.place == place and row[k] == row[i]
                else each
                for k, each in enumerate(groups)
            ]
            groups[i] = replace(group, place=place)
        else:
            groups[i] = replace(group, colour=other.colour)
            groups[j] = replace(other, colour=group.colour)
        changed = replace(scene, groups=tuple(groups), seed=rng.randrange(10**9))
        if (
            changed.truth != scene.truth
            and len({each.kind for each in groups}) == len(groups)
            and not any(HELD_OUT.get(each.kind) == each.colour for each in groups)
        ):
            return changed


def row_of(kind):
    return "sky" if kind in SKY else "ground"


def kinds_of(row):
    return [kind for kind in KINDS if row_of(kind) == row]


# --- where everything is -----------------------------------------------------


def layout(scene):
    """Every object as (group, x, y, half its width, 1 or -1: which way it faces), far ones first.

    No part of an object is more than half its width from (x, y), right or left, up or down.
    """
    objects = []
    for group in scene.groups:
        rng = random.Random(f"layout-{scene.seed}-{group.kind}")  # whatever its colour
        left, top = PLACES.index(group.place) * CELL, 0 if group.kind in SKY else UNITS / 2
        half, columns, rows = SIZES[group.size], *SPOTS[group.size]
        wide, high = CELL / columns, UNITS / 2 / rows
        spots = [(i, j) for i in range(columns) for j in range(rows)]
        for i, j in rng.sample(spots, group.number):
            x, y = left + (i + 0.5) * wide, top + (j + 0.5) * high
            x, y = x + rng.uniform(-SHIFT, SHIFT), y + rng.uniform(-SHIFT, SHIFT)
            objects.append((group, x, y, half, rng.choice((1, -1))))
    return sorted(objects, key=lambda placed: placed[2])


# --- the pen -----------------------------------------------------------------


def shade(colour, share):
    """Darker (share below 1) or paler (above 1: 2 is white)."""
    if share <= 1:
        return tuple(round(c * share) for c in colour)
    return tuple(round(c + (255 - c) * (share - 1)) for c in colour)


class Pen:
    """Draws in units, with alpha, on an image that is `scale` times as large."""

    def __init__(self, image, scale):
        self.draw, self.scale = ImageDraw.Draw(image, "RGBA"), scale
        self.outline = 0.5  # the width of outlines

    def polygon(self, points, fill, line=None):
        points = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.polygon(points, fill)
        if line:
            self.draw.line(
                [*points, points[0], points[1]], line, self.pixels(self.outline), "curve"
            )

    def box(self, left, top, right, bottom, fill, line=None):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, line)

    def ellipse(self, x, y, rx, ry, fill, line=None):
        box = [c * self.scale for c in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.ellipse(box, fill, line, self.pixels(self.outline))

    def line(self, points, fill, width):
        points = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(points, fill, self.pixels(width), "curve")

    def pixels(self, width):
        return max(round(width * self.scale), 1)


# --- the objects: each in a square around (x, y), `h` to every side -----------------

CREAM, TRUNK = (255, 250, 232), (122, 84, 58)


def cup(pen, x, y, h, colour, turn):
    dark = shade(colour, 0.42)
    pen.ellipse(x + turn * 0.62 * h, y + 0.12 * h, 0.34 * h, 0.4 * h, shade(colour, 0.6), dark)
    pen.ellipse(x + turn * 0.62 * h, y + 0.12 * h, 0.16 * h, 0.2 * h, CREAM)
    left, right = x - (0.9 if turn > 0 else 0.6) * h, x + (0.6 if turn > 0 else 0.9) * h
    pen.polygon(
        [
            (left, y - 0.7 * h),
            (right, y - 0.7 * h),
            (right - 0.2 * h, y + 0.92 * h),
            (left + 0.2 * h, y + 0.92 * h),
        ],
        colour,
        dark,
    )
    middle, wide = (left + right) / 2, (right - left) / 2
    pen.ellipse(middle, y - 0.7 * h, wide, 0.22 * h, shade(colour, 0.6), dark)
    pen.line(
        [(middle - 0.6 * wide, y - 0.3 * h), (middle - 0.5 * wide, y + 0.6 * h)],
        (255, 255, 255, 190),
        0.16 * h,
    )


def bell(pen, x, y, h, colour, turn):
    dark = shade(colour, 0.42)
    pen.ellipse(x, y - 0.8 * h, 0.16 * h, 0.16 * h, dark)
    pen.ellipse(x + 0.2 * turn * h, y + 0.78 * h, 0.22 * h, 0.2 * h, dark)
    right = [(0.24, -0.7), (0.44, -0.5), (0.52, 0.0), (0.6, 0.3), (0.92, 0.62)]
    outline = [(x + dx * h, y + dy * h) for dx, dy in right]
    outline += [(x - dx * h, y + dy * h) for dx, dy in reversed(right)]
    pen.polygon(outline, colour, dark)
    pen.line([(x - 0.66 * h, y + 0.36 * h), (x + 0.66 * h, y + 0.36 * h)], CREAM, 0.16 * h)


def candle(pen, x, y, h, colour, turn):
    dark = shade(colour, 0.42)
    pen.ellipse(x, y + 0.76 * h, 0.86 * h, 0.22 * h, shade(colour, 0.6), dark)
    pen.box(x - 0.46 * h, y - 0.36 * h, x + 0.46 * h, y + 0.78 * h, colour, dark)
    pen.line(
        [(x - 0.24 * h, y - 0.2 * h), (x - 0.24 * h, y + 0.6 * h)], (255, 255, 255, 170), 0.13 * h
    )
    pen.ellipse(x, y - 0.68 * h, 0.18 * h, 0.3 * h, (255, 190, 60), (214, 120, 30))
    pen.ellipse(x, y - 0.6 * h, 0.08 * h, 0.15 * h, CREAM)


def basket(pen, x, y, h, colour, turn):
    dark = shade(colour, 0.42)
    pen.ellipse(x, y, 0.6 * h, 0.9 * h, dark)  # the handle: what a smaller ellipse leaves of it
    pen.ellipse(x, y, 0.42 * h, 0.72 * h, CREAM)
    pen.polygon(
        [
            (x - 0.95 * h, y),
            (x + 0.95 * h, y),
            (x + 0.68 * h, y + 0.9 * h),
            (x - 0.68 * h, y + 0.9 * h),
        ],
        colour,
        dark,
    )
    for dy in (0.3, 0.6):
        pen.line(
            [(x - 0.8 * h, y + dy * h), (x + 0.8 * h, y + dy * h)], shade(colour, 1.5), 0.1 * h
        )


def lantern(pen, x, y, h, colour, turn):
    dark = shade(colour, 0.42)
    pen.line([(x, y - 0.98 * h), (x, y + 0.98 * h)], dark, 0.13 * h)
    pen.ellipse(x, y, 0.8 * h, 0.66 * h, colour, dark)
    pen.ellipse(x, y, 0.38 * h, 0.64 * h, shade(colour, 1.4))
    for dy in (-0.62, 0.62):
        pen.box(x - 0.36 * h, y + (dy - 0.1) * h, x + 0.36 * h, y + (dy + 0.1) * h, TRUNK)


def star(pen, x, y, h, colour, turn):
    def points(radius):
        reach = [radius if i % 2 == 0 else 0.45 * radius for i in range(10)]
        return [
            (x + r * math.sin(math.pi * i / 5), y + 0.06 * h - r * math.cos(math.pi * i / 5))
            for i, r in enumerate(reach)
        ]

    pen.polygon(points(0.98 * h), colour, shade(colour, 0.42))
    pen.polygon(points(0.42 * h), shade(colour, 1.5))


DRAWN = {
    "cup": cup,
    "bell": bell,
    "candle": candle,
    "basket": basket,
    "lantern": lantern,
    "star": star,
}

# --- the country around ----------------------------------------------------------

SKIES = {"day": ((176, 214, 246), (238, 247, 253)), "evening": ((190, 190, 236), (255, 226, 204))}
GROUNDS = {
    "spring": (206, 236, 182),
    "summer": (190, 222, 150),
    "autumn": (240, 220, 178),
    "winter": (244, 249, 255),
}
CROWNS = {"spring": (250, 190, 212), "summer": (98, 158, 92), "autumn": (230, 150, 78)}
SPECKS = {
    "spring": (250, 170, 200),
    "summer": (140, 186, 104),
    "autumn": (214, 126, 56),
    "winter": (202, 216, 236),
}  # petals, tufts of grass, leaves, tracks in the snow


def tree(pen, x, foot, height, season):
    """Blossoms, green or orange leaves; in winter bare branches with snow at the foot."""
    trunk = shade(TRUNK, 1.25)
    pen.line([(x, foot), (x, foot - 0.6 * height)], trunk, 0.13 * height)
    if season == "winter":
        for reach, low, high in (
            (-0.34, 0.4, 0.86),
            (0.32, 0.45, 0.92),
            (-0.1, 0.5, 1.0),
            (-0.2, 0.3, 0.55),
            (0.22, 0.3, 0.55),
        ):
            pen.line(
                [(x, foot - low * height), (x + reach * height, foot - high * height)],
                trunk,
                0.07 * height,
            )
        pen.ellipse(x, foot, 0.3 * height, 0.08 * height, (255, 255, 255))
        return
    crown = CROWNS[season]
    for dx, dy, r in ((-0.22, 0.6, 0.24), (0.22, 0.6, 0.24), (0, 0.76, 0.27)):
        pen.ellipse(x + dx * height, foot - dy * height, r * height, r * height, shade(crown, 0.93))
    for dx, dy, r in ((-0.24, 0.64, 0.15), (0.14, 0.68, 0.16), (-0.04, 0.84, 0.14)):
        pen.ellipse(x + dx * height, foot - dy * height, r * height, r * height, shade(crown, 1.3))


def landscape(pen, scene, rng):
    """Sun, clouds, two rows of hills, trees between them, and what lies on the ground."""
    ground = GROUNDS[scene.season]
    sun_x, sun_y = rng.uniform(8, 56), 6 if scene.time == "day" else 23
    for r, alpha in ((7, 60), (5.2, 90), (3.8, 230)):
        pen.ellipse(sun_x, sun_y, r, r, (255, 244, 200, alpha))
    for _ in range(2):
        x, y = rng.uniform(4, 60), rng.uniform(4, 18)
        for dx, dy, r in ((-3, 0.6, 2), (0, 0, 2.8), (3.2, 0.7, 1.9)):
            pen.ellipse(x + dx, y + dy, 1.5 * r, 0.8 * r, (255, 255, 255, 120))
    for x, r in ((rng.uniform(4, 20), 26), (rng.uniform(42, 60), 30)):
        pen.ellipse(x, 28 + 0.5 * r, r, 0.5 * r, shade(ground, 0.9))
    bend = rng.uniform(-1.5, 1.5)
    pen.polygon(
        [(0, 64), *((x, 31 + bend * math.sin(x / 11 + bend)) for x in range(0, 65, 4)), (64, 64)],
        ground,
    )
    for i in range(5):
        x, height = 6.5 + 12.8 * i + rng.uniform(-3, 3), rng.uniform(10, 13)
        tree(pen, x, 33.5 + rng.uniform(-0.5, 1), height, scene.season)
    for _ in range(26):
        x, y = rng.uniform(0, 64), rng.uniform(36, 63)
        pen.ellipse(x, y, 0.55, 0.3, (*SPECKS[scene.season], 190))


def tinted(group, seed):
    """The group's colour, as every painter mixes it a little differently."""
    rng = random.Random(f"tint-{seed}-{group.kind}")
    return tuple(min(255, max(0, c + rng.randint(-TINT, TINT))) for c in COLOURS[group.colour])


def draw(scene, size=96, detail=4):
    """The picture, RGB, `size` pixels wide and high: drawn `detail` times as large, then reduced.

    Raises ValueError for a size at which objects could not be told apart.
    """
    if size < SMALLEST:
        raise ValueError(f"a picture needs at least {SMALLEST} pixels, got {size}")
    wide, scale = size * detail, size * detail / UNITS
    high, low = SKIES[scene.time]
    image = Image.new("RGB", (1, 3))
    image.putdata([high, low, low])  # from centre to centre: the horizon is half-way down
    image = image.resize((1, wide), Image.Resampling.BILINEAR, (0, 0.5, 1, 2.5))
    image = image.resize((wide, wide), Image.Resampling.NEAREST)
    pen = Pen(image, scale)
    landscape(pen, scene, random.Random(f"landscape-{scene.seed}"))
    for group, x, y, half, turn in layout(scene):
        if row_of(group.kind) == "ground":
            pen.ellipse(x, y + 0.92 * half, 0.98 * half, 0.2 * half, (60, 60, 80, 60))
        pen.outline = 0.11 * half
        DRAWN[group.kind](pen, x, y, half, tinted(group, scene.seed), turn)
    return image.reduce(detail)

"""Scenes of the village: what stands in an image, as data, and the image itself.

A scene has a season, and groups of objects in the sky, on the ground or in both: one, or up to
two, in each. A group is of one kind, colour and size, on the left, in the middle or on the right;
no kind occurs twice, so questions have one answer. Lanterns, stars and kites are in the sky,
everything else is on the ground. Nothing overlaps.

Lengths are in units: an image measures 64 by 64, whatever its pixels. x goes right, y down.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from data.village.world import table

ROWS = {"sky": ("lantern", "star", "kite"), "ground": ("cup", "bell", "candle", "basket")}
KINDS = {kind: kind + "s" for kind in (*ROWS["ground"], *ROWS["sky"])}
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
# Where objects may be in it, columns and rows. A small one has a sixth of the image's width: a
# vision tower that cuts the image into 6 x 6 patches sees most of them whole, and so needs
# thousands of images instead of millions.
SPOTS = {"small": (2, 3), "big": (1, 2)}
TINT = 22  # how far R, G and B of a group may be from those of the named colour, of 255
SHIFT = 0.5  # how far from the middle of its spot an object may be, right or left, up or down


@dataclass(frozen=True)
class Group:
    """`number` objects alike, 1 to 3; of the big ones 1 or 2."""

    kind: str
    colour: str
    size: str
    place: str
    number: int

    @property
    def held_out(self):
        return HELD_OUT.get(self.kind) == self.colour


@dataclass(frozen=True)
class Scene:
    """`seed` decides what no caption tells: where exactly an object is, its tint, the trees."""

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
        """The groups in the sky, or those on the ground, from left to right."""
        found = [group for group in self.groups if row_of(group.kind) == row]
        return sorted(found, key=lambda group: PLACES.index(group.place))

    @property
    def crowded(self):
        """Are there two groups in the sky, or on the ground?"""
        return any(len(self.in_row(row)) > 1 for row in ROWS)

    @staticmethod
    def from_dict(record):
        groups = tuple(Group(**group) for group in record["groups"])
        return Scene(record["season"], record["time"], groups, record["seed"])


def row_of(kind):
    return "sky" if kind in ROWS["sky"] else "ground"


def random_scene(rng, held_out=False, most_groups=1):
    """A scene without any pair of HELD_OUT, or with one: its first group.

    There are groups in the sky, on the ground, or in both; one in each are few enough for a model
    of a million parameters to learn in minutes which of them a question means.
    """
    both = list(ROWS)
    rows = both if held_out else rng.choice((both, both, both, both[:1], both[1:]))
    while True:
        ordered = rng.sample(rows, len(rows))
        kinds = [k for row in ordered for k in rng.sample(ROWS[row], rng.randint(1, most_groups))]
        if kinds[0] in HELD_OUT or not held_out:
            break
    groups, places = [], {row: rng.sample(PLACES, len(PLACES)) for row in ROWS}
    for i, kind in enumerate(kinds):
        colour = rng.choice([c for c in COLOURS if c != HELD_OUT.get(kind)])
        if held_out and i == 0:
            colour = HELD_OUT[kind]
        big = rng.random() < 0.35  # about as many of each number altogether
        number = rng.choice((1, 2)) if big else rng.choices((1, 2, 3), (3, 3, 5))[0]
        place = places[row_of(kind)].pop()
        groups.append(Group(kind, colour, "big" if big else "small", place, number))
    return Scene(rng.choice(SEASONS), rng.choice(TIMES), tuple(groups), rng.randrange(10**9))


def vary(scene, rng):
    """The scene with one thing changed: kind, colour, number or place of a group, or the colours of
    two groups exchanged. Such hard negatives make a model look at everything: whoever tells scenes
    apart by their colours alone confuses them (Yuksekgonul et al. 2023, arXiv:2210.01936).
    """
    while True:
        groups, change = list(scene.groups), rng.choice(CHANGES)
        i, j = rng.randrange(len(groups)), rng.randrange(len(groups))
        group, other = groups[i], groups[j]
        if change == "colours":
            groups[j] = replace(other, colour=group.colour)
            groups[i] = replace(group, colour=other.colour)
        else:
            numbers = (1, 2) if group.size == "big" else (1, 2, 3)
            choices = {"kind": ROWS[row_of(group.kind)], "colour": tuple(COLOURS)}
            choices |= {"number": numbers, "place": PLACES}
            groups[i] = replace(group, **{change: rng.choice(choices[change])})
        changed = replace(scene, groups=tuple(groups), seed=rng.randrange(10**9))
        spots = {(row_of(group.kind), group.place) for group in groups}
        apart = len(spots) == len({group.kind for group in groups}) == len(groups)
        if changed.truth != scene.truth and apart and not any(g.held_out for g in groups):
            return changed


def layout(scene):
    """Every object as (group, x, y, half its width, 1 or -1: which way it faces), far ones first.

    No part of an object is more than half its width from (x, y), right or left, up or down.
    """
    objects = []
    for group in scene.groups:
        rng = random.Random(f"layout-{scene.seed}-{group.kind}")  # whatever its colour
        left, top = PLACES.index(group.place) * CELL, list(ROWS).index(row_of(group.kind)) * 32
        columns, rows = SPOTS[group.size]
        wide, high = CELL / columns, UNITS / 2 / rows
        spots = [(i, j) for i in range(columns) for j in range(rows)]
        for i, j in rng.sample(spots, group.number):
            x, y = left + (i + 0.5) * wide, top + (j + 0.5) * high
            x, y = x + rng.uniform(-SHIFT, SHIFT), y + rng.uniform(-SHIFT, SHIFT)
            objects.append((group, x, y, SIZES[group.size], rng.choice((1, -1))))
    return sorted(objects, key=lambda placed: placed[2])


# --- the drawing -------------------------------------------------------------------------------

# The parts of an object, far ones first: a fill, and the corners of a polygon or, behind "o", the
# middle and the two radii of an ellipse, in a square from -100 to 100. The fill is a brightness of
# the object's colour in percent, above 100 mixed with white, or one of FILLS.
PARTS = table("""
cup      60 o 62 12 34 40 | cream o 62 12 16 20 | 100 -90 -70 60 -70 40 92 -70 92
         60 o -15 -70 75 22 | cream -62 -30 -50 -30 -42 60 -54 60
bell     42 o 0 -80 16 16 | 42 o 20 78 22 20
         100 -24 -70 24 -70 44 -50 52 0 60 30 92 62 -92 62 -60 30 -52 0 -44 -50
         cream -64 28 64 28 68 44 -68 44
candle   60 o 0 76 92 22 | 100 -64 -36 64 -36 64 78 -64 78 | cream -46 -22 -34 -22 -34 60 -46 60
         flame o 0 -68 18 30 | cream o 0 -60 8 15
basket   42 o 0 0 60 90 | cream o 0 0 42 72 | 100 -95 0 95 0 68 90 -68 90
         150 -87 25 87 25 84 35 -84 35 | 150 -80 55 80 55 77 65 -77 65
lantern  42 -6 -98 6 -98 6 98 -6 98 | 100 o 0 0 80 66 | 140 o 0 0 38 64
         trunk -36 -72 36 -72 36 -52 -36 -52 | trunk -36 52 36 52 36 72 -36 72
star     100 0 -92 26 -30 93 -24 42 20 58 85 0 50 -58 85 -42 20 -93 -24 -26 -30
         150 0 -36 11 -9 40 -7 18 12 25 40 0 25 -25 40 -18 12 -40 -7 -11 -9
kite     42 -5 50 5 50 5 98 -5 98 | 42 -30 66 0 80 -30 94 | 42 30 66 0 80 30 94
         100 0 -96 70 -24 0 56 -70 -24 | 150 0 -74 0 -24 -50 -24 | 150 0 32 0 -24 50 -24
""")
FILLS = {"cream": (255, 250, 232), "flame": (255, 180, 40), "trunk": (122, 84, 58)}
SKIES = {"day": ((176, 214, 246), (238, 247, 253)), "evening": ((190, 190, 236), (255, 226, 204))}
LANDSCAPE = {  # the ground, the crowns of trees, and what lies on the ground
    "spring": ((206, 236, 182), (250, 190, 212), (250, 170, 200)),
    "summer": ((190, 222, 150), (98, 158, 92), (140, 186, 104)),
    "autumn": ((240, 220, 178), (230, 150, 78), (214, 126, 56)),
    "winter": ((244, 249, 255), None, (202, 216, 236)),
}


def shade(colour, percent):
    """Darker (below 100) or mixed with white (above: 200 is white)."""
    if percent <= 100:
        return tuple(round(c * percent / 100) for c in colour)
    return tuple(round(c + (255 - c) * (percent - 100) / 100) for c in colour)


def draw_object(pen, kind, x, y, half, colour, turn=1):
    """`half` to every side of (x, y), in pixels; turn -1: mirrored."""
    for part in PARTS[kind]:
        fill, *numbers = part.split()
        fill = FILLS.get(fill) or shade(colour, int(fill))
        outline = shade(colour, 42) if fill == shade(colour, 100) else None
        ellipse = numbers[0] == "o"
        numbers = [int(number) * half / 100 for number in numbers[ellipse:]]
        if ellipse:
            a, b, rx, ry = x + turn * numbers[0], y + numbers[1], *numbers[2:]
            pen.ellipse((a - rx, b - ry, a + rx, b + ry), fill, outline, round(0.11 * half))
            continue
        corners = [(x + turn * a, y + b) for a, b in zip(numbers[::2], numbers[1::2])]
        pen.polygon(corners, fill)
        if outline:
            pen.line([*corners, *corners[:2]], outline, round(0.11 * half), "curve")


def draw_tree(pen, x, foot, high, crown):
    """A trunk and a crown of blossoms or leaves; in winter bare branches."""
    trunk, wide = shade(FILLS["trunk"], 125), round(0.1 * high)
    pen.line([(x, foot), (x, foot - 0.6 * high)], trunk, wide)
    for dx, dy in ((-0.24, 0.62), (0.24, 0.62), (0, 0.78)):
        a, b, r = x + dx * high, foot - dy * high, 0.25 * high
        if crown:
            pen.ellipse((a - r, b - r, a + r, b + r), crown)
        else:
            pen.line([(x, foot - 0.35 * high), (a, b - 0.8 * r)], trunk, wide // 2)


def draw_landscape(pen, scene, scale):
    """The sun, the ground, trees behind it, and what lies on it."""
    rng = random.Random(f"landscape-{scene.seed}")
    ground, crown, specks = LANDSCAPE[scene.season]
    x, y, r = rng.uniform(8, 56) * scale, (6 if scene.time == "day" else 23) * scale, 4 * scale
    pen.ellipse((x - r, y - r, x + r, y + r), (255, 244, 200))
    bend = rng.uniform(-1.5, 1.5)
    hill = [(x, 31 + bend * math.sin(x / 11 + bend)) for x in range(0, 65, 4)]
    pen.polygon([(x * scale, y * scale) for x, y in [(0, 64), *hill, (64, 64)]], ground)
    for i in range(5):
        x, foot = 6.5 + 12.8 * i + rng.uniform(-3, 3), rng.uniform(33, 34.5)
        draw_tree(pen, x * scale, foot * scale, rng.uniform(10, 13) * scale, crown)
    for _ in range(26):
        x, y = rng.uniform(0, 64) * scale, rng.uniform(36, 63) * scale
        pen.ellipse((x - 0.55 * scale, y - 0.3 * scale, x + 0.55 * scale, y + 0.3 * scale), specks)


def tinted(group, seed):
    """The group's colour, as every painter mixes it a little differently."""
    rng = random.Random(f"tint-{seed}-{group.kind}")
    return tuple(min(255, max(0, c + rng.randint(-TINT, TINT))) for c in COLOURS[group.colour])


def draw(scene, size=96, detail=4):
    """The image, RGB, `size` pixels wide and high: drawn `detail` times as large, then reduced.

    Raises ValueError for a size at which objects could not be told apart.
    """
    if size < SMALLEST:
        raise ValueError(f"an image needs at least {SMALLEST} pixels, got {size}")
    wide, scale = size * detail, size * detail / UNITS
    high, low = SKIES[scene.time]
    image = Image.new("RGB", (1, 3))
    image.putdata([high, low, low])  # from centre to centre: the horizon is half-way down
    image = image.resize((1, wide), Image.Resampling.BILINEAR, (0, 0.5, 1, 2.5))
    image = image.resize((wide, wide), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    draw_landscape(pen, scene, scale)
    for group, x, y, half, turn in layout(scene):
        placed = (x * scale, y * scale, half * scale)
        draw_object(pen, group.kind, *placed, tinted(group, scene.seed), turn)
    return image.reduce(detail)

"""Line charts as SVG text, without a plotting library: curves.svg of a run, and the report's."""

import math
from html import escape

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 58, 16, 34, 42


def nice_ticks(low, high, count=5):
    """About `count` round numbers in [low, high]: steps of 1, 2 or 5 times a power of ten."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def text(x, y, content, anchor="middle", fill="#555", more=""):
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place} {more}>{escape(content)}</text>"


def line_chart(series, title="", x_label="step", y_label=""):
    """An SVG document as str. series: {name: [(x, y), ...]}; points that aren't finite are left
    out.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points for name, points in finite.items() if points}
    xs = [x for points in series.values() for x, _ in points] or [0, 1]
    ys = [y for points in series.values() for _, y in points] or [0, 1]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    pad = 0.05 * (max(ys) - min(ys)) or 0.5
    y_low, y_high = min(ys) - pad, max(ys) + pad
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def px(x):
        return LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)

    def py(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - TOP)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 18, title, "start", "#111", 'font-size="13" font-weight="600"'),
        text((LEFT + WIDTH) / 2, HEIGHT - 8, x_label),
    ]
    for y in nice_ticks(y_low, y_high):
        out.append(f'<path d="M{LEFT} {py(y):.1f}H{right}" stroke="#e5e7eb"/>')
        out.append(text(LEFT - 6, py(y) + 4, f"{y:g}", "end"))
    out += [text(px(x), bottom + 16, f"{x:g}") for x in nice_ticks(x_low, x_high, 6)]
    middle = (TOP + bottom) / 2
    out.append(text(14, middle, y_label, more=f'transform="rotate(-90 14 {middle})"'))
    legend = right
    for i, (name, points) in reversed(list(enumerate(series.items()))):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) < 25:
            shape = f'r="2.6" fill="{colour}"'
            out += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" {shape}/>' for x, y in points]
        out.append(text(legend, 18, name, "end", colour, 'font-weight="600"'))
        legend -= 7 * len(name) + 18
    return "\n".join([*out, "</svg>\n"])

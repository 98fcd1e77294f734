"""Line charts as SVG text, drawn without a plotting library: curves.svg of a run, and the report's
figures.
"""

import math
from html import escape

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 58, 16, 34, 42


def nice_ticks(low, high, count=5):
    """Round numbers that span [low, high], about `count` of them: steps of 1, 2 or 5 times a power
    of ten.
    """
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series, title="", x_label="step", y_label="", join=True):
    """An SVG document as str. series: {name: [(x, y), ...]}; points that aren't finite are left
    out. join=False: dots alone.
    """
    series = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points] or [0, 1]
    ys = [y for points in series.values() for _, y in points] or [0, 1]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(ys), max(ys)
    pad = 0.05 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - pad, y_high + pad

    def px(x):
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y):
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="600" '
        f'fill="#111">{escape(title)}</text>',
    ]
    for y in nice_ticks(y_low, y_high):
        out.append(f'<path d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>')
        out.append(
            f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end" fill="#555">{y:g}</text>'
        )
    for x in nice_ticks(x_low, x_high, 6):
        out.append(
            f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" '
            f'fill="#555">{x:g}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle" '
        f'fill="#555">{escape(x_label)}</text>'
    )
    out.append(
        f'<text x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle" '
        f'fill="#555">{escape(y_label)}</text>'
    )
    legend = WIDTH - RIGHT
    for i, (name, points) in reversed(list(enumerate(series.items()))):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        if join:
            out.append(
                f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
                f'stroke-linejoin="round"/>'
            )
        if not join or len(points) < 25:
            out += [
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{colour}" '
                f'fill-opacity="{1 if join else 0.35}"/>'
                for x, y in points
            ]
        out.append(
            f'<text x="{legend}" y="18" text-anchor="end" fill="{colour}" '
            f'font-weight="600">{escape(name)}</text>'
        )
        legend -= 7 * len(name) + 18
    return "\n".join([*out, "</svg>\n"])

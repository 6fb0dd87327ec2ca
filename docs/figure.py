"""Draw E, L and P in an encoder, for a light and for a dark page: `python docs/figure.py`.

A test compares the result with the files in `docs/assets`.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
WIDTH, HEIGHT = (
    400,
    562,
)  # a phone shows it at this width, so that the smallest text has 13 pixels
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
COLOURS = {
    "light": {
        "text": "#1f2328",
        "line": "#57606a",
        "frozen": "#eaeef2",
        "border": "#8c959f",
        "E": "#1a7f37",
        "L": "#0969da",
        "P": "#bc4c00",
        "head": "#6639ba",
        "on": "#ffffff",
    },
    "dark": {
        "text": "#e6edf3",
        "line": "#9198a1",
        "frozen": "#2d333b",
        "border": "#768390",
        "E": "#57ab5a",
        "L": "#6cb6ff",
        "P": "#f69d50",
        "head": "#b083f0",
        "on": "#0d1117",
    },
}
TITLE = "E-, L- and P-adapters in a speech encoder"
DESCRIPTION = (
    "Convolutions turn a waveform into frames. The P-adapter appends trained pseudo features to them. Three frozen "
    "layers follow. Each but the last has an E-adapter after its feed-forward module. The L-adapter taps every layer "
    "and passes the weighted sum of its taps to the head, which gives text, a label or a voice."
)


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    stroke: str,
    text: str,
    colour: str,
) -> str:
    """A box with a line of text in its middle."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        + label(x + width / 2, y + height / 2, text, colour)
    )


def label(
    x: float,
    y: float,
    text: str,
    colour: str,
    anchor: str = "middle",
    size: int = 14,
    weight: int = 400,
) -> str:
    """A line of text; x is its middle or, with another anchor, its start."""
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'dominant-baseline="central">{text}</text>'
    )


def arrow(
    points: list[tuple[float, float]], colour: str, theme: str, end: bool = True
) -> str:
    """A line through points, with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    tip = f' marker-end="url(#tip-{theme}-{colour.strip("#")})"' if end else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{tip}/>'


def frames(x: float, y: float, count: int, fill: str, stroke: str) -> str:
    """A row of frames."""
    return "".join(
        f'<rect x="{x + 19 * number}" y="{y}" width="15" height="22" rx="3" fill="{fill}" stroke="{stroke}"/>'
        for number in range(count)
    )


def figure(theme: str) -> str:
    """The whole figure, from the recording at the bottom to the answer at the top."""
    c = COLOURS[theme]
    parts = [
        # The answer and the head.
        label(278, 20, "text, label or voice", c["text"]),
        arrow([(278, 56), (278, 32)], c["line"], theme),
        box(213, 58, 130, 34, c["head"], c["head"], "head", c["on"]),
        arrow([(278, 130), (278, 94)], c["line"], theme),
        box(198, 132, 160, 34, c["L"], c["L"], "weighted sum", c["on"]),
        label(380, 149, "L", c["L"], size=20, weight=700),
    ]
    for top, name in ((212, "layer 3"), (298, "layer 2"), (384, "layer 1")):
        last = name == "layer 3"
        parts += [
            f'<rect x="14" y="{top}" width="166" height="68" rx="8" fill="{c["frozen"]}" stroke="{c["border"]}"/>',
            label(28, top + 18, name, c["text"], "start"),
            label(28, top + 48, "feed-forward", c["text"], "start", 13),
        ]
        if not last:
            parts.append(
                box(120, top + 34, 48, 26, c["E"], c["E"], "E", c["on"])
            )
            parts.append(arrow([(97, top), (97, top - 16)], c["line"], theme))
        # The output of the layer, its tap, and the way to the sum.
        tap = top - 9 if not last else top - 12
        parts += [
            arrow([(97, top), (97, tap), (226, tap)], c["line"], theme)
            if last
            else arrow([(97, tap), (226, tap)], c["line"], theme),
            box(228, tap - 13, 60, 26, c["L"], c["L"], "tap", c["on"]),
        ]
        if last:
            parts.append(arrow([(258, tap - 13), (258, 168)], c["L"], theme))
        else:
            side = 300 if name == "layer 2" else 328
            parts.append(
                arrow([(288, tap), (side, tap), (side, 168)], c["L"], theme)
            )
    parts += [
        # The frames and the pseudo features.
        arrow([(97, 478), (97, 454)], c["line"], theme),
        frames(14, 480, 8, c["frozen"], c["border"]),
        frames(166, 480, 4, c["P"], c["P"]),
        label(254, 491, "P", c["P"], "start", 20, 700),
        label(274, 491, "pseudo features", c["P"], "start", 13),
        arrow([(97, 524), (97, 504)], c["line"], theme),
        box(
            14,
            526,
            166,
            32,
            c["frozen"],
            c["border"],
            "convolutions",
            c["text"],
        ),
        arrow([(214, 542), (182, 542)], c["line"], theme),
        label(222, 542, "recording", c["text"], "start"),
        # What the colours mean.
        f'<rect x="228" y="408" width="15" height="15" rx="3" fill="{c["frozen"]}" stroke="{c["border"]}"/>',
        label(250, 416, "frozen", c["text"], "start", 13),
        *(
            f'<rect x="{228 + 19 * number}" y="432" width="15" height="15" rx="3" fill="{c[part]}"/>'
            for number, part in enumerate(("E", "L", "P", "head"))
        ),
        label(309, 440, "trained", c["text"], "start", 13),
    ]
    tips = "".join(
        f'<marker id="tip-{theme}-{colour.strip("#")}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for colour in (c["line"], c["L"])
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title-{theme} desc-{theme}" font-family="{FONT}">'
        f'<title id="title-{theme}">{TITLE}</title><desc id="desc-{theme}">{DESCRIPTION}</desc><defs>{tips}</defs>'
        + "\n".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    for theme in COLOURS:
        (ASSETS / f"elp-{theme}.svg").write_text(
            figure(theme), encoding="utf-8"
        )

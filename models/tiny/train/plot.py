#!/usr/bin/env python3
"""Draw the loss curves of train.log.json as an SVG file.

    python plot.py ../train.log.json ../loss.svg
"""

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 40, 20, 50
COLOURS = {"primary": "#1f5fa8", "aux": "#c4572b"}


def join_stages(log):
    """Curves per stage -> one curve per model; tokens count on, phases get their stage's name."""
    curves = {}
    for model in COLOURS:
        for stage in ("start", "main", "finish"):
            curve = curves.setdefault(model, [])
            before = curve[-1]["tokens"] if curve else 0
            curve += [dict(p, tokens=p["tokens"] + before, phase=(stage, p["phase"])) for p in log.get(f"{model}-{stage}", [])]
    return {model: curve for model, curve in curves.items() if curve}


def draw(log):
    log = join_stages(log)
    last = max(curve[-1]["tokens"] for curve in log.values())
    highest = max(point["loss"] for curve in log.values() for point in curve)
    highest = int(highest) + 1
    x = lambda tokens: LEFT + tokens / last * (WIDTH - LEFT - RIGHT)
    y = lambda loss: HEIGHT - BOTTOM - loss / highest * (HEIGHT - TOP - BOTTOM)
    text = lambda px, py, words, extra="": f'<text x="{px:.0f}" y="{py:.0f}" {extra}>{words}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 22, "Training loss (mean over 25 steps, target words only)", 'font-size="15"'),
    ]
    for loss in range(highest + 1):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y(loss) + 4, loss, 'text-anchor="end"'))
    step = max(1, round(last / 8e6)) * 1_000_000
    for tokens in range(0, last + 1, step):
        parts.append(text(x(tokens), HEIGHT - BOTTOM + 18, f"{tokens // 1_000_000}", 'text-anchor="middle"'))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "million tokens", 'text-anchor="middle"'))
    for row, (name, curve) in enumerate(sorted(log.items(), reverse=True)):
        colour = COLOURS[name]
        points = " ".join(f'{x(p["tokens"]):.1f},{y(p["loss"]):.1f}' for p in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for before, after in zip(curve, curve[1:]):
            if before["phase"] != after["phase"]:  # a new phase begins
                px, py = x(before["tokens"]), y(before["loss"])
                parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<line x1="560" x2="590" y1="{60 + 20 * row}" y2="{60 + 20 * row}" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(598, 64 + 20 * row, name))
    parts.append(text(560, 104, "dots: a new phase begins", 'fill="#555"'))
    return "\n".join(parts + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log")
    parser.add_argument("svg")
    args = parser.parse_args()
    Path(args.svg).write_text(draw(json.loads(Path(args.log).read_text())))


if __name__ == "__main__":
    main()

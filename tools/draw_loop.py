"""Draws docs/images/loop.svg, the one picture of the loop: `python tools/draw_loop.py`.

The colours stand on a ground of their own, so it reads the same on a light and a dark page.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path


OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "loop.svg"
WIDTH, HEIGHT = 1000, 596
INK, SOFT, GROUND, PAPER = "#1f2430", "#5b6475", "#f6f7fb", "#ffffff"
POLICY, JUDGE, REFERENCE, VALUE = "#3f51b5", "#00796b", "#8a6d1a", "#ad1457"
FONT = "font-family=\"system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif\""
LATENTS = ["#b9bfd0", "#aebfc6", "#9cc3b0", "#7fc08f", "#4caf50"]  # from noise to a picture


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, weight: str = "normal", anchor: str = "middle"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, title: str, *lines: str) -> str:
    """A box with its title at the top and lines below."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{PAPER}" stroke="{colour}" stroke-width="2"/>',
        text(x + width / 2, y + 24, title, 16, colour, "600"),
    ]
    parts += [text(x + width / 2, y + 46 + 19 * index, line, 13, SOFT) for index, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(path: str, colour: str = INK, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#{colour[1:]})"{dash}/>'


def strip(x: float, y: float, only: int | None = None) -> str:
    """The path of an image, from noise to picture; with `only`, the step that a replay runs the network in."""
    side, gap, parts = 30, 18, []
    for index, colour in enumerate(LATENTS):
        left = x + index * (side + gap)
        parts.append(f'<rect x="{left}" y="{y}" width="{side}" height="{side}" rx="4" fill="{colour}"/>')
        if index:
            active = only is None or index - 1 == only
            line = f"M{left - gap + 2} {y + side / 2} H{left - 4}"
            parts.append(arrow(line, POLICY if active else "#c3c8d6"))
    return "\n".join(parts)


def marker(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
    )


def picture() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title" {FONT}>',
        '<title id="title">One round: prompts, rollout, rewards, advantages, then replay of single steps, the loss with the KL to the pretrained model, '
        "and the optimizer that changes the policy</title>",
        "<defs>" + "".join(marker(colour) for colour in (INK, POLICY, JUDGE, REFERENCE, VALUE, "#c3c8d6")) + "</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{GROUND}"/>',
        text(24, 34, "1  Sample and judge", 15, SOFT, "600", "start"),
        text(24, 304, "2  Learn", 15, SOFT, "600", "start"),
        # sampling
        box(24, 60, 120, 120, INK, "prompts", "list, dataset", "or function"),
        box(
            190,
            50,
            290,
            140,
            POLICY,
            "rollout",
            "the pipeline's own __call__, no gradient",
            "keeps latents and log-probabilities",
        ),
        strip(224, 142),
        box(546, 60, 154, 120, JUDGE, "rewards", "one number for each", "image; several are", "weighted and added"),
        box(
            742,
            60,
            234,
            120,
            INK,
            "advantages",
            "reward less baseline:",
            "mean of the round, of the",
            "prompt's images, or V",
        ),
        arrow("M144 120 H184"),
        arrow("M480 120 H540", POLICY),
        arrow("M700 120 H736", JUDGE),
        text(511, 108, "images", 12, SOFT),
        # learning
        box(
            190,
            322,
            290,
            140,
            POLICY,
            "replay of step k",
            "the same call on the recorded path;",
            "the network runs in step k, with gradients",
        ),
        strip(224, 414, only=2),
        box(
            190, 476, 290, 76, REFERENCE, "reference", "the same replay with the adapter off:", "the pretrained model"
        ),
        box(546, 332, 154, 120, INK, "ratio and KL", "new over old", "probability, and", "distance per step"),
        box(
            742,
            332,
            234,
            120,
            INK,
            "loss",
            "− advantage × ratio, clipped",
            "+ kl_weight × KL",
            "then backward, optimizer",
        ),
        box(792, 216, 184, 66, VALUE, "V(x, prompt, t)", "if asked for, learned"),
        arrow("M335 190 V316", POLICY),
        text(345, 258, "latents, log-probabilities", 13, SOFT, anchor="start"),
        arrow("M480 392 H540", POLICY),
        arrow("M480 514 H623 V458", REFERENCE),
        arrow("M700 392 H736"),
        arrow("M766 180 V326"),
        arrow("M884 216 V186", VALUE, dashed=True),
        arrow("M859 452 V574 H166 V160 H184", POLICY),
        text(716, 564, "next round: the policy with its new weights", 13, SOFT),
        "</svg>\n",
    ]
    return "\n".join(parts)


def main() -> int:
    OUTPUT.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

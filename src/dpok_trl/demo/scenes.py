"""The demo world's language and its painter: a prompt, the objects it asks for, and a 32x32 picture of them.

Six colours, four shapes, at most four objects on a light grey ground. Everything the grammar can say is

    a [COLOUR] SHAPE                                   "a green triangle"
    two|three|four [COLOUR] SHAPEs                     "four circles"
    a [COLOUR] SHAPE and a [COLOUR] SHAPE              "a red square and a blue circle"
    a [COLOUR] SHAPE RELATION a [COLOUR] SHAPE         "a circle above a square"

with RELATION one of above, below, left of, right of. These are the four abilities DPOK (arXiv 2305.16381, section 5.1)
trains: colour, count, composition, location. Pure numpy and PIL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw


IMAGE_SIZE = 32
SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 45),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 40),
    "purple": (145, 50, 185),
    "orange": (245, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}  # from 2nd to 1st object, y down

#: Radii in pixels, by number of objects in the picture: what the painter draws and what `fidelity` expects.
RADIUS_RANGE = {1: (5.0, 8.0), 2: (3.6, 5.4), 3: (3.0, 4.2), 4: (3.0, 4.2)}
GAP = 2.0  # at least one clear pixel column or row between two objects
MARGIN = 1.0
BACKGROUND_RANGE = (222, 248)
COLOR_JITTER = 8

_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}

# Outlines in units of the radius, y down; the circle is drawn as an ellipse.
_ARM = 0.36
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
    "cross": (
        (-_ARM, -1.05), (_ARM, -1.05), (_ARM, -_ARM), (1.05, -_ARM), (1.05, _ARM), (_ARM, _ARM),
        (_ARM, 1.05), (-_ARM, 1.05), (-_ARM, _ARM), (-1.05, _ARM), (-1.05, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip
EXTENT = 1.15  # no outline reaches further than this many radii along an axis


@dataclass(frozen=True)
class Thing:
    """One object a prompt asks for.

    Args:
        shape (`str`): one of `SHAPES`.
        color (`str`, *optional*): one of `COLORS`; `None` means any colour will do.
    """

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" if self.color else self.shape


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one to four objects and, for two of them, perhaps how they lie.

    Args:
        things (`tuple[Thing, ...]`): the wanted objects; three or four must be alike, as the grammar cannot say otherwise.
        relation (`str`, *optional*): where the first of two objects lies as seen from the second, one of `RELATIONS`.

    Raises:
        `ValueError`: for a scene the grammar has no sentence for.
    """

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= 4:
            raise ValueError(f"A scene holds 1 to 4 objects, got {len(self.things)}.")
        if len(self.things) > 2 and len(set(self.things)) > 1:
            raise ValueError(f"The {len(self.things)} objects of a scene must be alike, got {self.things}.")
        if self.relation is not None and (len(self.things) != 2 or self.relation not in RELATIONS):
            raise ValueError(
                f"A relation is one of {list(RELATIONS)} between 2 objects, got {self.relation!r} with {len(self.things)}."
            )

    @property
    def category(self) -> str:
        """`"single"`, `"count"`, `"pair"` or `"relation"`."""
        if len(self.things) == 1:
            return "single"
        if self.relation is not None:
            return "relation"
        return "count" if len(set(self.things)) == 1 else "pair"

    @property
    def prompt(self) -> str:
        """The sentence for this scene; `parse_prompt` reads it back to an equal scene."""
        if self.category == "count":
            number = next(word for word, value in NUMBERS.items() if value == len(self.things))
            thing = self.things[0]
            return " ".join(filter(None, (number, thing.color, _PLURALS[thing.shape])))
        link = f" {self.relation or 'and'} "
        return link.join(f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}" for thing in self.things)


def _grammar_error(prompt: str, problem: str) -> ValueError:
    return ValueError(
        f"Cannot read the prompt {prompt!r}: {problem}. The demo world knows the colours {', '.join(COLORS)}; the shapes "
        f"{', '.join(SHAPES)}; the numbers {', '.join(NUMBERS)}; and the relations {', '.join(RELATIONS)}. For example "
        "'a green triangle', 'four circles', 'a red square and a blue circle', 'a circle above a square'."
    )


def _parse_thing(words: list[str], prompt: str) -> Thing:
    if len(words) not in (2, 3) or words[0] not in ("a", "an"):
        raise _grammar_error(prompt, f"{' '.join(words)!r} is not 'a [colour] shape'")
    if words[-1] not in SHAPES:
        raise _grammar_error(prompt, f"{words[-1]!r} is not a shape")
    if len(words) == 3 and words[1] not in COLORS:
        raise _grammar_error(prompt, f"{words[1]!r} is not a colour")
    return Thing(shape=words[-1], color=words[1] if len(words) == 3 else None)


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt of the demo world.

    Args:
        prompt (`str`): a sentence of the grammar; upper case, doubled spaces and a final full stop are forgiven.

    Returns:
        `Scene`: the objects the prompt asks for.

    Raises:
        `ValueError`: for any other sentence; the message says what is wrong with it and what the grammar knows.

    Example:

    ```python
    >>> parse_prompt("a circle above a square")
    Scene(things=(Thing(shape='circle', color=None), Thing(shape='square', color=None)), relation='above')
    ```
    """
    words = prompt.lower().rstrip(" .").split()
    if not words:
        raise _grammar_error(prompt, "it is empty")
    if words[0] in NUMBERS:
        if len(words) not in (2, 3) or words[-1] not in _SINGULARS:
            raise _grammar_error(prompt, f"a number wants '[colour] shapes' after it, got {' '.join(words[1:])!r}")
        if len(words) == 3 and words[1] not in COLORS:
            raise _grammar_error(prompt, f"{words[1]!r} is not a colour")
        thing = Thing(shape=_SINGULARS[words[-1]], color=words[1] if len(words) == 3 else None)
        return Scene(things=(thing,) * NUMBERS[words[0]])
    for link in ("and", *RELATIONS):
        link_words = link.split()
        for start in range(1, len(words)):
            if words[start : start + len(link_words)] == link_words:
                first = _parse_thing(words[:start], prompt)
                second = _parse_thing(words[start + len(link_words) :], prompt)
                if link != "and":
                    return Scene(things=(first, second), relation=link)
                if first == second:
                    raise _grammar_error(
                        prompt, "two objects that are alike are said with a number, as in 'two circles'"
                    )
                return Scene(things=(first, second))
    return Scene(things=(_parse_thing(words, prompt),))


def sample_scene(rng: np.random.Generator, category: str | None = None) -> Scene:
    """Draw a scene: an even choice of the four categories, colours named three times out of four.

    Args:
        rng (`numpy.random.Generator`): where the draws come from.
        category (`str`, *optional*): `"single"`, `"count"`, `"pair"` or `"relation"` to draw only that.
    """
    category = category or ("single", "count", "pair", "relation")[rng.integers(4)]
    named = rng.random() < 0.75

    def thing() -> Thing:
        return Thing(SHAPES[rng.integers(4)], list(COLORS)[rng.integers(6)] if named else None)

    if category == "single":
        return Scene((thing(),))
    if category == "count":
        return Scene((thing(),) * int(rng.integers(2, 5)))
    if category not in ("pair", "relation"):
        raise ValueError(f"category must be 'single', 'count', 'pair' or 'relation', got {category!r}.")
    first = second = thing()
    while second == first:
        second = thing()
    return Scene((first, second), relation=list(RELATIONS)[rng.integers(4)] if category == "relation" else None)


def sample_prompt(rng: np.random.Generator, category: str | None = None) -> str:
    """Draw a prompt; the sentence of `sample_scene`."""
    return sample_scene(rng, category).prompt


def corrupt_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that is a plausible mistake for `scene`: the label noise of the pretraining data.

    A single object gets another colour (or, one time in four and always when no colour is named, another shape); a count
    another count; a pair swaps its colours, repeats one colour or shape, or loses an object; a relation turns into another
    one. A picture of the result never satisfies `scene`'s prompt.
    """
    things = scene.things
    if scene.category == "single":
        thing = things[0]
        if thing.color is None or rng.random() < 0.25:
            others = [shape for shape in SHAPES if shape != thing.shape]
            return Scene((replace(thing, shape=others[rng.integers(3)]),))
        return Scene((replace(thing, color=[c for c in COLORS if c != thing.color][rng.integers(5)]),))
    if scene.category == "count":
        others = [number for number in range(1, 5) if number != len(things)]
        return Scene((things[0],) * int(others[rng.integers(3)]))
    if scene.category == "relation":
        others = [relation for relation in RELATIONS if relation != scene.relation]
        return Scene(things, relation=others[rng.integers(3)])
    first, second = things
    kept = things[rng.integers(2)]
    mistakes = [Scene((kept,)), Scene((kept, kept))]
    if first.shape != second.shape and first.color != second.color:
        swapped = (replace(first, color=second.color), replace(second, color=first.color))
        leaked = (replace(first, color=kept.color), replace(second, color=kept.color))
        mistakes += [Scene(swapped), Scene(leaked)]
    return mistakes[rng.integers(len(mistakes))]


@dataclass(frozen=True)
class Placed:
    """An object on the canvas: its shape, its colour (RGB, 0-255), centre and radius in pixels (y down)."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Choose sizes, positions and the colours the prompt leaves open, so that no two objects touch.

    A wanted relation holds with room to spare: the objects are further apart along its axis than 1.25 times across it, while
    the checker asks for 0.9 times.
    """
    number = len(scene.things)
    low, high = RADIUS_RANGE[number]
    names = list(COLORS)
    open_color = names[rng.integers(6)]  # several alike share one colour, as "four circles" suggests
    colors = [
        thing.color or (names[rng.integers(6)] if scene.category in ("pair", "relation") else open_color)
        for thing in scene.things
    ]
    for _ in range(10_000):
        radii = rng.uniform(low, high, number)
        reach = EXTENT * radii + MARGIN
        centres = rng.uniform(reach[:, None], IMAGE_SIZE - reach[:, None], (number, 2))
        if _separated(centres, radii) and (scene.relation is None or _relation_clear(centres, scene.relation)):
            break
    else:
        raise RuntimeError(f"No room for {scene.prompt!r} after 10,000 tries.")
    placed = []
    for thing, color, radius, (x, y) in zip(scene.things, colors, radii, centres, strict=True):
        jitter = rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3)
        rgb = tuple(int(value) for value in np.clip(np.array(COLORS[color]) + jitter, 0, 255))
        placed.append(Placed(thing.shape, rgb, float(x), float(y), float(radius)))
    return placed


def _separated(centres: np.ndarray, radii: np.ndarray) -> bool:
    for i in range(len(radii)):
        for j in range(i):
            if np.abs(centres[i] - centres[j]).max() < EXTENT * (radii[i] + radii[j]) + GAP:
                return False
    return True


def _relation_clear(centres: np.ndarray, relation: str) -> bool:
    along, across = relation_offsets(centres[0], centres[1], relation)
    return along > 1.25 * across


def relation_offsets(first: np.ndarray, second: np.ndarray, relation: str) -> tuple[float, float]:
    """How far `first` lies from `second` in the direction the relation names, and how far sideways (pixels, the latter >= 0)."""
    direction = np.array(RELATIONS[relation])
    offset = np.asarray(first) - np.asarray(second)
    return float(offset @ direction), float(abs(offset[0] * direction[1] - offset[1] * direction[0]))


def draw(placed: list[Placed], background: tuple[int, int, int]) -> Image.Image:
    """Paint objects on a plain ground: four-fold supersampling, then a box filter down to 32x32 RGB."""
    scale = SUPERSAMPLING
    canvas = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, background)
    pen = ImageDraw.Draw(canvas)
    for thing in placed:
        x, y, radius = thing.x * scale - 0.5, thing.y * scale - 0.5, thing.radius * scale
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=thing.rgb)
        else:
            pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in OUTLINES[thing.shape]], fill=thing.rgb)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A picture of the scene.

    Args:
        scene (`Scene`): what to show.
        rng (`numpy.random.Generator`): positions, sizes, open colours, colour jitter and the shade of the ground.

    Returns:
        `PIL.Image.Image`: 32x32, RGB.
    """
    placed = place(scene, rng)
    shade = int(rng.integers(BACKGROUND_RANGE[0], BACKGROUND_RANGE[1] + 1))
    return draw(placed, (shade, shade, shade))

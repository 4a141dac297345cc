"""The demo world's judge: finds the objects in a 32x32 picture and says whether they are what the prompt asked for.

The ground is the median of the border; objects are connected regions that differ from it; an object's colour is the nearest
of the palette and its shape the one whose outline, laid over the object with the same centre of mass and the same area, fits
best (soft intersection over union). On clean renders this is always right, and it needs no search and no learned part.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from PIL import Image

from .scenes import (
    BACKGROUND_RANGE,
    COLORS,
    OUTLINES,
    RADIUS_RANGE,
    SHAPES,
    Scene,
    Thing,
    parse_prompt,
    relation_offsets,
)


OBJECT_DISTANCE = 55.0  # RGB distance (of 0..441) from the ground at which a pixel belongs to an object
COLOR_DISTANCE = 75.0  # further than this from every palette colour, an object has no colour name
SPECK_AREA = 4.0  # regions smaller than this many pixels are dirt, not objects
MIN_IOU = 0.6  # below this an object has no shape name; real renders score above 0.9
SIZE_SLACK = 0.5  # pixels: measured radii of real renders differ from the painter's by up to 0.4
SIZE_FALLOFF = 1.0  # pixels beyond the slack that cost a factor e
_PALETTE = np.array(list(COLORS.values()), dtype=np.float64)
_COLOR_NAMES = tuple(COLORS)
_SUBPIXELS = 4


@dataclass(frozen=True)
class Detected:
    """An object found in a picture.

    Args:
        color (`str`, *optional*): nearest palette colour, `None` when nothing is near.
        shape (`str`, *optional*): best fitting shape, `None` when nothing fits.
        x, y, radius (`float`): centre of mass, and size in the painter's units, pixels.
        iou (`float`): soft intersection over union with the best fitting shape, 0..1.
        color_distance (`float`): RGB distance (0-255 units) to the nearest palette colour.
    """

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    iou: float
    color_distance: float


@dataclass(frozen=True)
class CheckResult:
    """Verdict on one picture.

    Args:
        exact (`bool`): the picture shows what the prompt asks for, all of it and nothing else.
        soft (`float`): partial credit in [0, 1]; 1 exactly when `exact`.
        detected (`tuple[Detected, ...]`): the objects found, left to right.
    """

    exact: bool
    soft: float
    detected: tuple[Detected, ...]


def to_array(image: Image.Image | torch.Tensor | np.ndarray) -> np.ndarray:
    """A picture as float64 `(H, W, 3)` in 0..255.

    Args:
        image: a PIL image, a tensor `(3, H, W)` in [0, 1], or an array `(H, W, 3)` (uint8, or floats in [0, 1]).
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"), dtype=np.float64)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"An image tensor must have shape (3, H, W), got {tuple(image.shape)}.")
        return image.detach().to("cpu", torch.float64).permute(1, 2, 0).numpy() * 255.0
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"An image array must have shape (H, W, 3), got {image.shape}.")
    return image.astype(np.float64) * (1.0 if image.dtype == np.uint8 else 255.0)


def _ground(pixels: np.ndarray) -> np.ndarray:
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return np.median(border, axis=0)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected regions of a boolean `(H, W)` mask, each as an `(n, 2)` array of (row, column)."""
    todo = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    regions = []
    while todo:
        stack = [todo.pop()]
        region = []
        while stack:
            row, column = stack.pop()
            region.append((row, column))
            for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if neighbour in todo:
                    todo.remove(neighbour)
                    stack.append(neighbour)
        regions.append(np.array(region))
    return regions


def _polygon_area_and_centroid(points: np.ndarray) -> tuple[float, np.ndarray]:
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    area = cross.sum() / 2
    return abs(area), ((points + following) * cross[:, None]).sum(axis=0) / (6 * area)


_UNIT_AREA = {"circle": np.pi}
_UNIT_CENTROID = {"circle": np.zeros(2)}
for _shape, _outline in OUTLINES.items():
    _UNIT_AREA[_shape], _UNIT_CENTROID[_shape] = _polygon_area_and_centroid(np.array(_outline))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, in units of the radius, lie inside a shape of radius 1 (the outlines of `scenes.OUTLINES`)."""
    if shape == "circle":
        return x * x + y * y <= 1.0
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        arm, reach = OUTLINES["cross"][1][0], -OUTLINES["cross"][0][1]
        return ((ax <= arm) & (ay <= reach)) | ((ay <= arm) & (ax <= reach))
    outline = np.array(OUTLINES[shape])  # square and triangle are convex: inside = on the same side of every edge
    inside = np.ones(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inside


def _fit(shape: str, coverage: np.ndarray, row0: int, column0: int, area: float, x: float, y: float) -> float:
    """Soft IoU of a coverage map with a shape of the same area and centre of mass."""
    radius = (area / _UNIT_AREA[shape]) ** 0.5
    centre_x, centre_y = np.array([x, y]) - radius * _UNIT_CENTROID[shape]
    height, width = coverage.shape
    sub = (np.arange(max(height, width) * _SUBPIXELS) + 0.5) / _SUBPIXELS
    grid_x = (sub[None, : width * _SUBPIXELS] + column0 - centre_x) / radius
    grid_y = (sub[: height * _SUBPIXELS, None] + row0 - centre_y) / radius
    template = _inside(shape, grid_x, grid_y).reshape(height, _SUBPIXELS, width, _SUBPIXELS).mean(axis=(1, 3))
    return float(np.minimum(coverage, template).sum() / np.maximum(coverage, template).sum())


def _region_color(pixels: np.ndarray, distance: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Median over the region's inner pixels, which the smoothed edge does not reach."""
    strengths = distance[region[:, 0], region[:, 1]]
    core = region[strengths >= np.quantile(strengths, 0.6)]
    return np.median(pixels[core[:, 0], core[:, 1]], axis=0)


def _describe(pixels: np.ndarray, ground: np.ndarray, distance: np.ndarray, region: np.ndarray) -> Detected | None:
    height, width = distance.shape
    color = _region_color(pixels, distance, region)
    row0, column0 = np.maximum(region.min(axis=0) - 1, 0)
    row1, column1 = np.minimum(region.max(axis=0) + 2, (height, width))
    # Coverage: where a pixel lies on the way from the ground to the object's colour; only in and next to the region.
    near = np.zeros((height, width), dtype=bool)
    for dr, dc in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
        near[np.clip(region[:, 0] + dr, 0, height - 1), np.clip(region[:, 1] + dc, 0, width - 1)] = True
    axis = color - ground
    window = (slice(row0, row1), slice(column0, column1))
    coverage = np.clip((pixels[window] - ground) @ axis / max(axis @ axis, 1e-9), 0.0, 1.0) * near[window]
    area = float(coverage.sum())
    if area < SPECK_AREA:
        return None
    y = float((coverage.sum(axis=1) * (np.arange(row0, row1) + 0.5)).sum() / area)
    x = float((coverage.sum(axis=0) * (np.arange(column0, column1) + 0.5)).sum() / area)
    fits = {shape: _fit(shape, coverage, row0, column0, area, x, y) for shape in SHAPES}
    shape = max(fits, key=fits.__getitem__)
    centre = np.array([x, y]) - (area / _UNIT_AREA[shape]) ** 0.5 * _UNIT_CENTROID[shape]
    distances = np.linalg.norm(_PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    return Detected(
        color=_COLOR_NAMES[nearest] if distances[nearest] <= COLOR_DISTANCE else None,
        shape=shape if fits[shape] >= MIN_IOU else None,
        x=float(centre[0]),
        y=float(centre[1]),
        radius=float((area / _UNIT_AREA[shape]) ** 0.5),
        iou=fits[shape],
        color_distance=float(distances[nearest]),
    )


def _detect(pixels: np.ndarray) -> tuple[tuple[Detected, ...], np.ndarray, np.ndarray]:
    ground = _ground(pixels)
    distance = np.linalg.norm(pixels - ground, axis=2)
    found = [_describe(pixels, ground, distance, region) for region in _regions(distance > OBJECT_DISTANCE)]
    objects = tuple(sorted((thing for thing in found if thing is not None), key=lambda thing: thing.x))
    return objects, ground, distance


def detect(image: Image.Image | torch.Tensor | np.ndarray) -> tuple[Detected, ...]:
    """The objects in a picture, left to right."""
    return _detect(to_array(image))[0]


def _thing_score(wanted: Thing, found: Detected) -> float:
    shape = float(found.shape == wanted.shape)
    return shape if wanted.color is None else 0.5 * shape + 0.5 * float(found.color == wanted.color)


def _relation_holds(first: Detected, second: Detected, relation: str) -> bool:
    along, across = relation_offsets(np.array([first.x, first.y]), np.array([second.x, second.y]), relation)
    return along > 2.0 and along > 0.9 * across


def _soft_score(scene: Scene, found: tuple[Detected, ...]) -> float:
    """Best assignment of found to wanted objects: mean object score, less for a wrong number, 40 % for the relation."""
    wanted = scene.things
    if not found:
        return 0.0
    considered = sorted(found, key=lambda thing: -thing.radius)[:5]  # 5 are already too many; bounds the permutations
    slots: list[Detected | None] = [*considered, *[None] * max(0, len(wanted) - len(considered))]
    best = 0.0
    for order in permutations(slots, len(wanted)):
        objects = sum(_thing_score(w, f) for w, f in zip(wanted, order, strict=True) if f is not None)
        score = objects / max(len(wanted), len(found))
        if scene.relation is not None:
            first, second = order
            holds = first is not None and second is not None and _relation_holds(first, second, scene.relation)
            score *= 1.0 if holds else 0.6
        best = max(best, score)
    return best


def check(image: Image.Image | torch.Tensor | np.ndarray, prompt: str) -> CheckResult:
    """Does the picture show what the prompt asks for?

    Args:
        image: PIL image, tensor `(3, H, W)` in [0, 1], or array `(H, W, 3)`.
        prompt (`str`): a sentence of the demo grammar.

    Returns:
        `CheckResult`: `exact` wants the right number of objects, each of the named colour and shape, and the relation;
        `soft` gives half an object's credit for its colour and half for its shape (all for the shape when no colour is
        named), divides by the larger of the wanted and the found number, and takes off 40 % when a relation fails.

    Raises:
        `ValueError`: when the grammar does not know the prompt.
    """
    scene = parse_prompt(prompt)
    objects = detect(image)
    soft = _soft_score(scene, objects)
    return CheckResult(exact=soft == 1.0, soft=soft, detected=objects)


def fidelity(image: Image.Image | torch.Tensor | np.ndarray, prompt: str) -> float:
    """Does the picture look like one of this world's, whether or not it shows what was asked?

    The mean over the objects of (shape fit x palette colour x size), times how clean and how light the ground is. An object
    larger (or smaller) than anything the painter draws for that many objects - as many as the prompt wants or as many as
    were found - counts for little: a policy that drives up "greenness" by painting one giant square scores near 0, which
    a score without that size prior does not notice.

    Args:
        image: PIL image, tensor `(3, H, W)` in [0, 1], or array `(H, W, 3)`.
        prompt (`str`): the prompt it was made for.

    Returns:
        `float`: in [0, 1]; about 0.97 for the painter's own pictures.
    """
    pixels = to_array(image)
    objects, ground, distance = _detect(pixels)
    if not objects:
        return 0.0
    ranges = [RADIUS_RANGE[len(parse_prompt(prompt).things)], RADIUS_RANGE[min(len(objects), 4)]]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    quality = 0.0
    for thing in objects:
        outside = max(low - thing.radius, thing.radius - high, 0.0)
        size = float(np.exp(-((max(outside - SIZE_SLACK, 0.0) / SIZE_FALLOFF) ** 2)))
        palette = float(np.exp(-((max(thing.color_distance - 15.0, 0.0) / 60.0) ** 2)))  # 15: the painter's own jitter
        quality += thing.iou * palette * size
    quality /= len(objects)
    if len(objects) > 4:
        quality *= 4 / len(objects)
    return quality * _ground_quality(ground, distance, objects)


def _ground_quality(ground: np.ndarray, distance: np.ndarray, objects: tuple[Detected, ...]) -> float:
    """1 for an even light grey ground; falls with its colour cast, with its darkness and with smudges on it."""
    rows, columns = np.mgrid[: distance.shape[0], : distance.shape[1]] + 0.5
    empty = np.ones(distance.shape, dtype=bool)
    for thing in objects:
        empty &= np.maximum(np.abs(rows - thing.y), np.abs(columns - thing.x)) > 1.15 * thing.radius + 1.5
    smudges = float(distance[empty].mean()) if empty.any() else 0.0
    low, high = BACKGROUND_RANGE
    shade = float(ground.mean())
    off = max(low - shade, shade - high, 0.0) + float(ground.max() - ground.min())
    return float(np.exp(-((max(smudges - 3.0, 0.0) / 20.0) ** 2)) * np.exp(-((max(off - 6.0, 0.0) / 25.0) ** 2)))

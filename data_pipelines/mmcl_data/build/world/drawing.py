"""A scene as pixels: anti-aliased shapes on a grey, slightly tinted, graded and noisy background.

Each object is drawn alone, enlarged, shrunk to a soft mask and pasted, so that the cost follows the objects' area.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from mmcl_data.build.world.config import COLOURS
from mmcl_data.build.world.scenes import Scene, SceneObject

_ENLARGED = 4
_INK = (20, 20, 20)
"""Of stripes and dots: a darker tone of the object's own colour could be another named colour (orange, brown)."""
_COLOUR_JITTER = 10


def draw(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB image."""
    image = Image.fromarray(_background(image_size, rng))
    for thing in scene.objects:
        left, top, shape, ink = _masks(thing, image_size)
        jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, 3).tolist()
        red, green, blue = (max(0, min(255, c + j)) for c, j in zip(COLOURS[thing.colour], jitter, strict=True))
        image.paste((red, green, blue), (left, top), shape)
        if ink is not None:
            image.paste(_INK, (left, top), ink)
    return image


def encode_image(image: Image.Image, image_format: str) -> bytes:
    """JPEG without chroma subsampling: at this size it would blur the colours, which are the ground truth."""
    content = io.BytesIO()
    if image_format == "jpg":
        image.save(content, "JPEG", quality=90, subsampling=0)
    else:
        image.save(content, "PNG")
    return content.getvalue()


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    grey, slope, grain = rng.uniform(95, 165), rng.uniform(0, 25), rng.uniform(0, 5)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, size)
    grade = grey + slope * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]) / 1.5
    grade += grain * rng.standard_normal((size, size))
    tint = rng.uniform(-9, 9, 3)
    return np.clip(np.rint(grade[:, :, None] + tint), 0, 255).astype(np.uint8)


def _masks(thing: SceneObject, size: int) -> tuple[int, int, Image.Image, Image.Image | None]:
    """Left, top, the mask of the shape and that of its texture, if any."""
    radius = thing.radius * size
    left, top = int(thing.x * size - radius) - 1, int(thing.y * size - radius) - 1
    side = int(2 * radius) + 4
    turn = np.exp(1j * thing.angle) * radius * _ENLARGED
    centre = ((thing.x * size - left) + 1j * (thing.y * size - top)) * _ENLARGED
    big = Image.new("L", (side * _ENLARGED, side * _ENLARGED))
    pen = ImageDraw.Draw(big)
    for outline, value in zip(OUTLINES[thing.shape], (255, 0), strict=False):  # a second outline is cut out
        pen.polygon(_corners(outline, turn, centre), fill=value)
    shape = big.reduce(_ENLARGED)
    if thing.texture == "plain":
        return left, top, shape, None
    pattern = Image.new("L", big.size)
    pen = ImageDraw.Draw(pattern)
    for outline in _PATTERNS[thing.texture]:
        pen.polygon(_corners(outline, turn, centre), fill=255)
    return left, top, shape, ImageChops.multiply(pattern, big).reduce(_ENLARGED)


def _corners(outline: np.ndarray, turn: complex, centre: complex) -> list[float]:
    return (outline * turn + centre).view(np.float64).tolist()


def _ring(corners: int, first: float = -0.25, inner: float | None = None) -> NDArray[np.complex128]:
    """Corners on the unit circle from the top, every other one at `inner`; x + iy, y downwards."""
    points = np.exp(2j * np.pi * (np.arange(corners) / corners + first))
    if inner is not None:
        points[1::2] *= inner
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return (x - 1j * (y + 2)) / 17.5


def _cross(arm: float = 0.3, reach: float = 0.95) -> np.ndarray:
    quarter = np.array([arm - 1j * reach, arm - 1j * arm, reach - 1j * arm])
    return np.concatenate([quarter * 1j**k for k in range(4)])


def _stripes() -> tuple[np.ndarray, ...]:
    bar = np.array([-1.2 - 0.11j, 1.2 - 0.11j, 1.2 + 0.11j, -1.2 + 0.11j])
    return tuple(bar + 1j * (k - 0.5) * 0.5 for k in range(-1, 3))


def _dots() -> tuple[np.ndarray, ...]:
    grid = [(k - 0.5) * 0.52 + 1j * (m - 0.5) * 0.52 for k in range(-1, 3) for m in range(-1, 3)]
    return tuple(0.15 * _ring(10) + place for place in grid)


OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (0.95 * _ring(48),),
    "square": (_ring(4, 0.125),),
    "triangle": (0.95 * _ring(3) + 0.12j,),
    "star": (_ring(10, inner=0.42),),
    "cross": (_cross(),),
    "diamond": (_ring(4).real * 0.58 + 1j * _ring(4).imag,),
    "heart": (_heart(),),
    "hexagon": (_ring(6, 0.0),),
    "ring": (0.95 * _ring(48), 0.52 * _ring(48)),
    "moon": (0.95 * _ring(48), 0.78 * _ring(48) + 0.42),
}
"""On the unit circle, y downwards; the second outline is a hole."""
_PATTERNS = {"striped": _stripes(), "dotted": _dots()}

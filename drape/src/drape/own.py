"""A team's own walks and plates: a JSON file of walks, and photographs, clips or folders of frames behind them.

A file of walks is a list of objects with the fields of `drape.walks.Walk`; only gait, path, light and place must be
there. `elevation`, `fov` (degrees) and `height` (metres) say how the camera of a plate stands and sees; the walk is put
before it, with the plate's exposure, tint and noise (`drape.scene.backgrounds.matched`).

    [{"gait": "stroll", "path": "towards", "light": "sun", "place": "street", "seconds": 5, "elevation": 4, "fov": 50}]

A plate that moves has one image per frame of the walk, taken from the clip at the walk's times.

Shapes: `N` images of a clip, `T` frames of a walk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from drape.errors import AssetError, ConfigError, unknown
from drape.scene.backgrounds import matched, plate_from_image, read_image
from drape.scene.cloth import CLOTHS
from drape.scene.light import light
from drape.scene.places import PLACES
from drape.scene.scene import Scene
from drape.walks import Walk, scenes

__all__ = ["own_scenes", "read_clip", "read_walks"]

LARGEST = 1 << 20  # bytes of a file of walks
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MOVING = 3  # images that a clip has at least
GIF_RATE = 10.0  # images per second where a clip does not say
Images = NDArray[np.uint8]


def read_walks(path: Path) -> tuple[Walk, ...]:
    """The walks of a JSON file.

    Raises:
        AssetError: the file cannot be read.
        ConfigError: it holds no list of walks, or a walk has a field or a value that cannot be; the message says which.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path} cannot be read ({error}); give a JSON file with a list of walks.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} holds no list of walks; expected [{{...}}, ...] with at least one.")
    return tuple(walk_of(row, f"{path}, walk {number}") for number, row in enumerate(rows, start=1))


def walk_of(row: dict[str, Any], where: str) -> Walk:
    """One walk from its fields; names and numbers are checked before anything is rendered."""
    known = {field.name: str(field.type) for field in fields(Walk)}
    for name, value in row.items():
        if name not in known:
            raise unknown(f"field of a walk ({where})", name, known)
        wanted = (str,) if known[name] == "str" else (int,) if known[name] == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ConfigError(f"{where}: {name}={value!r}; expected {'a name' if wanted == (str,) else 'a number'}.")
    missing = [name for name in ("gait", "path", "light", "place") if name not in row]
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}; expected gait, path, light and place at least.")
    for kind, name, names in (("place", row["place"], PLACES), ("cloth", row.get("cloth", "cotton"), CLOTHS)):
        if name not in names:
            raise unknown(f"{kind} ({where})", name, names)
    try:
        walk = Walk(**row)
        walk.spec(1.0, 64)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return walk


def read_clip(path: Path) -> tuple[Images, float]:
    """A clip as uint8 RGB `[N, height, width, 3]` and its images per second; of a photograph one image.

    Args:
        path: an image, an animated one, a folder of images in the order of their names, or a video (the extra `video`).

    Raises:
        AssetError: it cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        images = [read_image(file) for file in files]
        if not images or len({image.shape for image in images}) != 1:
            raise AssetError(f"{path} holds no images of one size; expected at least one of {', '.join(PICTURES)}.")
        return np.stack(images), GIF_RATE
    try:
        with Image.open(path) as image:
            frames = [(np.asarray(f.convert("RGB")), f.info.get("duration", 0)) for f in ImageSequence.Iterator(image)]
        spent = sum(duration for _, duration in frames) / 1000
        return np.stack([frame for frame, _ in frames]), len(frames) / spent if spent else GIF_RATE
    except FileNotFoundError as error:
        raise AssetError(f"{path} does not exist; give an image, a clip or a folder of images.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return read_video(path)


def read_video(path: Path) -> tuple[Images, float]:
    """A video file by imageio and PyAV."""
    try:
        import imageio.v3 as imageio

        rate = float(imageio.immeta(path, plugin="pyav")["fps"])
        return np.asarray(imageio.imread(path, plugin="pyav"), dtype=np.uint8), rate
    except ImportError as error:
        raise AssetError(f"{path} is no image, and a video needs pip install 'imageio[pyav]'.") from error
    except Exception as error:  # whatever a decoder raises on a file of a user
        reason = " ".join(str(error).split())
        raise AssetError(f"{path} cannot be read as an image or a video ({reason}); give a PNG, GIF or MP4.") from error


def at_times(clip: Images, rate: float, frames: int, fps: float, where: object) -> Images:
    """The images of a clip at the frames of a walk, `[T, height, width, 3]`.

    Raises:
        ConfigError: the clip ends before the walk.
    """
    places = np.floor(np.arange(frames) / fps * rate + 1e-6).astype(int)
    if places[-1] >= len(clip):
        raise ConfigError(
            f"{where} lasts {len(clip) / rate:.1f} s and the walk {frames / fps:.1f} s; give a longer clip, or a "
            "shorter walk in the file of walks."
        )
    return np.asarray(clip[places])


def own_scenes(
    walks: Sequence[Walk], plates: Sequence[Path], fps: float, size: int, engine: str = "drape", jobs: int = 1
) -> list[Scene]:
    """The walks before a user's plates, which take turns; without plates before the places that the walks name."""
    if len(plates) > len(walks):
        raise ConfigError(f"{len(plates)} plates for {len(walks)} walks; give no more plates than walks.")
    clips = [read_clip(path) for path in plates]  # before anything is rendered
    shown: list[Images] = []
    for number, walk in enumerate(walks if clips else ()):
        place = number % len(clips)
        clip, rate = clips[place]
        frames = walk.spec(fps, size, engine)[0].frames
        moving = len(clip) >= MOVING
        shown.append(at_times(clip, rate, frames, fps, plates[place]) if moving else clip[0])
    made = scenes(walks, fps, size, engine, jobs)
    if len({scene.label for scene in made}) < len(made):
        made = [replace(scene, label=f"{number}: {scene.label}") for number, scene in enumerate(made, start=1)]
    result = made[len(shown) :]
    for number, (walk, scene, image) in enumerate(zip(walks, made, shown, strict=False)):
        name = plates[number % len(plates)].name
        plate = plate_from_image(image, size, walk.spec(fps, size, engine)[0].camera, light(walk.light))
        result.append(replace(matched(scene, plate), label=f"{scene.label}, {name}"))
    return result

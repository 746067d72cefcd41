"""Natural colours: which RGB each role has in a scene, given its colour word, place and time.

Knows numbers for colour words and light. Must not know geometry, looks or pixels.
"""

from __future__ import annotations

import colorsys

import numpy as np

from sdft.data.toy.geometry import OTHER
from sdft.data.toy.scenes import Scene

RGB = tuple[float, float, float]
Palette = dict[str, np.ndarray]

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in lightness."""
FOG = np.array([214.0, 218.0, 224.0])

COLOUR_RGB: dict[str, RGB] = {
    "red": (214, 36, 34), "orange": (242, 130, 24), "yellow": (248, 206, 40), "green": (34, 142, 62),
    "blue": (36, 92, 214),
    "purple": (126, 48, 178), "pink": (244, 118, 176), "brown": (134, 82, 44), "white": (244, 244, 246),
    "black": (44, 44, 52), "grey": (138, 142, 150),
}
_FIXED: dict[str, RGB] = {
    "ink": (26, 24, 30), "white": (252, 252, 252), "yellow": (255, 214, 64), "orange": (246, 150, 36),
    "pink": (246, 146, 160), "wood": (150, 96, 52), "wooddark": (104, 64, 34), "metal": (196, 200, 208),
    "steel": (82, 88, 100), "glass": (170, 216, 246), "screen": (42, 120, 214), "screenlight": (96, 196, 120),
    "leaf": (72, 164, 62), "leafdark": (36, 116, 52), "pine": (22, 88, 70), "redlamp": (226, 44, 40),
    "stone": (164, 166, 180), "stonedark": (112, 116, 134), "snow": (250, 252, 255), "cream": (252, 240, 214),
    "shade": (204, 184, 152), "flame": (255, 190, 60), "coffee": (92, 54, 28), "plate": (226, 228, 236),
    "lamp": (120, 250, 130), "steam": (252, 252, 252), "path": (226, 196, 140), "brick": (188, 66, 48),
    "slate": (78, 88, 120), "eye": (166, 220, 80),
}
_MATERIAL_RGB: dict[str, RGB] = {"wooden": (176, 122, 70), "golden": (232, 178, 44), "stone": (158, 156, 152)}
_ROOF = {"grey": "screen", "red": "slate", "orange": "slate", "brown": "slate", "pink": "slate", "purple": "slate"}
_SKY: dict[str, tuple[RGB, RGB]] = {
    "day": ((112, 180, 240), (200, 230, 250)), "sunny": ((70, 160, 248), (180, 224, 252)),
    "sunset": ((96, 84, 158), (255, 164, 84)), "night": ((14, 20, 58), (44, 58, 118)),
    "rain": ((92, 104, 126), (152, 162, 178)), "fog": ((198, 204, 212), (226, 229, 233)),
}
_LAND: dict[str, tuple[RGB, RGB, RGB]] = {
    "grass": ((128, 196, 88), (82, 158, 62), (92, 166, 84)), "snow": ((238, 244, 252), (212, 224, 242),
        (206, 220, 240)),
    "desert": ((240, 206, 138), (222, 172, 96), (226, 178, 106)),
    "road": ((128, 196, 88), (82, 158, 62), (92, 166, 84)),
    "sea": ((52, 138, 204), (22, 88, 166), (40, 112, 184)),
}
_LIGHT: dict[str, RGB] = {"day": (1, 1, 1), "sunny": (1, 1, 1), "sunset": (0.96, 0.82, 0.78),
    "night": (0.42, 0.48, 0.70), "rain": (0.70, 0.75, 0.84), "fog": (0.96, 0.97, 1), "candle": (0.98, 0.80, 0.62)}
_GLOWING = frozenset({"flame", "lamp", "screen", "screenlight", "yellow"})


def _rgb(values: RGB) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def mixed(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """`a` with `share` of `b`."""
    return a * (1.0 - share) + b * share


def _main(colour: str, finish: str, tint: RGB) -> Palette:
    """The roles that depend on the colour of a subject, or on its material."""
    word = colour or "grey"
    sway = 0.3 if word in ("grey", "white", "black") else 1.0
    main = np.clip(_rgb(_MATERIAL_RGB.get(finish, COLOUR_RGB[word])) + sway * _rgb(tint), 0, 255)
    white, black = _rgb((255, 255, 255)), _rgb((20, 16, 36))
    table = {
        "main": main,
        "dark": mixed(main, black, {"white": 0.2, "black": 0.45}.get(word, 0.34)),
        "light": mixed(main, white, {"black": 0.3, "white": 0.6}.get(word, 0.46)),
        "trim": _rgb(COLOUR_RGB["blue" if word in ("red", "orange", "pink", "brown") else "red"]),
        "roof": _rgb(_FIXED[_ROOF.get(word, "brick")]),
        "spot": _rgb(COLOUR_RGB["red"] if word == "white" else _FIXED["white"]),
        "core": _rgb((196, 104, 30) if word in ("yellow", "orange") else (248, 190, 44)),
    }
    return table


def _clothes(scene: Scene) -> Palette:
    worn = _rgb(COLOUR_RGB[scene.worn_colour or "red"])
    return {"wear": worn, "wear_dark": mixed(worn, _rgb((20, 16, 36)), 0.4), "gold": _rgb((250, 200, 50))}


def _wall(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    pale_subject = scene.colour in ("white", "yellow") or scene.subject in ("boat", "cup", "mushroom")
    saturation, value = (0.34, 0.80) if pale_subject else (0.13, 0.95)
    if scene.colour == "grey":
        saturation, value = 0.24, 0.93
    top = _rgb(colorsys.hsv_to_rgb(scene.hue, saturation, value)) * 255.0
    return mixed(top, _rgb((255, 255, 255)), 0.25), top * 0.9


def _outdoors(scene: Scene) -> Palette:
    top, low = (_rgb(rgb) for rgb in _SKY.get(scene.time, _SKY["day"]))
    far, near, hill = (_rgb(rgb) for rgb in _LAND.get(scene.place, _LAND["grass"]))
    light = _rgb(_LIGHT[scene.time])
    dusk = scene.time == "sunset"
    return {
        "sky_top": top, "sky_low": low, "land_far": far * light, "land_near": near * light,
        "hill": mixed(hill * light, low, 0.25),
        "sun": _rgb((255, 226, 120) if dusk else (255, 224, 70)), "moon": _rgb((250, 244, 212)),
        "moonspot": _rgb((222, 214, 180)), "starlight": _rgb((255, 252, 226)),
        "cloud": _rgb({"sunset": (250, 180, 160), "rain": (120, 128, 146)}.get(scene.time, (252, 253, 255))),
        "flake": _rgb((255, 255, 255)) * (0.4 + 0.6 * light),
        "wave": mixed(far, _rgb((255, 255, 255)), 0.5) * light, "swell": mixed(far, near, 0.6) * light,
        "cactus": _rgb((62, 136, 70)) * light, "road": _rgb((112, 114, 124)) * light,
        "dash": _rgb((244, 238, 216)) * light, "drop": _rgb((206, 220, 238)),
    }


def natural_palette(scene: Scene) -> Palette:
    """RGB (0 to 255) of every role in the scene, as neutral light shows it."""
    subject: Palette = {role: _rgb(rgb) for role, rgb in _FIXED.items()} | _clothes(scene)
    subject |= _main(scene.colour, scene.finish, scene.tint)
    if scene.other is not None:
        others = _main(scene.other.colour, scene.other.finish, scene.tint)
        subject |= {OTHER + role: rgb for role, rgb in others.items()}
    if scene.subject == "fairy tale forest" and scene.place == "snow":
        subject |= {"leaf": _rgb((206, 222, 232)), "leafdark": _rgb((60, 122, 104)), "pine": _rgb((52, 96, 104)),
                    "path": _rgb((214, 206, 204))}
    light = mixed(_rgb(_LIGHT[scene.time]), _rgb((1, 1, 1)), 0.45)
    lit = {role: rgb if role in _GLOWING else rgb * light for role, rgb in subject.items()}
    wall_top, wall_low = _wall(scene)
    indoors = {
        "wall_top": wall_top, "wall_low": wall_low, "table_far": _rgb((208, 158, 108)),
        "table_near": _rgb((172, 118, 70)),
        "table_rim": _rgb((226, 182, 134)), "water_top": _rgb((112, 208, 226)), "water_deep": _rgb((22, 96, 164)),
        "seabed": _rgb((232, 206, 148)), "weed": _rgb((40, 140, 92)), "bubble": _rgb((206, 240, 250)),
    }
    if scene.time == "candle":
        indoors = {role: rgb * _rgb((0.62, 0.44, 0.34)) for role, rgb in indoors.items()}
    outdoors = _outdoors(scene)
    if scene.time == "fog":
        lit = {role: mixed(rgb, FOG, 0.22) for role, rgb in lit.items()}
        outdoors = {role: mixed(rgb, FOG, 0.62) for role, rgb in outdoors.items()}
    return lit | indoors | outdoors

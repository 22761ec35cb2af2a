"""Furniture and objects of the miniature apartment, written as ReplicaCAD and YCB files.

As in ReplicaCAD, y is up and the front of a cupboard faces +x. mani_skill turns the files by 90
degrees about x: (x, y, z) here is (x, -z, y) in the simulator. Only the objects are z-up. Lengths
are metres, colours RGB in 0..255. `tint` returns the apartment's shade of a colour.
"""

import json
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trimesh
from trimesh.visual.material import PBRMaterial

# Sizes are depth, height, width. The fronts of counter and fridge are at x = 0.
TABLE_SIZE = (0.8, 0.72, 1.4)
COUNTER_SIZE = (0.6, 0.90, 1.6)
DRAWER_SIZE = (0.50, 0.20, 0.70)
DRAWER_Y, DRAWER_Z = 0.74, 0.39  # height of the drawers' middle, offset to either side
DRAWER_FLOOR = DRAWER_Y - DRAWER_SIZE[1] / 2 + 0.03  # the surface on which the bowl stands
SHELF_TOP = 1.06  # in the fridge
STAND_TOP = SHELF_TOP + 0.06  # the apple stands clear of the shelf: room for the gripper
STAND_X, STAND_Z = -0.12, 0.06

# Shape, half sizes (round objects: radius, radius, half height), colour, density. Fetch's fingers
# open to 10 cm, close along y and reach 3 cm beyond the tcp; the palm begins 3 cm before the tcp.
OBJECTS = {
    "013_apple": ("ball", (0.036, 0.036, 0.036), (210, 30, 30), 400),
    "024_bowl": ("can", (0.040, 0.040, 0.030), (200, 60, 140), 400),
    "002_master_chef_can": ("can", (0.040, 0.040, 0.042), (40, 70, 170), 400),
    "003_cracker_box": ("box", (0.070, 0.025, 0.042), (220, 60, 30), 300),
    "004_sugar_box": ("box", (0.045, 0.020, 0.042), (235, 205, 40), 400),
    "005_tomato_soup_can": ("can", (0.033, 0.033, 0.042), (200, 40, 60), 500),
    "007_tuna_fish_can": ("can", (0.040, 0.040, 0.025), (60, 120, 190), 500),
    "008_pudding_box": ("box", (0.055, 0.022, 0.038), (150, 85, 40), 400),
    "009_gelatin_box": ("box", (0.045, 0.020, 0.034), (215, 70, 100), 400),
    "010_potted_meat_can": ("box", (0.050, 0.025, 0.040), (50, 70, 200), 500),
}

HANDLE = (0, 170, 60)  # the only strong green: a small network finds handles by their colour
INSIDE = (30, 70, 200)  # the furniture's only blue, visible when a drawer or the fridge is open

Box = namedtuple("Box", "size center color")  # three numbers each


class Link(NamedTuple):
    """A rigid part of a cupboard. A joint connects it to the cupboard's first link, the root."""

    name: str
    boxes: list[Box]
    mass: float
    joint: str = ""  # URDF type; empty for the root
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: tuple[int, int, int] = (0, 0, 0)
    upper: float = 0.0  # m or rad; the lower limit is 0
    damping: float = 0.0
    friction: float = 0.0


class Furniture(NamedTuple):
    """A cupboard and its handle. SAPIEN numbers links and joints in the order of the file."""

    name: str
    links: list[Link]
    handle_link: int  # index in `links`
    handle_pos: tuple[float, float, float]  # in the frame of the handle's link

    @property
    def handle_joint(self) -> int:
        return self.handle_link - 1  # the root has no joint


def make_counter(rng: np.random.Generator, tint) -> Furniture:
    """A counter with two drawers; the tasks use the one at -z."""
    depth, height, width = COUNTER_SIZE
    wood, back, end = tint((165, 140, 110)), -depth / 2, width / 2 - 0.015
    low, high = DRAWER_Y - DRAWER_SIZE[1] / 2 - 0.02, height - 0.04
    tall, middle = high - low, (high + low) / 2
    root = [
        Box((depth, 0.04, width), (back, height - 0.02, 0), tint((80, 80, 85))),
        Box((depth, low, width), (back, low / 2, 0), wood),
        Box((0.02, tall, width), (0.01 - depth, middle, 0), wood),
        *[Box((depth, tall, 0.03), (back, middle, z), wood) for z in (-end, end)],
        Box((depth - 0.02, tall, 0.03), (back - 0.01, middle, 0), wood),
    ]
    handle_x, handle_y = 0.10, float(rng.uniform(-0.02, 0.02))
    slide = dict(
        boxes=drawer_boxes(tint((200, 180, 140)), handle_x, handle_y),
        mass=3, joint="prismatic", axis=(1, 0, 0), upper=0.35, damping=2, friction=1,
    )  # fmt: skip
    links = [
        Link("root", root, mass=50),
        Link("drawer_left", origin=(0.005, DRAWER_Y, DRAWER_Z), **slide),
        Link("drawer_right", origin=(0.005, DRAWER_Y, -DRAWER_Z), **slide),
    ]
    return Furniture("kitchen_counter", links, 2, (handle_x, handle_y, 0.0))


def drawer_boxes(front, handle_x: float, handle_y: float) -> list[Box]:
    depth, height, width = DRAWER_SIZE
    back, wall, side = -depth / 2, height / 2, width / 2 - 0.03
    post_size, post_x = (handle_x, 0.02, 0.02), handle_x / 2
    return [
        Box((0.02, height, width), (0, 0, 0), front),
        Box((depth, 0.02, width - 0.04), (back, 0.02 - height / 2, 0), INSIDE),
        *[Box((depth, wall, 0.02), (back, -0.04, z), INSIDE) for z in (-side, side)],
        Box((0.02, wall, width - 0.04), (-depth, -0.04, 0), INSIDE),
        *[Box(post_size, (post_x, handle_y, z), HANDLE) for z in (-0.115, 0.115)],
        Box((0.02, 0.03, 0.26), (handle_x, handle_y, 0), HANDLE),
    ]


def make_fridge(rng: np.random.Generator, tint) -> Furniture:
    """A fridge with two doors; the tasks use the top door, which coasts shut after a push."""
    depth, height, width = 0.6, 1.70, 0.56
    white, back, side = tint((225, 225, 230)), -depth / 2, width / 2 - 0.015
    grey, middle = tint((90, 90, 95)), height / 2
    body = [
        *[Box((depth, 0.03, width), (back, y, 0), white) for y in (0.015, 0.70, height - 0.015)],
        Box((0.03, height, width), (0.015 - depth, middle, 0), white),
        Box((0.01, height - 0.06, width - 0.06), (0.035 - depth, middle, 0), INSIDE),
        *[Box((depth, height, 0.03), (back, middle, z), white) for z in (-side, side)],
        Box((depth - 0.1, 0.02, width - 0.06), (back - 0.05, SHELF_TOP - 0.01, 0), grey),
        *stand_boxes(grey),
    ]
    top, bottom = 0.96, 0.68  # heights of the doors
    top_y, bottom_y, hinge_z = 0.72 + top / 2, 0.02 + bottom / 2, -0.275
    handle = x, y, z = 0.125, 1.12 - top_y + float(rng.uniform(-0.02, 0.02)), 0.47
    face, post_size, post_x = tint((235, 235, 240)), (x - 0.05, 0.02, 0.02), (0.05 + x) / 2
    top_door = [
        Box((0.05, top, 0.54), (0.025, 0, 0.27), face),
        *[Box(post_size, (post_x, y + dy, z), HANDLE) for dy in (-0.185, 0.185)],
        Box((0.025, 0.40, 0.03), handle, HANDLE),
    ]
    bottom_door = [Box((0.05, bottom, 0.54), (0.025, 0, 0.27), face)]
    # One pull from the fridge's front reaches three quarters of the range, which MS-HAB asks for.
    hinge = dict(mass=4, joint="revolute", axis=(0, 1, 0), upper=1.25, damping=0.5, friction=0.1)
    links = [
        Link("body", body, mass=80),
        Link("top_door", top_door, origin=(0.005, top_y, hinge_z), **hinge),
        Link("bottom_door", bottom_door, origin=(0.005, bottom_y, hinge_z), **hinge),
    ]
    return Furniture("fridge", links, 1, handle)


def stand_boxes(color) -> list[Box]:
    """A block whose rim, just narrower than the apple, keeps the apple from rolling away."""
    size, rim, height = 0.056, 0.008, STAND_TOP - SHELF_TOP
    y, rim_y, edge = SHELF_TOP + height / 2, STAND_TOP + rim / 2, (size - rim) / 2
    return [
        Box((size, height, size), (STAND_X, y, STAND_Z), color),
        *[Box((rim, rim, size), (STAND_X + x, rim_y, STAND_Z), color) for x in (-edge, edge)],
        *[Box((size, rim, rim), (STAND_X, rim_y, STAND_Z + z), color) for z in (-edge, edge)],
    ]


def room_boxes(floor, walls) -> list[Box]:
    """Floor and four walls of a square room around the origin, from their colours."""
    width, height, half = 6.0, 2.6, 3.05
    boxes = [Box((width, 0.1, width), (0, -0.05, 0), floor)]
    for x, z, color in zip((-half, half, 0, 0), (0, 0, -half, half), walls):
        size = (0.1, height, width) if x else (width, height, 0.1)
        boxes.append(Box(size, (x, height / 2, z), color))
    return boxes


def table_boxes(color) -> list[Box]:
    depth, height, width = TABLE_SIZE
    leg, dx, dz = height - 0.04, depth / 2 - 0.04, width / 2 - 0.04
    legs = [Box((0.05, leg, 0.05), (x, leg / 2, z), color) for x in (-dx, dx) for z in (-dz, dz)]
    return [Box((depth, 0.04, width), (0, height - 0.02, 0), color), *legs]


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=1))


def make_visual(rgba, metallic=0.0, roughness=0.9) -> trimesh.visual.TextureVisuals:
    material = PBRMaterial(baseColorFactor=rgba, metallicFactor=metallic, roughnessFactor=roughness)
    return trimesh.visual.TextureVisuals(material=material)


def write_glb(path: Path, boxes: list[Box]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = trimesh.Scene()
    for box in boxes:
        mesh = trimesh.creation.box(box.size)
        mesh.apply_translation(box.center)
        mesh.visual = make_visual([*box.color, 255])
        scene.add_geometry(mesh)
    scene.export(path)


def write_urdf(folder: Path, furniture: Furniture) -> None:
    """Write <folder>/<name>/<name>.urdf."""
    name, root = furniture.name, furniture.links[0]
    inertia = '<inertia ixx="0.2" iyy="0.2" izz="0.2" ixy="0" ixz="0" iyz="0"/></inertial>'
    text = f'<?xml version="1.0"?>\n<robot name="{name}">\n'
    for link in furniture.links:
        text += f'<link name="{link.name}"><inertial><mass value="{link.mass}"/>{inertia}\n'
        for size, center, color in link.boxes:
            shape = f'<origin xyz="{format_numbers(center)}"/>'
            shape += f'<geometry><box size="{format_numbers(size)}"/></geometry>'
            rgba = format_numbers([*(np.array(color) / 255), 1])
            paint = f'<material name="c{rgba.replace(" ", "_")}"><color rgba="{rgba}"/></material>'
            text += f"  <visual>{shape}{paint}</visual>\n  <collision>{shape}</collision>\n"
        text += "</link>\n"
    for i, link in enumerate(furniture.links[1:]):
        text += (
            f'<joint name="joint_{i}" type="{link.joint}">'
            f'<parent link="{root.name}"/><child link="{link.name}"/>'
            f'<origin xyz="{format_numbers(link.origin)}"/>'
            f'<axis xyz="{format_numbers(link.axis)}"/>'
            f'<limit lower="0" upper="{link.upper}" effort="1000" velocity="10"/>'
            f'<dynamics damping="{link.damping}" friction="{link.friction}"/></joint>\n'
        )
    write_text(folder / name / f"{name}.urdf", text + "</robot>\n")


def format_numbers(values) -> str:
    return " ".join(f"{float(value):.6g}" for value in values)


def write_objects(folder: Path, tint) -> None:
    """Write the meshes of OBJECTS, z-up and centred, and info_pick_v0.json."""
    infos = {}
    for name, (shape, half, color, density) in OBJECTS.items():
        if shape == "ball":
            mesh = trimesh.creation.icosphere(subdivisions=2, radius=half[0])
        elif shape == "can":
            mesh = trimesh.creation.cylinder(radius=half[0], height=2 * half[2], sections=24)
        else:
            mesh = trimesh.creation.box(np.multiply(half, 2))
        model = folder / "models" / name
        rgb = format_numbers(np.array(tint(color)) / 255)
        write_text(model / "textured.mtl", f"newmtl m\nKd {rgb}\nKa 0 0 0\n")
        vertices = "".join(f"v {format_numbers(vertex)}\n" for vertex in mesh.vertices)
        faces = "".join(f"f {a} {b} {c}\n" for a, b, c in mesh.faces + 1)
        header = "mtllib textured.mtl\no o\n"
        write_text(model / "textured.obj", f"{header}{vertices}usemtl m\n{faces}")
        mesh.export(model / "collision.ply")
        low, high = mesh.bounds.tolist()
        infos[name] = dict(bbox=dict(min=low, max=high), density=density, scales=[1.0])
    write_json(folder / "info_pick_v0.json", infos)

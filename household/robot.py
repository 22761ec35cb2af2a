"""A Fetch that renders fast: the simulator's robot with lighter visual meshes and equal physics.

mani_skill loads Fetch's visual meshes unindexed: 384,507 vertices, 98 % of the generated
apartment's, and a software renderer spends its time on vertices. Here one vertex replaces all
vertices in a cell of 10 mm. About 2.5 % remain; the cameras' colours change by less than 1 % on
average. Joints, inertia and collision meshes are copied.
"""

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import sapien
import trimesh
from mani_skill import PACKAGE_ASSET_DIR

from household.furniture import make_visual

CELL = 0.010  # metres; with 20 mm the hand camera would see misshapen fingers
COLORS_PER_MESH = 6  # a texture's main colours; each makes one more mesh to draw


def write_light_fetch(folder: Path) -> None:
    """Write fetch.urdf with relative paths, fetch.srdf and meshes into `folder`, in about 3 s."""
    meshes = folder / "meshes"
    meshes.mkdir(parents=True)
    urdf = Path(PACKAGE_ASSET_DIR) / "robots/fetch/fetch.urdf"  # env.py changes Fetch.urdf_path
    tree = ElementTree.parse(urdf)
    for link in tree.getroot().iter("link"):
        for mesh in link.findall("collision/geometry/mesh"):
            source = urdf.parent / mesh.get("filename")
            shutil.copyfile(source, meshes / source.name)
            mesh.set("filename", f"meshes/{source.name}")
        for i, mesh in enumerate(link.findall("visual/geometry/mesh")):
            name = f"{link.get('name')}_visual_{i}.glb"
            lighten(urdf.parent / mesh.get("filename")).export(meshes / name)
            mesh.set("filename", f"meshes/{name}")
    tree.write(folder / "fetch.urdf")
    shutil.copyfile(urdf.with_suffix(".srdf"), folder / "fetch.srdf")


def lighten(path: Path) -> trimesh.Scene:
    """Cluster a mesh file's vertices and bake its texture into a few face colours."""
    scene = trimesh.Scene()
    for part in sapien.render.RenderShapeTriangleMesh(str(path)).parts:
        vertices = np.asarray(part.vertices)  # [V, 3]
        faces = np.asarray(part.triangles)  # [F, 3]
        colors = face_colors(part, faces)  # [F, 3]
        vertices, faces, normals, kept = cluster(vertices, faces)
        colors = colors[kept]
        for color in np.unique(colors, axis=0):
            chosen = faces[(colors == color).all(axis=1)]
            used, local = np.unique(chosen, return_inverse=True)
            mesh = trimesh.Trimesh(vertices[used], local.reshape(chosen.shape), process=False)
            mesh.vertex_normals = normals[used]
            rgba = np.append(color * 255, 255).round().astype(np.uint8)
            mesh.visual = make_visual(rgba, part.material.metallic, part.material.roughness)
            scene.add_geometry(mesh)
    return scene


def cluster(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, ...]:
    """Merge the vertices of each cubic cell into their mean and drop the faces that collapse.

    Returns vertices [W, 3], faces [G, 3], unit normals [W, 3] and indices [G] of the faces kept.
    """
    cells = np.floor(vertices / CELL).astype(np.int64)
    _, cell, count = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    cell = cell.reshape(-1)  # numpy 2.0 returns [V, 1]
    merged = np.zeros((len(count), 3))
    np.add.at(merged, cell, vertices)
    merged /= count[:, None]
    faces = cell[faces]
    a, b, c = faces.T
    proper = np.flatnonzero((a != b) & (b != c) & (c != a))
    _, first = np.unique(np.sort(faces[proper], axis=1), axis=0, return_index=True)
    kept = proper[first]
    faces = faces[kept]
    a, b, c = merged[faces.T]  # corners [G, 3]
    face_normals = np.cross(b - a, c - a)
    normals = np.zeros_like(merged)
    for corner in faces.T:
        np.add.at(normals, corner, face_normals)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(min=1e-12)
    return merged, faces, normals, kept


def face_colors(part: sapien.render.RenderShapeTriangleMeshPart, faces: np.ndarray) -> np.ndarray:
    """Linear colour of each face [F, 3] in [0, 1], at most COLORS_PER_MESH different ones."""
    texture = part.material.base_color_texture
    if texture is None:
        return np.tile(part.material.base_color[:3], (len(faces), 1))
    texels = np.asarray(texture.download())[..., :3] / 255  # [H, W, 3]
    height, width = texels.shape[:2]
    u, v = (np.asarray(part.get_vertex_uv())[faces].mean(axis=1) % 1.0).T  # at the face's centre
    row = (v * height).astype(int).clip(max=height - 1)
    column = (u * width).astype(int).clip(max=width - 1)
    colors = texels[row, column]  # [F, 3]
    rounded = np.round(colors * 7)  # eight levels of each channel, to find the main colours
    palette, count = np.unique(rounded, axis=0, return_counts=True)
    palette = palette[np.argsort(-count, kind="stable")[:COLORS_PER_MESH]]
    nearest = np.abs(rounded[:, None] - palette).sum(axis=-1).argmin(axis=1)
    for i in range(len(palette)):
        colors[nearest == i] = colors[nearest == i].mean(axis=0)
    return colors**2.2  # textures hold sRGB, base colour factors are linear

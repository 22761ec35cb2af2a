"""Rows of recorded pictures, inflated chunk by chunk: MS-HAB's files at the speed of zlib.

MS-HAB lets h5py choose the chunks, which cut a picture's colours apart: [26, 32, 32, 1]. HDF5 puts
such a chunk in its place one byte at a time, which takes five times as long as inflating it.
"""

import zlib
from itertools import product

import h5py
import numpy as np
from einops import rearrange


def read_rows(pictures: h5py.Dataset, first: int, last: int) -> np.ndarray:
    """pictures[first:last], the same values, [n, H, W, C].

    Raises OSError on a chunk that is damaged.
    """
    filtered = pictures.shuffle or pictures.fletcher32 or pictures.scaleoffset
    if pictures.compression != "gzip" or filtered:
        return pictures[first:last]
    (frames, height, width, colours), shape = pictures.chunks, pictures.shape
    begin = first // frames * frames
    corners = (
        range(begin, last, frames), range(0, shape[1], height), range(0, shape[2], width),
        range(0, shape[3], colours),
    )  # fmt: skip
    size = pictures.dtype.itemsize * frames * height * width * colours
    content = b"".join(inflated(pictures, corner, size) for corner in product(*corners))
    tiles = np.frombuffer(content, pictures.dtype).reshape(*map(len, corners), *pictures.chunks)
    whole = np.empty([len(c) * s for c, s in zip(corners, pictures.chunks)], pictures.dtype)
    target = rearrange(
        whole, "(a t) (b y) (c x) (d k) -> d a t b y c x k", t=frames, y=height, x=width, k=colours
    )  # a view
    for place, tile in zip(target, rearrange(tiles, "a b c d t y x k -> d a t b y c x k")):
        place[...] = tile  # colour by colour: numpy's inner loop would be the three colours
    return whole[first - begin : last - begin, : shape[1], : shape[2], : shape[3]]


def inflated(pictures: h5py.Dataset, corner: tuple[int, ...], size: int) -> bytes:
    """The whole chunk at a corner, of `size` bytes."""
    try:
        content = zlib.decompress(pictures.id.read_direct_chunk(corner)[1])
    except zlib.error as error:
        raise OSError(f"{pictures.name}, chunk at {corner}: {error}") from error
    if len(content) != size:
        raise OSError(f"{pictures.name}, chunk at {corner}: {len(content)} bytes, expected {size}")
    return content

"""Pictures inflated chunk by chunk are those that HDF5 itself reads."""

import re

import h5py
import numpy as np
import pytest

from storage.trajectory import read_rows

STORED = {
    "MS-HAB's": dict(compression="gzip", compression_opts=5),
    "one chunk a frame": dict(compression="gzip", chunks=(1, 128, 128, 3)),
    "chunks that do not divide the picture": dict(compression="gzip", chunks=(7, 50, 48, 2)),
    "whole": dict(),
    "shuffled": dict(compression="gzip", shuffle=True),
    "checked": dict(compression="gzip", fletcher32=True),
    "another filter": dict(compression="lzf"),
}


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (61, 128, 128, 3), dtype=np.uint8)
    noise[:, :64] = 7  # some of it can be compressed
    return noise


@pytest.mark.parametrize("stored", STORED)
def test_any_rows_are_those_that_h5py_reads(stored, pictures, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("rgb", data=pictures, **STORED[stored])
        for first, last in ((0, 61), (0, 1), (26, 52), (5, 40), (60, 61), (25, 27), (30, 30)):
            assert np.array_equal(read_rows(dataset, first, last), pictures[first:last])


@pytest.mark.parametrize("damage", [lambda raw: raw[:50], lambda raw: b"?" + raw[1:]])
def test_a_damaged_chunk_is_named(damage, pictures, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("rgb", data=pictures, **STORED["MS-HAB's"])
        corner = (0, *dataset.chunks[1:])
        _, raw = dataset.id.read_direct_chunk(corner)
        dataset.id.write_direct_chunk(corner, damage(raw))
        with pytest.raises(OSError, match=re.escape(f"/rgb, chunk at {corner}")):
            read_rows(dataset, 0, 5)

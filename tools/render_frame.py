"""Render one frame of a box with SAPIEN and print the device: `python tools/render_frame.py`.

tools/setup.sh and tools/doctor.py run this file as a process of its own: a Vulkan driver that is
too old can crash the process. It exits with 0 only if the picture shows the box.
"""

import os
import sys

import sapien

# Where nvidia-smi works and NVIDIA's Vulkan driver is missing, SAPIEN sets this variable to its own
# driver file. Vulkan then reads no other driver.
if "/sapien/" in os.environ.get("VK_ICD_FILENAMES", ""):
    print("SAPIEN looks for NVIDIA's Vulkan driver alone", file=sys.stderr)

scene = sapien.Scene()
scene.set_ambient_light([0.5, 0.5, 0.5])
box = scene.create_actor_builder()
box.add_box_visual(half_size=[0.2, 0.2, 0.2])
box.build_static(name="box")
camera = scene.add_camera("camera", width=64, height=64, fovy=1.0, near=0.1, far=10)
camera.entity.set_pose(sapien.Pose([-1, 0, 0]))
scene.update_render()
camera.take_picture()
picture = camera.get_picture("Color")  # [64, 64, 4] float
device = scene.render_system.device.name
if picture.std() == 0:
    raise SystemExit(f"{device}: every pixel of the picture is {picture[0, 0]}")
print(f"drawn by {device}")

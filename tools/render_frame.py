"""Render one frame of a box with SAPIEN and print the device: `python tools/render_frame.py`.

tools/setup.sh and tools/doctor.py run this file as a process of its own: a Vulkan driver that is
too old can crash the process. It exits with 0 only if the picture shows the box.
"""

import os
import sys

import sapien

NO_NVIDIA = (
    ". SAPIEN looks for NVIDIA's Vulkan driver alone, since nvidia-smi works. One of these helps: "
    "in a container: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all; on bare metal: "
    "apt-get install libnvidia-gl-N, N as of the driver (Debian: nvidia-vulkan-icd); on a MIG "
    "slice, which cannot draw: take a whole GPU; on the CPU, slowly, in every shell: "
    "export VK_ICD_FILENAMES=/usr/share/vulkan/icd.d/lvp_icd.json && make setup"
)

try:
    scene = sapien.Scene()
except RuntimeError as error:
    # Where NVIDIA's driver is missing, SAPIEN has set this variable to a driver file of its own.
    alone = "/sapien/" in os.environ.get("VK_ICD_FILENAMES", "")
    sys.exit(f"{error}{NO_NVIDIA if alone else ''}")
scene.set_ambient_light([0.5, 0.5, 0.5])
box = scene.create_actor_builder()
box.add_box_visual(half_size=[0.2, 0.2, 0.2])
box.build_static(name="box")
camera = scene.add_camera("camera", width=64, height=64, fovy=1.0, near=0.1, far=10)
camera.entity.set_pose(sapien.Pose([-1, 0, 0]))
scene.update_render()
camera.take_picture()
print(f"drawn by {scene.render_system.device.name}")
if camera.get_picture("Color").std() == 0:  # [64, 64, 4]
    sys.exit("every pixel of the picture is the same")

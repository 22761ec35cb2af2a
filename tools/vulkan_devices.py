"""Print Vulkan's devices and their drivers, one per line: `python tools/vulkan_devices.py`.

SAPIEN only says that it found no device; this says which there are: "llvmpipe (LLVM 15.0.6, 256
bits) | llvmpipe | Mesa 22.3.6 (LLVM 15.0.6)". tools/doctor.py runs it in a process of its own,
which a broken driver may take with it. Structures and numbers are those of vulkan_core.h, 1.1.
"""

import ctypes
from ctypes import Structure, addressof, byref, c_char, c_int, c_ubyte, c_uint32, c_void_p


class ApplicationInfo(Structure):
    _fields_ = [("type", c_int), ("next", c_void_p), ("name", c_void_p), ("version", c_uint32),
                ("engine", c_void_p), ("engine_version", c_uint32), ("api", c_uint32)]  # fmt: skip


class InstanceInfo(Structure):
    _fields_ = [("type", c_int), ("next", c_void_p), ("flags", c_uint32), ("app", c_void_p),
                ("layers", c_uint32), ("layer_names", c_void_p), ("extensions", c_uint32),
                ("extension_names", c_void_p)]  # fmt: skip


class Driver(Structure):
    _fields_ = [("type", c_int), ("next", c_void_p), ("id", c_int), ("name", c_char * 256),
                ("info", c_char * 256), ("conformance", c_ubyte * 4)]  # fmt: skip


class Properties(Structure):
    _fields_ = [("type", c_int), ("next", c_void_p), ("numbers", c_uint32 * 5),
                ("name", c_char * 256), ("rest", c_ubyte * 1024)]  # fmt: skip


vulkan = ctypes.CDLL("libvulkan.so.1")
app = ApplicationInfo(type=0, api=1 << 22 | 1 << 12)  # Vulkan 1.1
info, instance = InstanceInfo(type=1, app=addressof(app)), c_void_p()
if code := vulkan.vkCreateInstance(byref(info), None, byref(instance)):
    raise SystemExit(f"no Vulkan driver (vkCreateInstance: {code})")
count, devices = c_uint32(16), (c_void_p * 16)()
vulkan.vkEnumeratePhysicalDevices(instance, byref(count), devices)
for device in devices[: count.value]:
    driver = Driver(type=1000196000)
    properties = Properties(type=1000059001, next=addressof(driver))
    vulkan.vkGetPhysicalDeviceProperties2(c_void_p(device), byref(properties))
    print(" | ".join(text.decode() for text in (properties.name, driver.name, driver.info)))

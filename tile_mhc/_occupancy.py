"""How many clusters of CTAs a GPU runs at one time, by its driver.

GPCs have different numbers of SMs, also on two GPUs of one kind, and a cluster lies in one GPC: of
132 SMs clusters of eight may use 112 or 128. The driver knows; NVIDIA's cuda-bindings, which
torch's builds for CUDA come with, ask it.
"""

import functools
import importlib
from typing import Any

# Its shared memory is what a launch asks for, so one that does nothing stands for all kernels.
PTX = b""".version 7.8
.target sm_90
.address_size 64
.visible .entry nothing() { ret; }
"""


@functools.cache
def clusters_at_once(device: int, size: int, shared_bytes: int) -> int | None:
    """Clusters of `size` CTAs, of so many bytes of shared memory each, that run at one time.

    0 where the device has no GPC for one. None where nobody can be asked: without cuda-bindings,
    or with a driver that says no. Asked once, so that a process has one answer.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        return _ask(driver, device, size, shared_bytes)
    except (ImportError, AttributeError, RuntimeError):
        return None


def _ask(driver: Any, index: int, size: int, shared_bytes: int) -> int:
    def call(name: str, *arguments: Any) -> Any:
        error, *results = getattr(driver, name)(*arguments)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {error}")
        return results[0] if results else None

    call("cuInit", 0)
    device = call("cuDeviceGet", index)
    # torch's context; a thread of autograd's need not have it at hand.
    call("cuCtxPushCurrent", call("cuDevicePrimaryCtxRetain", device))
    try:
        module = call("cuModuleLoadData", PTX)
        try:
            kernel = call("cuModuleGetFunction", module, b"nothing")
            attributes = driver.CUfunction_attribute
            for attribute, value in (
                (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes),
                (attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
            ):
                call("cuFuncSetAttribute", kernel, attribute, value)
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            shape = cluster.value.clusterDim
            shape.x, shape.y, shape.z = size, 1, 1
            cluster.value.clusterDim = shape
            launch = driver.CUlaunchConfig()
            launch.gridDimX, launch.gridDimY, launch.gridDimZ = size, 1, 1
            launch.blockDimX, launch.blockDimY, launch.blockDimZ = 32, 1, 1
            launch.sharedMemBytes = shared_bytes
            launch.attrs, launch.numAttrs = [cluster], 1
            return int(call("cuOccupancyMaxActiveClusters", kernel, launch))
        finally:
            call("cuModuleUnload", module)
    finally:
        call("cuCtxPopCurrent")
        call("cuDevicePrimaryCtxRelease", device)

"""What is asked of NVIDIA's driver, by a driver that is not one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tile_mhc import _occupancy, config, selection

DONE = 0
NAMES = (
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveClusters",
    "cuModuleUnload",
    "cuCtxPopCurrent",
    "cuDevicePrimaryCtxRelease",
)


class Driver(ModuleType):
    """Notes what is called, and says no to `refused`."""

    def __init__(self, answer, refused=""):
        super().__init__("cuda.bindings.driver")
        self.calls, self.launches = [], []
        self.CUresult = SimpleNamespace(CUDA_SUCCESS=DONE)
        self.CUfunction_attribute = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="bytes",
            CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED="any size",
        )
        self.CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4)
        self.CUlaunchAttribute = lambda: SimpleNamespace(
            value=SimpleNamespace(clusterDim=SimpleNamespace())
        )
        self.CUlaunchConfig = SimpleNamespace
        for name in NAMES:
            setattr(self, name, self.called(name, answer, refused))

    def called(self, name, answer, refused):
        def call(*arguments):
            self.calls.append(name)
            if name == refused:
                return (1,)
            if name == "cuOccupancyMaxActiveClusters":
                self.launches.append(arguments[1])
                return DONE, answer
            return DONE, f"result of {name}"

        return call


def ask(monkeypatch, driver):
    packages = {"cuda": ModuleType("cuda"), "cuda.bindings": ModuleType("cuda.bindings")}
    packages["cuda.bindings"].driver = driver
    for name, module in (*packages.items(), ("cuda.bindings.driver", driver)):
        monkeypatch.setitem(sys.modules, name, module)
    _occupancy.clusters_at_once.cache_clear()
    try:
        return _occupancy.clusters_at_once(0, 8, 232448)
    finally:
        _occupancy.clusters_at_once.cache_clear()


@pytest.mark.parametrize("answer", [15, 0])
def test_the_answer_is_the_driver_s(monkeypatch, answer):
    driver = Driver(answer)
    assert ask(monkeypatch, driver) == answer
    (launch,) = driver.launches
    (cluster,) = launch.attrs
    shape = cluster.value.clusterDim
    assert (shape.x, shape.y, shape.z) == (8, 1, 1)
    assert (launch.sharedMemBytes, launch.gridDimX, launch.numAttrs) == (232448, 8, 1)


@pytest.mark.parametrize("refused", NAMES[:8])
def test_who_is_refused_knows_nothing_and_leaves_nothing(monkeypatch, refused):
    driver = Driver(15, refused)
    assert ask(monkeypatch, driver) is None
    assert driver.calls.count("cuCtxPopCurrent") == ("cuModuleLoadData" in driver.calls)
    loaded = "cuModuleGetFunction" in driver.calls
    assert driver.calls.count("cuModuleUnload") == loaded


def test_without_bindings_nobody_knows(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    _occupancy.clusters_at_once.cache_clear()
    assert _occupancy.clusters_at_once(0, 8, 232448) is None
    _occupancy.clusters_at_once.cache_clear()


def test_as_many_clusters_as_the_driver_says_or_an_eighth_is_left(monkeypatch):
    def most(bound_by_memory=False):
        return [
            selection.num_clusters(10**6, size, bound_by_memory=bound_by_memory)
            for size in (8, 4, 2)
        ]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(config, "_device_num_sms", lambda _: 132)
    answers = {8: 15, 4: 30, 2: 66}
    monkeypatch.setattr(selection, "_clusters_at_once", answers.get)
    assert most() == [15, 30, 66]
    assert most(bound_by_memory=True) == [14, 28, 66]
    assert selection.num_clusters(17, 8, bound_by_memory=False) == 3
    monkeypatch.setattr(config, "_num_sms", 120)
    assert most() == [13, 26, 60]
    monkeypatch.setattr(config, "_num_sms", 0)
    monkeypatch.setattr(selection, "_clusters_at_once", lambda size: None)
    assert most() == [14, 28, 66]

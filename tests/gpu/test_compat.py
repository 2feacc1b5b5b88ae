"""The TileKernels names on the kernels: every test of the CPU, and what only a GPU shows."""

import pytest
import torch

from cpu.test_compat_semantics import *  # noqa: F403
from cpu.test_compat_semantics import block, recompute_inputs, relative, streams
from tile_mhc import ShapeError, jit
from tile_mhc.compat.tile_kernels import config
from tile_mhc.compat.tile_kernels.modeling import mhc
from tile_mhc.compat.tile_kernels.modeling.mhc import ops
from tile_mhc.ops import projection as projection_module


@pytest.fixture
def device() -> str:
    return "cuda"


def test_n_splits_caps_the_slices(monkeypatch):
    """Few tokens and a long K is where splitting pays: the cap decides the number of slices."""
    slices = []
    split_products = projection_module.split_products

    def watched(*args):
        products, squares = split_products(*args)
        slices.append(products.shape[0])
        return products, squares

    monkeypatch.setattr(projection_module, "split_products", watched)
    residual, (fn, _, _) = streams("cuda", hidden=7168), block("cuda", hidden=7168)
    results = [ops.mhc_pre_norm_fn(residual, fn, None, 1e-6, n_splits=n) for n in (1, 4, 16)]
    assert slices[0] == 1
    assert 1 < slices[1] <= 4 < slices[2] <= 16
    for result in results[1:]:
        assert relative(result, results[0]) < 1e-5


def test_one_recompute_kernel_for_any_depth():
    """B7, counted at the compiler."""
    built = set()
    for layers, posts in ((2, 2), (3, 2), (7, 7), (20, 19)):
        residual, *lists = recompute_inputs("cuda", layers, posts)
        outputs = (
            [torch.empty_like(residual[..., 0, :]) for _ in range(layers)],
            [torch.empty_like(residual) for _ in range(posts)],
        )
        ops.mhc_multilayer_recompute(residual, *lists, *outputs)
        statistics = jit.statistics()
        built.add((statistics.built + statistics.loaded, statistics.resident))
    assert len(built) == 1


def test_cpu_tensor_among_cuda_ones():
    residual, (fn, scale, base) = streams("cuda"), block("cuda")
    with pytest.raises(ShapeError, match="scale must be on cuda:0"):
        mhc.mhc_pre(residual, fn, scale.cpu(), base)
    fn.requires_grad_()
    fn.main_grad = torch.zeros(fn.shape)
    with pytest.raises(ShapeError, match=r"main_grad must hold .* on cuda:0"):
        ops.mhc_pre_norm_fn(residual, fn, None, 1e-6).sum().backward()


def test_config():
    properties = torch.cuda.get_device_properties(0)
    assert config.get_device_num_sms() == properties.multi_processor_count
    assert config.get_max_smem_per_sm() == properties.shared_memory_per_multiprocessor
    assert config.get_num_sms() == properties.multi_processor_count
    residual, (fn, scale, base) = streams("cuda", lead=(300,)), block("cuda")
    every, _ = mhc.mhc_pre(residual, fn, scale, base)
    try:
        config.set_num_sms(1)
        assert config.get_num_sms() == 1
        one, _ = mhc.mhc_pre(residual, fn, scale, base)
    finally:
        config.set_num_sms(0)
    assert config.get_num_sms() == properties.multi_processor_count
    assert relative(one, every) < 3e-3
    with pytest.raises(ValueError, match="set_num_sms: num_sms must be from 0 to"):
        config.set_num_sms(properties.multi_processor_count + 1)

"""What is generated for GPUs before Hopper, assembled for this one.

It uses nothing that later GPUs lack, so that cp.async, pipelines and barriers run on hardware;
what is left is another generation's own: its timing, and its assembler.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import oracle
import replaying
from cases import CONTRACT, DELAYED_PRE, FUSED_PRE, POST_PRE_DELAYED, PROJECTION, Case
from tile_mhc import _device, config, jit, specs
from tile_mhc.kernels._arch import ARCHITECTURES

# Eight streams take other tiles where a CTA has little shared memory.
SIZES = [("sm_80", 4, 256), ("sm_86", 8, 128)]
NAMES = ("projection", "contract", "fused_pre", "post_pre")


@pytest.fixture(scope="module", params=SIZES, ids=str)
def size(request):
    arch, *size = request.param
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        pytest.skip("for a GPU from Hopper on; others have these kernels as their own")
    tilelang = jit.import_tilelang()
    compile_kernel = tilelang.compile

    def for_this_gpu(func, *, target, **options):
        return compile_kernel(func, target=target | {"code": [f"sm_{major}{minor}"]}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tilelang, "compile", for_this_gpu)
        patch.setattr(_device, "limits_of", lambda _: ARCHITECTURES[arch])
        patch.setattr(jit, "device_arch", lambda _: arch)
        patch.setattr(jit, "_ready", {})
        patch.setattr(jit, "_compiled", {})
        replaying.forget()
        kernels = specs.select([specs.Sizes(*size)], NAMES, arch)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda kernel: jit.compile_kernel(*kernel, arch), kernels))
        yield size
    replaying.forget()


@pytest.mark.parametrize("num_sms", [0, 4], ids=["all SMs", "4 SMs"])
@pytest.mark.parametrize(
    "op", [PROJECTION, CONTRACT, FUSED_PRE, DELAYED_PRE, POST_PRE_DELAYED], ids=str
)
def test_op(size, op, num_sms):
    """With few SMs a CTA has many tiles, and pipelines run full."""
    case = Case(1001, *size, "several tiles, the last ragged")
    config.set_num_sms(num_sms)
    try:
        oracle.check(op, case, *op.inputs(*case.shape, "cuda"))
    finally:
        config.set_num_sms(0)

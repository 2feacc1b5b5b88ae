"""Each kind of fault is reported, with the kernel, the place and what was done there."""

import dataclasses

import pytest
import torch

from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.ops import emulated
from tile_mhc import projection

BF16 = torch.bfloat16


def broken(name, args, old, new):
    """The kernel with its first `old` replaced."""
    lowered = launch.kernel(name, *args).lowered
    assert old in lowered.source, f"{name} has no {old!r} any more: choose another place to break"
    return Kernel(dataclasses.replace(lowered, source=lowered.source.replace(old, new, 1)))


def expand_arguments():
    return torch.zeros(3, 192, dtype=BF16), torch.zeros(3, 4, 192, dtype=BF16)


def aggregate_arguments():
    wide = torch.ones(3, 4, 192, dtype=BF16)
    return wide[:, 0].clone(), wide, torch.ones(3, 4), torch.ones_like(wide), torch.ones(3, 4), 0


def sinkhorn_arguments():
    return torch.zeros(3, 16), torch.zeros(3, 16), 5, 1e-6


KERNELS = {
    "expand_fwd": ((4, 192), expand_arguments),
    "aggregate_bwd": ((4, 192), aggregate_arguments),
    "sinkhorn_fwd": ((4,), sinkhorn_arguments),
}
FOLLOW = "cudaGridDependencySynchronize();"
SYNC = "__syncthreads();"
THREAD = "((int)threadIdx.x)"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("expand_fwd", f"if ({THREAD} < 24)", "if (true)", "which has 1152"),
        ("expand_fwd", "(uint4*)(hidden + (", "(uint4*)(hidden - 8 + (", "at byte -16 of hidden"),
        ("expand_fwd", "(uint4*)(hidden + (", "(uint4*)(hidden + 1 + (", "is not aligned"),
        ("expand_fwd", FOLLOW, f"/* {FOLLOW} */", "before the wait for the kernel before this one"),
        ("aggregate_bwd", SYNC, "", "since the last barrier|never written"),
        (
            "aggregate_bwd",
            SYNC,
            f"{SYNC} if ({THREAD} < 7) {{ {SYNC} }}",
            "divergent barrier: 7 of 32",
        ),
        ("aggregate_bwd", "shared[(", f"if ({THREAD}) shared[(", "never written"),
        ("sinkhorn_fwd", "comb[(i_1 * 4)]", "comb[((i_1 * 4) + 16)]", "register array"),
        ("sinkhorn_fwd", "; ++__1)", ";)", "time limit"),
    ],
)
def test_fault(name, old, new, message):
    args, arguments = KERNELS[name]
    kernel = broken(name, args, old, new)
    with launch.settings(time_limit=1), pytest.raises(FaultError, match=message) as error:
        kernel(*arguments())
    assert f"{name}({', '.join(map(str, args))}): block (" in str(error.value)


def test_early_read_of_what_the_kernel_before_writes():
    hidden, streams = expand_arguments()
    reader = launch.kernel("aggregate_mix_bwd", 4, 192)
    launch.kernel("expand_fwd", 4, 192)(hidden, streams)
    with pytest.raises(FaultError, match="read of residual before the wait"):
        reader(hidden, streams, torch.zeros(3, 4))
    launch.kernel("expand_fwd", 4, 192)(hidden, streams.clone())
    reader(hidden, streams, torch.zeros(3, 4))


def test_launch_beside_the_kernel_that_writes_its_tensors():
    def gradients():
        return torch.zeros(4), torch.zeros(1)

    sums = launch.kernel("column_sums", 4, 1, False)
    first, others = gradients(), gradients()
    partials = torch.ones(3, 5)
    sums(partials, *first, 0, 0, 0)
    with pytest.raises(FaultError, match="write of grad_bias before the wait"):
        sums(partials, *first, 0, 0, 1)
    sums(partials, *first, 0, 0, 0)
    sums(partials, *others, 0, 0, 1)
    # What comes behind finds both of them at work, and waits.
    with pytest.raises(FaultError, match="write of grad_bias before the wait"):
        sums(partials, *first, 0, 0, 1)
    sums(partials, *first, 0, 0, 0)
    assert first[0].tolist() == others[0].tolist() == [3] * 4


def test_copy_that_nothing_waits_for():
    launches = []

    def watch(kernel, given):
        if kernel.key[0] == "projection_fwd":
            launches.append((kernel, [g.clone() if torch.is_tensor(g) else g for g in given]))

    with emulated(), launch.settings(watch=watch):
        projection(torch.ones(5, 4, 192, dtype=BF16), torch.ones(24, 768))
    kernel, arguments = launches[0]
    source = kernel.lowered.source
    assert source.count("tl::cp_async_wait<") > 2, "the sibling is pipelined"
    source = source.replace("tl::cp_async_wait<", "// tl::cp_async_wait<")
    with pytest.raises(
        FaultError, match=r"cp\.async that nothing waits for|since the last barrier"
    ):
        Kernel(dataclasses.replace(kernel.lowered, source=source))(*arguments)


def test_address_of_no_tensor():
    kernel = launch.kernel("recompute", 4, 192)
    table = torch.full((1, 6), 4096)
    with pytest.raises(FaultError, match="in no tensor"):
        kernel(torch.zeros(3, 4, 192, dtype=BF16), table, 0)


def test_arguments_are_checked_as_tilelang_checks_them():
    kernel = launch.kernel("expand_fwd", 4, 192)
    hidden, out = expand_arguments()
    with pytest.raises(RuntimeError, match="hidden dtype mismatch, expected bfloat16"):
        kernel(hidden.float(), out)
    with pytest.raises(RuntimeError, match="out must be"):
        kernel(hidden, out[:2])
    with pytest.raises(RuntimeError, match="contiguous"):
        kernel(hidden, out.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="takes 2, got 1"):
        kernel(hidden)
    with pytest.raises(FaultError, match="cannot be launched"):
        kernel(hidden[:0], out[:0])


def test_unknown_name_says_where_to_add_it():
    with pytest.raises(RuntimeError, match="the emulator lacks a name"):
        broken("expand_fwd", (4, 192), f"if ({THREAD} < 24)", "if (tl::unheard_of())")

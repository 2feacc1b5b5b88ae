"""Values that TileLang's CUDA reads after they have changed: what is seen, and what is let pass."""

import pytest

from tile_mhc import jit
from tile_mhc.cli._stale import check_source, stale_value

tilelang = pytest.importorskip("tilelang")
T = tilelang.language

READS = "  B[1] = (*(float *)(&(v_)));"


def source(*between):
    lines = (
        "  int word[4];",
        "  int v_ = word[0] << 16;",
        "  B[0] = (*(float *)(&(v_)));",
        *between,
    )
    return "\n".join((*lines, READS))


@pytest.mark.parametrize(
    "writes",
    [
        "  word[0] = A[1];",
        "  *(int4*)(word + 0) = *(int4*)(A + 4);",
        "  *(uint2*)(((bfloat16_t*)word) + 0) = held[0];",
        "  tl::load(&(word[0]), A);",
    ],
)
def test_a_changed_value(writes):
    assert stale_value(source(writes)) == READS.strip()
    with pytest.raises(jit.CompileError, match=r"must read values as they are; got a changed one"):
        check_source(source(writes))


@pytest.mark.parametrize(
    "between",
    [
        (),
        ("  other[0] = word[0];",),
        ("  if (word[0] == 3) {", "  }"),
        ("  word[0] = A[1];", "  int v_ = word[0] << 16;"),
    ],
)
def test_a_value_as_it_is(between):
    assert stale_value(source(*between)) is None


def test_what_tilelang_writes():
    @T.prim_func
    def kernel(A: T.Tensor((64,), "int32"), B: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=32):
            t = T.get_thread_binding()
            word = T.alloc_local((1,), "int32")
            word[0] = A[t]
            B[t] = T.reinterpret(word[0] << 16, "float32")
            word[0] = A[32 + t]
            B[32 + t] = T.reinterpret(word[0] << 16, "float32")

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        artifact = tilelang.lower(kernel, target=target)
    # Once TileLang has mended it, this fails, and what avoids it may go.
    assert stale_value(str(artifact.kernel_source)) is not None

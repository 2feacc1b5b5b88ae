"""What of TileKernels is recorded in tests/golden, one file a case, and the manifest beside it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parity import calls, plain

FOLDER = Path(__file__).parents[1] / "golden"
MANIFEST = FOLDER / "MANIFEST.json"
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Case:
    """A call at one size; tensors in `left_out` are too large to keep."""

    call: str
    num_tokens: int
    hidden_size: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.call}-T{self.num_tokens}-H{self.hidden_size}"

    @property
    def path(self) -> Path:
        return FOLDER / f"{self}.safetensors"

    def maker(self) -> calls.Maker:
        return calls.Maker(self.call, self.num_tokens, self.hidden_size, "cpu")


# A ragged tile everywhere. H of 256 is the least whose K TileKernels' projection takes.
CASES = (
    Case("expand", 7, 256),
    Case("norm_fn", 13, 256),
    Case("norm_fn", 7, 1280, ("grad_fn",)),
    Case("norm_fn_weight", 13, 256),
    Case("split_mixes", 64, 64),
    Case("sinkhorn", 64, 64),
    Case("apply_mix", 7, 1280),
    Case("post", 7, 512),
    Case("head_compute_mix", 64, 64),
    Case("big_fuse", 13, 256),
    Case("recompute", 5, 512),
    Case("sub_layer", 13, 256),
    # The gradient of fn is that of norm_fn.
    Case("boundary", 13, 256, ("grad_fn",)),
    Case("boundary_delayed", 13, 256, ("grad_fn",)),
)


@dataclass(frozen=True)
class PlainCase(Case):
    """A plain function of release 2.1.0 at one size."""

    def __str__(self) -> str:
        return f"plain-{super().__str__()}"

    def inputs(self, device: str) -> dict[str, Tensor]:
        """Made on the CPU, whose bits the manifest records."""
        make = plain.Maker(self.call, self.num_tokens, self.hidden_size, "cpu")
        return on(device, plain.PLAIN[self.call].inputs(make))


# TileKernels' merge of the weights takes K in blocks of 256.
PLAIN_SIZES = {
    **dict.fromkeys(("head_compute_mix_fwd", "head_compute_mix_bwd"), (64, 64)),
    **dict.fromkeys(("fn_normw_merge_fwd", "fn_normw_merge_bwd"), (1, 64)),
    **dict.fromkeys(("pre_split_mixes_fwd", "pre_split_mixes_bwd"), (16, 64)),
    **dict.fromkeys(("sinkhorn_fwd", "sinkhorn_bwd"), (16, 64)),
    **dict.fromkeys(("reduce_partials_fwd", "reduce_partials_bwd"), (16, 64)),
    **dict.fromkeys(("reduce_partials_of_groups_fwd", "reduce_partials_of_groups_bwd"), (7, 64)),
}
PLAIN_CASES = tuple(PlainCase(name, *PLAIN_SIZES.get(name, (5, 128))) for name in plain.PLAIN)


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_manifest() -> dict:
    return json.loads(MANIFEST.read_text())


def on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


class MakerOn(calls.Maker):
    """Makes on the CPU, whose bits the manifest records, and moves."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case.call, case.num_tokens, case.hidden_size, "cpu")
        self.target = device

    def cotangents(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return on(self.target, super().cotangents(outputs))

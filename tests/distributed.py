"""A small model under a data-parallel wrapper: what each rank of the tests runs."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import oracle
from cases import contract_inputs, pre_inputs
from tile_mhc import contract, fused_pre, main_grad, post, reference

STREAMS, HIDDEN = 4, 64
RANKS, MICRO_BATCHES, TOKENS = 2, 3, 24
LAYERS = 2
# Of every layer, and of the readout, in a forward.
CALLS = 2
# What ranks need of modules that take seconds to import; one that is absent is left out.
PRELOADED = "sharding", "megatron.core.distributed", "megatron.core.transformer"


def roundings(ranks: int) -> int:
    """Of a sum in bfloat16: one as each micro-batch is added and, of several ranks, each rank."""
    return MICRO_BATCHES + (ranks if ranks > 1 else 0)


class Op(nn.Module):
    """What an op has for parameters, as this module's own: Megatron-FSDP gathers those."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if name != "residual":
                self.register_parameter(name, nn.Parameter(tensor))

    def own(self) -> dict[str, Any]:
        return dict(self.named_parameters(recurse=False))


class Layer(Op):
    def __init__(self) -> None:
        tensors, self.options = pre_inputs((1,), STREAMS, HIDDEN, "cpu")
        super().__init__(tensors)

    def forward(self, residual: Tensor) -> Tensor:
        if residual.dtype == torch.float64:
            pre = reference.fused_pre(residual, **self.own(), **self.options)
            return reference.post(torch.tanh(pre[0]), residual, *pre[1:])
        *pre, residual = fused_pre(residual, **self.own(), **self.options, passes_residual=True)
        return post(torch.tanh(pre[0]), residual, *pre[1:])


class Head(Op):
    def __init__(self) -> None:
        super().__init__(contract_inputs((1,), STREAMS, HIDDEN, "cpu")[0])
        # Without a gradient, and among those that have one.
        self.scale.requires_grad_(False)

    def forward(self, residual: Tensor) -> Tensor:
        readout = reference.contract if residual.dtype == torch.float64 else contract
        return readout(residual, **self.own())


class Network(nn.Module):
    """Sub-layers that run twice, as in a looped model, and two readouts that share their
    parameters, as a model and its MTP may.

    Without the kernels' rounding it would be what it is in float64: that is its own reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = Head()

    def forward(self, residual: Tensor) -> Tensor:
        for layer in [*self.layers] * CALLS:
            first = residual
            residual = layer(residual)
        outputs = self.head(residual) + self.head(first)
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        return wide.square().mean()


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (TOKENS, STREAMS, HIDDEN)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(MICRO_BATCHES)]


def gradients(ranks: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Plain autograd: the mean over ranks of the sums over micro-batches, added in float64.

    Of the reference in float64, or of the ops themselves in the `dtype` of the parameters.
    """
    model = network(dtype).to(device)
    total: dict[str, Tensor] = {}
    for rank in range(ranks):
        for streams in batches(rank):
            batch = streams.to(device)
            model.zero_grad()
            model(batch.double() if dtype == torch.float64 else batch).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    grad = parameter.grad.double() / ranks
                    total[name] = total[name] + grad if name in total else grad
    return total


def gate_terms(ranks: int, device: str = "cpu") -> dict[str, Tensor]:
    """What the gradients of scales and biases by `gradients` are sums of."""
    model = network(torch.float64).to(device)
    with oracle.gate_terms() as terms:
        for rank in range(ranks):
            for streams in batches(rank):
                model(streams.to(device).double()).backward()
    found = {name: terms.of(parameter) for name, parameter in model.named_parameters()}
    return {name: sizes / ranks for name, sizes in found.items() if sizes is not None}


@contextlib.contextmanager
def process_group(rank: int, ranks: int, folder: Path, device: str = "cpu") -> Iterator[None]:
    if ranks > 1:
        torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def forking() -> Iterator[str]:
    """The start method of ranks on the CPU: forked from one process that only imported modules.

    A process that has used CUDA, or run a backward, cannot be forked; that one does neither.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ):
        # The only path that it is told of; ranks themselves get this process's.
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        yield "forkserver"


def spawn(worker: Callable[..., None], folder: Path, *args: Any) -> dict[str, Tensor]:
    """Run `worker(rank, ranks, folder, *args)` on every rank; what rank 0 saved."""
    with contextlib.nullcontext("spawn") if "cuda" in args else forking() as method:
        torch.multiprocessing.start_processes(
            worker, (RANKS, folder, *args), nprocs=RANKS, start_method=method
        )
    result: dict[str, Tensor] = torch.load(folder / "gradients.pt")
    return result


def run_steps(
    model: nn.Module, rank: int, last: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    """Micro-batches; `last` is what all but the last run in, so that only that reduces."""
    micro = batches(rank)
    device = next(model.parameters()).device
    for i, batch in enumerate(micro):
        with contextlib.nullcontext() if i == len(micro) - 1 else last():
            model(batch.to(device)).backward()


@contextlib.contextmanager
def buffers_on_cpu() -> Iterator[None]:
    """Megatron-Core keeps its buffers on the current device; later than 0.16 it asks for its stream
    too, to wait for the CUDA graphs of parameters that have some."""
    with (
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.NonCallableMock(spec=[])),
    ):
        yield


def megatron_ddp(
    rank: int,
    ranks: int,
    folder: Path,
    parameters: torch.dtype,
    in_fp32: bool,
    device: str = "cpu",
) -> None:
    """Megatron-Core's DistributedDataParallel, reductions overlapped with the backward."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(rank, ranks, folder, device))
        if device == "cpu":
            stack.enter_context(buffers_on_cpu())
        parallel_state.initialize_model_parallel()
        model = DistributedDataParallel(
            TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1),
            DistributedDataParallelConfig(
                overlap_grad_reduce=True,
                grad_reduce_in_fp32=in_fp32,
                average_in_collective=False,
                bucket_size=1000,
            ),
            network(parameters).to(device=device),
        )
        for _ in range(2):  # the second step as the first: all flags are back
            model.zero_grad_buffer()
            run_steps(model, rank, model.no_sync)
            model.finish_grad_sync()
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        if not all(p.grad_added_to_main_grad for p in trained.values()):
            raise RuntimeError("a gradient went through autograd")
        if rank == 0:
            grads = {name: p.main_grad.cpu() for name, p in trained.items()}
            torch.save(grads, folder / "gradients.pt")
        parallel_state.destroy_model_parallel()


def torch_fsdp(rank: int, ranks: int, folder: Path, device: str = "cpu") -> None:
    """torch's fully_shard: parameters sharded, gathered for each layer, gradients scattered."""
    from torch.distributed.fsdp import fully_shard

    with process_group(rank, ranks, folder, device):
        model = network().to(device)
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)

        @contextlib.contextmanager
        def no_sync() -> Iterator[None]:
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        run_steps(model, rank, no_sync)
        grads = {
            name: p.grad.full_tensor().cpu()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        if rank == 0:
            torch.save(grads, folder / "gradients.pt")


@contextlib.contextmanager
def not_importable(names: list[str]) -> Iterator[None]:
    """Without these modules; unlike `mock.patch.dict`, what is imported meanwhile stays."""
    found = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(found)


@contextlib.contextmanager
def streams_on_cpu() -> Iterator[None]:
    """Megatron-FSDP makes CUDA streams and events, whatever its device: here all is in order."""
    fakes = {
        "Stream": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "stream": lambda _: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda tensor: tensor))
        yield


def megatron_fsdp(
    rank: int,
    ranks: int,
    folder: Path,
    strategy: str,
    parameters: torch.dtype,
    main_grads: torch.dtype,
    units: tuple[type[nn.Module], ...],
    device: str,
) -> None:
    """The package megatron-fsdp; on the CPU with streams that are none."""
    # An older megatron-core beside it has another configuration, which it would take for its own.
    core = {name for name in sys.modules if name.startswith("megatron.")}
    with not_importable([*(core | {"megatron.core"})]):
        from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model

    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(rank, ranks, folder, device))
        if device == "cpu":
            stack.enter_context(streams_on_cpu())
        model = fully_shard_model(
            network(parameters),
            fsdp_unit_modules=[*units],
            device_mesh=init_device_mesh(device, (ranks, 1), mesh_dim_names=("shard", "tensor")),
            dp_shard_dim="shard",
            tp_dim="tensor",
            zero_dp_strategy=strategy,
            device=torch.device("cuda", rank) if device == "cuda" else torch.device("cpu"),
            mixed_precision_policy=MixedPrecisionPolicy(main_grads_dtype=main_grads),
            sync_model_each_microbatch=False,
        )
        # Gloo has no reduction that scales too.
        model.ddp_config.gradient_reduce_div_fusion = device == "cuda"
        for _ in range(2):  # the second step as the first: all flags are back
            model.zero_grad_buffer()
            with mock.patch.object(main_grad, "finish", wraps=main_grad.finish) as finished:
                run_steps(model, rank, model.no_sync)
            model.finish_grad_sync()
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        expected = MICRO_BATCHES * CALLS * len(trained)
        if finished.call_count != expected:
            raise RuntimeError(f"{finished.call_count} gradients in main_grad, not {expected}")
        # Rows of each, as ranks follow one another; without a gradient where a rank has none.
        shard = {}
        for name, parameter in trained.items():
            if (grad := parameter.grad) is not None:
                shard[name] = (grad.to_local() if isinstance(grad, DTensor) else grad).cpu()
        shards: list[Any] = [None] * ranks
        dist.all_gather_object(shards, shard)
        if rank == 0:
            whole = shards[:1] if strategy == "no_shard" else shards
            grads = {name: torch.cat([s[name] for s in whole if name in s]) for name in trained}
            torch.save(grads, folder / "gradients.pt")

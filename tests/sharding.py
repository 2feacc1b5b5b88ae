"""A bfloat16 block with float32 mixing under torch's fully_shard: what each rank runs."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import distributed
from distributed import HIDDEN, STREAMS, TOKENS
from tile_mhc import recompute_group
from tile_mhc.nn import (
    DeepSeekV41Decoder,
    DeepSeekV41Layer,
    HyperConnection,
    HyperHead,
    Mixes,
    observe_mixes,
)


class Block(nn.Module):
    """A sub-layer of bfloat16, with what mixes its streams in float32."""

    def __init__(self, calls_methods: bool) -> None:
        super().__init__()
        self.hc = HyperConnection(HIDDEN, STREAMS, norm_weight=True)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.calls_methods = calls_methods

    def forward(self, streams: Tensor) -> Tensor:
        if not self.calls_methods:
            return self.hc(streams, self.layer)
        layer_input, *mixes, streams = self.hc.pre(streams)
        return self.hc.post(self.layer(layer_input), streams, *mixes)


class Model(nn.Module):
    def __init__(self, calls_methods: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(calls_methods) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = HyperHead(HIDDEN, STREAMS)

    def forward(self, streams: Tensor) -> Tensor:
        for block in self.blocks:
            streams = block(streams)
        return self.norm(self.head(streams))


def make_model(calls_methods: bool, dtype: torch.dtype = torch.bfloat16) -> Model:
    """Everything in `dtype`, but for the mixing, which stays float32."""
    torch.manual_seed(0)
    model = Model(calls_methods)
    for name, parameter in model.named_parameters():
        if name.endswith(("scale", "bias")) and "layer" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def make_streams(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1 + rank)
    return torch.randn(TOKENS, STREAMS, HIDDEN, generator=generator).bfloat16()


def run(model: nn.Module, rank: int) -> Tensor:
    out = model(make_streams(rank))
    out.float().square().mean().backward()
    return out.detach()


def save(model: Model, out: Tensor, rank: int, folder: Path) -> None:
    """What `distributed.spawn` returns: the output of rank 0, and the gradients put together."""
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(found | {"out": out}, folder / "gradients.pt")


def shard_mixing(model: Model) -> None:
    """Each HyperConnection and HyperHead as a unit of its own, before what holds it."""
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            fully_shard(module)


def of_original_dtypes(rank: int, ranks: int, folder: Path, calls_methods: bool) -> None:
    with distributed.process_group(rank, ranks, folder):
        model = make_model(calls_methods)
        shard_mixing(model)
        for block in model.blocks:
            if calls_methods:
                register_fsdp_forward_method(block.hc, "pre")
                register_fsdp_forward_method(block.hc, "post")
            fully_shard(block)
        fully_shard(model)
        for _ in range(2):  # the second step as the first
            model.zero_grad()
            out = run(model, rank)
        save(model, out, rank, folder)


def in_a_group(rank: int, ranks: int, folder: Path, calls_methods: bool) -> None:
    """As `of_original_dtypes`: its gradients without a group, less those with one."""
    with distributed.process_group(rank, ranks, folder):
        model = make_model(calls_methods)
        shard_mixing(model)
        for block in model.blocks:
            if calls_methods:
                register_fsdp_forward_method(block.hc, "pre")
                register_fsdp_forward_method(block.hc, "post")
            fully_shard(block)
        fully_shard(model)
        found: list[list[Tensor]] = []
        for around in (contextlib.nullcontext(), recompute_group()):
            model.zero_grad()
            with around:
                out = model(make_streams(rank))
            out.float().square().mean().backward()
            found.append([out.detach(), *(p.grad.full_tensor() for p in model.parameters())])
        same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        if rank == 0:
            torch.save({"same": same, "replays": len(around._all)}, folder / "gradients.pt")


def of_mixed_precision(rank: int, ranks: int, folder: Path, calls_methods: bool) -> None:
    """Float32 parameters, gathered in bfloat16 but for those of the mixing."""
    with distributed.process_group(rank, ranks, folder):
        model = make_model(calls_methods, torch.float32)
        shard_mixing(model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            if calls_methods:
                register_fsdp_forward_method(block.hc, "pre")
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        save(model, run(model, rank), rank, folder)


def make_decoder() -> DeepSeekV41Decoder:
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        attn, ffn = (nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        layers.append(DeepSeekV41Layer(HIDDEN, attn, ffn, num_streams=STREAMS))
        for connection in (layers[-1].hc_attn, layers[-1].hc_ffn):
            nn.init.normal_(connection.bias)
    norm, head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    return DeepSeekV41Decoder(layers, norm=norm, head=head)


def run_decoder(decoder: nn.Module, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the logits of every connection, which an observer takes."""
    generator = torch.Generator().manual_seed(1 + rank)
    logits = {}

    def observer(name: str, mixes: Mixes) -> None:
        logits[name] = torch.cat([part.flatten() for part in mixes.logits()])

    with observe_mixes(decoder, observer):
        out = decoder(torch.randn(TOKENS, HIDDEN, generator=generator))
    out.square().mean().backward()
    return out.detach(), logits


def of_decoder(rank: int, ranks: int, folder: Path) -> None:
    """The connections are units of their own, in a layer that is one; and the whole state."""
    with distributed.process_group(rank, ranks, folder):
        decoder = make_decoder()
        for layer in decoder.layers:
            fully_shard(layer.hc_attn)
            fully_shard(layer.hc_ffn)
            fully_shard(layer)
        fully_shard(decoder)
        out, logits = run_decoder(decoder, rank)
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(decoder, options=options)
        found = {name: p.grad.full_tensor() for name, p in decoder.named_parameters()}
        if rank == 0:
            whole = {"out": out, "state": state, "logits": logits}
            torch.save(found | whole, folder / "gradients.pt")


def refused(rank: int, ranks: int, folder: Path) -> None:
    """What is said of `pre` without the registration."""
    with distributed.process_group(rank, ranks, folder):
        model = make_model(calls_methods=True)
        shard_mixing(model)
        message = message_of(lambda: run(model, rank))
        if rank == 0:
            torch.save({"pre": message}, folder / "gradients.pt")


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

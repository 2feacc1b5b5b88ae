"""Megatron-LM's definitions, written again in float64 on a state dict's own names.

Main between #4531 and #6401 (at 7cdba422b8) has another one than its dev branch and DeepSeek: the
divisors of Sinkhorn are bounded, not added to; H_res mixes the streams untransposed; nothing is
added to H_pre; and the streams' mean is the output. Both divide by rms + 1e-6.
"""

import pytest
import torch

from tile_mhc import aggregate, expand, recompute_group, sinkhorn
from tile_mhc.nn import (
    DelayedHyperConnection,
    HyperConnection,
    MeanHead,
    SubLayer,
    run_delayed_sublayers,
    run_sublayers,
)

N, H, COUNT = 4, 32, 3
AS_MAIN = {"transposes_comb": True, "pre_eps": 0, "sinkhorn_eps": 0}
# Nearest to their division by rms + 1e-6.
NORM_EPS = 1e-12


def make_state():
    """Of a block whose layers have one hyper-connection each."""
    state = {}
    for index in range(COUNT):
        own = {
            "mapping_proj.weight": torch.randn(N * (N + 2), N * H) * 0.3,
            "alpha_pre": torch.rand(1) + 0.5,
            "alpha_post": torch.rand(1) + 0.5,
            "alpha_res": torch.rand(1) + 0.5,
            "bias": torch.randn(N * (N + 2)),
        }
        state |= {f"layers.{index}.hyper_connection.{name}": value for name, value in own.items()}
    return state


def make_connections(state, version, kind=HyperConnection, **options):
    connections = [kind(H, **options) for _ in range(COUNT)]
    for index, connection in enumerate(connections):
        prefix = f"layers.{index}.hyper_connection."
        connection.load_state_dict(connection.from_megatron(state, prefix, version))
    return connections


def normalized(matrix, axis, eps):
    """As main of #4531 does, and as dev."""
    sums = matrix.sum(axis, keepdim=True)
    return matrix / (sums.clamp(min=1e-6) if eps is None else sums + eps)


def mappings(state, prefix, x, version, inside=False):
    """H_pre, H_post and H_res of flat streams; their norm, or with `inside` as NORM_EPS stands."""
    weight, bias, *alphas = (
        state[f"{prefix}{name}"]
        for name in ("mapping_proj.weight", "bias", "alpha_pre", "alpha_post", "alpha_res")
    )
    alpha = torch.cat([a.expand(count) for a, count in zip(alphas, (N, N, N * N), strict=True)])
    rms = x.norm(dim=-1, keepdim=True) / (N * H) ** 0.5
    divisor = (rms * rms + NORM_EPS).sqrt() if inside else rms + 1e-6
    h = x @ weight.mT / divisor * alpha + bias
    pre, post = h[..., :N].sigmoid(), 2 * h[..., N : 2 * N].sigmoid()
    logits = h[..., 2 * N :].unflatten(-1, (N, N))
    if version == "dev":
        res = normalized(logits.softmax(-1) + 1e-6, -2, 1e-6)
        for _ in range(19):
            res = normalized(normalized(res, -1, 1e-6), -2, 1e-6)
        return pre + 1e-6, post, res
    res = (logits - logits.amax(-1, keepdim=True)).exp()
    for _ in range(20):
        res = normalized(normalized(res, -1, None), -2, None)
    return pre, post, res


def defined(state, hidden, layers, version, inside=False):
    """The output of the block, the mean of its streams."""
    streams = hidden.unsqueeze(-2).expand(*hidden.shape[:-1], N, H)
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}.hyper_connection."
        pre, post, res = mappings(state, prefix, streams.flatten(-2), version, inside)
        output = layer((streams * pre.unsqueeze(-1)).sum(-2))
        mixed = (res.mT if version == "dev" else res) @ streams
        streams = mixed + post.unsqueeze(-1) * output.unsqueeze(-2)
    return streams.mean(-2)


def block(connections, layers, hidden):
    return MeanHead()(run_sublayers(expand(hidden, N), map(SubLayer, connections, layers)))


def one_by_one(connections, layers, hidden):
    streams = expand(hidden, N)
    for connection, layer in zip(connections, layers, strict=True):
        streams = connection(streams, layer)
    return streams.mean(-2)


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


LAYERS = (torch.tanh, torch.sin, torch.neg)
ROUTES = pytest.mark.parametrize("run", [block, one_by_one])


@ROUTES
@pytest.mark.parametrize("rms", [1.0, 0.01])
@pytest.mark.parametrize("version", ["dev", "main-4531"])
def test_a_block(version, rms, run):
    """Outputs and gradients, but for where their epsilon stands: that is 1e-6 / rms."""
    state, hidden = make_state(), torch.randn(2, 5, H) * rms
    options = {"norm_eps": NORM_EPS} | (AS_MAIN if version == "main-4531" else {})
    connections = make_connections(state, version, **options)
    leaf = hidden.clone().requires_grad_()
    out = run(connections, LAYERS, leaf)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    leaves = {name: value.double().requires_grad_() for name, value in state.items()}
    wide = hidden.double().requires_grad_()
    assert distance(out, defined(leaves, wide, LAYERS, version)) <= 4e-6 + 1e-5 / rms
    truth = defined(leaves, wide, LAYERS, version, inside=True)
    truth.backward(upstream.double())
    assert distance(out, truth) <= 4e-6
    assert distance(leaf.grad, wide.grad) <= 2e-5
    for index, connection in enumerate(connections):
        for own in connection.parameters():
            own.data = own.grad
        grads = connection.to_megatron(f"layers.{index}.hyper_connection.", version)
        # An alpha's gradient may cancel: beside the bias's, a sum of the same terms, and then some.
        bias = leaves[f"layers.{index}.hyper_connection.bias"].grad.norm()
        for name, grad in grads.items():
            difference = (grad.double() - leaves[name].grad).norm()
            bound = 1e-4 if "alpha" in name else 2e-5
            assert difference <= bound * max(bias, leaves[name].grad.norm()), name
    other = "dev" if version == "main-4531" else "main-4531"
    assert distance(defined(leaves, wide, LAYERS, other), truth) > 0.01


@pytest.mark.parametrize("rms", [1.0, 1e-4])
def test_single_pass(rms):
    """With `mhc_single_pass` as DeepSeek-V4.1: H_pre is for the layer after, or for the output."""
    state, hidden = make_state(), torch.randn(2, 5, H) * rms
    connections = make_connections(state, "dev", DelayedHyperConnection, norm_eps=NORM_EPS)
    entries = list(map(SubLayer, connections, LAYERS))
    out = aggregate(*run_delayed_sublayers(expand(hidden, N), entries))
    wide = {name: value.double() for name, value in state.items()}
    streams = hidden.double().unsqueeze(-2).expand(2, 5, N, H)
    mix = torch.eye(N).double()[0]
    for index, layer in enumerate(LAYERS):
        prefix = f"layers.{index}.hyper_connection."
        following, post, res = mappings(wide, prefix, streams.flatten(-2), "dev", inside=True)
        output = layer((streams * mix.unsqueeze(-1)).sum(-2))
        streams, mix = res.mT @ streams + post.unsqueeze(-1) * output.unsqueeze(-2), following
    assert distance(out, (streams * mix.unsqueeze(-1)).sum(-2)) <= 4e-6


@pytest.mark.parametrize("rms", [1.0, 0.03, 0.007])
def test_the_epsilon_of_the_norm(rms):
    """What `from_megatron` says of norm_eps: of the logits, to which gates are nearly linear."""
    state = make_state()
    state["layers.0.hyper_connection.mapping_proj.weight"] *= 0.1
    state["layers.0.hyper_connection.bias"].zero_()
    x = torch.randn(64, N, H)
    x = x * rms / x.square().mean((-2, -1), keepdim=True).sqrt()
    wide = {name: value.double() for name, value in state.items()}
    _, truth, _ = mappings(wide, "layers.0.hyper_connection.", x.double().flatten(-2), "dev")

    def off(norm_eps):
        connection = make_connections(state, "dev", norm_eps=norm_eps)[0]
        _, post_mix, *_ = connection.pre(x)
        return distance(post_mix - 1, truth - 1)

    noise = 2e-6
    assert off(NORM_EPS) <= 1.1e-6 / rms + noise
    default = abs(5e-7 / rms**2 - 1e-6 / rms)
    assert default / 1.3 - noise <= off(1e-6) <= 1.1 * default + noise


@pytest.mark.parametrize(
    ("below", "steps", "least", "most"),
    [(10, 1, 0, 1e-6), (20, 1, 0.1, 1), (60, 20, 0, 2e-3), (200, 20, 1e-4, 1)],
)
def test_a_column_far_below_the_others(below, steps, least, most):
    """What `from_megatron` says of their smallest divisors."""
    logits = torch.randn(64, N, N)
    logits[..., 0] -= below
    theirs = (logits.double() - logits.double().amax(-1, keepdim=True)).exp()
    for _ in range(steps):
        theirs = normalized(normalized(theirs, -1, None), -2, None)
    away = float((sinkhorn(logits, repeat=steps, eps=0.0) - theirs).abs().max())
    assert least <= away <= most


@ROUTES
def test_in_a_group(run):
    connections = make_connections(make_state(), "main-4531", **AS_MAIN)
    hidden = torch.randn(2, 5, H, requires_grad=True)
    leaves = [hidden, *(p for each in connections for p in each.parameters())]
    expected = torch.autograd.grad(run(connections, LAYERS, hidden).sum(), leaves)
    with recompute_group():
        out = run(connections, LAYERS, hidden)
    found = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_delayed_with_a_transposed_comb():
    """Nobody's model, but the option is of both kinds."""
    state, streams = make_state(), torch.randn(2, 5, N, H)
    plain, transposed = (
        DelayedHyperConnection(H, transposes_comb=value) for value in (False, True)
    )
    plain.load_state_dict(plain.from_megatron(state, "layers.0.hyper_connection."))
    transposed.load_state_dict(plain.state_dict())
    layer_output, mix = torch.randn(2, 5, H), torch.rand(2, 5, N)
    given = layer_output, streams, mix, mix, torch.rand(2, 5, N, N)
    for a, b in (
        (plain.pre(streams), transposed.pre(streams)),
        (plain.post_pre(*given), transposed.post_pre(*given)),
    ):
        assert torch.equal(b[3], a[3].mT)
        assert b[3].is_contiguous()
        assert all(torch.equal(a[i], b[i]) for i in (0, 1, 2, 4))

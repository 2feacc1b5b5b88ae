"""DeepSeek-V4.1's hyper-connections from their definition, written again number by number.

As vLLM's `mhc_pre_delayed` and `mhc_fused_post_pre_delayed` and DeepGEMM's `mega_mhc` have it, in
Python's own floats (64 bits) and loops: nothing here is shared with tile_mhc's reference. Between
two sub-layers f is the output of the one that ends, R its streams, and prev what its pre gate was:

    R'_j  = round(post_j f + sum_i comb_ij R_i)
    x     = round(sum_j prev_j R'_j), then its RMSNorm
    pre, post, comb: of one projection of R', each row scaled by 1 / rms

At the start prev is stream 0 alone, and there is no post; behind the last sub-layer its pre gate
reads the output of the model.
"""

import math

import pytest
import torch

import tile_mhc
from tile_mhc import reference
from tile_mhc.nn import DelayedHyperConnection, SubLayer, run_delayed_sublayers

N, H, STEPS = 4, 24, 20
RMS_EPS, HC_EPS, POST_MULT = 1e-20, 1e-6, 2.0


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def rounded(value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(dtype).double().tolist()


def gates(streams, weight, scale, bias):
    """The pre and post gates and the comb of one token, from its flat streams."""
    flat = [value for stream in streams for value in stream]
    inverse = 1 / math.sqrt(sum(value * value for value in flat) / len(flat) + RMS_EPS)
    logits = []
    for row, (weights, offset) in enumerate(zip(weight, bias, strict=True)):
        product = sum(w * value for w, value in zip(weights, flat, strict=True)) * inverse
        logits.append(product * scale[0 if row < N else 1 if row < 2 * N else 2] + offset)
    pre = [sigmoid(z) + HC_EPS for z in logits[:N]]
    post = [POST_MULT * sigmoid(z) for z in logits[N : 2 * N]]
    comb = []
    for source in range(N):  # softmax over the destinations
        exponents = [math.exp(z) for z in logits[2 * N + source * N :][:N]]
        comb.append([value / sum(exponents) + HC_EPS for value in exponents])
    for step in range(STEPS):
        if step:
            comb = [[value / (sum(row) + HC_EPS) for value in row] for row in comb]
        sums = [sum(row[j] for row in comb) + HC_EPS for j in range(N)]
        comb = [[value / sums[j] for j, value in enumerate(row)] for row in comb]
    return pre, post, comb


def collapse(streams, mix, dtype):
    sums = [sum(mix[j] * streams[j][h] for j in range(N)) for h in range(H)]
    return rounded(sums, dtype)


def rms_norm(x, weight, eps, dtype):
    inverse = 1 / math.sqrt(sum(value * value for value in x) / len(x) + eps)
    return rounded([value * inverse * w for value, w in zip(x, weight, strict=True)], dtype)


def write(layer_output, streams, post, comb, dtype):
    return [
        rounded(
            [
                post[j] * layer_output[h] + sum(comb[i][j] * streams[i][h] for i in range(N))
                for h in range(H)
            ],
            dtype,
        )
        for j in range(N)
    ]


def run_token(streams, parameters, layers, dtype):
    """The streams before every write, the layer inputs and the output of a model, of one token."""
    mix = [1.0, 0.0, 0.0, 0.0]
    inputs = []
    for (weight, scale, bias), layer in zip(parameters, layers, strict=True):
        next_mix, post, comb = gates(streams, weight, scale, bias)
        inputs.append(collapse(streams, mix, dtype))
        streams = write(rounded(layer(inputs[-1]), dtype), streams, post, comb, dtype)
        mix = next_mix
    return streams, inputs, collapse(streams, mix, dtype)


def make_parameters():
    weight, scale = torch.randn(N * (N + 2), N * H) * 0.1, torch.rand(3) + 0.5
    return weight, scale, torch.randn(N * (N + 2))


def negated(x):
    return [-0.5 * value for value in x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_three_sub_layers(dtype):
    tokens, sublayers = 3, []
    parameters = [make_parameters() for _ in range(3)]
    for weight, scale, bias in parameters:
        connection = DelayedHyperConnection(H)
        connection.load_state_dict({"weight": weight, "scale": scale, "bias": bias})
        sublayers.append(SubLayer(connection, lambda x: x * -0.5))
    streams = torch.randn(tokens, N, H).to(dtype)
    out, pre_mix = run_delayed_sublayers(streams, sublayers)
    hidden = tile_mhc.aggregate(out, pre_mix)
    lists = [[tensor.tolist() for tensor in of] for of in parameters]
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-5  # a rounding may go the other way
    for t in range(tokens):
        wanted, _, output = run_token(streams[t].tolist(), lists, [negated] * 3, dtype)
        torch.testing.assert_close(
            out[t].double(), torch.tensor(wanted).double(), rtol=bound, atol=bound
        )
        torch.testing.assert_close(
            hidden[t].double(), torch.tensor(output).double(), rtol=bound, atol=bound
        )


@pytest.mark.parametrize("small", [False, True], ids=["streams near 1", "streams near 1e-8"])
def test_a_boundary_with_its_norm(small):
    """norm_eps of 1e-20: mixes do not depend on the size of the streams, be it ever so small."""
    weight, scale, bias = make_parameters()
    streams = torch.randn(N, H) * (1e-8 if small else 1)
    output, mix = torch.randn(H) * (1e-8 if small else 1), torch.rand(N)
    post_mix, comb_mix = torch.rand(N), torch.randn(N, N).softmax(-1)
    norm_weight = torch.rand(H) + 0.5
    found = tile_mhc.post_pre(
        *(tensor[None] for tensor in (output, streams, post_mix, comb_mix)),
        weight,
        scale,
        bias,
        pre_mix=mix[None],
        norm_eps=RMS_EPS,
        post_mult=POST_MULT,
        sinkhorn_repeat=STEPS,
        layer_norm_weight=norm_weight,
        layer_norm_eps=1e-20,
    )
    dtype = torch.float32
    wanted = write(output.tolist(), streams.tolist(), post_mix.tolist(), comb_mix.tolist(), dtype)
    pre, post, comb = gates(wanted, weight.tolist(), scale.tolist(), bias.tolist())
    layer_input = collapse(wanted, mix.tolist(), dtype)
    normed = rms_norm(layer_input, norm_weight.tolist(), 1e-20, dtype)
    for ours, theirs in zip(found, (wanted, normed, pre, post, comb), strict=True):
        truth = torch.tensor(theirs, dtype=torch.float64)
        assert float((ours[0].double() - truth).norm() / truth.norm()) <= 1e-5


def test_gradients_are_those_of_the_definition():
    """By central differences of the loops: every input of a boundary of one token."""
    weight, scale, bias = make_parameters()
    names = ("layer_output", "residual", "post_mix", "comb_mix", "scale", "bias", "pre_mix")
    values = [torch.randn(H), torch.randn(N, H), torch.rand(N), torch.randn(N, N).softmax(-1)]
    values += [scale, bias, torch.rand(N)]
    inputs = {name: value.double() for name, value in zip(names, values, strict=True)}
    upstream = [torch.randn(shape).double() for shape in ((N, H), (H,), (N,), (N,), (N, N))]
    exact = torch.float64

    def loss(given):
        listed = {name: tensor.tolist() for name, tensor in given.items()}
        of_post = (listed[name] for name in names[:4])
        streams = write(*of_post, exact)
        made = gates(streams, weight.tolist(), listed["scale"], listed["bias"])
        outputs = (streams, collapse(streams, listed["pre_mix"], exact), *made)
        terms = (
            (torch.tensor(out, dtype=exact) * grad).sum()
            for out, grad in zip(outputs, upstream, strict=True)
        )
        return float(sum(terms))

    leaves = {name: tensor[None].clone() for name, tensor in inputs.items()}
    for name in ("scale", "bias"):
        leaves[name] = inputs[name].clone()
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    outputs = reference.post_pre(
        *(leaves[name] for name in names[:4]),
        weight.double(),
        leaves["scale"],
        leaves["bias"],
        pre_mix=leaves["pre_mix"],
        norm_eps=RMS_EPS,
        post_mult=POST_MULT,
        sinkhorn_repeat=STEPS,
    )
    grads = torch.autograd.grad(outputs, list(leaves.values()), [grad[None] for grad in upstream])
    step = 1e-5
    for (name, value), grad in zip(inputs.items(), grads, strict=True):
        direction = torch.randn_like(value)
        ends = [loss(inputs | {name: value + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((grad.reshape(value.shape) * direction).sum()) == pytest.approx(
            slope, rel=1e-4
        )

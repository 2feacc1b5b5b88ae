"""A DeepSeek-V4 of Hugging Face transformers that is small enough for every test."""

import copy
import itertools

import pytest
import torch

from tile_mhc.integrations.transformers import _manifold
from tile_mhc.integrations.transformers._models import FAMILIES

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
CLASSES = ("DeepseekV4HyperConnection", "DeepseekV4HyperHead", "DeepseekV4DecoderLayer")
CPU = "reference (on cpu)"
FAMILY = FAMILIES["deepseek_v4"]


def one_step(**apart):
    """What a step of `make_model()` calls, with so many of its boundaries apart, by the reason."""
    count = sum(apart.values())
    reasons = {f"separate ({why})": times for why, times in apart.items()}
    whole = {CPU: 3 - count} if count < 3 else {}
    both = {CPU: 1 + count}
    return {"boundary": whole | reasons, "head": {CPU: 1}, "post": both, "pre": both}


ONE_STEP = one_step()


def make_config(**changes):
    fields = {
        "vocab_size": 32,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "hash_moe"],
        "sliding_window": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    return transformers.DeepseekV4Config(**fields)


def make_model(**changes):
    model = transformers.DeepseekV4ForCausalLM(make_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base"):
                parameter.normal_()
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # zeros at first: the same expert twice
                buffer.copy_(torch.rand(32, 4).argsort(-1)[:, :2])
    return model.train()


def make_connection(num_streams=4, hidden_size=64):
    connection = modeling.DeepseekV4HyperConnection(
        make_config(hc_mult=num_streams, hidden_size=hidden_size)
    )
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    return connection


def make_head(num_streams=4, hidden_size=64):
    head = modeling.DeepseekV4HyperHead(make_config(hc_mult=num_streams, hidden_size=hidden_size))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def mix(layer_output, streams, post_mix, comb_mix):
    """What a decoder layer calls to write an output into the streams."""
    return _manifold.post(FAMILY, layer_output, streams, post_mix, comb_mix)


def cast_parameters(module, dtype):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def step(model, ids):
    """The logits and every gradient of one training step, as float32."""
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach().float(), grads


def distance(value, truth, beside=None):
    """||value - truth||, in units of ||truth|| or, where that is more, of ||beside||."""
    value, truth = value.detach().double(), truth.detach().double()
    unit = truth.norm() if beside is None else max(truth.norm(), beside.detach().double().norm())
    return float((value - truth).norm() / unit)


def beside(name, grads):
    """For a scale's gradient, which may cancel, the bias's: a sum of the same terms."""
    return grads[name.removesuffix("scale") + "base"] if name.endswith("scale") else None


def magnitudes(outputs, leaves, upstream):
    """What gradients are sums of: the magnitudes of every token's, summed.

    A parameter's gradient of few elements may cancel; how exact it can be goes by these.
    """
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for row, token in itertools.product(*map(range, upstream[0].shape[:2])):
        one = [torch.zeros_like(grad) for grad in upstream]
        for alone, grad in zip(one, upstream, strict=True):
            alone[row, token] = grad[row, token]
        grads = torch.autograd.grad(outputs, leaves, one, retain_graph=True)
        total = [sum_ + grad.abs() for sum_, grad in zip(total, grads, strict=True)]
    return total

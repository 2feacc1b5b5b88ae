"""Multi-token prediction on a real DeepSeek-V4: its last streams have three readers.

transformers builds no such layers: here they are its own decoder layer and head, put together as in
DeepSeek-V4's checkpoints (`mtp.0`): the streams of the model and the embeddings of the next tokens,
each normed and projected, are the streams of one more layer. Beside the model's head a second one
reads the model's streams.
"""

import contextlib

import pytest
import torch

from tile_mhc import recompute_group
from tile_mhc.integrations import transformers as integration

pytest.importorskip(integration.MODELING)
from tiny_deepseek import CPU, beside, cast_parameters, distance, make_head, make_model, modeling

IDS = torch.arange(48).view(2, 24) % 32
DEPTHS = 2


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


class Depth(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.enorm, self.hnorm, self.norm = (modeling.DeepseekV4RMSNorm(size) for _ in range(3))
        self.e_proj, self.h_proj = (torch.nn.Linear(size, size, bias=False) for _ in range(2))
        # Of sliding attention, as layer 0, and of its own weights.
        self.layer = make_model().model.layers[0]
        self.head = make_head(config.hc_mult, size)

    def forward(self, streams, embedded, **given):
        joined = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embedded))[..., None, :]
        return self.layer(joined, **given)


class Predicting(torch.nn.Module):
    """The model's logits, those of a second head, and of every depth."""

    def __init__(self):
        super().__init__()
        self.trunk = make_model()
        config = self.trunk.config
        self.depths = torch.nn.ModuleList(Depth(config) for _ in range(DEPTHS))
        self.second = make_head(config.hc_mult, config.hidden_size)

    def forward(self, ids, around=contextlib.nullcontext):
        model, seen = self.trunk.model, []
        handle = model.hc_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            outputs = [self.trunk(ids, use_cache=False).logits]
        finally:
            handle.remove()
        (streams,) = seen
        outputs.append(self.trunk.lm_head(model.norm(self.second(streams))))
        positions = torch.arange(ids.shape[1])[None]
        for number, depth in enumerate(self.depths, 1):
            ids_then = ids.roll(-number, 1)
            embedded = model.embed_tokens(ids_then)
            rotary = {
                kind: model.rotary_emb(embedded, position_ids=positions, layer_type=kind)
                for kind in ("main", "compress")
            }
            mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            with around():
                streams = depth(
                    streams,
                    embedded,
                    input_ids=ids_then,
                    position_ids=positions,
                    position_embeddings=rotary,
                    attention_mask=mask,
                    past_key_values=None,
                )
                outputs.append(self.trunk.lm_head(depth.norm(depth.head(streams))))
        return outputs


def step(model, **options):
    outputs = model(IDS, **options)
    losses = []
    for number, logits in zip((1, 1, *range(2, DEPTHS + 2)), outputs, strict=True):
        targets = IDS.roll(-number, 1)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    sum(losses).backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [logits.detach().float() for logits in outputs], grads


def check(found, expected, outputs_bound, grads_bound):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert distance(ours, theirs) <= outputs_bound
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert distance(found[1][name], grad, beside(name, expected[1])) <= grads_bound, name


def test_every_gradient_counts():
    model = Predicting()
    expected = step(model)
    with integration.patch():
        check(step(model), expected, 1e-5, 2e-4)
        # The model's layers but for their boundaries, two layers more, and four heads.
        count = {call: counts[CPU] for call, counts in integration.backend_report().items()}
    assert count["head"] == 2 + DEPTHS
    # That it would not pass without one of them.
    for name in ("second", "depths.0.h_proj", "depths.1.h_proj"):
        module = model.get_submodule(name)
        handle = module.register_full_backward_hook(lambda _, grads, __: [0 * g for g in grads])
        _, grads = step(model)
        handle.remove()
        trunk = "trunk.model.layers.0.attn_hc.fn"
        assert distance(grads[trunk], expected[1][trunk]) > 1e-2


@pytest.mark.parametrize("layers", [1, 2])
def test_groups(layers):
    """The bits, with groups of the model's layers and one of each depth."""
    model = Predicting()
    with integration.patch():
        expected = step(model)
    with integration.patch(recompute_layers=layers):
        found = step(model, around=recompute_group)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


def test_streams_of_bfloat16():
    """No further from float32 than the model without us."""
    model = Predicting()
    exact = step(model)
    rounded = cast_parameters(model, torch.bfloat16)
    theirs = step(rounded)
    with integration.patch():
        ours = step(rounded)
    for name in ("trunk.model.layers.0.attn_hc.fn", "trunk.model.embed_tokens.weight"):
        away = distance(theirs[1][name], exact[1][name])
        assert distance(ours[1][name], exact[1][name]) <= 1.5 * away

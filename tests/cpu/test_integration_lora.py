"""Adapters beside hyper-connections on a real DeepSeek-V4: either is trained with the rest frozen.

By low-rank adapters written here, and by those of peft where it is installed, which also wraps
hyper-connections that are to be trained, and adapts a parameter of one.
"""

import pytest
import torch

from tile_mhc.integrations import transformers as integration

pytest.importorskip(integration.MODELING)
from tiny_deepseek import distance, make_model, one_step, step

IDS = torch.arange(48).view(2, 24) % 32
RANK, STEPS = 4, 6
# By what they are called in a layer.
TARGETS = ("q_a_proj", "q_b_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj")
PATCHES = {
    "boundaries": {},
    "a group": {"recompute_layers": 2},
}

# How peft's modules round a connection look to the boundary before it.
WRAPPED = {"a hyper-connection has another forward": 3}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


class Adapted(torch.nn.Module):
    """y = x W^T + x A^T B^T, with B as after some steps: at the start it is zero."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.lora_a = torch.nn.Linear(linear.in_features, RANK, bias=False)
        self.lora_b = torch.nn.Linear(RANK, linear.out_features, bias=False)
        torch.nn.init.normal_(self.lora_b.weight, std=0.1)

    def forward(self, x):
        return self.linear(x) + self.lora_b(self.lora_a(x))


def by_hand(model):
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp.shared_experts):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    setattr(parent, name, Adapted(child))
    return model


def by_peft(model, **options):
    peft = pytest.importorskip("peft")
    targets = rf".*\.(self_attn|shared_experts)\.({'|'.join(TARGETS)})"
    config = peft.LoraConfig(r=RANK, target_modules=targets, **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def is_mixing(name):
    return "_hc." in name or "hc_head." in name


def is_adapter(name):
    return "lora_" in name


TRAINED = {
    "adapters": is_adapter,
    "adapters and hyper-connections": lambda name: is_adapter(name) or is_mixing(name),
    "hyper-connections": is_mixing,
    "one connection's gates": lambda name: "layers.1.attn_hc.base" in name,
    "adapters and the head": lambda name: is_adapter(name) or "hc_head." in name,
}


def train_only(model, chosen):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return model


def check_step(model, **patched):
    """Every gradient of one step, beside transformers' own; none but of what is trained."""
    logits, grads = step(model, IDS)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    with integration.patch(**patched):
        ours, found = step(model, IDS)
        report = integration.backend_report()
    assert distance(ours, logits) <= 1e-5
    assert found.keys() == grads.keys()
    everything = torch.cat([grad.flatten() for grad in grads.values()])
    for name, grad in grads.items():
        unit = grads.get(name.removesuffix("scale") + "base", everything * 0.01)
        assert distance(found[name], grad, unit if "scale" in name else None) <= 2e-4, name
    return report


def check_training(model, **patched):
    """A few steps of it: the loss falls, and what is frozen keeps its bits."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    with integration.patch(**patched):
        for _ in range(STEPS):
            loss = model(IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("patched", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("trained", TRAINED)
def test_adapters(trained, patched):
    model = train_only(by_hand(make_model()), TRAINED[trained])
    report = check_step(model, **patched)
    if not patched:
        assert report == one_step()
    check_training(model, **patched)


@pytest.mark.parametrize("trained", TRAINED)
def test_with_gradient_checkpointing(trained):
    model = train_only(by_hand(make_model()), TRAINED[trained])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_step(model)
    check_training(model)


@pytest.mark.parametrize("trained", TRAINED)
def test_adapters_of_peft(trained):
    model = train_only(by_peft(make_model()), TRAINED[trained])
    assert check_step(model) == one_step()
    check_training(model)


@pytest.mark.parametrize("patched", PATCHES.values(), ids=PATCHES)
def test_connections_that_peft_saves(patched):
    """It trains copies, in modules of its own."""
    saved = ["attn_hc", "ffn_hc", "hc_head"]
    model = by_peft(make_model(), modules_to_save=saved)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(is_mixing(name) for name in names) == 3 * 5
    assert check_step(model, **patched) == one_step(**WRAPPED)
    check_training(model, **patched)


@pytest.mark.parametrize("patched", PATCHES.values(), ids=PATCHES)
def test_a_parameter_that_peft_adapts(patched):
    model = by_peft(make_model(), target_parameters=["attn_hc.fn", "ffn_hc.fn"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(is_mixing(name) for name in names) == 2 * 4
    assert check_step(model, **patched) == one_step(**WRAPPED)
    check_training(model, **patched)

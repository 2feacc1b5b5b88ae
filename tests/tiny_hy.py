"""HY-V4 of Hugging Face transformers, with and without vision, small enough for every test."""

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
LAYERS = 3
KINDS = ("hy_v4", "hy_v4_vl")  # the second from transformers 5.24 on
NAMES = {"hy_v4": "HYV4", "hy_v4_vl": "HYV4VL"}


def skip_absent(kind):
    pytest.importorskip(f"transformers.models.{kind}", reason=f"transformers has no {kind}")


def modeling_of(kind):
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def class_of(kind, name):
    return getattr(modeling_of(kind), NAMES[kind] + name)


def make_text_config(kind="hy_v4", **changes):
    fields = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "head_dim": 16,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "index_topk": 8,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.1,
        "hc_magnitude": 1.5,  # not DeepSeek's 2
        "hc_eps": 1e-3,  # seen in the result, on post_mix too
        **changes,
    }
    if kind == "hy_v4":
        return transformers.HYV4Config(**fields)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    return transformers.HYV4VLTextConfig(rope_parameters=rope, **fields)


def make_config(kind="hy_v4", **changes):
    text = make_text_config(kind, **changes)
    if kind == "hy_v4":
        return text
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "out_hidden_size": 64,
    }
    tokens = {"image_token_id": 31, "video_token_id": 30}
    return transformers.HYV4VLConfig(text_config=text, vision_config=vision, **tokens)


def make_model(kind="hy_v4", **changes):
    name = "ForCausalLM" if kind == "hy_v4" else "ForConditionalGeneration"
    model = class_of(kind, name)(make_config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base"):
                parameter.normal_()
            if name.endswith("scale"):
                parameter.fill_(1.0)  # transformers' 0.01 leaves the gates nearly constant
            parameter.copy_(parameter.bfloat16())
    return model.train()


def make_connection(kind="hy_v4", num_streams=4, hidden_size=64):
    config = make_text_config(kind, hc_mult=num_streams, hidden_size=hidden_size)
    connection = class_of(kind, "HyperConnection")(config)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    return connection


def make_ids(batch=2, length=24):
    return torch.randint(1, 25, (batch, length))


def layers_of(model):
    return getattr(model.model, "language_model", model.model).layers

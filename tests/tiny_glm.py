"""A GLM-5.3 of Hugging Face transformers that is small enough for every test.

Of each kind of layer two: linear attention and sparse attention, whose second takes the indices of
the first; dense and sparse MLPs.
"""

import pytest
import torch

from tile_mhc.integrations.transformers._models import FAMILIES

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
FAMILY = FAMILIES["glm5_next"]
CLASSES = (
    "Glm5NextTextHyperConnection",
    "Glm5NextTextHyperHead",
    "Glm5NextTextDecoderLayer",
    "Glm5NextTextModel",
)
LAYERS = 4


def make_config(**changes):
    linear, sparse = "linear_attention", "deepseek_sparse_attention"
    text = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "layer_types": [linear, sparse, sparse, linear],
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
        "indexer_types": ["full", "full", "shared", "full"],
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_kpool": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.1,
        **changes,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 64,
        "projection_intermediate_size": 16,
    }
    names = ("image_token", "video_token", "image_start_token", "image_end_token")
    tokens = {f"{name}_id": 31 - at for at, name in enumerate(names)}
    return transformers.Glm5NextConfig(text_config=text, vision_config=vision, **tokens)


def make_model(**changes):
    model = transformers.Glm5NextForConditionalGeneration(make_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_hc.base"):
                parameter.normal_()
            parameter.copy_(parameter.bfloat16())
    return model.train()


def make_ids(batch=2, length=24):
    return torch.randint(1, 25, (batch, length))


def layers_of(model):
    return model.model.language_model.layers

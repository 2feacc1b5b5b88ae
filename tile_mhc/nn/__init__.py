"""Modules: `HyperConnection` around a sub-layer, `HyperHead` at the end.

    streams = expand(embedding, 4)
    streams = attention_hc(streams, attention)  # post(attention(layer_input), ...)
    streams = mlp_hc(streams, mlp)
    hidden = head(streams)

They hold the parameters and the options of `fused_pre`, `post` and `contract`, and call them: the
outputs and gradients are theirs, bit for bit.

`run_sublayers` runs a stack of sub-layers with one op at each boundary between two, where the
streams would otherwise be written, read twice, and read twice more in the backward:

    sublayers = []
    for block in blocks:
        sublayers.append(SubLayer(block.attention_hc, block.attention, norm=block.attention_norm))
        sublayers.append(SubLayer(block.mlp_hc, block.mlp, norm=block.mlp_norm))
    hidden = head(run_sublayers(expand(embedding, 4), sublayers))

DeepSeek-V4.1 has `DelayedHyperConnection` and `run_delayed_sublayers`, and no head:

    streams, pre_mix = run_delayed_sublayers(expand(embedding, 4), sublayers)
    hidden = aggregate(streams, pre_mix)

`DeepSeekV41Decoder` is the whole of that model round the caller's attention and feed-forward, with
the names of DeepSeek's checkpoints:

    layers = [DeepSeekV41Layer(5120, make_attention(i), make_moe(i)) for i in range(num_layers)]
    decoder = DeepSeekV41Decoder(layers, embed=embed, norm=norm, head=head)
    decoder.load_state_dict(checkpoint)
    logits = decoder(ids, positions=positions)  # attn(layer_input, positions=positions)

GLM-5.3 has `HyperConnection` and `MeanHead`, HY-V4 `IdentityHyperConnection`, which leaves the
streams unmixed, and `HyperHead`. `run_sublayers` takes such a stack too, though no op joins two of
its sub-layers.

To see what the mixes do while a model trains, for the log, without waiting for the device:

    def observer(name, mixes):
        _, _, comb = mixes.logits()
        seen = mixes.row_sums.amax(), mixes.column_sums.amax(), comb.abs().amax()
        log[name] = torch.stack(seen)

    with observe_mixes(model, observer):
        loss = model(batch)
    loss.backward()

Parameters stay float32: `.to(torch.bfloat16)`, `.half()` or `.double()` on a module or on a model
around it moves them where it is told to, and leaves their dtype. That is a choice, as the ops take
bfloat16 parameters too: DeepSeek-V4's checkpoints hold them in float32, and Megatron-LM and
transformers keep them so. Streams are bfloat16, float16 or float32.
"""

from tile_mhc.nn._projected import INITS as INITS
from tile_mhc.nn.connection import DelayedHyperConnection, HyperConnection
from tile_mhc.nn.deepseek import DeepSeekV41Decoder, DeepSeekV41Layer
from tile_mhc.nn.head import HyperHead, MeanHead
from tile_mhc.nn.identity import IdentityHyperConnection
from tile_mhc.nn.mixes import IdentityMixes, Mixes
from tile_mhc.nn.observe import observe_mixes
from tile_mhc.nn.sublayers import SubLayer, run_delayed_sublayers, run_sublayers

__all__ = [
    "DeepSeekV41Decoder",
    "DeepSeekV41Layer",
    "DelayedHyperConnection",
    "HyperConnection",
    "HyperHead",
    "IdentityHyperConnection",
    "IdentityMixes",
    "MeanHead",
    "Mixes",
    "SubLayer",
    "observe_mixes",
    "run_delayed_sublayers",
    "run_sublayers",
]

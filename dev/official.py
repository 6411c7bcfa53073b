"""The official modules behind the interface of torch_moleblend.MoleculeEncoder, so that they can be
checked and timed in the same way:

    python3 dev/torch_moleblend.py --official FOLDER --golden data/mini.safetensors
    python3 dev/torch_moleblend.py --official FOLDER --bench train.bin --beside ./moleblend

FOLDER is a clone of the release (github.com/YudiZh/MoleBlend), which is imported as it is. fairseq,
which no longer installs, is replaced by stand-ins for the six names that the modules import. Two
things are not the release's own: the blend is the batch's (one mask per molecule instead of one per
batch), and the losses are those of torch_moleblend. Needs torch and einops.
"""

import importlib.util
import os
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """fairseq.modules.FairseqDropout"""

    def __init__(self, p, module_name=None):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)


def stand_in_for_fairseq():
    """Puts what the modules import from fairseq into sys.modules."""
    def module(name, **members):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
        return sys.modules[name]

    utils = module("fairseq.utils", get_activation_fn=lambda name: getattr(F, name),
                   softmax=lambda x, dim, onnx_trace: F.softmax(x, dim=dim, dtype=torch.float32))
    module("fairseq", utils=utils)
    module("fairseq.modules", FairseqDropout=Dropout, LayerDropModuleList=nn.ModuleList,
           LayerNorm=nn.LayerNorm, Fp32LayerNorm=nn.LayerNorm)
    module("fairseq.modules.fairseq_dropout", FairseqDropout=Dropout)
    module("fairseq.modules.quant_noise", quant_noise=lambda layer, p, block_size: layer)


def import_release(folder):
    """The release's package of modules, without those around it (they need all of fairseq)."""
    path = os.path.join(folder, "MoleBlend", "modules", "__init__.py")
    if not os.path.exists(path):
        raise SystemExit(f"{folder}: expected a clone of the release, with {path}")
    stand_in_for_fairseq()
    spec = importlib.util.spec_from_file_location("release", path)
    release = sys.modules["release"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)
    return release


def official_batch(batch, pos):
    """The padded batch under the names, and with the index shifts, of the release's collator."""
    mask = F.pad(batch["mask"], (1, 0), value=True)
    B, S = mask.shape
    attn_bias = torch.zeros(B, S, S).masked_fill(mask[:, :, None] & ~mask[:, None], -torch.inf)
    types_i = batch["type_i"].unsqueeze(2).expand(B, S - 1, S - 1)
    types_j = batch["type_j"].unsqueeze(1).expand(B, S - 1, S - 1)
    return {"x": batch["atoms"], "in_degree": batch["degree"], "out_degree": batch["degree"],
            "attn_bias": attn_bias, "attn_edge_type": None, "spatial_pos": batch["spd"],
            "edge_input": batch["path"], "pos": pos,
            "node_type_edge": torch.stack([types_i, types_j], dim=-1)}


def official_encoder(folder, cfg, heads=True):
    """An encoder of the release; heads=False: for encode() only, which adds all relations."""
    release = import_release(folder)
    in_module = sys.modules["release.moleblend_encoder"]

    class Encoder(release.MoleBlendEncoder):
        def forward(self, batch):
            self.batch = batch
            inner, noise, spd, edge, d3, *_ = super().forward(
                official_batch(batch, batch["pos"] + batch["noise"]))
            return {"states": [x.transpose(0, 1) for x in inner], "bias": self.bias,
                    "spd_logits": spd, "edge_logits": edge, "d3_pred": d3, "denoise_pred": noise}

        def encode(self, batch):
            inner = super().forward(official_batch(batch, batch["pos"]))[0]
            return [x.transpose(0, 1) for x in inner], None, None

        def eval(self):
            """The heads run in training mode only; golden files have no dropout."""
            for module in self.modules():
                if hasattr(module, "p"):
                    module.p = 0.0
                if hasattr(module, "drop_prob"):
                    module.drop_prob = 0.0
            return self

    encoder = Encoder(
        num_atoms=512 * 9, num_in_degree=512, num_out_degree=512, num_edges=512 * 3,
        num_spatial=512, num_edge_dis=128, edge_type="multi_hop", multi_hop_max_dist=5,
        num_encoder_layers=cfg.layers, embedding_dim=cfg.dim, ffn_embedding_dim=cfg.ffn,
        num_attention_heads=cfg.heads, dropout=0.0, attention_dropout=cfg.attention_dropout,
        activation_dropout=cfg.activation_dropout, encoder_normalize_before=True, apply_init=True,
        activation_fn="gelu", droppath_prob=cfg.drop_path, add_3d=True,
        num_3d_bias_kernel=cfg.kernels, regularization_3d_denosing=heads, blending=heads,
        blend_prob=[0.2, 0.2, 0.6], blend_pred_spd=heads, blend_pred_edge=heads,
        blend_pred_3d=heads)

    def blend_relations(spd, edge, d3, _):
        """Stands for blend_3_mode(): the same, with the batch's own draws."""
        masks = [(encoder.batch["blend"] == k)[:, None] for k in range(3)]
        for bias, mask in zip((spd, edge, d3), masks):
            bias.masked_fill_(~mask, 0)
        return spd + edge + d3, *masks

    def blend_features(degree, geometry):
        """Stands for blend_atom_feature()."""
        masks = [(encoder.batch["feat_blend"] == k)[:, :, None] for k in range(2)]
        return degree.masked_fill(~masks[0], 0) + geometry.masked_fill(~masks[1], 0), *masks

    first = encoder.layers[0]
    plain_forward = first.forward

    def keep_bias(x, self_attn_bias, **named):
        encoder.bias = self_attn_bias
        return plain_forward(x, self_attn_bias=self_attn_bias, **named)

    in_module.blend_3_mode, in_module.blend_atom_feature = blend_relations, blend_features
    first.forward = keep_bias
    if not heads:
        encoder.training = False
    return encoder

#!/usr/bin/env python3
"""MoleBLEND in plain PyTorch: the readable counterpart of moleblend.c, for checking and timing it.

    python3 dev/torch_moleblend.py --golden FILE.safetensors... [--float64]
    python3 dev/torch_moleblend.py --bench train.bin [--size base --batch 64 --threads 1 --steps 10]
                                   [--inference] [--compile] [--sdpa] [--beside ./moleblend]
                                   [--official FOLDER]
    python3 dev/torch_moleblend.py --evaluate valid.bin --model moleblend.safetensors

Everything is dense, as in the official code: molecules are padded to the longest of the batch, the
relation heads form the outer product of every atom pair (1024 numbers), all three biases are
computed for all pairs. Module and tensor names are those of the official state dict. Needs torch,
numpy and safetensors. Letters: B molecules, N atoms (padded), S = N + 1 tokens, C width, H heads,
K Gaussians.
"""

import argparse
import json
import math
import os
import re
import struct
import subprocess
import tempfile
import time
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"tiny": (2, 64, 64, 4, 16), "small": (6, 256, 256, 8, 64), "base": (12, 768, 768, 32, 128)}
UNCONNECTED = 510  # shortest-path distance of atoms in different fragments
MAX_HOPS = 5       # bonds of a shortest path that the edge relation looks at
SPD, EDGE, THREE_D = 0, 1, 2
NOISE = 0.2        # Angstrom
BLEND_PROBS = (0.2, 0.2, 0.6)  # SPD, edge, 3D
FEATURE_3D_PROB = 0.6
LOSS_WEIGHTS = {"denoise": 6.0, "spd": 0.1, "edge": 0.1, "d3": 0.5}


@dataclass
class Config:
    layers: int
    dim: int
    ffn: int
    heads: int
    kernels: int
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    drop_path: float = 0.1      # of the last layer; rises linearly from 0
    denoise_dropout: float = 0.1
    sdpa: bool = False          # fused attention instead of matmul, softmax, matmul


# ==================================================================================================
# Molecules and their relations
# ==================================================================================================

@dataclass
class Molecule:
    atom_feat: np.ndarray          # (n, 9)
    bonds: np.ndarray              # (m, 2)
    bond_feat: np.ndarray          # (m, 3)
    pos: np.ndarray = None         # (n, 3) or None
    labels: np.ndarray = None      # (tasks,), NaN = missing
    name: str = ""
    noise: np.ndarray = None       # (n, 3), blend (n, n), feat_blend (n): fixed draws, golden files
    blend: np.ndarray = None
    feat_blend: np.ndarray = None
    relations: tuple = field(default=None, repr=False)  # spd, path; see add_relations()


def read_dataset(path):
    """The molecules of a file made by data_prep (the format is described in moleblend.h), or of the
    JSON lines that `data_prep --dump` prints."""
    with open(path, "rb") as f:
        data = f.read()
    if data[:8] != b"MOLBLEND":
        return [molecule_from_json(json.loads(line)) for line in data.decode().splitlines()]
    version, tasks, count, index_at, size = struct.unpack_from("<IIQQQ", data, 8)
    if version != 2 or size != len(data):
        raise SystemExit(f"{path}: damaged, or not of format version 2")
    starts = [entry >> 16 for entry in struct.unpack_from(f"<{count}Q", data, index_at)]
    skipped_at, = struct.unpack_from("<Q", data, index_at + 12 * count)
    molecules = []
    for begin, end in zip(starts, starts[1:] + [skipped_at]):
        record = data[begin:end]
        crc, n, m, has_pos, name_length = struct.unpack_from("<IHHHH", record)
        if zlib.crc32(record[4:]) != crc:
            raise SystemExit(f"{path}: molecule {len(molecules)} is damaged (checksum)")
        at = 12

        def take(dtype, *shape):
            nonlocal at
            array = np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape)
            at += array.nbytes
            return array

        atom_feat, bonds, code = take("u1", n, 9), take("<u2", m, 2), take("u1", m).astype(int)
        pos = take("<f4", n, 3) if has_pos else None
        labels = take("<f4", tasks)
        bond_feat = np.stack([code // 12, code // 2 % 6, code % 2], axis=1)
        name = record[at:at + name_length].decode("utf-8", "replace")
        molecules.append(Molecule(atom_feat, bonds, bond_feat, pos, labels, name))
    return molecules


def molecule_from_json(row):
    bonds = np.array(row["bonds"], dtype=np.int64).reshape(-1, 5)
    labels = [math.nan if v is None else v for v in row.get("labels", [])]
    pos = None if row["pos"] is None else np.array(row["pos"], np.float32).reshape(-1, 3)
    return Molecule(np.array(row["atom_feat"]), bonds[:, :2], bonds[:, 2:], pos,
                    np.array(labels, np.float32), row["name"])


def add_relations(mol):
    """Shortest-path distances (n, n) and, for each pair, the features of the first five bonds of
    the path, (n, n, 5, 3), -1 = empty. Which shortest path: the one Floyd-Warshall finds."""
    n = len(mol.atom_feat)
    dist = np.full((n, n), UNCONNECTED, dtype=np.int64)
    via = np.full((n, n), -1, dtype=np.int64)
    np.fill_diagonal(dist, 0)
    feat = {}
    for (i, j), f in zip(mol.bonds.tolist(), mol.bond_feat.tolist()):
        dist[i, j] = dist[j, i] = 1
        feat[i, j] = feat[j, i] = f
    for k in range(n):  # row and column k do not change while k is the intermediate atom
        longer = dist > dist[:, k, None] + dist[None, k]
        dist[longer] = (dist[:, k, None] + dist[None, k])[longer]
        via[longer] = k
    path = np.full((n, n, MAX_HOPS, 3), -1, dtype=np.int64)

    def first_bonds(i, j, hops):
        """The features of the first `hops` bonds from i to j."""
        k = via[i, j]
        if k < 0:
            return [feat[i, j]]
        head = first_bonds(i, k, hops)
        return head if len(head) >= hops else head + first_bonds(k, j, hops - len(head))

    for i in range(n):
        for j in range(n):
            if 0 < dist[i, j] < UNCONNECTED:
                bonds = first_bonds(i, j, MAX_HOPS)[:MAX_HOPS]
                path[i, j, :len(bonds)] = bonds
    mol.relations = dist, path


# ==================================================================================================
# A padded batch: a dict of tensors
# ==================================================================================================

def pad(arrays, shape, fill, dtype):
    """Stacks arrays of different sizes into (B, *shape)."""
    out = np.full((len(arrays), *shape), fill, dtype)
    for b, a in enumerate(arrays):
        if a is not None:
            out[(b, *map(slice, a.shape))] = a
    return torch.from_numpy(out)


def make_batch(molecules, dtype=torch.float32):
    """Indices are shifted as the embedding tables want them: 0 is padding everywhere."""
    for mol in molecules:
        if mol.relations is None:
            add_relations(mol)
    N = max(len(mol.atom_feat) for mol in molecules)
    real = np.dtype("f8" if dtype == torch.float64 else "f4")
    spd = [mol.relations[0] for mol in molecules]
    path = [mol.relations[1] for mol in molecules]
    degree = [np.bincount(mol.bonds.ravel(), minlength=len(mol.atom_feat)) for mol in molecules]
    atoms = [mol.atom_feat + 2 + 512 * np.arange(9) for mol in molecules]
    bonds = [np.where(p < 0, 0, p + 3 + 512 * np.arange(3)) for p in path]
    batch = {
        "mask": pad([np.ones(len(d), bool) for d in spd], (N,), False, bool),
        "atoms": pad(atoms, (N, 9), 0, "i8"),
        "degree": pad([d + 1 for d in degree], (N,), 0, "i8"),
        "spd": pad([d + 1 for d in spd], (N, N), 0, "i8"),
        "path": pad(bonds, (N, N, MAX_HOPS, 3), 0, "i8"),
        "type_i": pad([mol.atom_feat[:, 0].astype("i8") + 3 for mol in molecules], (N,), 0, "i8"),
        "type_j": pad([mol.atom_feat[:, 0].astype("i8") + 515 for mol in molecules], (N,), 0, "i8"),
        "pos": pad([mol.pos for mol in molecules], (N, 3), 0, real),
        "has_pos": torch.tensor([mol.pos is not None for mol in molecules]),
        "spd_target": pad([spd_classes(d) for d in spd], (N, N), -100, "i8"),
        "edge_target": pad([edge_classes(p) for p in path], (N, N, MAX_HOPS), -100, "i8"),
    }
    if molecules[0].labels is not None:
        batch["labels"] = torch.from_numpy(np.stack([mol.labels for mol in molecules]).astype(real))
    if molecules[0].noise is not None:
        batch["noise"] = pad([mol.noise for mol in molecules], (N, 3), 0, real)
        batch["blend"] = pad([mol.blend for mol in molecules], (N, N), 0, "i8")
        batch["feat_blend"] = pad([mol.feat_blend for mol in molecules], (N,), 0, "i8")
    return batch


def spd_classes(spd):
    """1..10 -> 0..9, 11 and more -> 10; the diagonal and unconnected pairs are ignored."""
    return np.where((spd > 0) & (spd < UNCONNECTED), np.minimum(spd, 11) - 1, -100)


def edge_classes(path):
    """24 classes: type (4) x stereo none/Z/E (3) x conjugated (2); anything else is ignored."""
    kind, stereo, conjugated = path[..., 0], path[..., 1], path[..., 2]
    inside = (kind >= 0) & (kind < 4) & (stereo < 3)
    return np.where(inside, 6 * kind + 2 * stereo + conjugated, -100)


def draw(batch, generator=None):
    """Draws noise and blend of a batch. A molecule without positions blends 2D relations only."""
    B, N = batch["mask"].shape
    has_pos = batch["has_pos"]
    batch["noise"] = NOISE * torch.randn(batch["pos"].shape, generator=generator,
                                         dtype=batch["pos"].dtype)
    with_3d, without = torch.tensor(BLEND_PROBS), torch.tensor([*BLEND_PROBS[:2], 0.0])
    probs = torch.where(has_pos[:, None], with_3d, without)
    batch["blend"] = torch.multinomial(probs, N * N, True, generator=generator).view(B, N, N)
    batch["feat_blend"] = ((torch.rand(B, N, generator=generator) < FEATURE_3D_PROB)
                           & has_pos[:, None]).long()


# ==================================================================================================
# Model
# ==================================================================================================

class AtomFeature(nn.Module):
    """Atom tokens and the graph token."""

    def __init__(self, cfg):
        super().__init__()
        self.atom_encoder = nn.Embedding(1 + 512 * 9, cfg.dim, padding_idx=0)
        self.in_degree_encoder = nn.Embedding(512, cfg.dim, padding_idx=0)
        self.out_degree_encoder = nn.Embedding(512, cfg.dim, padding_idx=0)
        self.graph_token = nn.Embedding(1, cfg.dim)

    def forward(self, batch):
        atoms = self.atom_encoder(batch["atoms"]).sum(dim=2)
        degree = self.in_degree_encoder(batch["degree"]) + self.out_degree_encoder(batch["degree"])
        return atoms, degree  # (B, N, C) each


class MoleculeAttnBias(nn.Module):
    """The biases of the two graph relations."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.edge_encoder = nn.Embedding(1 + 512 * 3, cfg.heads, padding_idx=0)
        self.edge_dis_encoder = nn.Embedding(128 * cfg.heads * cfg.heads, 1)
        self.spatial_pos_encoder = nn.Embedding(512, cfg.heads, padding_idx=0)
        self.graph_token_virtual_distance = nn.Embedding(1, cfg.heads)

    def forward(self, batch):
        """b_spd, b_edge (B, N, N, H)."""
        B, N, _ = batch["spd"].shape
        b_spd = self.spatial_pos_encoder(batch["spd"])
        edge = self.edge_encoder(batch["path"]).mean(dim=-2)                # (B, N, N, hops, H)
        edge = edge.permute(3, 0, 1, 2, 4).reshape(MAX_HOPS, B * N * N, self.heads)
        maps = self.edge_dis_encoder.weight.view(-1, self.heads, self.heads)[:MAX_HOPS]
        b_edge = torch.bmm(edge, maps).sum(dim=0).view(B, N, N, self.heads)
        hops = (batch["spd"] - 1).clamp(1, MAX_HOPS)
        return b_spd, b_edge / hops.unsqueeze(-1).to(b_edge.dtype)


class GaussianLayer(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.means = nn.Embedding(1, kernels)
        self.stds = nn.Embedding(1, kernels)
        self.mul = nn.Embedding(512 * 3, 1, padding_idx=0)
        self.bias = nn.Embedding(512 * 3, 1, padding_idx=0)

    def forward(self, dist, type_i, type_j):
        """(B, N, N) distances, (B, N) atom types -> (B, N, N, K)."""
        pair = lambda table: table(type_i).unsqueeze(2) + table(type_j).unsqueeze(1)
        x = pair(self.mul) * dist.unsqueeze(-1) + pair(self.bias)
        std = self.stds.weight.view(-1).abs() + 0.01
        a = (2 * 3.14159) ** 0.5  # the official code's pi
        return torch.exp(-0.5 * ((x - self.means.weight.view(-1)) / std) ** 2) / (a * std)


class NonLinear(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.layer1 = nn.Linear(width, width)
        self.layer2 = nn.Linear(width, outputs)

    def forward(self, x):
        return self.layer2(F.gelu(self.layer1(x)))


class Molecule3DBias(nn.Module):
    """The bias of the distances, and what the distances add to an atom token."""

    def __init__(self, cfg):
        super().__init__()
        self.gbf = GaussianLayer(cfg.kernels)
        self.gbf_proj = NonLinear(cfg.kernels, cfg.heads)
        self.edge_proj = nn.Linear(cfg.kernels, cfg.dim)

    def forward(self, batch, pos):
        """b_3d (B, N, N, H), geo (B, N, C), delta (B, N, N, 3)."""
        away = pos.unsqueeze(1) - pos.unsqueeze(2)              # [b, i, j] = pos_j - pos_i
        dist = away.norm(dim=-1)
        delta = away / (dist.unsqueeze(-1) + 1e-5)
        g = self.gbf(dist, batch["type_i"], batch["type_j"])
        there = batch["mask"][:, None, :, None]
        return self.gbf_proj(g), self.edge_proj(g.masked_fill(~there, 0).sum(dim=2)), delta


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(cfg.dim, cfg.dim) for _ in range(4))

    def forward(self, x, bias):
        B, S, C = x.shape
        split = lambda y: y.view(B, S, self.cfg.heads, -1).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        rate = self.cfg.attention_dropout if self.training else 0.0
        if self.cfg.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
            y = F.dropout(scores.softmax(dim=-1), rate) @ v
        return self.out_proj(y.transpose(1, 2).reshape(B, S, C))


class EncoderLayer(nn.Module):
    def __init__(self, cfg, drop_path):
        super().__init__()
        self.activation_dropout, self.drop_path = cfg.activation_dropout, drop_path
        self.self_attn = SelfAttention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.dim)
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn)
        self.fc2 = nn.Linear(cfg.ffn, cfg.dim)
        self.final_layer_norm = nn.LayerNorm(cfg.dim)

    def drop(self, branch):
        """DropPath: zeroes the branch for some molecules."""
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1) < keep).to(branch.dtype) / keep

    def forward(self, x, bias):
        x = self.self_attn_layer_norm(x + self.drop(self.self_attn(x, bias)))
        y = F.dropout(F.gelu(self.fc1(x)), self.activation_dropout, self.training)
        return self.final_layer_norm(x + self.drop(self.fc2(y)))


class OuterProduct(nn.Module):
    """o(i, j) = vec(r_i c_j^T), 32 x 32 numbers for every ordered atom pair."""

    def __init__(self, dim, width=32):
        super().__init__()
        self.row_head, self.column_head = nn.Linear(dim, width), nn.Linear(dim, width)
        self.row_LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.column_LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, h):
        r = self.row_LayerNorm(F.gelu(self.row_head(h)))
        c = self.column_LayerNorm(F.gelu(self.column_head(h)))
        return torch.einsum("bia,bjc->bijac", r, c).flatten(3)  # (B, N, N, 1024)


class SPDHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.transform_n2_head = OuterProduct(dim)
        self.linear = nn.Linear(1024, 11)

    def forward(self, h):
        return self.linear(self.transform_n2_head(h))


class EdgeHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.transform_n2_head = OuterProduct(dim)
        self.linear_map_feature = nn.Linear(1024, MAX_HOPS * 24)

    def forward(self, h):
        return self.linear_map_feature(self.transform_n2_head(h)).unflatten(-1, (MAX_HOPS, 24))


class DirectionHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.transform_n2_head = OuterProduct(dim)
        self.linear = nn.Linear(1024, 256)
        self.force_proj1, self.force_proj2, self.force_proj3 = (nn.Linear(256, 1) for _ in range(3))

    def forward(self, h):
        u = self.linear(self.transform_n2_head(h))
        return torch.cat([self.force_proj1(u), self.force_proj2(u), self.force_proj3(u)], dim=-1)


class DenoiseHead(nn.Module):
    """Attention whose values are carried along the directions between atoms."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(cfg.dim, cfg.dim) for _ in range(3))
        self.force_proj1, self.force_proj2, self.force_proj3 = (
            nn.Linear(cfg.dim, 1) for _ in range(3))

    def forward(self, h, bias, delta):
        B, N, C = h.shape
        split = lambda y: y.view(B, N, self.cfg.heads, -1).transpose(1, 2)
        q, k, v = split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + bias
        probs = F.dropout(scores.softmax(dim=-1), self.cfg.denoise_dropout, self.training)
        moved = probs.unsqueeze(2) * delta.permute(0, 3, 1, 2).unsqueeze(1)  # (B, H, 3, N, N)
        y = (moved @ v.unsqueeze(2)).permute(0, 3, 2, 1, 4).reshape(B, N, 3, C)
        projections = (self.force_proj1, self.force_proj2, self.force_proj3)
        return torch.cat([project(y[:, :, a]) for a, project in enumerate(projections)], dim=-1)


class MoleculeEncoder(nn.Module):
    """The encoder with its pretraining heads (heads=False: without them)."""

    def __init__(self, cfg, heads=True):
        super().__init__()
        self.cfg = cfg
        self.atom_feature = AtomFeature(cfg)
        self.molecule_attn_bias = MoleculeAttnBias(cfg)
        self.molecule_3d_bias = Molecule3DBias(cfg)
        self.emb_layer_norm = nn.LayerNorm(cfg.dim)
        rates = np.linspace(0, cfg.drop_path, cfg.layers)
        self.layers = nn.ModuleList(EncoderLayer(cfg, float(rate)) for rate in rates)
        if heads:
            self.atom_proc = DenoiseHead(cfg)
            self.blend_spd_pred_head = SPDHead(cfg.dim)
            self.blend_edge_pred_head = EdgeHead(cfg.dim)
            self.blend_3d_pred_head = DirectionHead(cfg.dim)
        self.apply(initialise)

    def tokens_and_bias(self, batch, blended, use_2d, use_3d):
        """x (B, S, C), bias (B, H, S, S), delta: blended as drawn, or all relations added."""
        atoms, degree = self.atom_feature(batch)
        b_spd, b_edge = self.molecule_attn_bias(batch)
        has_pos = batch["has_pos"][:, None, None]
        delta = None
        if use_3d:
            pos = batch["pos"] + batch["noise"] if blended else batch["pos"]
            b_3d, geo, delta = self.molecule_3d_bias(batch, pos)
        if blended:
            drawn = batch["blend"].unsqueeze(-1)
            relation = (b_spd * (drawn == SPD) + b_edge * (drawn == EDGE)
                        + b_3d * (drawn == THREE_D))
            atoms = atoms + torch.where(batch["feat_blend"].unsqueeze(-1) == 1, 0.01 * geo, degree)
        else:
            relation = 0
            if use_2d:
                relation, atoms = b_spd + b_edge, atoms + degree
            if use_3d:
                relation = relation + b_3d * has_pos.unsqueeze(-1)
                atoms = atoms + 0.01 * geo * has_pos
        B, N, C = atoms.shape
        x = torch.cat([self.atom_feature.graph_token.weight.expand(B, 1, C), atoms], dim=1)
        t = self.molecule_attn_bias.graph_token_virtual_distance.weight.view(1, -1, 1, 1)
        H = self.cfg.heads
        bias = torch.cat([t.expand(B, H, N, 1), relation.permute(0, 3, 1, 2)], dim=3)
        bias = torch.cat([t.expand(B, H, 1, N + 1), bias], dim=2)
        there = F.pad(batch["mask"], (1, 0), value=True)
        return self.emb_layer_norm(x), bias.masked_fill(~there[:, None, None], -math.inf), delta

    def encode(self, batch, blended=False, use_2d=True, use_3d=True):
        """Hidden states before the first and after every layer, the bias, the directions."""
        x, bias, delta = self.tokens_and_bias(batch, blended, use_2d, use_3d)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return states, bias, delta

    def forward(self, batch):
        """Pretraining: every output the losses need, by name."""
        states, bias, delta = self.encode(batch, blended=True)
        h = states[-1][:, 1:]
        return {
            "states": states, "bias": bias,
            "spd_logits": self.blend_spd_pred_head(h),
            "edge_logits": self.blend_edge_pred_head(h),
            "d3_pred": self.blend_3d_pred_head(h),
            "denoise_pred": self.atom_proc(h, bias[:, :, 1:, 1:], delta),
        }


class OutputHead(nn.Module):
    def __init__(self, dim, tasks):
        super().__init__()
        self.dense, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, tasks)

    def forward(self, x):
        return self.out_proj(F.gelu(self.dense(x)))


class FineTuned(nn.Module):
    """The encoder with a head for labels."""

    def __init__(self, cfg, tasks, readout="cls", use_2d=True, use_3d=True):
        super().__init__()
        self.molecule_encoder = MoleculeEncoder(cfg, heads=False)
        self.proj_out = OutputHead(cfg.dim, tasks)
        self.readout, self.use_2d, self.use_3d = readout, use_2d, use_3d
        self.proj_out.apply(initialise)

    def forward(self, batch):
        states, _, _ = self.molecule_encoder.encode(batch, False, self.use_2d, self.use_3d)
        out = self.proj_out(states[-1])
        if self.readout == "cls":
            return out[:, 0]
        mask = batch["mask"].unsqueeze(-1)
        total = (out[:, 1:] * mask).sum(dim=1)
        return total if self.readout == "sum" else total / mask.sum(dim=1)


def initialise(module):
    if isinstance(module, GaussianLayer):
        nn.init.uniform_(module.means.weight, 0, 3)
        nn.init.uniform_(module.stds.weight, 0, 3)
        nn.init.constant_(module.mul.weight, 0.5)
        nn.init.constant_(module.bias.weight, 0)
        for table in (module.mul, module.bias):
            table.weight.data[0] = 0
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0


# ==================================================================================================
# Losses
# ==================================================================================================

def pretraining_losses(out, batch):
    """(total, denoise, spd, edge, d3), in the order of the golden files."""
    mask, has_pos = batch["mask"], batch["has_pos"][:, None]
    zero = out["d3_pred"].sum() * 0
    spd_target, edge_target = batch["spd_target"], batch["edge_target"]
    spd = edge = d3 = denoise = zero
    if (spd_target >= 0).any():
        spd = F.cross_entropy(out["spd_logits"].flatten(0, 2), spd_target.flatten())
    if (edge_target >= 0).any():
        edge = F.cross_entropy(out["edge_logits"].flatten(0, 3), edge_target.flatten())

    away = batch["pos"].unsqueeze(1) - batch["pos"].unsqueeze(2)
    pairs = (mask[:, :, None] & mask[:, None, :] & has_pos[:, :, None] & (away != 0).any(dim=-1))
    count = pairs.sum(dim=(1, 2))
    if count.any():
        miss = (1 - F.cosine_similarity(out["d3_pred"], away, dim=-1)) * pairs
        d3 = (miss.sum(dim=(1, 2)) / count.clamp(min=1))[count > 0].mean()

    moved = mask & has_pos & (batch["feat_blend"] == 1)
    if moved.any():
        miss = 1 - F.cosine_similarity(out["denoise_pred"], batch["noise"], dim=-1)
        denoise = miss[moved].mean()
    losses = {"denoise": denoise, "spd": spd, "edge": edge, "d3": d3}
    total = sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())
    return torch.stack([total, denoise, spd, edge, d3])


def finetuning_loss(out, labels, task, mean, std):
    """Mean over the labels that are present."""
    there = ~labels.isnan()
    if task == "classification":
        return F.binary_cross_entropy_with_logits(out[there], labels[there])
    return F.mse_loss((out * std + mean)[there], labels[there])


# ==================================================================================================
# Golden files: what the official modules computed
# ==================================================================================================

def hashed(name, count):
    """splitmix64(fnv1a64(name) + e) for e < count, the numbers the mini files are built from."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        x = np.uint64(h) + np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def formula_parameter(name, tensor, has_padding):
    """A parameter of a mini file; the formula is in the file's metadata."""
    bare = name.removeprefix("molecule_encoder.")
    v = (hashed(bare, tensor.numel()) >> np.uint64(40)).astype("f8") / 2 ** 23 - 1
    v = v.reshape(tensor.shape)
    if "layer_norm" in bare or "LayerNorm" in bare:
        value = 1 + 0.2 * v if bare.endswith("weight") else 0.1 * v
    elif ".gbf." in bare:
        kind = bare.split(".")[-2]
        value = {"mul": 0.5 + 0.2 * v, "bias": 0.2 * v}.get(kind, 1.5 + 1.5 * v)
    elif bare.startswith(("atom_feature.", "molecule_attn_bias.")) and "edge_dis" not in bare:
        value = 0.5 * v
    else:
        value = 0.1 * v if bare.endswith("bias") else 0.25 * v
    if has_padding:
        value[0] = 0
    return torch.from_numpy(value.astype("f4"))


class Worst:
    """The largest relative L2 error of each family of tensors."""

    def __init__(self):
        self.rows = {}

    def compare(self, family, what, ours, wanted, scale=None):
        """Relative to |wanted|, or to a given scale."""
        ours, wanted = np.asarray(ours, "f8"), np.asarray(wanted, "f8")
        if ours.shape != wanted.shape:
            raise SystemExit(f"{what}: shape {ours.shape}, expected {wanted.shape}")
        gap, norm = np.linalg.norm(ours - wanted), np.linalg.norm(wanted)
        error = gap / (scale or norm) if gap > 0 or not np.isfinite(gap) else 0.0
        if family not in self.rows or not error <= self.rows[family][0]:
            self.rows[family] = (error, what)


def make_encoder(cfg, official, heads=True):
    """Ours, or that of the release in the folder `official`."""
    if not official:
        return MoleculeEncoder(cfg, heads)
    from official import official_encoder
    return official_encoder(official, cfg, heads)


def golden_molecules(tensors, count, labels):
    get = lambda i, key: tensors.get(f"mol/{i}/{key}")
    return [Molecule(get(i, "atom_feat").astype("i8"), get(i, "bonds"),
                     get(i, "bond_feat").astype("i8"), get(i, "pos"),
                     None if labels is None else labels[i], str(i), get(i, "noise"),
                     get(i, "blend"), get(i, "feat_blend")) for i in range(count)]


def check_golden(path, dtype, official=None):
    """Runs one golden file and prints the largest error of each family. True if all are small."""
    from safetensors import safe_open
    with safe_open(path, "np") as f:
        meta = f.metadata()
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    cfg = Config(*(int(meta[key]) for key in ("layers", "dim", "ffn", "heads", "kernels")))
    finetuning = "task" in meta
    molecules = golden_molecules(tensors, int(meta["n_mols"]), tensors.get("labels"))
    batch = make_batch(molecules, dtype)
    if finetuning:
        model = FineTuned(cfg, int(meta["n_tasks"]), meta["readout"], meta["use_2d"] == "True",
                          meta["use_3d"] == "True")
        mean, std = float(meta["label_mean"]), float(meta["label_std"])
        losses_of = lambda out: finetuning_loss(out, batch["labels"], meta["task"], mean,
                                                std).view(1)
    else:
        model = make_encoder(cfg, official)
        losses_of = lambda out: pretraining_losses(out, batch)
    model.eval()  # every dropout is off in these files
    padded = {f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, nn.Embedding) and module.padding_idx is not None}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "params" in meta:
                p.copy_(formula_parameter(name, p, name in padded))
            elif f"param/{name}" in tensors:
                p.copy_(torch.from_numpy(tensors[f"param/{name}"]))
            else:
                p.requires_grad_(False)
    model.to(dtype)

    worst = Worst()
    out = model(batch)
    losses = losses_of(out)
    losses[0].backward()
    compare_outputs(worst, out, tensors, molecules, cfg, finetuning)
    worst.compare("loss", "loss", losses.detach().numpy(), tensors["loss"])
    compare_gradients(worst, model, tensors)
    compare_training(worst, model, lambda: losses_of(model(batch)), tensors, meta)
    print(f"{path} ({dtype})".replace("torch.", ""))
    limits = {"gradient": 1e-4, "training loss": 1e-4, "training gradient norm": 1e-4,
              "spd": 0, "zero gradient": 1e-6}
    good = True
    for family, (error, what) in worst.rows.items():
        limit = limits.get(family, 1e-5)
        good = good and error <= limit
        verdict = "" if error <= limit else f"ABOVE {limit:g}  "
        print(f"  {family:24s} {error:9.2e}  {verdict}{what}")
    return good


def compare_outputs(worst, out, tensors, molecules, cfg, finetuning):
    if finetuning:
        worst.compare("logits", "out/logits", out.detach().numpy(), tensors["out/logits"])
        return
    value = {key: t.detach().numpy() for key, t in out.items() if key != "states"}
    for i, mol in enumerate(molecules):
        n = len(mol.atom_feat)
        ours = {"spd": mol.relations[0], "attn_bias": value["bias"][i, :, :n + 1, :n + 1],
                "spd_logits": value["spd_logits"][i, :n, :n],
                "edge_logits": value["edge_logits"][i, :n, :n],
                "d3_pred": value["d3_pred"][i, :n, :n] * (1 - np.eye(n))[:, :, None],
                "denoise_pred": value["denoise_pred"][i, :n]}
        for k, state in enumerate(out["states"]):
            ours["embed" if k == 0 else f"layer{k}"] = state[i, :n + 1].detach().numpy()
        for key, array in ours.items():
            worst.compare(key, f"out/{i}/{key}", array, tensors[f"out/{i}/{key}"])


def compare_gradients(worst, model, tensors):
    bare = lambda name: name.removeprefix("molecule_encoder.")
    grads = {bare(name): p.grad.numpy().astype("f8") for name, p in model.named_parameters()
             if p.grad is not None}
    norm = math.sqrt(sum((g ** 2).sum() for g in grads.values()))
    for key, wanted in tensors.items():
        family, _, name = key.partition("/")
        name = bare(name)
        if family == "grad":
            ours = grads[name]
        elif family == "gradsum":
            g, h = grads[name].ravel(), hashed(name, grads[name].size)
            signs = [1 - 2 * (h >> np.uint64(k) & np.uint64(1)).astype("f8") for k in range(4)]
            ours = np.array([np.linalg.norm(g)] + [(g * s).sum() for s in signs])
        else:
            continue
        if name.endswith("k_proj.bias"):  # zero but for rounding
            worst.compare("zero gradient", key, ours, wanted, scale=norm)
        else:
            worst.compare("gradient", key, ours, wanted)


def compare_training(worst, model, compute_losses, tensors, meta):
    """Ten AdamW steps on the same batch."""
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=float(meta["lr"]),
        betas=(float(meta["beta1"]), float(meta["beta2"])), eps=float(meta["eps"]),
        weight_decay=float(meta["weight_decay"]))
    losses, norms = [], []
    for _ in range(len(tensors["train/losses"])):
        optimiser.zero_grad()
        loss = compute_losses()
        loss[0].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), float(meta["clip_norm"])).item())
        optimiser.step()
        losses.append(loss.detach().numpy())
    wanted = tensors["train/losses"]
    worst.compare("training loss", "train/losses", np.array(losses).reshape(wanted.shape), wanted)
    if "train/grad_norms" in tensors:
        worst.compare("training gradient norm", "train/grad_norms", norms,
                      tensors["train/grad_norms"])


# ==================================================================================================
# Timing, evaluation
# ==================================================================================================

def random_batches(molecules, size, count, seed):
    order = np.random.default_rng(seed)
    return [make_batch([molecules[i] for i in order.choice(len(molecules), size, False)])
            for _ in range(count)]


def peak_memory_mb():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench(options):
    """Times whole training steps (forward, backward, clip, AdamW; batches are made beforehand), or
    the encoder alone."""
    torch.manual_seed(options.seed)
    cfg = Config(*SIZES[options.size], sdpa=options.sdpa)
    molecules = [mol for mol in read_dataset(options.bench)[:options.limit or None]
                 if options.min_atoms <= len(mol.atom_feat) <= options.max_atoms]
    batches = random_batches(molecules, options.batch, options.steps + options.warmup, options.seed)
    for batch in batches:
        draw(batch)
    atoms = sum(int(b["mask"].sum()) for b in batches) / (len(batches) * options.batch)
    longest = sum(b["mask"].shape[1] for b in batches) / len(batches)
    model = make_encoder(cfg, options.official, heads=not options.inference)
    parameters = list(model.parameters())
    fused = {"fused": True} if int(torch.__version__.split(".")[0]) > 1 else {}
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0, **fused)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.bf16)

    def train_step(batch):
        optimiser.zero_grad()
        with autocast:
            losses = pretraining_losses(model(batch), batch)
        losses[0].backward()
        nn.utils.clip_grad_norm_(parameters, 5)
        optimiser.step()
        return losses[0].item()

    @torch.inference_mode()
    def embed(batch):
        with autocast:
            return model.encode(batch)[0][-1][:, 0]

    step = embed if options.inference else train_step
    model.train(not options.inference)
    if options.compile:
        part = "encode" if options.inference else "forward"
        setattr(model, part, torch.compile(getattr(model, part), dynamic=True))
    seconds, beside = [], []
    for k, batch in enumerate(batches):
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
        if options.beside and k >= options.warmup:
            beside.append(moleblend_rate(options))
    timed = sorted(seconds[options.warmup:])
    median = timed[len(timed) // 2]
    what = ["inference" if options.inference else "training", options.size,
            f"batch {options.batch}", f"{torch.get_num_threads()} threads",
            f"{atoms:.1f} atoms a molecule (padded to {longest:.1f})"]
    what += [name for name in ("compile", "sdpa", "official", "bf16") if getattr(options, name)]
    print(f"{', '.join(what)}: median {1000 * median:.0f} ms a batch, "
          f"{options.batch / median:.1f} molecules/s (best {options.batch / timed[0]:.1f}), "
          f"peak memory {peak_memory_mb():.0f} MB, torch {torch.__version__}", flush=True)
    if beside:
        rate = sorted(beside)[len(beside) // 2]
        print(f"moleblend in turns with it: median {rate:.1f} molecules/s "
              f"(best {max(beside):.1f}); {rate * median / options.batch:.1f} times as fast",
              flush=True)


def moleblend_rate(options):
    """Molecules/s of the C program: of the median training step of a short run, or of `embed`."""
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "bench.safetensors")
        threads = options.beside_threads or torch.get_num_threads()
        same = ["--batch-size", str(options.batch), "--threads", str(threads)]
        same += ["--precision", "bf16"] * options.bf16

        def run(*words):
            command = [options.beside, *words, *same]
            return subprocess.run(command, check=True, capture_output=True, text=True).stderr

        run(options.bench, "--size", options.size, "--steps", "1" if options.inference else "6",
            "--lr", "1e-5", "-o", target)
        if options.inference:
            said = run("embed", options.bench, "--modality", "both", "--model", target, "-o",
                       os.path.join(folder, "bench.npy"))
            return float(re.findall(r"([\d.]+) molecules/s", said)[-1])
        with open(target.replace(".safetensors", ".log.csv")) as log:
            rates = sorted(float(line.split(",")[-1]) for line in list(log)[2:])
    return rates[len(rates) // 2]


def load_encoder(path):
    """The encoder and heads of a pretrained checkpoint, sizes by the shapes of its tensors."""
    from safetensors.torch import load_file
    prefix = "encoder.molecule_encoder."
    state = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()
             if key.startswith(prefix)}
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    dim = state["emb_layer_norm.weight"].numel()
    cfg = Config(layers, dim, state["layers.0.fc1.weight"].shape[0],
                 state["molecule_attn_bias.graph_token_virtual_distance.weight"].shape[1],
                 state["molecule_3d_bias.gbf.means.weight"].shape[1])
    model = MoleculeEncoder(cfg)
    model.load_state_dict(state)
    return model.eval()


def evaluate(options):
    """Mean pretraining losses of a checkpoint over a dataset, with fresh draws."""
    model = load_encoder(options.model)
    torch.manual_seed(options.seed)
    molecules = read_dataset(options.evaluate)[:options.limit or None]
    totals, weight = torch.zeros(5), 0
    with torch.no_grad():
        for at in range(0, len(molecules), options.batch):
            part = molecules[at:at + options.batch]
            batch = make_batch(part)
            draw(batch)
            totals += len(part) * pretraining_losses(model(batch), batch)
            weight += len(part)
    means = zip(("total", "denoise", "spd", "edge", "d3"), (totals / weight).tolist())
    print(f"{options.evaluate}: {weight} molecules: "
          + ", ".join(f"{name} {value:.4f}" for name, value in means))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--golden", nargs="+", metavar="FILE", help="check against golden files")
    task.add_argument("--bench", metavar="DATA", help="time training steps on a dataset")
    task.add_argument("--evaluate", metavar="DATA", help="losses of a checkpoint on a dataset")
    parser.add_argument("--official", metavar="FOLDER", help="use the official modules, from a "
                        "clone of the release in FOLDER (see official.py)")
    parser.add_argument("--model", metavar="FILE", help="checkpoint for --evaluate")
    parser.add_argument("--float64", action="store_true", help="compute --golden in float64")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--limit", type=int, default=0, help="first N molecules only")
    parser.add_argument("--min-atoms", type=int, default=1,
                        help="--bench: leave out smaller molecules")
    parser.add_argument("--max-atoms", type=int, default=512,
                        help="--bench: leave out larger ones (a single one pads the whole batch; "
                        "PCQM4Mv2 has 20 at most: 9 to 20 of the bundled sample are like it)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", metavar="PROGRAM", help="--bench: also time moleblend, in "
                        "turns; give it a dataset without outsizes (data_prep --max-atoms 20)")
    parser.add_argument("--beside-threads", type=int, default=0, help="0: as many as PyTorch")
    parser.add_argument("--inference", action="store_true", help="time the encoder's forward only")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--bf16", action="store_true", help="--bench: autocast to bfloat16, and "
                        "moleblend --precision bf16 beside it")
    parser.add_argument("--sdpa", action="store_true", help="scaled_dot_product_attention")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.golden:
        dtype = torch.float64 if options.float64 else torch.float32
        if not all([check_golden(path, dtype, options.official) for path in options.golden]):
            raise SystemExit(1)
    elif options.bench:
        bench(options)
    else:
        evaluate(options)


if __name__ == "__main__":
    main()

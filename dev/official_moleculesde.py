#!/usr/bin/env python3
"""The official modules of MoleculeSDE beside ours: checked by golden files, timed on a dataset.

    python3 dev/official_moleculesde.py --official FOLDER --golden FILE.safetensors... [--float64]
    OMP_WAIT_POLICY=passive python3 dev/official_moleculesde.py --official FOLDER --bench train.bin
        [--beside ./moleculesde/moleculesde --threads 1 --batch 64 --steps 4 --turns 3]

FOLDER is a clone of the release (github.com/chao1224/MoleculeSDE), which is imported as it is:
modules, losses and the extended graph are its own, the training step is that of its
pretrain_MoleculeSDE.py (_02, VE, no dropout but the attention layers', Adam). --golden shows that:
with the file's parameters and draws it prints how far losses and ten training steps are from the
file's. --bench takes turns between both programs. Both start from the checkpoint that ours writes,
which also compares all names and shapes. What is timed of the release is the step alone: reading,
graphs and batches are made before the clock starts; ours does it all (two runs of different
--steps, so that start and end cancel). Both have grown their memory by then. CPU time is user +
system over all threads; it is the figure to trust on a machine that others use too.

Needs torch, torch_geometric, numpy and safetensors. torch_scatter, torch_sparse and radius_graph of
torch_cluster are replaced by the same operations in torch and torch_geometric, ogb's two encoders
by sums of embeddings; ase, rdkit and scipy, which are imported for nothing that pretraining needs,
by empty modules.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch_moleblend import read_dataset

ATOM_FEATURES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
BOND_FEATURES = (5, 6, 2)
TERMS = ("contrast", "2d->3d", "elements", "bonds")
NOT_OURS = ("num_batches_tracked", "equi_modules.0.eps", "equi_modules.1.eps", "atomic_mass",
            "distance_expansion.offset")  # constants, and .conv.nn. is SchNet's mlp again


# ==================================================================================================
# The release, and stand-ins for what it imports
# ==================================================================================================

class Encoder(nn.Module):
    """ogb.graphproppred.mol_encoder: a sum of embeddings, xavier."""

    def __init__(self, name, sizes, dim):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        self.add_module(name, self.tables)
        del self.tables
        self.name = name
        for table in self._modules[name]:
            nn.init.xavier_uniform_(table.weight)

    def forward(self, x):
        total = 0
        for k, table in enumerate(self._modules[self.name]):
            total = total + table(x[:, k])
        return total


def radius_graph(pos, r, batch=None, loop=False, max_num_neighbors=32):
    """torch_cluster.radius_graph: the edges j -> i of one molecule shorter than r, of each atom the
    first 32."""
    near = torch.cdist(pos.detach(), pos.detach()) < r
    near &= batch[:, None] == batch[None]
    near.fill_diagonal_(False)
    near &= near.cumsum(dim=1) <= max_num_neighbors
    receiver, sender = near.nonzero(as_tuple=True)
    return torch.stack([sender, receiver])


def spspmm(index_a, value_a, index_b, value_b, m, k, n):
    product = torch.sparse.mm(torch.sparse_coo_tensor(index_a, value_a, (m, k)),
                              torch.sparse_coo_tensor(index_b, value_b, (k, n))).coalesce()
    return product.indices(), product.values()


def import_release(folder):
    """The release's classes and functions, in one namespace."""
    if not os.path.exists(os.path.join(folder, "Geom3D", "models", "schnet.py")):
        raise SystemExit(f"{folder}: expected a clone of the release, with Geom3D/models/schnet.py")
    import torch_geometric.nn
    from torch_geometric.utils import coalesce, scatter

    modules = {}

    def module(name, **members):
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)

    module("torch_scatter", scatter=scatter,
           scatter_add=lambda src, index, dim=0, **named: scatter(src, index, dim, **named),
           scatter_mean=lambda src, index, dim=0: scatter(src, index, dim, reduce="mean"))
    module("torch_sparse", SparseTensor=type("SparseTensor", (), {}), spspmm=spspmm,
           coalesce=lambda index, value, m, n: (coalesce(index, num_nodes=max(m, n)), value))
    module("ogb")
    module("ogb.graphproppred")
    module("ogb.graphproppred.mol_encoder",
           AtomEncoder=lambda emb_dim: Encoder("atom_embedding_list", ATOM_FEATURES, emb_dim),
           BondEncoder=lambda emb_dim: Encoder("bond_embedding_list", BOND_FEATURES, emb_dim))
    module("ase.data", atomic_masses=np.ones(119))
    module("ase", data=modules["ase.data"])
    module("rdkit")
    module("rdkit.Chem", AllChem=None)
    module("scipy", stats=None)

    def from_file(*path):
        """A file without the package around it, which needs more packages."""
        spec = importlib.util.spec_from_file_location(path[-1][:-3], os.path.join(folder, *path))
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    torch_geometric.nn.radius_graph = radius_graph
    with mock.patch.dict(sys.modules, modules), mock.patch.object(sys, "path", [folder] + sys.path):
        import Geom3D.models as models
        import Geom3D.models.MoleculeSDE as sde
        loaded = {name: entry for name, entry in sys.modules.items() if name.startswith("Geom3D")}
        release = types.SimpleNamespace(
            GNN=models.GNN, SchNet=models.SchNet, Sde2Dto3D=sde.SDEModel2Dto3D_02,
            Sde3Dto2D=sde.SDEModel3Dto2D_node_adj_dense,
            extend_graph=from_file("Geom3D", "datasets", "dataset_3D.py").extend_graph,
            dual_CL=from_file("examples", "util.py").dual_CL)
    sys.modules.update(loaded)  # without the stand-ins, which others must not see
    return release


# The release's sizes, by the golden files' names.
RELEASE = {"emb_dim": 300, "gin_layers": 5, "schnet_filters": 128, "schnet_interactions": 6,
           "schnet_gaussians": 51, "cutoff": 10, "hidden_2dto3d": 32, "nhid": 16, "adim": 16,
           "c_init": 2, "c_hid": 8, "c_final": 4, "edge_layers": 4}


def build(release, sizes):
    """The four modules, by the prefixes of their state dicts."""
    s = types.SimpleNamespace(**{name: int(float(sizes[name])) for name in RELEASE})
    return {
        "model_2D": release.GNN(s.gin_layers, s.emb_dim, JK="last", drop_ratio=0, gnn_type="GIN"),
        "model_3D": release.SchNet(
            hidden_channels=s.emb_dim, num_filters=s.schnet_filters, cutoff=s.cutoff,
            num_interactions=s.schnet_interactions, num_gaussians=s.schnet_gaussians,
            readout="mean", node_class=119),
        "SDE_2Dto3D_model": release.Sde2Dto3D(
            emb_dim=s.emb_dim, hidden_dim=s.hidden_2dto3d, beta_schedule=None, beta_min=0.2,
            beta_max=1.0, num_diffusion_timesteps=1000, SDE_type="VE", use_extend_graph=True),
        "SDE_3Dto2D_model": release.Sde3Dto2D(
            dim3D=s.emb_dim, c_init=s.c_init, c_hid=s.c_hid, c_final=s.c_final, num_heads=4,
            adim=s.adim, nhid=s.nhid, num_layers=s.edge_layers, emb_dim=s.emb_dim, num_linears=3,
            beta_min=0.1, beta_max=1.0, num_diffusion_timesteps=1000, SDE_type="VE",
            num_class_X=119, noise_on_one_hot=True)}


def adam(models, lr, scale_3d):
    return torch.optim.Adam([{"params": model.parameters(), "lr": lr * scale} for model, scale
                             in zip(models.values(), (1, scale_3d, 1, scale_3d))], lr=lr)


def make_batch(release, molecules, dtype=torch.float32):
    """What the release's dataset and loader make of molecules."""
    edges, extended, features, positions, graph, first = [], [], [], [], [], 0
    for k, mol in enumerate(molecules):
        n, bonds = len(mol.atom_feat), torch.tensor(mol.bonds.astype(np.int64)).reshape(-1, 2)
        both = torch.stack([bonds, bonds.flip(1)], dim=1).reshape(-1, 2)
        data = types.SimpleNamespace(edge_index=both.T.contiguous(), num_nodes=n)
        extended.append(release.extend_graph(data).extended_edge_index + first)
        edges.append(both.T + first)
        features.append(torch.tensor(mol.bond_feat.astype(np.int64)).reshape(-1, 3)
                        .repeat_interleave(2, dim=0))
        pos = torch.tensor(mol.pos).to(dtype)
        positions.append(pos - pos.mean(dim=0))
        graph.append(torch.full((n,), k))
        first += n
    return types.SimpleNamespace(
        x=torch.cat([torch.tensor(mol.atom_feat.astype(np.int64)) for mol in molecules]),
        edge_index=torch.cat(edges, dim=1), edge_attr=torch.cat(features),
        extended_edge_index=torch.cat(extended, dim=1), positions=torch.cat(positions),
        batch=torch.cat(graph), num_graphs=len(molecules))


def losses(release, models, batch):
    """The total, its four terms, and the accuracy of the contrast."""
    how = types.SimpleNamespace(CL_similarity_metric="EBM_node_dot_prod", T=0.1)
    batch.positions = batch.positions.detach()  # a loader makes them anew
    x = models["model_2D"](batch.x, batch.edge_index, batch.edge_attr)
    _, y = models["model_3D"](batch.x[:, 0], batch.positions, batch.batch, return_latent=True)
    contrast, accuracy = release.dual_CL(x, y, how)
    position = models["SDE_2Dto3D_model"](x, batch, anneal_power=0)["position"]
    elements, bonds = models["SDE_3Dto2D_model"](y, batch, reduce_mean=True, continuous=True,
                                                 train=True, anneal_power=0)
    total = contrast + position + (elements + bonds) * 0.5
    return total, [contrast, position, elements, bonds], accuracy


def step(release, models, optimizer, batch):
    total, terms, accuracy = losses(release, models, batch)
    shown = [term.item() for term in (total, *terms)] + [accuracy]
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return shown


def load(models, tensors):
    """Loads tensors by their names; raises where names or shapes differ beyond what may differ."""
    used = set()
    for prefix, model in models.items():
        own = {name[len(prefix) + 1:]: tensor for name, tensor in tensors.items()
               if name.startswith(prefix + ".")}
        missing, unexpected = model.load_state_dict(own, strict=False)
        wrong = [name for name in missing
                 if not name.endswith(NOT_OURS) and ".conv.nn." not in name]
        if wrong or unexpected:
            raise SystemExit(f"{prefix}: missing {wrong}, unexpected {unexpected}")
        used.update(f"{prefix}.{name}" for name in own)
    if used != set(tensors):
        raise SystemExit(f"not in the release: {sorted(set(tensors) - used)}")


# ==================================================================================================
# --golden
# ==================================================================================================

def splitmix64(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def parameter(name, shape):
    """A parameter by the golden files' formula (their metadata `params`)."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        h = splitmix64(np.uint64(h) + np.arange(count, dtype=np.uint64))
    v = (h >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    norm = len(shape) == 1 and (".batch_norms." in name or ".mlp.1." in name or ".norm" in name
                                or ".edge_2D_emb.1." in name)
    if name.endswith("gaussian_fourier.W"):
        pass
    elif name.endswith(".eps"):
        v = 0.2 * v
    elif norm and name.endswith(".weight"):
        v = 1 + 0.2 * v
    elif len(shape) == 1:
        v = 0.1 * v
    elif "embedding_list" in name or name == "model_3D.embedding.weight":
        v = 0.5 * v
    else:
        by_rows = name.endswith(".func_v.weight") or ".node_score_network.layers." in name
        v = v * np.sqrt(3 / shape[0 if by_rows else 1])
    return torch.tensor(v.astype(np.float32).reshape(shape))


@contextlib.contextmanager
def fixed_draws(draws):
    """Every random number of a step is the next of the given ones."""
    randn, randint, randperm = (iter(draws[kind]) for kind in ("randn", "randint", "randperm"))
    with mock.patch.object(torch, "randn_like", lambda x: next(randn).to(x.dtype)), \
            mock.patch.object(torch, "randint", lambda *_, **__: next(randint)), \
            mock.patch.object(torch, "randperm", lambda n: next(randperm)):
        yield


def golden_batch(release, tensors, dtype):
    """The file's molecules, and its draws in the order in which a step asks for them."""
    molecules, count = [], sum(1 for name in tensors if name.endswith("/atom_feat"))
    for k in range(count):
        own = {name: tensors[f"mol/{k}/{name}"].numpy() for name in
               ("atom_feat", "bonds", "bond_feat", "pos")}
        molecules.append(types.SimpleNamespace(**own))
    longest = max(len(mol.atom_feat) for mol in molecules)
    z_adj, z_x = torch.zeros(count, longest, longest), torch.zeros(count, longest, 119)
    for k, mol in enumerate(molecules):
        n = len(mol.atom_feat)
        z_adj[k, :n, :n], z_x[k, :n] = tensors[f"mol/{k}/z_adj"], tensors[f"mol/{k}/z_x"]
    noise = torch.cat([tensors[f"mol/{k}/noise"] for k in range(count)])
    half = count // 2 + 1
    draws = {"randn": [noise, z_adj, z_x],
             "randint": [tensors[f"draw/{name}"][:half].long() for name in ("k23", "k32")],
             "randperm": [tensors[f"draw/{name}"].long() for name in ("perm1", "perm2")]}
    return make_batch(release, molecules, dtype), draws


def golden_models(release, path, dtype=torch.float32):
    """Models, batch, draws, metadata and tensors of a golden file."""
    with safe_open(path, "pt") as file:
        sizes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    models = build(release, sizes)
    given = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param/")}
    if not given:
        for prefix, model in models.items():
            given.update((f"{prefix}.{name}", parameter(f"{prefix}.{name}", p.shape))
                         for name, p in model.named_parameters() if ".conv.nn." not in name)
    load(models, {**{f"{prefix}.{name}": tensor for prefix, model in models.items()
                     for name, tensor in model.state_dict().items()
                     if name.endswith(("running_mean", "running_var"))}, **given})
    for model in models.values():
        model.train().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    return models, *golden_batch(release, tensors, dtype), sizes, tensors


@contextlib.contextmanager
def precision(double):
    """float64 everywhere, also where the release says float()."""
    if not double:
        yield
        return
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield
    torch.set_default_dtype(torch.float32)


def check_golden(release, path):
    models, batch, draws, sizes, tensors = golden_models(release, path, torch.get_default_dtype())
    if not torch.equal(batch.extended_edge_index.T, tensors["out/ext_edges"].long()):
        raise SystemExit(f"{path}: the extended graph differs")
    optimizer = adam(models, float(sizes["lr"]), float(sizes["lr_scale_3d"]))
    worst, expected = [], tensors["train/losses"].double()
    for want in expected:
        with fixed_draws(draws):
            got = torch.tensor(step(release, models, optimizer, batch), dtype=torch.float64)
        worst.append(((got - want).abs() / want.abs().clamp(min=1e-30))[:5])
        if len(worst) == 1:
            print(f"{os.path.basename(path)}: losses", *(f"{value:.6g}" for value in got.tolist()))
    print("  relative difference of total, contrast, 2d->3d, elements, bonds, a row a step")
    for k, row in enumerate(worst):
        print(f"  {k + 1:2}", *(f"{value:8.1e}" for value in row.tolist()))


# ==================================================================================================
# --bench
# ==================================================================================================

def cpu_time(who):
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


WARM_UP = 6  # steps of ours that do not count


def run_ours(program, data, batch_size, threads, steps, out):
    """Wall and CPU seconds of a whole run of ours, and the losses of its last step."""
    command = [program, data, "--batch-size", str(batch_size), "--threads", str(threads),
               "--steps", str(steps), "-o", out]
    wall, cpu = time.time(), cpu_time(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    table = [line.split() for line in done.stdout.splitlines()]
    row = next(words for words in table if words[:1] == [str(steps)])
    return (time.time() - wall, cpu_time(resource.RUSAGE_CHILDREN) - cpu,
            [float(value) for value in row[1:7]])


def bench(release, args):
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    models = build(release, RELEASE)
    usable = [mol for mol in read_dataset(args.bench) if mol.pos is not None]
    order = np.random.default_rng(1).permutation(len(usable))
    wanted = (args.turns * args.steps + 1) * args.batch
    order = np.resize(order, wanted)  # other molecules in every step
    batches = [make_batch(release, [usable[i] for i in order[k:k + args.batch]])
               for k in range(0, wanted, args.batch)]
    sizes = [len(mol.atom_feat) for mol in usable]
    longest = [int(batch.batch.bincount().max()) for batch in batches]
    print(f"data     {len(usable)} molecules of {np.mean(sizes):.1f} atoms in the mean, {min(sizes)} "
          f"to {max(sizes)}; {len(batches)} batches of {args.batch}, the longest of a batch "
          f"{np.mean(longest):.0f} in the mean")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "ours.safetensors")
        if args.beside:
            run_ours(args.beside, args.bench, args.batch, args.threads, 1, out)
            load(models, load_file(out))
            print(f"names    {len(load_file(out))} tensors of our checkpoint, all names and shapes "
                  "are the release's")
        for prefix, model in models.items():
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"model    {prefix:18} {count:9} parameters")
        for model in models.values():
            model.train()
        optimizer = adam(models, 5e-4, 1)
        shown = step(release, models, optimizer, batches.pop(int(np.argmax(longest))))
        print("losses   total, contrast, 2d->3d, elements, bonds, accuracy of the release's first "
              "step:", *(f"{value:.4f}" for value in shown))
        print(f"threads  {args.threads}; seconds a step by wall and by CPU time")
        ratios = []
        for turn in range(args.turns):
            own = batches[turn * args.steps:][:args.steps]
            wall, cpu = time.time(), cpu_time(resource.RUSAGE_SELF)
            for batch in own:
                shown = step(release, models, optimizer, batch)
            theirs = [(time.time() - wall) / args.steps,
                      (cpu_time(resource.RUSAGE_SELF) - cpu) / args.steps]
            line = (f"turn {turn + 1}   official {theirs[0]:.3f} {theirs[1]:.3f} "
                    f"({args.batch / theirs[1]:.1f} molecules/s of CPU time)")
            if args.beside:
                few, many = (run_ours(args.beside, args.bench, args.batch, args.threads, steps, out)
                             for steps in (WARM_UP, WARM_UP + args.ours_steps))
                ours = [(many[k] - few[k]) / args.ours_steps for k in range(2)]
                ratios.append([theirs[k] / ours[k] for k in range(2)])
                line += (f"  ours {ours[0]:.3f} {ours[1]:.3f} ({args.batch / ours[1]:.1f})  ratio "
                         f"{ratios[-1][0]:.1f} {ratios[-1][1]:.1f}")
            print(line, flush=True)
        for k, kind in enumerate(("wall", "CPU time")):
            if ratios:
                column = [pair[k] for pair in ratios]
                print(f"ratio    by {kind}: median {statistics.median(column):.1f}, "
                      f"{min(column):.1f} to {max(column):.1f}")
        print("losses   of the release's last step:", *(f"{value:.4f}" for value in shown))
        if ratios:
            print("losses   of our last step:", *(f"{value:.4f}" for value in many[2]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, metavar="FOLDER", help="a clone of the release")
    parser.add_argument("--golden", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--float64", action="store_true", help="--golden in double precision")
    parser.add_argument("--bench", metavar="FILE", help="a dataset made by data_prep")
    parser.add_argument("--beside", metavar="PROGRAM", help="our program, to be timed in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of the release in a turn")
    parser.add_argument("--ours-steps", type=int, default=16, help="of ours in a turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of old functions that the release calls
    torch.set_num_threads(args.threads)
    release = import_release(args.official)
    with precision(args.float64):
        for path in args.golden:
            check_golden(release, path)
    if args.bench:
        bench(release, args)


if __name__ == "__main__":
    main()

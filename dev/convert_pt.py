#!/usr/bin/env python3
"""A PyTorch checkpoint (.pt, .bin) of the official release, or of another program with the same
tensor names, as a safetensors file that moleblend reads:

    python3 dev/convert_pt.py checkpoint_best.pt converted.safetensors
    ./moleblend embed data.bin --model converted.safetensors -o embeddings.npy
    ./moleblend finetune train.bin --init converted.safetensors

The state dict may stand under "model", as fairseq saves it, under "state_dict", or bare. Names stay
as they are, numbers become float32, or float16 with --half, for half the bytes: a checkpoint of
moleblend (.safetensors) may be given for that too, and keeps what its head says of the model. What
moleblend does not read is left out and named: heads of the release without a loss, buffers,
everything beside the state dict (options, optimizer).

fairseq may save Python objects beside the tensors. To load these is to run what the file says: a
file that holds others than plain ones is refused, unless --trust says that you know where it is
from. Needs torch (2.4 or newer) and safetensors.
"""

import argparse
import pickle

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Modules of the encoder that moleblend has; "proj_out.", the head of labels, stands beside them.
MODULES = ("atom_feature.", "molecule_attn_bias.", "molecule_3d_bias.", "emb_layer_norm.",
           "layers.", "atom_proc.", "blend_spd_pred_head.", "blend_edge_pred_head.",
           "blend_3d_pred_head.", "proj_out.")
WRAPPERS = ("module.", "encoder.", "molecule_encoder.")


def load(path, trust):
    """The content of a file, and the head of a safetensors file."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            head = {name: value for name, value in (file.metadata() or {}).items()
                    if name != "moleblend.crc32"}  # of the other bytes
            return {name: file.get_tensor(name) for name in file.keys()}, head
    return load_pt(path, trust), {"format": "pt"}


def load_pt(path, trust):
    """What torch.save() wrote. fairseq's options are a plain Namespace, or more than that."""
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError:
        raise SystemExit(f"{path}: not written by torch.save(), or with Python objects whose "
                         "loading runs code: add --trust if you know where the file is from")
    except (OSError, KeyError, EOFError, RuntimeError) as error:
        raise SystemExit(f"{path}: not a checkpoint of PyTorch ({error})")


def state_dict(content, path):
    """The dictionary of tensors, and the names of what stands beside it."""
    beside = []
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            beside, content = [name for name in content if name != key], content[key]
    if not isinstance(content, dict) or not any(torch.is_tensor(v) for v in content.values()):
        raise SystemExit(f"{path}: expected a state dict, bare or under \"model\"")
    return content, beside


def belongs(name):
    """Is this a tensor that moleblend knows, whatever wrappers stand in front?"""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.startswith(MODULES)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="written by torch.save()")
    parser.add_argument("output", help="the safetensors file to write")
    parser.add_argument("--trust", action="store_true",
                        help="load Python objects too, which runs what the file says")
    parser.add_argument("--half", action="store_true", help="write float16")
    options = parser.parse_args()
    content, head = load(options.checkpoint, options.trust)
    state, left_out = state_dict(content, options.checkpoint)
    kind = torch.float16 if options.half else torch.float32
    tensors = {}
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and belongs(name):
            tensors[name] = value.detach().to(kind).clone().contiguous()
        else:
            left_out.append(name)
    if not tensors:
        raise SystemExit(f"{options.checkpoint}: no tensor of the model is there; the first is "
                         f"{next(iter(state))}")
    save_file(tensors, options.output, metadata=head)
    print(f"{options.output}: {len(tensors)} tensors, "
          f"{sum(t.numel() for t in tensors.values()):,} numbers")
    if left_out:
        print("left out: " + ", ".join(left_out))


if __name__ == "__main__":
    main()

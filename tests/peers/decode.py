"""Our own decoding of each layout, from its description alone: bytes in, float32 weights out, by the names of the source."""

import re

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def elements(codes):
    """Two to a byte, the low half first."""
    return E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]


def e8m0(scales):
    return torch.pow(2.0, scales.view(torch.uint8).float() - 127)


def scaled(codes, scales):
    values = elements(codes)
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], -1)


def compressed_tensors(tensors):
    out = {}
    for name, value in tensors.items():
        if not name.endswith(("_packed", "_scale")):
            out[name] = value
        elif name.endswith("weight_packed"):
            stem = name[:-len("_packed")]
            scale, whole = tensors[stem + "_scale"], tensors.get(stem + "_global_scale")
            out[stem] = scaled(value, e8m0(scale) if whole is None else scale.float() / whole)
    return out


def modelopt(tensors):
    out = {}
    for name, value in tensors.items():
        if name + "_scale_2" in tensors:
            out[name] = scaled(value, tensors[name + "_scale"].float() * tensors[name + "_scale_2"])
        elif not name.endswith(("_scale", "_scale_2")):
            out[name] = value
    return out


def gpt_oss(tensors):
    out = {}
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            stem = name[:-len("_blocks")]
            rows = scaled(value.flatten(-2), e8m0(tensors[stem + "_scales"]))  # [experts, outputs, K]
            out[stem] = rows.transpose(1, 2)
        elif not name.endswith("_scales"):
            out[name] = value
    return out


LAYOUTS = {"compressed-tensors": compressed_tensors, "modelopt": modelopt, "gpt-oss": gpt_oss}


def refused(dense, source):
    """Experts that the source stores as one tensor [experts, K, outputs], made one again."""
    for name in source:
        parent, leaf = name.rsplit(".", 1)
        if name in dense or leaf not in ("gate_up_proj", "down_proj"):
            continue
        count = source[name].shape[0]
        take = lambda part: torch.stack([dense.pop(f"{parent}.{e}.{part}.weight").float() for e in range(count)])
        if leaf == "down_proj":
            rows = take("down_proj")
        else:
            gate, up = take("gate_proj"), take("up_proj")
            is_interleaved = parent + ".gate_up_proj_bias" in source or any("sinks" in other for other in source)
            rows = torch.stack((gate, up), 2).flatten(1, 2) if is_interleaved else torch.cat((gate, up), 1)
        dense[name] = rows.transpose(1, 2)
        for bias in ("gate_proj", "up_proj", "down_proj"):
            for e in range(count):
                dense.pop(f"{parent}.{e}.{bias}.bias", None)
        for bias in (parent + ".gate_up_proj_bias", parent + ".down_proj_bias"):
            if bias in source:
                dense[bias] = source[bias]
    return dense


def is_weight(name):
    return re.search(r"(weight|_proj)$", name) is not None and "norm" not in name

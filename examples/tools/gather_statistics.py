"""Calibration statistics of a PyTorch model's linear layers, for `quantize_checkpoint --statistics`:

    from gather_statistics import gather
    gather(model, batches, "statistics.safetensors")

    quantize_checkpoint MODEL OUT --recipe nvfp4/min-error/gptq --statistics statistics.safetensors

Needs torch and safetensors. The file holds, for each input of K columns: INPUT.moments [matrices, K, K] (F64), the sum of
x^T x over all rows x that went in; INPUT.rows [matrices] (F64), how many these were; INPUT.amax [matrices] (F32), the
largest magnitude. `matrices` is 1, or the number of experts of a stack [experts, N, K]. The metadata name the input of each
weight, so that weights which share an input may share its statistics. Two streams (docs of gptq.hpp) also have INPUT.drift
[matrices, K, K] (F64): x is then what the packed model sees, x' the float model, and the drift the sum of (x' - x)^T x,
column by column.
"""

import torch
from safetensors.torch import save_file


def gather(model, batches, path):
    """Runs the batches, dictionaries of the model's arguments, and writes what the inputs of all torch.nn.Linear were to
    `path`. Rows that an `attention_mask` [sentences, tokens] leaves out do not count. Linear layers that no row reaches
    are left out, and so are experts that a model keeps in one tensor: those are no torch.nn.Linear."""
    seen, mask = {}, None

    def add(name, x):
        of_tokens = mask is not None and x.shape[:-1] == mask.shape
        rows = (x[mask.bool()] if of_tokens else x.flatten(0, -2)).double()
        if len(rows) > 0:
            moments, count, amax = seen.get(name, (0, 0, 0.0))
            seen[name] = moments + rows.T @ rows, count + len(rows), max(amax, rows.abs().max().item())

    hooks = [module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
             for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    tensors = {}
    for name, (moments, count, amax) in seen.items():
        tensors[name + ".moments"] = moments.cpu()[None]
        tensors[name + ".rows"] = torch.tensor([count], dtype=torch.float64)
        tensors[name + ".amax"] = torch.tensor([amax], dtype=torch.float32)
    save_file(tensors, path, {name + ".weight": name for name in seen})

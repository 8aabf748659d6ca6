"""Packs small checkpoints of many architectures in every layout and loads the results with the real readers.

    peers.py PROGRAMS WORK      the folder with quantize_checkpoint and verify_checkpoint, and a folder for what is made
"""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import torch
import transformers

import decode
import models

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS = (torch.arange(48) * 37 % 251).reshape(2, 24)
RECIPES = {"compressed-tensors": ("mxfp4-32/floor", "mxfp4-32/oas", "nvfp4/amax"), "modelopt": ("nvfp4/amax",),
           "gpt-oss": ("mxfp4-32/floor", "mxfp4-32/oas")}

def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float().flatten()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, 0).item()


def load(folder, dtype=torch.float32, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                                                    **options)
    return model, {what: sorted(map(str, names)) for what, names in info.items() if names}


def save_dense(tensors, config, folder):
    """A checkpoint without quantization, which transformers loads as any other."""
    shutil.rmtree(folder, ignore_errors=True)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return models.save({name: value.float() for name, value in tensors.items()}, config, folder)


def source_weights(folder):
    """The model's values, whatever form they are in."""
    tensors = models.tensors_of(folder)
    out = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scales = tensors.get(name + "_scale_inv")
        if scales is not None:
            rows, cols = value.shape
            grid = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
            value = value.float() * grid
        out[name] = value
    return decode.gpt_oss(out) if any(name.endswith("_blocks") for name in out) else out


class Energy:
    """Signal to noise over all weights that packing changed."""

    def __init__(self):
        self.signal = self.noise = 0.0

    def add(self, x, y):
        self.signal += x.double().square().sum().item()
        self.noise += (x.double() - y.double()).square().sum().item()

    def db(self):
        return float("inf") if self.noise == 0 else 10 * torch.tensor(self.signal / self.noise).log10().item()


def changed(before, after):
    """QSNR over the parameters of two models that differ."""
    energy, other = Energy(), dict(after.named_parameters())
    for name, value in before.named_parameters():
        if name in other and not torch.equal(value.float(), other[name].float()):
            energy.add(value.float(), other[name].float())
    return energy.db()


def own_compressed_tensors(weight, recipe):
    """The same weight by compressed-tensors' own functions."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    is_nv = recipe.startswith("nvfp4")
    size = 16 if is_nv else 32
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, group_size=size,
                            strategy="tensor_group" if is_nv else "group",
                            scale_dtype=torch.float8_e4m3fn if is_nv else torch.uint8, zp_dtype=None)
    blocks = weight.float().unflatten(-1, (-1, size))
    low, high = blocks.amin(-1), blocks.amax(-1)
    whole = generate_gparam(weight.float().amin(), weight.float().amax()) if is_nv else None
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    return fake_quantize(weight.float(), scale, zero, args, global_scale=whole)


def own_modelopt(weight, _):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    made, scale, whole = NVFP4QTensor.quantize(weight.clone(), 16)
    return made.dequantize(scale=scale, double_scale=whole, block_sizes={-1: 16}).float()


def own_qsnr(own, source, dense, recipe):
    """QSNR of the reader's own tool over the matrices that we packed."""
    energy = Energy()
    for name, value in source.items():
        if not decode.is_weight(name) or value.ndim < 2 or torch.equal(value.float(), dense[name].float()):
            continue
        rows = value if value.ndim == 2 else value.transpose(1, 2)
        for matrix in rows.reshape(-1, *rows.shape[-2:]):
            energy.add(matrix.float(), own(matrix.contiguous(), recipe))
    return energy.db()


def read_compressed_tensors(out, recipe):
    """transformers with compressed-tensors."""
    options = transformers.CompressedTensorsConfig(dequantize=True)
    return load(out, torch.float32, quantization_config=options)


def read_gpt_oss(out, recipe):
    """transformers' Mxfp4 loader, which unpacks where there is no GPU."""
    return load(out, torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True))


def read_modelopt(out, source, config, work):
    """ModelOpt's NVFP4QTensor for every weight, and transformers for the rest."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    tensors, dense = models.tensors_of(out), {}
    for name, value in tensors.items():
        if name + "_scale_2" in tensors:
            shape = (*value.shape[:-1], value.shape[-1] * 2)
            packed = NVFP4QTensor(torch.Size(shape), torch.float32, value)
            dense[name] = packed.dequantize(scale=tensors[name + "_scale"], double_scale=tensors[name + "_scale_2"],
                                            block_sizes={-1: 16}).float()
        elif not name.endswith(("_scale", "_scale_2")):
            dense[name] = value
    return load(save_dense(decode.refused(dense, source), config, work / "modelopt"))


def check(name, folder, layout, recipe, programs, work):
    """One line of the table; what is wrong stands first."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.run([programs / "quantize_checkpoint", folder, out, "--recipe", recipe, "--layout", layout,
                          "--shard-size", "0.001", "--quiet"], capture_output=True, text=True)
    if run.returncode != 0:
        return ("refused", run.stderr.strip().split("\n")[-1])
    verified = subprocess.run([programs / "verify_checkpoint", folder, out], capture_output=True, text=True)
    config, source = json.loads((folder / "config.json").read_text()), source_weights(folder)
    before, _ = load(save_dense(source, config, work / "source"))
    dense = decode.refused(decode.LAYOUTS[layout](models.tensors_of(out)), source)
    ours, lost = load(save_dense(dense, config, work / "dense"))
    if layout == "compressed-tensors":
        model, problems = read_compressed_tensors(out, recipe)
        own = own_qsnr(own_compressed_tensors, source, dense, recipe)
    elif layout == "modelopt":
        model, problems = read_modelopt(out, source, config, work)
        own = own_qsnr(own_modelopt, source, dense, recipe)
    else:
        model, problems = read_gpt_oss(out, recipe)
        own = None
    ours_out, theirs = logits(ours), logits(model)
    facts = {"same": cosine(ours_out, theirs), "original": cosine(logits(before), theirs), "qsnr": changed(before, model),
             "own": own}
    wrong = [] if verified.returncode == 0 else ["verify_checkpoint: " + verified.stderr.strip().split("\n")[-1]]
    wrong += [f"ours: {len(names)} {what}" for what, names in lost.items()]
    fault = None if wrong or layout != "compressed-tensors" else known_fault(model, problems, ours, source, out)
    if fault:
        return (f"reader's fault: {fault}", facts)
    wrong += [f"{len(names)} {what}" for what, names in problems.items()]
    if not facts["same"] > 0.999:
        wrong.append("other logits than ours")
    if own is not None and recipe != "mxfp4-32/floor" and facts["qsnr"] < own - 0.05:  # its own rule is another
        wrong.append("worse than its own tool")
    return ("; ".join(wrong) or "ok", facts)


def known_fault(model, problems, ours, source, out):
    """What transformers 5.24 with compressed-tensors 0.20 does to packed experts, whoever made them: exactly that, with
    every other value as it should be, or nothing."""
    theirs, right = dict(model.named_parameters()), dict(ours.named_parameters())
    other = sorted(name for name, value in right.items() if name not in theirs or
                   not torch.allclose(theirs[name].float(), value.float(), rtol=1e-2, atol=0))
    stacks = [name for name in source if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    if problems:
        modules = {re.sub(r"[.]weight(_packed)?$", "", name) for name in models.tensors_of(out)
                   if re.search(r"[.]experts[.][0-9]+[.].*weight_packed$", name)}
        is_known = (stacks and other == problems.get("missing_keys") == sorted(stacks) and
                    problems.get("unexpected_keys") == sorted(name + ".weight" for name in modules) and
                    len(problems) == 2)
        return "it has no packed experts for this architecture" if is_known else None
    scales = [value.item() for name, value in models.tensors_of(out).items()
              if re.search(r"experts[.].*weight_global_scale$", name)]
    if not other or not scales or not all(".experts." in name and name in theirs for name in other):
        return None
    for name in other:  # each matrix is as many times too large as its global scale says
        for matrix, right_one in zip(theirs[name].double(), right[name].double()):
            factor = ((matrix * right_one).sum() / right_one.square().sum()).item()
            if not torch.allclose(matrix, right_one * factor, rtol=1e-2, atol=0) or min(abs(factor / s - 1) for s in scales) > 1e-3:
                return None
    return "it leaves out the global scales of experts"


def main():
    programs, work = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    made = models.make(work)
    wanted = sys.argv[3:] or list(made)
    failed = 0
    print(f"{'architecture':18} {'layout':18} {'recipe':15} {'QSNR':>6} {'own':>6} {'cos ours':>9} {'cos source':>10}  result")
    for name in wanted:
        for layout, recipes in RECIPES.items():
            for recipe in recipes:
                if layout == "gpt-oss" and not name.startswith("gpt-oss"):
                    continue
                try:
                    result, facts = check(name, made[name], layout, recipe, programs, work)
                except Exception as fault:  # the reader's: it is what this looks for
                    result, facts = f"{type(fault).__name__}: {str(fault)[:200]}", None
                failed += result != "ok" and not result.startswith("reader's fault")
                numbers = " " * 34
                if isinstance(facts, dict):
                    own = "-" if facts["own"] is None else f"{facts['own']:.2f}"
                    numbers = f"{facts['qsnr']:6.2f} {own:>6} {facts['same']:9.5f} {facts['original']:10.5f}"
                elif isinstance(facts, str):
                    result += ": " + facts
                print(f"{name:18} {layout:18} {recipe:15} {numbers}  {result}", flush=True)
    print(f"{failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())

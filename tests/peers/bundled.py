"""The bundled mixture-of-experts model as GGUF, so that llama.cpp can run it, and its held-out documents.

    bundled.py DATA WORK    examples/data, and a folder for moe-16x2-f16.gguf and heldout.txt, for llama.cpp's programs
"""

import pathlib
import sys

import numpy as np
import torch
from safetensors import safe_open

import gguf


def interleaved(weight, heads):
    """Rows of a q or k projection in the order of llama.cpp's rotary embedding: pairs beside each other."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read(path):
    """All tensors as float32, and the metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata()


def as_text(tokens):
    """A character for each token: llama.cpp's programs take text, and take each of these for the token again."""
    return "".join(chr(0x4E00 + token) for token in tokens)


def write_gguf(source, path, dtype="F16"):
    """The model of examples/data/README.md in llama.cpp's "llama" architecture, matrices in `dtype`."""
    weights, facts = read(source)
    heads, layers, hidden = (int(facts[key]) for key in ("heads", "layers", "hidden"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("moe-16x2")
    writer.add_vocab_size(int(facts["vocab"]))
    tokens = range(int(facts["vocab"]))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([as_text([token]) for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(int(facts["expert_hidden"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(float(facts["norm_eps"]))
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(float(facts["rope_base"]))
    writer.add_expert_count(int(facts["experts"]))
    writer.add_expert_used_count(int(facts["top_k"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "F16" else gguf.LlamaFileType.MOSTLY_BF16)

    def add(name, tensor):
        values = tensor.contiguous().numpy()
        if values.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, values.astype(np.float32))
        elif dtype == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[dtype]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", weights["embed.weight"])
    add("output_norm.weight", weights["norm.weight"])
    for i in range(layers):
        old, new = f"layers.{i}.", f"blk.{i}."
        add(new + "attn_norm.weight", weights[old + "attn_norm.weight"])
        add(new + "attn_q.weight", interleaved(weights[old + "attn.q.weight"], heads))
        add(new + "attn_k.weight", interleaved(weights[old + "attn.k.weight"], heads))
        add(new + "attn_v.weight", weights[old + "attn.v.weight"])
        add(new + "attn_output.weight", weights[old + "attn.o.weight"])
        add(new + "ffn_norm.weight", weights[old + "moe_norm.weight"])
        add(new + "ffn_gate_inp.weight", weights[old + "moe.router.weight"])
        for ours, theirs in (("gate", "ffn_gate_exps"), ("up", "ffn_up_exps"), ("down", "ffn_down_exps")):
            add(f"{new}{theirs}.weight", weights[f"{old}moe.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def documents(path):
    """Tokens of each held-out document, and the negative log-likelihood that float32 arithmetic gives it."""
    with safe_open(path, "np") as file:
        tokens, offsets, nll = (file.get_tensor(name) for name in ("tokens", "document_offsets", "reference_nll"))
    return [tokens[a:b].astype(np.int32) for a, b in zip(offsets[:-1], offsets[1:])], nll


if __name__ == "__main__":
    data, work = (pathlib.Path(argument) for argument in sys.argv[1:3])
    write_gguf(data / "moe-16x2.safetensors", work / "moe-16x2-f16.gguf")
    held = documents(data / "moe-16x2.heldout.safetensors")[0]
    (work / "heldout.txt").write_text("".join(as_text(tokens) for tokens in held))

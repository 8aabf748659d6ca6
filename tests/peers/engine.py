"""llama.cpp itself on packed GGUF files: its own quantizer beside ours on the same F16 file, and held-out perplexity.

    engine.py PROGRAMS DATA WORK    the folder with quantize_checkpoint, examples/data, and a folder for what is made

llama.cpp is the library of the package llama-cpp-python; LLAMA_CPP_LIB_PATH names another build of it.
"""

import ctypes
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
import transformers

import bundled
import gguf
import llama_cpp as llama

DOCUMENTS = 12  # held-out, for perplexity; as many others make the importance matrix
OURS = ("mxfp4-32/floor", "mxfp4-32/oas", "mxfp4-32/min-error", "nvfp4/amax", "nvfp4/min-error")


def quiet(level, text, data):
    """llama.cpp's log goes nowhere."""


torch.set_num_threads(1)
LOG = llama.llama_log_callback(quiet)
llama.llama_log_set(LOG, ctypes.c_void_p(0))
llama.llama_backend_init()


def perplexity(path, documents):
    """exp of the mean negative log-likelihood of every token after the first of each document."""
    options = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        return None
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(len(d) for d in documents) + 8
    settings.n_threads = settings.n_threads_batch = 1  # its threads spin while they wait
    context = llama.llama_init_from_model(model, settings)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    total = count = 0
    for tokens in documents:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, True
            batch.seq_id[i][0] = 0
        assert llama.llama_decode(context, batch) == 0
        out = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), vocabulary)).astype(np.float64)
        out -= out.max(1, keepdims=True)
        out -= np.log(np.exp(out).sum(1, keepdims=True))
        total -= out[np.arange(len(tokens) - 1), tokens[1:]].sum()
        count += len(tokens) - 1
        llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return float(np.exp(total / count))


def stock(source, out):
    """llama-quantize's MXFP4_MOE: experts in MXFP4, the other matrices in Q8_0. Returns seconds."""
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = 38, 1
    start = time.perf_counter()
    assert llama.llama_model_quantize(str(source).encode(), str(out).encode(), options) == 0
    return time.perf_counter() - start


def ours(programs, source, out, recipe, *more):
    start = time.perf_counter()
    subprocess.run([programs / "quantize_checkpoint", source, out, "--recipe", "experts=" + recipe, "--threads", "1",
                    "--quiet", *more], check=True)
    return time.perf_counter() - start


def decoded(path):
    """Values by name, as the gguf package decodes them, times the tensor scales."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    out = {}
    for name, tensor in tensors.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        scale = tensors.get(name.replace(".weight", ".scale"))
        if tensor.tensor_type == gguf.GGMLQuantizationType.NVFP4 and scale is not None:
            values *= np.asarray(scale.data, np.float64).reshape((-1,) + (1,) * (values.ndim - 1))
        out[name] = values
    return out


def signal_to_noise(before, after, weights=None):
    """Over the experts, in dB; weighted by the columns' mean squares if they are given."""
    signal = noise = 0
    for name, x in before.items():
        if "_exps" not in name:
            continue
        w = 1 if weights is None else weights[name][:, None, :]
        signal += (w * x**2).sum()
        noise += (w * (x - after[name]) ** 2).sum()
    return 10 * np.log10(signal / noise)


def mixtral(data):
    """The bundled model in transformers, whose layers say what goes into the experts."""
    weights, facts = bundled.read(data / "moe-16x2.safetensors")
    hidden, heads, layers, experts = (int(facts[key]) for key in ("hidden", "heads", "layers", "experts"))
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=int(facts["vocab"]), hidden_size=hidden, intermediate_size=int(facts["expert_hidden"]),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, num_local_experts=experts,
        num_experts_per_tok=int(facts["top_k"]), rms_norm_eps=float(facts["norm_eps"]), tie_word_embeddings=True,
        rope_theta=float(facts["rope_base"]), sliding_window=None, max_position_embeddings=4096)).eval()
    state = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["norm.weight"]}
    for i in range(layers):
        old, new = f"layers.{i}.", f"model.layers.{i}."
        for part in "qkvo":
            state[f"{new}self_attn.{part}_proj.weight"] = weights[f"{old}attn.{part}.weight"]
        state[new + "input_layernorm.weight"] = weights[old + "attn_norm.weight"]
        state[new + "post_attention_layernorm.weight"] = weights[old + "moe_norm.weight"]
        state[new + "mlp.gate.weight"] = weights[old + "moe.router.weight"]
        state[new + "mlp.experts.gate_up_proj"] = torch.cat((weights[old + "moe.gate.weight"],
                                                             weights[old + "moe.up.weight"]), 1)
        state[new + "mlp.experts.down_proj"] = weights[old + "moe.down.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def write_imatrix(data, documents, path):
    """Sums of squares of what goes into each expert, in the form of llama-imatrix. Returns their means by tensor."""
    model, sums = mixtral(data), {}

    def hook(layer):
        def look(module, args, kwargs):
            states, chosen = (list(args) + list(kwargs.values()))[:2]
            for e in range(module.gate_up_proj.shape[0]):
                x = states[(chosen == e).any(-1)]
                gate, up = (x @ module.gate_up_proj[e].T).chunk(2, -1)
                inner = torch.nn.functional.silu(gate) * up
                for name, rows in (("gate", x), ("up", x), ("down", inner)):
                    key = f"blk.{layer}.ffn_{name}_exps.weight"
                    total, count = sums.setdefault(key, (np.zeros((module.gate_up_proj.shape[0], rows.shape[1])),
                                                         np.zeros(module.gate_up_proj.shape[0])))
                    total[e] += rows.double().square().sum(0).numpy()
                    count[e] += len(rows)
        return look

    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(hook(i), with_kwargs=True)
    with torch.no_grad():
        for tokens in documents:
            model(torch.from_numpy(tokens).long().unsqueeze(0))
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["held-out documents"])
    writer.add_uint32("imatrix.chunk_count", len(documents))
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (total, count) in sums.items():
        writer.add_tensor(name + ".in_sum2", total.astype(np.float32))
        writer.add_tensor(name + ".counts", count.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: total / np.maximum(count, 1)[:, None] for name, (total, count) in sums.items()}


def main():
    programs, data, work = (pathlib.Path(argument).resolve() for argument in sys.argv[1:4])
    source, out = work / "moe-16x2-f16.gguf", work / "packed.gguf"
    bundled.write_gguf(data / "moe-16x2.safetensors", source)
    documents, reference = bundled.documents(data / "moe-16x2.heldout.safetensors")
    held, others = documents[::16][:DOCUMENTS], documents[1::16][:DOCUMENTS]
    known = np.exp(reference[::16][:DOCUMENTS].sum() / sum(len(d) - 1 for d in held))
    before, weights = decoded(source), write_imatrix(data, others, work / "imatrix.gguf")
    print(f"{'experts':34} {'seconds':>8} {'SNR dB':>7} {'weighted':>8} {'perplexity':>10}")

    def line(name, seconds):
        after = decoded(out)
        print(f"{name:34} {seconds:8.3f} {signal_to_noise(before, after):7.3f} "
              f"{signal_to_noise(before, after, weights):8.3f} {perplexity(out, held):10.4f}", flush=True)

    plain = perplexity(source, held)
    print(f"{'F16 (float32 elsewhere: %.4f)' % known:34} {'':8} {'':7} {'':8} {plain:10.4f}")
    assert abs(plain / known - 1) < 0.01, "llama.cpp runs another model than the bundled one"
    line("llama-quantize MXFP4_MOE", stock(source, out))
    for recipe in OURS:
        line(recipe, ours(programs, source, out, recipe))
        subprocess.run([programs / "verify_checkpoint", source, out, "--quiet"], check=True)
    for recipe in ("mxfp4-32/min-error", "nvfp4/min-error"):
        line(recipe + ", imatrix", ours(programs, source, out, recipe, "--imatrix", work / "imatrix.gguf"))


if __name__ == "__main__":
    main()

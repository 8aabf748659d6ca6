#include "check.hpp"

#include <tetromino/io/checkpoint/roles.hpp>

#include <map>
#include <string>
#include <vector>

namespace {

namespace io = tetromino::io;
using role = io::tensor_role;
using shape = std::vector<std::size_t>;

/// What a tensor must be taken for: `packs` says whether it may be packed, `transposed` whether it is stored [K, N].
struct expected {
  std::string name;
  shape dimensions;
  role is;
  bool packs = false;
  bool transposed = false;
};

/// Names and shapes as published model definitions have them, with small sizes.
void check(const std::string& architecture, const nlohmann::json& config, const std::vector<expected>& tensors) {
  std::vector<io::tensor_facts> facts;
  for (const auto& tensor : tensors) facts.push_back({tensor.name, tensor.dimensions});
  const auto kinds = io::roles_of(facts, config);
  REQUIRE(kinds.size() == tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CAPTURE(architecture, tensors[i].name, kinds[i].kept_because);
    CHECK(io::name(kinds[i].role) == io::name(tensors[i].is));
    CHECK(kinds[i].kept_because.empty() == tensors[i].packs);
    if (tensors[i].packs) CHECK(kinds[i].is_transposed == tensors[i].transposed);
  }
}

constexpr bool packs = true, transposed = true;

}  // namespace

TEST_CASE("dense decoders") {
  check("Llama", {{"model_type", "llama"}, {"hidden_size", 64}},
        {{"model.embed_tokens.weight", {256, 64}, role::embedding},
         {"model.layers.0.self_attn.q_proj.weight", {64, 64}, role::linear, packs},
         {"model.layers.0.self_attn.k_proj.weight", {32, 64}, role::linear, packs},
         {"model.layers.0.self_attn.k_proj.bias", {32}, role::bias},
         {"model.layers.0.self_attn.o_proj.weight", {64, 64}, role::linear, packs},
         {"model.layers.0.self_attn.q_norm.weight", {16}, role::norm},
         {"model.layers.0.self_attn.rotary_emb.inv_freq", {8}, role::embedding},
         {"model.layers.0.mlp.gate_proj.weight", {128, 64}, role::linear, packs},
         {"model.layers.0.mlp.down_proj.weight", {64, 128}, role::linear, packs},
         {"model.layers.0.input_layernorm.weight", {64}, role::norm},
         {"model.norm.weight", {64}, role::norm},
         {"lm_head.weight", {256, 64}, role::lm_head}});
  check("Phi-3", {{"hidden_size", 64}},
        {{"model.layers.0.self_attn.qkv_proj.weight", {192, 64}, role::linear, packs},
         {"model.layers.0.mlp.gate_up_proj.weight", {256, 64}, role::linear, packs}});
  check("Meta's names", nullptr,
        {{"tok_embeddings.weight", {256, 64}, role::embedding},
         {"layers.0.attention.wq.weight", {64, 64}, role::linear, packs},
         {"layers.0.feed_forward.w1.weight", {128, 64}, role::linear, packs},
         {"layers.0.attention_norm.weight", {64}, role::norm},
         {"output.weight", {256, 64}, role::lm_head}});
  check("Falcon, GPT-NeoX", {{"hidden_size", 64}},
        {{"transformer.h.0.self_attention.query_key_value.weight", {192, 64}, role::linear, packs},
         {"transformer.h.0.self_attention.dense.weight", {64, 64}, role::linear, packs},
         {"transformer.h.0.mlp.dense_h_to_4h.weight", {256, 64}, role::linear, packs},
         {"gpt_neox.embed_in.weight", {256, 64}, role::embedding},
         {"embed_out.weight", {256, 64}, role::lm_head},
         {"transformer.h.0.ln_attn.weight", {64}, role::norm}});
  check("Gemma 3n", {{"hidden_size", 64}},
        {{"model.layers.0.per_layer_input_gate.weight", {16, 64}, role::other},
         {"model.layers.0.altup.modality_router.weight", {4, 64}, role::router},
         {"model.per_layer_model_projection.weight", {64, 64}, role::other}});
}

TEST_CASE("Conv1D stores [K, N], which biases show, also for its square matrices") {
  check("GPT-2", {{"model_type", "gpt2"}, {"n_embd", 64}},
        {{"wte.weight", {256, 64}, role::embedding},
         {"wpe.weight", {128, 64}, role::embedding},
         {"h.0.ln_1.weight", {64}, role::norm},
         {"h.0.attn.bias", {1, 1, 128, 128}, role::bias},
         {"h.0.attn.c_attn.weight", {64, 192}, role::linear, packs, transposed},
         {"h.0.attn.c_attn.bias", {192}, role::bias},
         {"h.0.attn.c_proj.weight", {64, 64}, role::linear, packs, transposed},
         {"h.0.attn.c_proj.bias", {64}, role::bias},
         {"h.0.mlp.c_fc.weight", {64, 256}, role::linear, packs, transposed},
         {"h.0.mlp.c_fc.bias", {256}, role::bias},
         {"h.0.mlp.c_proj.weight", {256, 64}, role::linear, packs, transposed},
         {"h.0.mlp.c_proj.bias", {64}, role::bias},
         {"ln_f.weight", {64}, role::norm}});
  check("GPTBigCode: the same names, [N, K]", {{"model_type", "gpt_bigcode"}, {"n_embd", 64}},
        {{"transformer.h.0.attn.c_attn.weight", {80, 64}, role::linear, packs},
         {"transformer.h.0.attn.c_attn.bias", {80}, role::bias},
         {"transformer.h.0.mlp.c_proj.weight", {64, 256}, role::linear, packs},
         {"transformer.h.0.mlp.c_proj.bias", {64}, role::bias}});
}

TEST_CASE("encoders and encoder-decoders") {
  check("BERT, MiniLM", {{"hidden_size", 64}},
        {{"embeddings.word_embeddings.weight", {256, 64}, role::embedding},
         {"embeddings.position_embeddings.weight", {128, 64}, role::embedding},
         {"embeddings.LayerNorm.weight", {64}, role::norm},
         {"encoder.layer.0.attention.self.query.weight", {64, 64}, role::linear, packs},
         {"encoder.layer.0.attention.output.dense.weight", {64, 64}, role::linear, packs},
         {"encoder.layer.0.attention.output.LayerNorm.weight", {64}, role::norm},
         {"encoder.layer.0.intermediate.dense.weight", {256, 64}, role::linear, packs},
         {"encoder.layer.0.output.dense.weight", {64, 256}, role::linear, packs},
         {"pooler.dense.weight", {64, 64}, role::lm_head},
         {"cls.predictions.transform.dense.weight", {64, 64}, role::lm_head},
         {"classifier.weight", {2, 64}, role::lm_head}});
  check("T5", {{"d_model", 64}},
        {{"shared.weight", {256, 64}, role::embedding},
         {"encoder.block.0.layer.0.SelfAttention.q.weight", {64, 64}, role::linear, packs},
         {"encoder.block.0.layer.0.SelfAttention.o.weight", {64, 64}, role::linear, packs},
         {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", {32, 4}, role::embedding},
         {"encoder.block.0.layer.0.layer_norm.weight", {64}, role::norm},
         {"decoder.block.0.layer.1.EncDecAttention.k.weight", {64, 64}, role::linear, packs},
         {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight", {128, 64}, role::linear, packs},
         {"encoder.block.0.layer.1.DenseReluDense.wo.weight", {64, 128}, role::linear, packs}});
  check("Whisper", {{"d_model", 64}},
        {{"model.encoder.conv1.weight", {64, 80, 3}, role::convolution},
         {"model.encoder.embed_positions.weight", {128, 64}, role::embedding},
         {"model.decoder.layers.0.encoder_attn.out_proj.weight", {64, 64}, role::linear, packs},
         {"model.decoder.layers.0.fc1.weight", {256, 64}, role::linear, packs},
         {"proj_out.weight", {256, 64}, role::other}});
  check("ViT", {{"hidden_size", 64}},
        {{"patch_embed.proj.weight", {64, 3, 16, 16}, role::convolution},
         {"pos_embed", {1, 197, 64}, role::embedding},
         {"cls_token", {1, 1, 64}, role::convolution},
         {"blocks.0.attn.qkv.weight", {192, 64}, role::linear, packs},
         {"head.weight", {10, 64}, role::lm_head}});
}

TEST_CASE("routed experts, and gates that route beside gates that multiply") {
  check("Mixtral", {{"hidden_size", 64}, {"num_local_experts", 4}},
        {{"model.layers.0.block_sparse_moe.gate.weight", {4, 64}, role::router},
         {"model.layers.0.block_sparse_moe.experts.0.w1.weight", {128, 64}, role::routed_expert, packs},
         {"model.layers.0.block_sparse_moe.experts.0.w2.weight", {64, 128}, role::routed_expert, packs}});
  check("Qwen2-MoE, Qwen3-MoE", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"model.layers.0.mlp.gate.weight", {4, 64}, role::router},
         {"model.layers.0.mlp.shared_expert_gate.weight", {1, 64}, role::shared_expert_gate},
         {"model.layers.0.mlp.shared_expert.gate_proj.weight", {128, 64}, role::linear, packs},
         {"model.layers.0.mlp.experts.3.up_proj.weight", {32, 64}, role::routed_expert, packs}});
  check("Qwen3-Next", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"model.layers.0.linear_attn.in_proj_qkvz.weight", {256, 64}, role::linear, packs},
         {"model.layers.0.linear_attn.in_proj_ba.weight", {16, 64}, role::state_space},
         {"model.layers.0.linear_attn.conv1d.weight", {96, 1, 4}, role::convolution},
         {"model.layers.0.linear_attn.A_log", {8}, role::state_space},
         {"model.layers.0.linear_attn.dt_bias", {8}, role::bias},
         {"model.layers.0.linear_attn.norm.weight", {16}, role::norm},
         {"model.layers.0.linear_attn.out_proj.weight", {64, 64}, role::linear, packs}});
  check("DeepSeek-V3", {{"hidden_size", 64}, {"n_routed_experts", 8}},
        {{"model.layers.3.self_attn.q_a_proj.weight", {32, 64}, role::linear, packs},
         {"model.layers.3.self_attn.q_a_layernorm.weight", {32}, role::norm},
         {"model.layers.3.self_attn.kv_a_proj_with_mqa.weight", {48, 64}, role::linear, packs},
         {"model.layers.3.self_attn.kv_b_proj.weight", {64, 32}, role::linear, packs},
         {"model.layers.3.mlp.gate.weight", {8, 64}, role::router},
         {"model.layers.3.mlp.gate.e_score_correction_bias", {8}, role::bias},
         {"model.layers.3.mlp.experts.7.down_proj.weight", {64, 32}, role::routed_expert, packs},
         {"model.layers.3.mlp.shared_experts.down_proj.weight", {64, 32}, role::linear, packs},
         {"model.layers.61.eh_proj.weight", {64, 128}, role::other},
         {"model.layers.61.enorm.weight", {64}, role::norm},
         {"model.layers.61.embed_tokens.weight", {256, 64}, role::embedding},
         {"model.layers.61.shared_head.head.weight", {256, 64}, role::lm_head},
         {"model.layers.3.mlp.experts.7.down_proj.weight_scale_inv", {1, 1}, role::scale}});
  check("Hunyuan, Jamba, Phi-3.5", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"model.layers.0.mlp.gate.wg.weight", {4, 64}, role::router},
         {"model.layers.0.feed_forward.router.weight", {4, 64}, role::router},
         {"model.layers.0.feed_forward.experts.1.gate_proj.weight", {128, 64}, role::routed_expert, packs},
         {"model.layers.0.ffn.gate.weight", {4, 64}, role::router},
         {"model.layers.0.mamba.dt_layernorm.weight", {8}, role::norm}});
  check("a gate that multiplies", nullptr,
        {{"layers.0.moe.router.weight", {16, 64}, role::router},
         {"layers.0.moe.gate.weight", {16, 64, 64}, role::fused_experts, packs},
         {"layers.0.moe.up.weight", {16, 64, 64}, role::fused_experts, packs},
         {"layers.0.moe.down.weight", {16, 64, 64}, role::fused_experts, packs},
         {"layers.1.mlp.gate.weight", {128, 64}, role::linear, packs},
         {"layers.1.mlp.up.weight", {128, 64}, role::linear, packs},
         {"layers.2.mlp.gate.weight", {8, 64}, role::router},
         {"layers.2.mlp.up.weight", {128, 64}, role::linear, packs}});
}

TEST_CASE("stacks of experts are read along their outputs, whichever way they lie") {
  check("gpt-oss", {{"hidden_size", 96}, {"num_local_experts", 4}},
        {{"model.layers.0.mlp.experts.gate_up_proj", {4, 96, 192}, role::fused_experts, packs, transposed},
         {"model.layers.0.mlp.experts.gate_up_proj_bias", {4, 192}, role::bias},
         {"model.layers.0.mlp.experts.down_proj", {4, 96, 96}, role::fused_experts, packs, transposed},
         {"model.layers.0.mlp.experts.down_proj_bias", {4, 96}, role::bias},
         {"model.layers.0.mlp.router.weight", {4, 96}, role::router},
         {"model.layers.0.self_attn.sinks", {8}, role::other}});
  check("Llama 4", {{"text_config", {{"hidden_size", 64}, {"num_local_experts", 4}}}},
        {{"language_model.model.layers.0.feed_forward.experts.gate_up_proj",
          {4, 64, 96},
          role::fused_experts,
          packs,
          transposed},
         {"language_model.model.layers.0.feed_forward.experts.down_proj",
          {4, 48, 64},
          role::fused_experts,
          packs,
          transposed},
         {"language_model.model.layers.0.feed_forward.router.weight", {4, 64}, role::router},
         {"language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight", {48, 64}, role::linear, packs},
         {"vision_model.model.layers.0.self_attn.q_proj.weight", {64, 64}, role::linear},
         {"model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.q_proj.weight", {64, 64}, role::linear},
         {"multi_modal_projector.linear_1.weight", {64, 64}, role::other}});
  check("without a config, two neighbours decide", nullptr,
        {{"model.layers.0.mlp.experts.gate_up_proj", {4, 96, 64}, role::fused_experts, packs},
         {"model.layers.0.mlp.experts.down_proj", {4, 64, 48}, role::fused_experts, packs},
         {"model.layers.1.mlp.experts.gate_up_proj", {4, 64, 96}, role::fused_experts, packs, transposed},
         {"model.layers.1.mlp.experts.down_proj", {4, 48, 64}, role::fused_experts, packs, transposed},
         {"model.layers.2.mlp.experts.gate_up_proj", {4, 64, 64}, role::fused_experts}});
  check("Granite", {{"hidden_size", 64}, {"num_local_experts", 4}},
        {{"model.layers.0.block_sparse_moe.input_linear.weight", {4, 96, 64}, role::fused_experts, packs},
         {"model.layers.0.block_sparse_moe.output_linear.weight", {4, 64, 48}, role::fused_experts, packs},
         {"model.layers.0.block_sparse_moe.router.layer.weight", {4, 64}, role::router}});
  check("DBRX, XLNet: not known", {{"d_model", 64}, {"num_experts", 4}},
        {{"transformer.blocks.0.ffn.experts.mlp.w1", {192, 64}, role::other},
         {"transformer.blocks.0.ffn.router.layer.weight", {4, 64}, role::router},
         {"transformer.layer.0.rel_attn.q", {64, 4, 16}, role::other}});
}

TEST_CASE("state-space layers") {
  check("Mamba", {{"hidden_size", 64}},
        {{"backbone.embeddings.weight", {256, 64}, role::embedding},
         {"backbone.layers.0.mixer.in_proj.weight", {256, 64}, role::linear, packs},
         {"backbone.layers.0.mixer.conv1d.weight", {128, 1, 4}, role::convolution},
         {"backbone.layers.0.mixer.x_proj.weight", {36, 128}, role::state_space},
         {"backbone.layers.0.mixer.dt_proj.weight", {128, 4}, role::state_space},
         {"backbone.layers.0.mixer.A_log", {128, 16}, role::state_space},
         {"backbone.layers.0.mixer.D", {128}, role::state_space},
         {"backbone.layers.0.mixer.out_proj.weight", {64, 128}, role::linear, packs},
         {"backbone.norm_f.weight", {64}, role::norm}});
  check("LFM2, Conformer", {{"hidden_size", 64}},
        {{"model.layers.0.conv.conv.weight", {64, 1, 3}, role::convolution},
         {"model.layers.0.conv.in_proj.weight", {192, 64}, role::linear, packs},
         {"encoder.layers.0.conv_module.pointwise_conv1.weight", {128, 64, 1}, role::convolution}});
}

TEST_CASE("what nobody knows is kept, whatever it looks like") {
  check("tomorrow's model", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"model.layers.0.mixer.frobnicate.weight", {64, 64}, role::other},
         {"model.layers.0.norm1.linear.weight", {128, 64}, role::other},
         {"model.layers.0.self_attention.layernorm_qkv.weight", {192, 64}, role::other},
         {"model.layers.0.attn_gate.weight", {8, 64}, role::other},
         {"model.layers.0.moe_gate.weight", {4, 64}, role::router},
         {"model.layers.0.router.0.fc1.weight", {64, 64}, role::router},
         {"time_embed.linear_1.weight", {64, 64}, role::embedding},
         {"model.layers.0.experts.gate_up", {4, 64, 64}, role::other},
         {"w", {64, 64}, role::other},
         {"", {64, 64}, role::other},
         {"..", {64, 64}, role::other},
         {"model.layers.0.self_attn.q_proj.weight", {}, role::other},
         {"model.layers.0.self_attn.q_proj.lora_A.weight", {8, 64}, role::other}});
}

TEST_CASE("routers, heads and gates by what they are, whatever model they are in") {
  check("Switch Transformers, NLLB-MoE", {{"d_model", 64}, {"num_experts", 4}},
        {{"encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight", {128, 64}, role::routed_expert, packs},
         {"encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight", {64, 128}, role::routed_expert, packs},
         {"model.decoder.layers.0.ffn.experts.expert_0.fc1.weight", {128, 64}, role::routed_expert, packs},
         {"encoder.block.1.layer.1.mlp.router.classifier.weight", {4, 64}, role::router},
         {"model.layers.0.mlp.experts.w1.weight", {512, 64}, role::other}});
  check("routers with layers of their own", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"layers.0.moe.gating_network.fc1.weight", {64, 64}, role::router},
         {"layers.0.moe.routing.out_proj.weight", {4, 64}, role::router},
         {"layers.0.moe.token_router.w1.weight", {4, 64}, role::router},
         {"layers.0.self_attention.experts.router.layer.weight", {4, 64}, role::router},
         {"layers.0.attn.gate_layer.fc1.weight", {64, 64}, role::other},
         {"layers.0.attn.head_gate.out_proj.weight", {64, 64}, role::other}});
  check("BART, mBART", {{"d_model", 64}},
        {{"classification_head.out_proj.weight", {4, 64}, role::lm_head},
         {"model.decoder.layers.0.self_attn.out_proj.weight", {64, 64}, role::linear, packs},
         {"decoder.layers.0.multi_head_attention.q_proj.weight", {64, 64}, role::linear, packs}});
  check("GLM-4-MoE, dots.llm1, ERNIE 4.5", {{"hidden_size", 64}, {"n_routed_experts", 8}},
        {{"model.layers.1.mlp.gate.weight", {8, 64}, role::router},
         {"model.layers.1.mlp.moe_statics.e_score_correction_bias", {1, 8}, role::bias},
         {"model.layers.1.mlp.experts.7.gate_proj.weight", {32, 64}, role::routed_expert, packs},
         {"model.layers.1.mlp.shared_experts.down_proj.weight", {64, 32}, role::linear, packs}});
  check("MiniMax", {{"hidden_size", 64}, {"num_local_experts", 4}},
        {{"model.layers.0.self_attn.qkv_proj.weight", {192, 64}, role::linear, packs},
         {"model.layers.0.self_attn.output_gate.weight", {64, 64}, role::other},
         {"model.layers.0.self_attn.slope_rate", {4, 1, 1}, role::convolution},
         {"model.layers.0.self_attn.key_decay", {4, 256, 1}, role::other},
         {"model.layers.0.block_sparse_moe.gate.weight", {4, 64}, role::router}});
  check("Kimi Linear", {{"hidden_size", 64}, {"num_experts", 4}},
        {{"model.layers.0.self_attn.A_log", {1, 1, 32, 1}, role::state_space},
         {"model.layers.0.self_attn.q_conv1d.weight", {128, 1, 4}, role::convolution},
         {"model.layers.0.self_attn.b_proj.weight", {32, 64}, role::state_space},
         {"model.layers.0.self_attn.f_a_proj.weight", {64, 64}, role::other}});
  check("DeepSeek-V4", {{"hidden_size", 64}, {"n_routed_experts", 4}},
        {{"head.weight", {256, 64}, role::lm_head},
         {"model.hc_head.hc_fn", {4, 256}, role::lm_head},
         {"model.layers.0.attn.compressor.wgate.weight", {64, 64}, role::other},
         {"model.layers.0.hc_attn_fn", {24, 256}, role::other},
         {"model.layers.0.ffn.gate.weight", {4, 64}, role::router},
         {"model.layers.0.ffn.shared_experts.w1.weight", {128, 64}, role::linear, packs}});
  check("RWKV, xLSTM, RecurrentGemma", {{"hidden_size", 64}},
        {{"rwkv.blocks.0.attention.time_mix_key", {1, 1, 64}, role::convolution},
         {"backbone.blocks.0.mlstm_layer.igate_preact.weight", {4, 64}, role::other},
         {"backbone.blocks.0.ffn.proj_up_gate.weight", {128, 64}, role::other},
         {"model.layers.0.temporal_block.conv_1d.weight", {64, 1, 4}, role::convolution},
         {"model.layers.0.temporal_block.rg_lru.input_gate_weight", {4, 32, 32}, role::other},
         {"model.layers.0.temporal_block.linear_x.weight", {64, 64}, role::other}});
}

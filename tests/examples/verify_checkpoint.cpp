#include "support/model_folder.hpp"

#include "examples/program.hpp"

#include <tetromino/io/gguf.hpp>

#include <set>

/// Models of published architectures through both programs, in every layout, read back without the library.

namespace {

using namespace tetromino_test;

/// What becomes of a tensor: it stays, or is packed as a matrix [N, K], or as a stack of experts.
enum class fate { kept, matrix, transposed_matrix, stack, transposed_stack };

struct tensor_case {
  std::string name;
  std::vector<std::size_t> shape;
  fate becomes = fate::kept;
};

struct architecture {
  std::string name;
  nlohmann::json config;
  std::vector<tensor_case> tensors;
  bool rows_in_turn = false;  ///< gate and up of a stack: row by row, rather than one above the other
};

constexpr fate matrix = fate::matrix, stack = fate::stack, transposed = fate::transposed_stack;

const std::vector<architecture> architectures = {
    {"llama",
     {{"model_type", "llama"}, {"hidden_size", 64}},
     {{"model.embed_tokens.weight", {96, 64}},
      {"model.layers.0.self_attn.q_proj.weight", {64, 64}, matrix},
      {"model.layers.0.self_attn.k_proj.weight", {32, 64}, matrix},
      {"model.layers.0.self_attn.v_proj.weight", {32, 64}, matrix},
      {"model.layers.0.self_attn.o_proj.weight", {64, 64}, matrix},
      {"model.layers.0.mlp.gate_proj.weight", {128, 64}, matrix},
      {"model.layers.0.mlp.up_proj.weight", {128, 64}, matrix},
      {"model.layers.0.mlp.down_proj.weight", {64, 128}, matrix},
      {"model.layers.0.input_layernorm.weight", {64}},
      {"lm_head.weight", {96, 64}}}},
    {"qwen2_moe",
     {{"model_type", "qwen2_moe"}, {"hidden_size", 64}, {"num_experts", 2}},
     {{"model.layers.0.self_attn.q_proj.weight", {64, 64}, matrix},
      {"model.layers.0.self_attn.q_proj.bias", {64}},
      {"model.layers.0.mlp.gate.weight", {2, 64}},
      {"model.layers.0.mlp.shared_expert_gate.weight", {1, 64}},
      {"model.layers.0.mlp.shared_expert.down_proj.weight", {64, 96}, matrix},
      {"model.layers.0.mlp.experts.0.gate_proj.weight", {32, 64}, matrix},
      {"model.layers.0.mlp.experts.1.gate_proj.weight", {32, 64}, matrix},
      {"model.layers.0.mlp.experts.0.up_proj.weight", {32, 64}, matrix},
      {"model.layers.0.mlp.experts.1.up_proj.weight", {32, 64}, matrix}}},
    {"qwen3_next",
     {{"model_type", "qwen3_next"}, {"hidden_size", 64}, {"num_experts", 2}},
     {{"model.layers.0.linear_attn.in_proj_qkvz.weight", {192, 64}, matrix},
      {"model.layers.0.linear_attn.in_proj_ba.weight", {32, 64}},
      {"model.layers.0.linear_attn.conv1d.weight", {96, 1, 4}},
      {"model.layers.0.linear_attn.A_log", {8}},
      {"model.layers.0.linear_attn.out_proj.weight", {64, 64}, matrix},
      {"model.layers.0.mlp.gate.weight", {2, 64}}}},
    {"mixtral",
     {{"model_type", "mixtral"}, {"hidden_size", 64}, {"num_local_experts", 2}},
     {{"model.layers.0.block_sparse_moe.gate.weight", {2, 64}},
      {"model.layers.0.block_sparse_moe.experts.0.w1.weight", {96, 64}, matrix},
      {"model.layers.0.block_sparse_moe.experts.0.w2.weight", {64, 96}, matrix},
      {"model.layers.0.block_sparse_moe.experts.0.w3.weight", {96, 64}, matrix}}},
    {"deepseek_v3",
     {{"model_type", "deepseek_v3"}, {"hidden_size", 64}, {"n_routed_experts", 2}},
     {{"model.layers.0.self_attn.q_a_proj.weight", {32, 64}, matrix},
      {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight", {48, 64}, matrix},
      {"model.layers.0.self_attn.kv_a_layernorm.weight", {32}},
      {"model.layers.0.self_attn.kv_b_proj.weight", {64, 32}, matrix},
      {"model.layers.0.mlp.gate.weight", {2, 64}},
      {"model.layers.0.mlp.gate.e_score_correction_bias", {2}},
      {"model.layers.0.mlp.experts.1.down_proj.weight", {64, 32}, matrix},
      {"model.layers.0.eh_proj.weight", {64, 128}}}},
    {"gpt_oss",
     {{"model_type", "gpt_oss"}, {"hidden_size", 64}, {"num_local_experts", 2}},
     {{"model.layers.0.self_attn.q_proj.weight", {64, 64}, matrix},
      {"model.layers.0.self_attn.sinks", {8}},
      {"model.layers.0.mlp.router.weight", {2, 64}},
      {"model.layers.0.mlp.experts.gate_up_proj", {2, 64, 192}, transposed},
      {"model.layers.0.mlp.experts.gate_up_proj_bias", {2, 192}},
      {"model.layers.0.mlp.experts.down_proj", {2, 96, 64}, transposed},
      {"model.layers.0.mlp.experts.down_proj_bias", {2, 64}}},
     true},
    {"llama4",
     {{"model_type", "llama4"}, {"text_config", {{"hidden_size", 64}, {"num_local_experts", 2}}}},
     {{"language_model.model.layers.0.feed_forward.experts.gate_up_proj", {2, 64, 128}, transposed},
      {"language_model.model.layers.0.feed_forward.experts.down_proj", {2, 64, 64}, transposed},
      {"language_model.model.layers.0.feed_forward.router.weight", {2, 64}},
      {"language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight", {64, 64}, matrix},
      {"vision_model.model.layers.0.self_attn.q_proj.weight", {64, 64}}}},
    {"a stack, outputs first",
     {{"model_type", "new_moe"}, {"hidden_size", 64}, {"num_experts", 2}},
     {{"model.layers.0.mlp.experts.gate_up_proj", {2, 192, 64}, stack},
      {"model.layers.0.mlp.experts.down_proj", {2, 64, 96}, stack},
      {"model.layers.0.mlp.router.weight", {2, 64}}}},
    {"mamba",
     {{"model_type", "mamba"}, {"hidden_size", 64}},
     {{"backbone.layers.0.mixer.in_proj.weight", {128, 64}, matrix},
      {"backbone.layers.0.mixer.conv1d.weight", {64, 1, 4}},
      {"backbone.layers.0.mixer.x_proj.weight", {36, 64}},
      {"backbone.layers.0.mixer.dt_proj.weight", {64, 32}},
      {"backbone.layers.0.mixer.A_log", {64, 16}},
      {"backbone.layers.0.mixer.out_proj.weight", {64, 64}, matrix}}},
    {"gpt2",
     {{"model_type", "gpt2"}, {"n_embd", 64}},
     {{"wte.weight", {96, 64}},
      {"h.0.attn.c_attn.weight", {64, 192}, fate::transposed_matrix},
      {"h.0.attn.c_attn.bias", {192}},
      {"h.0.attn.c_proj.weight", {64, 64}, fate::transposed_matrix},
      {"h.0.mlp.c_proj.weight", {256, 64}, fate::transposed_matrix},
      {"h.0.mlp.c_proj.bias", {64}}}},
    {"t5",
     {{"model_type", "t5"}, {"d_model", 64}},
     {{"shared.weight", {96, 64}},
      {"encoder.block.0.layer.0.SelfAttention.q.weight", {64, 64}, matrix},
      {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", {32, 4}},
      {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight", {128, 64}, matrix},
      {"encoder.block.0.layer.1.DenseReluDense.wi_1.weight", {128, 64}, matrix}}},
    {"bert",
     {{"model_type", "bert"}, {"hidden_size", 64}},
     {{"embeddings.word_embeddings.weight", {96, 64}},
      {"encoder.layer.0.attention.self.query.weight", {64, 64}, matrix},
      {"encoder.layer.0.attention.self.key.weight", {64, 64}, matrix},
      {"encoder.layer.0.attention.self.value.weight", {64, 64}, matrix},
      {"encoder.layer.0.attention.output.LayerNorm.weight", {64}},
      {"pooler.dense.weight", {64, 64}}}},
};

struct layout_case {
  std::string layout, recipe;
};
const std::vector<layout_case> layouts = {{"linear", "nvfp4/amax"},
                                          {"compressed-tensors", "nvfp4/amax"},
                                          {"compressed-tensors", "mxfp4-32/even"},
                                          {"modelopt", "nvfp4/four-over-six"},
                                          {"gpt-oss", "mxfp4-32/oas"}};

std::string without_suffix(const std::string& name, const std::string& suffix) {
  return name.ends_with(suffix) ? name.substr(0, name.size() - suffix.size()) : name;
}

/// Reads packed tensors of a layout, and remembers which.
class layout_reader {
 public:
  layout_reader(const std::filesystem::path& folder, const layout_case& c) : all_(read_model(folder)), case_(c) {}

  std::vector<float> read(const std::string& weight, std::size_t which, std::size_t matrices) {
    const std::string module = without_suffix(weight, ".weight");
    const bool is_nvfp4 = case_.recipe.starts_with("nvfp4");
    if (case_.layout == "linear") {
      const auto scales = is_nvfp4 ? take(weight + ".tensor_scales") : reference::stored_tensor{};
      float scale = 0;
      if (is_nvfp4) std::memcpy(&scale, scales.bytes.data() + 4 * which, 4);
      return part(weight + ".codes", weight + ".scales", scale, which, matrices);
    }
    if (case_.layout == "gpt-oss") return part(module + "_blocks", module + "_scales", 0, which, matrices);
    if (case_.layout == "modelopt") {
      const float scale = first_float(take(module + ".weight_scale_2"));
      scales_[module] = scale;
      return part(module + ".weight", module + ".weight_scale", scale, which, matrices);
    }
    const float scale = is_nvfp4 ? 1.0f / first_float(take(module + ".weight_global_scale")) : 0.0f;
    scales_[module] = scale;
    return part(module + ".weight_packed", module + ".weight_scale", scale, which, matrices);
  }

  const reference::stored_tensor& take(const std::string& name) {
    INFO(name);
    REQUIRE(all_.count(name) == 1);
    used_.insert(name);
    return all_.at(name);
  }
  bool has_read_all() const { return used_.size() == all_.size(); }
  float scale_of(const std::string& module) const { return scales_.at(module); }

 private:
  std::vector<float> part(const std::string& codes, const std::string& scales, float tensor_scale, std::size_t which,
                          std::size_t matrices) {
    const auto cut = [&](const reference::stored_tensor& tensor) {
      const auto size = static_cast<std::ptrdiff_t>(tensor.bytes.size() / matrices);
      const auto begin = tensor.bytes.begin() + static_cast<std::ptrdiff_t>(which) * size;
      return std::vector<std::uint8_t>(begin, begin + size);
    };
    return decode(cut(take(codes)), cut(take(scales)), tensor_scale);
  }

  std::map<std::string, reference::stored_tensor> all_;
  layout_case case_;
  std::set<std::string> used_;
  std::map<std::string, float> scales_;
};

/// Matrix e of a tensor as [outputs, K].
std::vector<float> outputs_first(const tensor_case& t, std::size_t e) {
  const auto values = model_values({t.name, t.shape});
  const std::size_t a = t.shape[t.shape.size() - 2], b = t.shape.back();
  std::vector<float> out(a * b);
  const bool turn = t.becomes == fate::transposed_stack || t.becomes == fate::transposed_matrix;
  for (std::size_t i = 0; i < a; ++i) {
    for (std::size_t j = 0; j < b; ++j) out[turn ? j * a + i : i * b + j] = values[(e * a + i) * b + j];
  }
  return out;
}

/// What readers of a layout find for a packed tensor, matrix by matrix, in the order of the original's outputs.
std::vector<float> read_matrix(layout_reader& reader, const architecture& a, const layout_case& c, const tensor_case& t,
                               std::size_t e) {
  const bool is_stack = t.shape.size() == 3;
  const std::size_t matrices = is_stack ? t.shape[0] : 1;
  if (!is_stack || c.layout == "linear" || c.layout == "gpt-oss") return reader.read(t.name, e, matrices);
  const std::string experts = without_suffix(without_suffix(t.name, ".gate_up_proj"), ".down_proj");
  const std::string expert = experts + "." + std::to_string(e) + ".";
  if (t.name.ends_with(".down_proj")) return reader.read(expert + "down_proj.weight", 0, 1);
  const auto gate = reader.read(expert + "gate_proj.weight", 0, 1), up = reader.read(expert + "up_proj.weight", 0, 1);
  if (c.recipe.starts_with("nvfp4")) {
    CHECK(reader.scale_of(expert + "gate_proj") == reader.scale_of(expert + "up_proj"));
  }
  std::vector<float> out;
  const std::size_t cols = t.becomes == fate::stack ? t.shape[2] : t.shape[1];
  for (std::size_t r = 0; r < gate.size() / cols; ++r) {
    for (const auto* half : {&gate, &up}) {
      if (a.rows_in_turn)
        out.insert(out.end(), half->begin() + std::ptrdiff_t(r * cols), half->begin() + std::ptrdiff_t((r + 1) * cols));
    }
  }
  if (!a.rows_in_turn) {
    out = gate;
    out.insert(out.end(), up.begin(), up.end());
  }
  return out;
}

bool is_packed(const layout_case& c, const tensor_case& t) {
  if (t.becomes == fate::kept) return false;
  if (c.layout == "gpt-oss") return t.shape.size() == 3;
  return t.becomes != fate::transposed_matrix || c.layout == "linear";
}

std::vector<model_tensor> tensors_of(const architecture& a) {
  std::vector<model_tensor> out;
  for (const auto& t : a.tensors) out.push_back({t.name, t.shape});
  return out;
}

/// Members of one reader's matrix have one tensor scale.
void check_shared(const layout_reader& reader, const architecture& a) {
  for (const auto& names : std::vector<std::vector<std::string>>{{"q_proj", "k_proj", "v_proj"},
                                                                 {"gate_proj", "up_proj"},
                                                                 {"w1", "w3"},
                                                                 {"wi_0", "wi_1"},
                                                                 {"query", "key", "value"},
                                                                 {"q_a_proj", "kv_a_proj_with_mqa"}}) {
    std::map<std::string, std::set<float>> scales;  // by parent
    for (const auto& t : a.tensors) {
      for (const auto& leaf : names) {
        const std::string end = "." + leaf + ".weight";
        if (t.becomes != fate::matrix || !t.name.ends_with(end)) continue;
        scales[without_suffix(t.name, end)].insert(reader.scale_of(without_suffix(t.name, ".weight")));
      }
    }
    for (const auto& [parent, different] : scales) {
      CAPTURE(parent, names.front());
      CHECK(different.size() == 1);
    }
  }
}

}  // namespace

TEST_CASE("every architecture in every layout is what its reader decodes") {
  for (const auto& a : architectures) {
    const temporary_directory folder;
    write_model(folder / "in", a.config, tensors_of(a));
    for (const auto& c : layouts) {
      const bool any = std::any_of(a.tensors.begin(), a.tensors.end(), [&](const auto& t) { return is_packed(c, t); });
      CAPTURE(a.name, c.layout, c.recipe);
      const std::string in = (folder / "in").string(),
                        out = (folder / (c.layout + "-" + c.recipe.substr(0, 5))).string();
      const auto run =
          run_program("quantize_checkpoint",
                      {in, out, "--recipe", c.recipe, "--layout", c.layout, "--shard-size", "0.001"}, folder.path());
      INFO(run.err);
      if (!any) {
        CHECK(run.exit_code == 2);
        CHECK_THAT(run.err, contains("expected a weight to pack, found none"));
        continue;
      }
      REQUIRE(run.exit_code == 0);
      layout_reader reader(out, c);
      for (const auto& t : a.tensors) {
        CAPTURE(t.name);
        if (!is_packed(c, t)) {
          CHECK(reader.take(t.name).bytes == read_model(in).at(t.name).bytes);
          continue;
        }
        for (std::size_t e = 0; e < (t.shape.size() == 3 ? t.shape[0] : 1); ++e) {
          CHECK(qsnr_of(outputs_first(t, e), read_matrix(reader, a, c, t, e)) > 15);
        }
      }
      CHECK(reader.has_read_all());
      if (c.recipe.starts_with("nvfp4") && c.layout != "linear") check_shared(reader, a);
      CHECK(read_json(std::filesystem::path(out) / "tokenizer.json") == read_json(folder / "in/tokenizer.json"));
      const auto verified = run_program("verify_checkpoint", {in, out}, folder.path());
      INFO(verified.err);
      CHECK(verified.exit_code == 0);
      CHECK_THAT(verified.out, contains("packing again gives the same bytes"));
    }
  }
}

namespace {

const architecture& architecture_named(const std::string& name) {
  return *std::find_if(architectures.begin(), architectures.end(), [&](const auto& a) { return a.name == name; });
}

/// A model, packed, and what the second program says after a change to the packed one.
class changed_model {
 public:
  explicit changed_model(const std::string& name, std::vector<std::string> arguments) {
    write_model(folder_ / "in", architecture_named(name).config, tensors_of(architecture_named(name)));
    arguments.insert(arguments.begin(), {(folder_ / "in").string(), (folder_ / "packed").string()});
    const auto run = run_program("quantize_checkpoint", arguments, folder_.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
  }

  /// Changes the tensors of the packed model.
  template <class Change>
  std::string after(const Change& change) const {
    return after_all([&](const fs::path& packed) { rewrite(packed / "model.safetensors", change); });
  }
  template <class Change>
  std::string after_config(const Change& change) const {
    return after_all([&](const fs::path& packed) {
      auto config = read_json(packed / "config.json");
      change(config);
      store_text(packed / "config.json", config.dump());
    });
  }
  template <class Change>
  std::string after_all(const Change& change) const {
    fs::remove_all(folder_ / "changed");
    fs::copy(folder_ / "packed", folder_ / "changed", fs::copy_options::recursive);
    change(folder_ / "changed");
    const auto run =
        run_program("verify_checkpoint", {(folder_ / "in").string(), (folder_ / "changed").string()}, folder_.path());
    return run.exit_code == 0 ? "verified" : run.err;
  }

  const temporary_directory& folder() const { return folder_; }

 private:
  temporary_directory folder_;
};

using stored_file = reference::stored_file;

}  // namespace

TEST_CASE("what a reader would stumble over is found") {
  const changed_model llama("llama", {"--recipe", "nvfp4/amax", "--layout", "compressed-tensors"});
  CHECK(llama.after([](stored_file&) {}) == "verified");
  CHECK_THAT(llama.after([](stored_file& f) { f.tensors["extra"] = f.tensors.begin()->second; }),
             contains("tensor 'extra': it is no part of the original"));
  CHECK_THAT(llama.after([](stored_file& f) { f.tensors.erase("lm_head.weight"); }),
             contains("tensor 'lm_head.weight': it is missing"));
  CHECK_THAT(llama.after([](stored_file& f) { f.metadata["made"] = "by others"; }),
             contains("metadata 'made': expected 'by hand'"));
  CHECK_THAT(llama.after([](stored_file& f) { f.metadata["new"] = "one"; }), contains("the original has none"));
  CHECK_THAT(llama.after([](stored_file& f) { f.tensors["model.embed_tokens.weight"].bytes[77] ^= 1; }),
             contains("it was kept, but differs from the original"));
  CHECK_THAT(
      llama.after([](stored_file& f) { f.tensors["model.layers.0.mlp.down_proj.weight_packed"].bytes[77] ^= 0x10; }),
      contains("do not hold what nvfp4/amax makes of the original"));
  CHECK_THAT(llama.after([](stored_file& f) {
    auto& bytes = f.tensors["model.layers.0.self_attn.k_proj.weight_global_scale"].bytes;
    const float doubled = 2 * first_float(f.tensors["model.layers.0.self_attn.k_proj.weight_global_scale"]);
    std::memcpy(bytes.data(), &doubled, sizeof doubled);
  }),
             contains("take one tensor scale for both"));
  CHECK_THAT(llama.after([](stored_file& f) {  // K along the rows: codes of the transposed square matrix
    auto& codes = f.tensors["model.layers.0.self_attn.o_proj.weight_packed"].bytes;
    std::reverse(codes.begin(), codes.end());
    f.metadata.erase("tetromino.recipe");
  }),
             contains("what readers decode is not the original"));
  CHECK_THAT(llama.after_config([](nlohmann::json& c) { c["quantization_config"]["ignore"].clear(); }),
             contains("does not name its module"));
  CHECK_THAT(llama.after_config([](nlohmann::json& c) { c["quantization_config"]["ignore"].push_back("re:.*q_proj"); }),
             contains("it is packed, but \"ignore\" in quantization_config names its module"));
  CHECK_THAT(llama.after_config([](nlohmann::json& c) { c["hidden_size"] = 65; }),
             contains("expected what the original has"));
  CHECK_THAT(llama.after_config([](nlohmann::json& c) { c["quantization_config"].erase("quantization_status"); }),
             contains("quantization_status"));
}

TEST_CASE("separate scales, a packed router and a wrong axis are found") {
  const changed_model apart("llama", {"--recipe", "nvfp4/amax", "--layout", "modelopt", "--separate-scales"});
  CHECK_THAT(apart.after([](stored_file&) {}), contains("take one tensor scale for both"));
  const changed_model named("llama", {"--recipe", "nvfp4/amax", "--layout", "modelopt"});
  CHECK_THAT(named.after_config([](nlohmann::json& c) { c["quantization_config"]["ignore"].push_back("mlp.down"); }),
             contains("vLLM leaves alone what has a name of \"ignore\" in its own, here 'mlp.down'"));
  const changed_model routed("mixtral", {"--recipe", "nvfp4/amax", "--layout", "modelopt", "--pack", "*.gate.weight"});
  CHECK_THAT(routed.after([](stored_file&) {}), contains("it is packed, but it is a router"));
  // [E, K, N] packed along N, as if it were [E, N, K]: the same shapes, since both are 64
  const changed_model axis("llama4", {"--recipe", "mxfp4-32/oas", "--layout", "gpt-oss"});
  CHECK_THAT(axis.after([](stored_file& f) {
    const std::string down = "language_model.model.layers.0.feed_forward.experts.down_proj";
    auto& codes = f.tensors[down + "_blocks"].bytes;
    std::vector<std::uint8_t> turned(codes.size());
    const auto nibble = [&](std::size_t e, std::size_t r, std::size_t k) {
      return codes[(e * 64 + r) * 32 + k / 2] >> (4 * (k % 2)) & 15;
    };
    for (std::size_t e = 0; e < 2; ++e) {
      for (std::size_t r = 0; r < 64; ++r) {
        for (std::size_t k = 0; k < 64; k += 2) {
          turned[(e * 64 + r) * 32 + k / 2] = static_cast<std::uint8_t>(nibble(e, k, r) | nibble(e, k + 1, r) << 4);
        }
      }
    }
    codes = turned;
    f.metadata.erase("tetromino.recipe");
  }),
             contains("another axis"));
}

TEST_CASE("GGUF: what llama.cpp would decode wrongly, or not find, is found") {
  namespace io = tetromino::io;
  const temporary_directory folder;
  const auto path = [&](const char* name) { return (folder / name).string(); };
  const std::string q = "blk.0.attn_q.weight", up = "blk.0.ffn_up_exps.weight", norm = "blk.0.attn_norm.weight";
  const std::vector<io::gguf_declaration> declarations = {
      {q, io::ggml_type::F16, {32, 64}}, {up, io::ggml_type::F32, {2, 32, 64}}, {norm, io::ggml_type::F32, {64}}};
  io::gguf_metadata metadata;
  metadata.set("general.architecture", "llama");
  metadata.set("general.name", "small");
  auto writer = io::gguf_writer::create(path("in.gguf"), metadata, declarations);
  for (const auto& d : declarations) {
    const auto values = model_values({d.name, d.shape});
    if (d.type == io::ggml_type::F32) {
      writer.append_values<float>(d.name, values);
    } else {
      std::vector<tetromino::half> halves;
      for (const float v : values) halves.push_back(tetromino::half(v));
      writer.append_values<tetromino::half>(d.name, halves);
    }
  }
  writer.finish();
  const auto pack = [&](const char* to, std::vector<std::string> more) {
    more.insert(more.begin(), {path("in.gguf"), path(to), "--recipe", "nvfp4/min-error", "--quiet"});
    const auto run = run_program("quantize_checkpoint", more, folder.path());
    INFO(run.err);
    REQUIRE(run.exit_code == 0);
  };
  const auto verify = [&](const char* packed, std::vector<std::string> more = {}) {
    more.insert(more.begin(), {path("in.gguf"), path(packed)});
    const auto run = run_program("verify_checkpoint", more, folder.path());
    CHECK((run.exit_code == 0) == run.err.empty());
    return run.exit_code == 0 ? run.out : run.err;
  };
  const auto said = [&](const std::vector<std::string>& options) {
    const auto run = run_program("quantize_checkpoint", options, folder.path());
    INFO(run.err);
    CHECK(run.exit_code == 0);
    return run.out;
  };
  const auto written = nlohmann::json::parse(said({path("in.gguf"), path("said.gguf"), "--json"}));
  CHECK(written.at("layout") == "gguf");
  CHECK(written.at("bytes_written") == std::filesystem::file_size(folder / "said.gguf"));
  REQUIRE(written.at("tensors").size() == 3);
  CHECK(written["tensors"][0].at("recipe") == "mxfp4-32/min-error");
  CHECK(written["tensors"][0].at("qsnr_db").get<double>() > 15);
  CHECK(written["tensors"][2].at("packed") == false);
  CHECK(written["tensors"][2].contains("why"));
  const auto planned = nlohmann::json::parse(said({path("in.gguf"), "--dry-run", "--json"}));
  CHECK(!planned.contains("bytes_written"));
  CHECK(!planned.at("tensors")[0].contains("qsnr_db"));
  CHECK(said({path("in.gguf"), "--dry-run", "--quiet"}).empty());
  CHECK_THAT(said({path("in.gguf"), "--dry-run", "--list"}), contains(up) && contains("kept: "));
  pack("out.gguf", {});
  CHECK_THAT(verify("out.gguf"), contains("2 tensors packed as nvfp4/min-error, 1 kept"));
  CHECK_THAT(verify("out.gguf"), contains("packing again gives the same bytes; kept tensors and keys are unchanged"));
  const auto facts = nlohmann::json::parse(verify("out.gguf", {"--json"}));
  CHECK(facts["layout"] == "gguf");
  CHECK(facts["packed_again"] == true);
  CHECK(facts["qsnr_db"].get<double>() > 20);
  CHECK(verify("out.gguf", {"--quiet"}).empty());
  for (const std::vector<std::string>& wrong :
       {std::vector{path("in.gguf"), path("out.gguf"), std::string("--statistics"), path("none")},
        std::vector{path("in"), path("out"), std::string("--imatrix"), path("none")}}) {
    CHECK(run_program("verify_checkpoint", wrong, folder.path()).exit_code == 2);
  }

  /// The packed file after a change to its keys, or to a tensor's bytes; a tensor whose name is `left_out` is not
  /// there.
  const auto changed = [&](const auto& change_keys, const auto& change_bytes, const std::string& left_out = "") {
    const auto packed = io::gguf_file::open(path("out.gguf"));
    auto keys = packed.metadata();
    change_keys(keys);
    std::vector<io::gguf_declaration> tensors;
    for (const auto& t : packed) {
      if (t.name() != left_out) tensors.push_back({t.name(), t.type(), {t.shape().begin(), t.shape().end()}});
    }
    auto again = io::gguf_writer::create(path("changed.gguf"), keys, tensors);
    for (const auto& t : packed) {
      std::vector<std::uint8_t> bytes(t.bytes().begin(), t.bytes().end());
      if (t.name() == left_out) continue;
      change_bytes(t.name(), bytes);
      again.append(t.name(), bytes);
    }
    again.finish();
    return verify("changed.gguf");
  };
  const auto same_keys = [](io::gguf_metadata&) {};
  const auto same_bytes = [](const std::string&, std::vector<std::uint8_t>&) {};
  CHECK_THAT(changed(same_keys, same_bytes), contains("packing again gives the same bytes"));
  const auto flip = [&](const std::string& which, std::size_t at) {
    return changed(same_keys, [&](const std::string& name, std::vector<std::uint8_t>& bytes) {
      if (name == which) bytes[at] ^= 0x10;
    });
  };
  CHECK_THAT(flip(q, 20), contains(q));
  CHECK_THAT(flip(up, 99), contains(up));
  CHECK_THAT(flip(norm, 1), contains(norm));
  CHECK_THAT(flip("blk.0.ffn_up_exps.scale", 2), contains("blk.0.ffn_up_exps"));
  CHECK_THAT(changed(same_keys, same_bytes, norm), contains(norm));
  CHECK_THAT(changed(same_keys, same_bytes, "blk.0.attn_q.scale"), contains("blk.0.attn_q"));
  CHECK_THAT(changed([](io::gguf_metadata& keys) { keys.set("general.name", "other"); }, same_bytes),
             contains("general.name"));
  CHECK_THAT(changed([](io::gguf_metadata& keys) { keys.set("general.file_type", std::uint32_t{1}); }, same_bytes),
             contains("general.file_type"));

  // an importance matrix in its older form: calls and sums of squares by tensor
  std::string weights;
  const auto put = [&](auto value) { weights.append(reinterpret_cast<const char*>(&value), sizeof value); };
  put(std::int32_t{1});
  put(static_cast<std::int32_t>(q.size()));
  weights += q;
  put(std::int32_t{1});
  put(std::int32_t{64});
  for (int k = 0; k < 64; ++k) put(k < 8 ? 100.0f : 0.01f);
  store_text(folder / "weights.dat", weights);
  pack("weighted.gguf", {"--imatrix", path("weights.dat")});
  CHECK_THAT(verify("weighted.gguf"), contains("not packed again, which needs the --imatrix it was packed with"));
  CHECK_THAT(verify("weighted.gguf", {"--imatrix", path("weights.dat")}),
             contains("packing again gives the same bytes"));
  CHECK_THAT(verify("none.gguf"), contains("none.gguf"));
}

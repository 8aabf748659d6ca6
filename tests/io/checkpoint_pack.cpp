#include "support/model_folder.hpp"

#include <tetromino/io/checkpoint.hpp>
#include <tetromino/io/checkpoint/pack.hpp>
#include <tetromino/io/checkpoint/verify.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/thread_executor.hpp>

#include <cfenv>  // std::fesetround
#include <set>
#include <thread>

/// Packing in process: models whose weights are FP8 or 4-bit already, scales of activations, and work that stops.

namespace {

using namespace tetromino_test;
namespace io = tetromino::io;
namespace tt = tetromino;
using tt::errc;
using layout = io::checkpoint_layout;

struct raw_tensor {
  std::string name;
  io::dtype dtype;
  std::vector<std::size_t> shape;
  std::vector<std::uint8_t> bytes;
};
void write_raw(const fs::path& folder, const nlohmann::json& config, const std::vector<raw_tensor>& tensors) {
  fs::create_directories(folder);
  store_text(folder / "config.json", config.dump());
  std::vector<io::tensor_declaration> declarations;
  for (const auto& t : tensors) declarations.push_back({t.name, t.dtype, t.shape});
  auto writer = io::safetensors_writer::create(folder / "model.safetensors", io::aligned_order(declarations));
  for (const auto& t : tensors) writer.append(t.name, t.bytes);
  writer.finish();
}
template <class T>
std::vector<std::uint8_t> bytes_of(const std::vector<T>& values) {
  std::vector<std::uint8_t> out(values.size() * sizeof(T));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}
std::vector<std::uint8_t> random_bytes(std::size_t count, unsigned least, unsigned most) {
  static std::mt19937 random(static_cast<unsigned>(seed()));
  std::uniform_int_distribution<unsigned> byte(least, most);
  std::vector<std::uint8_t> out(count);
  for (auto& b : out) b = static_cast<std::uint8_t>(byte(random));
  return out;
}

/// Packs a folder, verifies the result, and returns what packing reports.
io::pack_report pack_and_verify(const fs::path& in, const fs::path& out, io::plan_options options,
                                const io::pack_options& how = {}) {
  const auto model = io::checkpoint::open(in);
  const auto parameters = io::parameters_of(model);
  const tt::thread_executor threads(3);
  io::verify_options verifying{options.inputs};
  const auto plan = io::plan(model, parameters, std::move(options));
  auto report = io::pack(tt::scalar.on(threads), model, plan, out, how);
  verifying.slice_bytes = 1000;
  io::verify(tt::scalar.on(threads), model, io::checkpoint::open(out), verifying);
  return report;
}

io::plan_options by(layout where, const char* recipe) {
  io::plan_options out;
  out.layout = where;
  out.rules.push_back({"", tt::recipe::parse(recipe)});
  return out;
}

const std::string experts = "model.layers.0.mlp.experts.", q = "model.layers.0.self_attn.q_proj.weight";

/// gpt-oss as published: experts in MXFP4, whose scales span `spread` powers of two.
void write_gpt_oss(const fs::path& folder, unsigned spread) {
  std::vector<tt::bfloat16> attention;
  for (const float v : model_values({q, {64, 64}})) attention.push_back(tt::bfloat16(v));
  write_raw(folder,
            {{"model_type", "gpt_oss"}, {"hidden_size", 64}, {"quantization_config", {{"quant_method", "mxfp4"}}}},
            {{q, io::dtype::BF16, {64, 64}, bytes_of(attention)},
             {experts + "gate_up_proj_blocks", io::dtype::U8, {2, 96, 2, 16}, random_bytes(2 * 96 * 32, 0, 255)},
             {experts + "gate_up_proj_scales", io::dtype::U8, {2, 96, 2}, random_bytes(2 * 96 * 2, 120 - spread, 120)},
             {experts + "down_proj_blocks", io::dtype::U8, {2, 64, 2, 16}, random_bytes(2 * 64 * 32, 0, 255)},
             {experts + "down_proj_scales", io::dtype::U8, {2, 64, 2}, random_bytes(2 * 64 * 2, 120 - spread, 120)}});
}

/// Activations' largest magnitudes: 6 * 448 for the first expert, twice as much for the next.
class known_inputs final : public io::input_knowledge {
 public:
  tt::result<std::vector<float>> column_weights(const io::parameter& weight, std::size_t, std::size_t) const override {
    return std::vector<float>(weight.cols, 1.0f);
  }
  tt::result<double> squared_products(const tt::matrix_view<const float>&, const io::parameter&,
                                      std::size_t) const override {
    return tt::error(errc::invalid_argument, "no moments");
  }
  std::optional<float> input_amax(const io::parameter&, std::size_t matrix) const override {
    return 6.0f * 448.0f * static_cast<float>(1 + matrix);
  }
  tt::result<tt::packed<>> feed_back(const tt::matrix_view<const float>&, const io::parameter&, std::size_t,
                                     const tt::recipe&, const tt::quantize_options&) const override {
    return tt::error(errc::invalid_argument, "no moments");
  }
};

}  // namespace

TEST_CASE("MXFP4 becomes NVFP4 without loss, and says where it cannot") {
  const temporary_directory folder;
  write_gpt_oss(folder / "in", 17);
  const auto before = read_model(folder / "in");
  const auto report = pack_and_verify(folder / "in", folder / "out", by(layout::modelopt, "nvfp4/amax"));
  for (const auto& p : report.parameters) CHECK(p.rounded_blocks == 0);
  const auto after = read_model(folder / "out");
  const auto half = [&](const std::string& module) {
    return decode(after.at(module + ".weight").bytes, after.at(module + ".weight_scale").bytes,
                  first_float(after.at(module + ".weight_scale_2")));
  };
  const auto whole =
      decode(before.at(experts + "gate_up_proj_blocks").bytes, before.at(experts + "gate_up_proj_scales").bytes, 0);
  std::size_t wrong = 0;
  for (std::size_t e = 0; e < 2; ++e) {
    const auto gate = half(experts + std::to_string(e) + ".gate_proj"),
               up = half(experts + std::to_string(e) + ".up_proj");
    for (std::size_t r = 0; r < 96; ++r) {  // gate and up in turn
      for (std::size_t k = 0; k < 64; ++k) {
        wrong += whole[(e * 96 + r) * 64 + k] != (r % 2 == 0 ? gate : up)[r / 2 * 64 + k];
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(read_json(folder / "out/config.json")["quantization_config"]["quant_algo"] == "W4A16_NVFP4");
  CHECK(read_json(folder / "out/hf_quant_config.json")["quantization"]["group_size"] == 16);

  write_gpt_oss(folder / "wide", 40);
  const auto rounded =
      pack_and_verify(folder / "wide", folder / "wide-out", by(layout::compressed_tensors, "nvfp4/amax"));
  std::size_t blocks = 0;
  for (const auto& p : rounded.parameters) blocks += p.rounded_blocks;
  CHECK(blocks > 50);
}

TEST_CASE("a NaN block scale stays with its block, or is refused, in codes that are kept") {
  using special = tt::special_values;
  const temporary_directory folder;
  const std::string name = experts + "down_proj";
  std::vector<std::uint8_t> codes(2 * 64 * 32, 0x21);  // 0.5, 1, ..
  std::vector<std::uint8_t> scales(2 * 64 * 2, 127);
  for (const std::size_t nan : {2u, 130u}) scales[nan] = 255;  // rows 1 of both matrices, the first block
  for (std::size_t i = 65 * 32; i < 65 * 32 + 16; ++i) codes[i] = 0;
  write_raw(folder / "in",
            {{"model_type", "gpt_oss"}, {"hidden_size", 64}, {"quantization_config", {{"quant_method", "mxfp4"}}}},
            {{name + "_blocks", io::dtype::U8, {2, 64, 2, 16}, codes},
             {name + "_scales", io::dtype::U8, {2, 64, 2}, scales}});
  const auto packed = [&](const fs::path& in, const fs::path& out, layout where, const char* recipe, special how) {
    io::pack_options options;
    options.special = how;
    fs::remove_all(out);
    pack_and_verify(in, out, by(where, recipe), options);
    return read_model(out);
  };
  const auto refused = [&](const fs::path& in, layout where, const char* recipe) {
    CAPTURE(std::string(io::name(where)), recipe);
    const auto model = io::checkpoint::open(in);
    const auto parameters = io::parameters_of(model);
    const auto plan = io::plan(model, parameters, by(where, recipe));
    const auto done = io::try_pack(tt::scalar, model, plan, folder / "none");
    REQUIRE_FALSE(done);
    CHECK(done.error().code() == errc::non_finite);
    CHECK_FALSE(fs::exists(folder / "none"));
    return std::string(done.error().what());
  };
  CHECK_THAT(refused(folder / "in", layout::gpt_oss, "mxfp4-32/oas"), contains("down_proj': expected finite block"));
  CHECK_THAT(refused(folder / "in", layout::linear, "mxfp4-32/oas"), contains("row 1, block 0"));
  refused(folder / "in", layout::compressed_tensors, "mxfp4-32/floor");
  refused(folder / "in", layout::modelopt, "nvfp4/amax");
  refused(folder / "in", layout::linear, "nvfp4/amax");

  for (const special how : {special::poison, special::saturate}) {
    const bool poisons = how == special::poison;
    CAPTURE(poisons);
    auto expected_codes = codes, expected = scales;
    for (std::size_t e = 0; e < 2; ++e) {
      std::fill_n(expected_codes.begin() + static_cast<std::ptrdiff_t>((e * 64 + 1) * 32), 16, std::uint8_t{0});
      expected[e * 128 + 2] = poisons ? 255 : 0;
    }
    for (const layout where : {layout::gpt_oss, layout::linear}) {
      const auto mx = packed(folder / "in", folder / "mx", where, "mxfp4-32/oas", how);
      CHECK(mx.at(name + (where == layout::linear ? ".codes" : "_blocks")).bytes == expected_codes);
      CHECK(mx.at(name + (where == layout::linear ? ".scales" : "_scales")).bytes == expected);
    }
    const auto nv = packed(folder / "in", folder / "nv", layout::modelopt, "nvfp4/amax", how);
    for (std::size_t e = 0; e < 2; ++e) {
      const std::string module = experts + std::to_string(e) + ".down_proj";
      CHECK(first_float(nv.at(module + ".weight_scale_2")) == 0x1p-8f);
      std::vector<std::uint8_t> e4m3(64 * 4, 0x78);  // 256
      e4m3[4] = e4m3[5] = poisons ? 0x7F : 0;
      CHECK(nv.at(module + ".weight_scale").bytes == e4m3);
      CHECK(nv.at(module + ".weight").bytes ==
            std::vector<std::uint8_t>(expected_codes.begin(), expected_codes.begin() + 64 * 32));
    }
    if (!poisons) continue;
    refused(folder / "nv", layout::compressed_tensors, "nvfp4/amax");  // NVFP4 codes as they are
    const auto ct = packed(folder / "nv", folder / "ct", layout::compressed_tensors, "nvfp4/amax", special::saturate);
    CHECK(ct.at(experts + "0.down_proj.weight_scale").bytes[4] == 0);
    CHECK(ct.at(experts + "0.down_proj.weight_scale").bytes[6] == 0x78);
  }
}

TEST_CASE("MXFP4 of the least magnitudes becomes NVFP4 without loss") {
  for (const unsigned most : {0u, 1u, 8u, 9u, 10u}) {
    CAPTURE(most);
    const temporary_directory folder;
    auto scales = random_bytes(64 * 2, 0, most);
    scales[0] = static_cast<std::uint8_t>(most);
    const auto codes = random_bytes(64 * 32, 0x11, 0x77);
    write_raw(folder / "in",
              {{"model_type", "gpt_oss"}, {"hidden_size", 64}, {"quantization_config", {{"quant_method", "mxfp4"}}}},
              {{experts + "down_proj_blocks", io::dtype::U8, {1, 64, 2, 16}, codes},
               {experts + "down_proj_scales", io::dtype::U8, {1, 64, 2}, scales}});
    pack_and_verify(folder / "in", folder / "out", by(layout::modelopt, "nvfp4/amax"));
    const auto after = read_model(folder / "out");
    const std::string module = experts + "0.down_proj";
    CHECK(decode(after.at(module + ".weight").bytes, after.at(module + ".weight_scale").bytes,
                 first_float(after.at(module + ".weight_scale_2"))) == decode(codes, scales, 0));
  }
}

TEST_CASE("MXFP4 keeps its bytes in another layout of it, and through NVFP4 codes stay") {
  const temporary_directory folder;
  write_gpt_oss(folder / "in", 17);
  pack_and_verify(folder / "in", folder / "same", by(layout::gpt_oss, "mxfp4-32/oas"));
  CHECK(read_model(folder / "same").at(experts + "down_proj_blocks").bytes ==
        read_model(folder / "in").at(experts + "down_proj_blocks").bytes);
  pack_and_verify(folder / "in", folder / "ct", by(layout::compressed_tensors, "mxfp4-32/oas"));
  pack_and_verify(folder / "in", folder / "nv", by(layout::modelopt, "nvfp4/amax"));
  pack_and_verify(folder / "nv", folder / "ct-nv", by(layout::compressed_tensors, "nvfp4/min-error"));
  const auto nv = read_model(folder / "nv"), ct = read_model(folder / "ct-nv");
  for (const std::string& module : {experts + "1.up_proj", experts + "0.down_proj"}) {
    CHECK(nv.at(module + ".weight").bytes == ct.at(module + ".weight_packed").bytes);
    CHECK(first_float(nv.at(module + ".weight_scale_2")) == 1.0f / first_float(ct.at(module + ".weight_global_scale")));
  }
}

TEST_CASE("FP8 blocks are packed from their values, and become BF16 where they are kept") {
  const temporary_directory folder;
  const std::string up = "model.layers.0.mlp.experts.0.up_proj.weight", o = "model.layers.0.self_attn.o_proj.weight";
  auto codes = random_bytes(130 * 256, 0, 255), kept = random_bytes(64 * 64, 0, 0x7E);
  for (auto& code : codes) code = (code & 0x7F) == 0x7F ? 0 : code;
  write_raw(folder / "in",
            {{"model_type", "deepseek_v3"}, {"hidden_size", 64}, {"quantization_config", {{"quant_method", "fp8"}}}},
            {{up, io::dtype::F8_E4M3, {130, 256}, codes},
             {up + "_scale_inv", io::dtype::F32, {2, 2}, bytes_of(std::vector<float>{0.5f, 0.01f, 0.25f, 1.0f})},
             {o, io::dtype::F8_E4M3, {64, 64}, kept},
             {o + "_scale_inv", io::dtype::F32, {1, 1}, bytes_of(std::vector<float>{0.5f})}});
  auto options = by(layout::compressed_tensors, "nvfp4/amax");
  options.keep.push_back("*o_proj*");
  pack_and_verify(folder / "in", folder / "out", std::move(options));
  const auto after = read_model(folder / "out");
  CHECK(after.size() == 4);
  CHECK(after.at(o).dtype == "BF16");
  tt::bfloat16 last;
  std::memcpy(&last, after.at(o).bytes.data() + after.at(o).bytes.size() - 2, 2);
  CHECK(float(last) == 0.5f * e4m3_value(kept.back()));
  const std::string module = up.substr(0, up.size() - 7);
  std::vector<float> values;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const float scales[4] = {0.5f, 0.01f, 0.25f, 1.0f};
    values.push_back(e4m3_value(codes[i]) * scales[i / 256 / 128 * 2 + i % 256 / 128]);
  }
  CHECK(qsnr_of(values, decode(after.at(module + ".weight_packed").bytes, after.at(module + ".weight_scale").bytes,
                               1.0f / first_float(after.at(module + ".weight_global_scale")))) > 18);
}

TEST_CASE("FP8 blocks pack to the same bytes in every rounding mode") {
  const temporary_directory folder;
  const std::string up = "model.layers.0.mlp.up_proj.weight", down = "model.layers.0.mlp.down_proj.weight";
  write_raw(folder / "in",
            {{"model_type", "llama"}, {"hidden_size", 64}, {"quantization_config", {{"quant_method", "fp8"}}}},
            {{up, io::dtype::F8_E4M3, {128, 64}, random_bytes(128 * 64, 0, 0x7E)},
             {up + "_scale_inv", io::dtype::F32, {1, 1}, bytes_of(std::vector<float>{0.0123456f})},
             {down, io::dtype::F8_E4M3, {64, 128}, random_bytes(64 * 128, 0, 0x7E)},
             {down + "_scale_inv", io::dtype::F32, {1, 1}, bytes_of(std::vector<float>{0.0345678f})}});
  const auto packed = [&](const std::string& name, int rounding) {
    auto options = by(layout::compressed_tensors, "nvfp4/min-error");
    options.keep.push_back("*down_proj*");
    REQUIRE(std::fesetround(rounding) == 0);
    pack_and_verify(folder / "in", folder / name, std::move(options));
    CHECK(std::fegetround() == rounding);
    std::fesetround(FE_TONEAREST);
    std::map<std::string, std::vector<std::uint8_t>> out;
    for (const auto& [tensor, stored] : read_model(folder / name)) out[tensor] = stored.bytes;
    return out;
  };
  const auto expected = packed("nearest", FE_TONEAREST);
  CHECK(packed("upward", FE_UPWARD) == expected);
  CHECK(packed("downward", FE_DOWNWARD) == expected);
  CHECK(packed("to_zero", FE_TOWARDZERO) == expected);
}

TEMPLATE_TEST_CASE("stacks that are stored [experts, K, outputs] pack as if their rows were stored", "", tt::bfloat16,
                   tt::half, float) {
  constexpr std::size_t matrices = 2, rows = 118, cols = 80;
  const temporary_directory folder;
  const std::string name = experts + "gate_up_proj";
  const io::dtype type = std::is_same_v<TestType, float>      ? io::dtype::F32
                         : std::is_same_v<TestType, tt::half> ? io::dtype::F16
                                                              : io::dtype::BF16;
  std::vector<TestType> straight, turned(matrices * rows * cols);
  for (const float v : model_values({name, {matrices, rows, cols}})) straight.push_back(TestType(v));
  for (std::size_t i = 0; i < straight.size(); ++i) {
    const std::size_t e = i / (rows * cols), r = i / cols % rows, k = i % cols;
    turned[(e * cols + k) * rows + r] = straight[i];
  }
  const raw_tensor bias{
      name + "_bias", type, {matrices, rows}, std::vector<std::uint8_t>(matrices * rows * sizeof(TestType))};
  const nlohmann::json config = {{"hidden_size", cols}, {"num_local_experts", matrices}};
  write_raw(folder / "straight", config, {{name, type, {matrices, rows, cols}, bytes_of(straight)}, bias});
  write_raw(folder / "turned", config, {{name, type, {matrices, cols, rows}, bytes_of(turned)}, bias});
  const auto pack = [&](const std::string& which, const char* recipe, const io::pack_options& how) {
    fs::remove_all(folder / "out");
    pack_and_verify(folder / which, folder / "out", by(layout::linear, recipe), how);
    return read_model(folder / "out");
  };
  for (const char* recipe : {"mxfp4-32/oas", "nvfp4/amax", "nvfp4/four-over-six/hadamard-16"}) {
    const auto expected = pack("straight", recipe, {});
    REQUIRE(expected.count(name + ".codes") == 1);
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{5000}, std::size_t{9000}, std::size_t{1} << 20}) {
      CAPTURE(recipe, bytes);
      io::pack_options how;
      how.slice_bytes = how.window_bytes = bytes;
      const auto got = pack("turned", recipe, how);
      CHECK(got.size() == expected.size());
      for (const auto& [part, tensor] : expected) {
        CAPTURE(part);
        CHECK(got.at(part).bytes == tensor.bytes);
      }
    }
  }
}

TEST_CASE("activations' scales are written where all weights have one") {
  const temporary_directory folder;
  const std::vector<model_tensor> tensors = {{experts + "0.up_proj.weight", {32, 64}},
                                             {experts + "0.gate_proj.weight", {32, 64}}};
  write_model(folder / "in", {{"hidden_size", 64}}, tensors);
  const known_inputs inputs;
  for (const layout where : {layout::modelopt, layout::compressed_tensors}) {
    auto options = by(where, "nvfp4/amax");
    options.inputs = &inputs;
    const auto out = folder / std::string(io::name(where));
    pack_and_verify(folder / "in", out, std::move(options));
    const auto config = read_json(out / "config.json")["quantization_config"];
    const auto after = read_model(out);
    if (where == layout::modelopt) {
      CHECK(config["quant_algo"] == "NVFP4");
      CHECK(first_float(after.at(experts + "0.up_proj.input_scale")) == 1.0f);
      CHECK(after.at(experts + "0.up_proj.input_scale").shape.empty());
    } else {
      CHECK(config["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local");
      CHECK(first_float(after.at(experts + "0.up_proj.input_global_scale")) == 1.0f);
    }
  }
  pack_and_verify(folder / "modelopt", folder / "again", by(layout::compressed_tensors, "nvfp4/amax"));
  CHECK(read_model(folder / "again").count(experts + "0.up_proj.input_global_scale") == 1);  // as the source has it
}

TEST_CASE("two recipes: each weight has its own, and the config names both") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}, {experts + "0.up_proj.weight", {32, 64}}});
  auto options = by(layout::compressed_tensors, "nvfp4/amax");
  options.rules.push_back({"experts", tt::recipe::parse("mxfp4-32/oas")});
  pack_and_verify(folder / "in", folder / "out", std::move(options));
  const auto config = read_json(folder / "out/config.json")["quantization_config"];
  CHECK(config["format"] == "mixed-precision");
  CHECK(config["config_groups"]["group_0"]["targets"] == nlohmann::json{"Linear"});
  CHECK(config["config_groups"]["group_0"]["format"] == "mxfp4-pack-quantized");
  CHECK(config["config_groups"]["group_1"]["targets"] == nlohmann::json{"model.layers.0.self_attn.q_proj"});
  CHECK(read_model(folder / "out").at(experts + "0.up_proj.weight_scale").dtype == "U8");
}

TEST_CASE("config.json with the numbers that Python writes passes through") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}});
  store_text(folder / "in/config.json",
             R"({"hidden_size": 64, "time_step_limit": [0.0, Infinity], "least": -Infinity, "none": NaN,
                 "text": "Infinity, \\\"NaN, -Infinity"})");
  pack_and_verify(folder / "in", folder / "out", by(layout::compressed_tensors, "nvfp4/amax"));
  std::ifstream file(folder / "out/config.json");
  const std::string written(std::istreambuf_iterator<char>(file), {});
  for (const char* kept : {"    Infinity\n", "\"least\": -Infinity,", "\"none\": NaN,",
                           R"("text": "Infinity, \\\"NaN, -Infinity",)", "\"hidden_size\": 64,"}) {
    CHECK_THAT(written, contains(kept));
  }
  store_text(folder / "in/config.json", R"({"hidden_size": Infinite})");
  CHECK_FALSE(io::checkpoint::try_open(folder / "in").has_value());
}

TEST_CASE("a model that cannot be finished leaves nothing") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}, {experts + "0.up_proj.weight", {64, 64}}});
  store_text(folder / "in/notes.bin", "weights of another form");
  const auto model = io::checkpoint::open(folder / "in");
  const auto parameters = io::parameters_of(model);
  const auto plan = io::plan(model, parameters, by(layout::linear, "nvfp4/amax"));
  const auto refused = [&](const fs::path& out, const io::pack_options& options, const std::string& message) {
    const auto done = io::try_pack(tt::scalar, model, plan, out, options);
    REQUIRE_FALSE(done.has_value());
    CHECK_THAT(done.error().what(), contains(message));
    std::set<std::string> left;
    for (const auto& entry : fs::directory_iterator(folder.path())) left.insert(entry.path().filename().string());
    CHECK(left == std::set<std::string>{"in"});
  };
  std::size_t calls = 0, last = 0;  // whether to go on is asked so often: each answer may be the one that says no
  io::pack_options stopping;
  stopping.slice_bytes = 4096;
  stopping.progress = [&](std::size_t) { return ++calls != last; };
  static_cast<void>(io::pack(tt::scalar, model, plan, folder / "out", stopping));
  fs::remove_all(folder / "out");
  const std::size_t all = calls;
  CHECK(all > 4);
  for (last = 1; last <= all; ++last) {
    calls = 0;
    refused(folder / "out", stopping, "stopped");
  }
  refused(folder / "in/out", {}, "outside of the model");
  refused(folder / "in/model-00001-of-00002.safetensors", {}, "another file than the one being read");
  refused(folder / "no/out", {}, "could not create");

  io::pack_options whole;
  whole.shard_bytes = 1;  // each weight in a file of its own
  const auto report = io::pack(tt::scalar, model, plan, folder / "out", whole);
  CHECK(report.files == 2);
  CHECK(report.files_left == std::vector<std::string>{"notes.bin"});
  const auto packed = io::checkpoint::open(folder / "out");
  CHECK(packed.file_count() == 2);
  CHECK(io::verify(tt::scalar, model, packed).packed == 2);
  CHECK_THAT(io::try_pack(tt::scalar, model, plan, folder / "out").error().what(), contains("new or empty"));

  auto changing = io::pack_options{};
  changing.progress = [&](std::size_t) {  // another program writes to the model
    fs::last_write_time(folder / "in/model-00001-of-00002.safetensors", fs::file_time_type::clock::now());
    return true;
  };
  fs::remove_all(folder / "out");
  refused(folder / "out", changing, "nobody changes while it is read");

  auto cutting = io::pack_options{};
  cutting.progress = [&](std::size_t) {
    for (const char* shard : {"in/model-00001-of-00002.safetensors", "in/model-00002-of-00002.safetensors"}) {
      fs::resize_file(folder / shard, 100);
    }
    return true;
  };
  refused(folder / "out", cutting, "cut short");
}

TEST_CASE("with a name for each expert, what --keep splits is kept whole") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}},
              {{experts + "0.up_proj.weight", {32, 64}}, {experts + "0.gate_proj.weight", {32, 64}}, {q, {64, 64}}});
  const auto model = io::checkpoint::open(folder / "in");
  const auto parameters = io::parameters_of(model);
  auto options = by(layout::modelopt, "nvfp4/amax");
  options.keep.push_back("*.up_proj.weight");
  const auto plan = io::plan(model, parameters, options);
  std::map<std::string, std::string> reasons;
  for (const auto& p : plan.parameters) reasons[p.source->name] = p.reason;
  CHECK(reasons[experts + "0.up_proj.weight"] == "--keep *.up_proj.weight");
  CHECK_THAT(reasons[experts + "0.gate_proj.weight"], contains("readers run it as one with"));
  CHECK(reasons[q].empty());
  options.layout = layout::linear;  // ours takes them as they come
  CHECK(io::plan(model, parameters, options).parameters[1].is_packed() !=
        io::plan(model, parameters, options).parameters[0].is_packed());
}

TEST_CASE("a link as the output stays, and where it leads is written or refused before the work") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}});
  const auto model = io::checkpoint::open(folder / "in");
  const auto parameters = io::parameters_of(model);
  const auto plan = io::plan(model, parameters, by(layout::linear, "nvfp4/amax"));
  fs::create_directory(folder / "empty");
  fs::create_symlink("empty", folder / "link");
  fs::create_symlink("new", folder / "dangling");
  for (const char* out : {"link", "dangling"}) {
    static_cast<void>(io::pack(tt::scalar, model, plan, folder / out));
    CHECK(fs::is_symlink(folder / out));
    CHECK(io::verify(tt::scalar, model, io::checkpoint::open(folder / out)).packed == 1);
  }
  CHECK(fs::exists(folder / "empty/config.json"));
  CHECK(fs::exists(folder / "new/config.json"));
  fs::create_directory(folder / "here");
  static_cast<void>(io::pack(tt::scalar, model, plan, folder.path() / "here/."));
  CHECK(fs::exists(folder / "here/config.json"));

  io::pack_options never;
  never.progress = [](std::size_t) -> bool { throw std::logic_error("this is work"); };
  const auto refused = [&](const fs::path& out, const std::string& message) {
    const auto done = io::try_pack(tt::scalar, model, plan, out, never);
    REQUIRE_FALSE(done);
    CHECK(done.error().code() == errc::io);
    CHECK_THAT(done.error().what(), contains(message));
  };
  fs::create_symlink("round", folder / "round");
  refused(folder / "round", "could not follow the link");
  refused(folder / "link", "new or empty");  // not any more
  fs::create_symlink("in/out", folder / "into");
  CHECK_THAT(io::try_pack(tt::scalar, model, plan, folder / "into").error().what(), contains("outside of the model"));
}

TEST_CASE("links in a model's folder that lead nowhere stay behind") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}}, 1);
  fs::create_directories(folder / "in/sub");
  fs::create_symlink("round.json", folder / "in/round.json");
  fs::create_symlink("../sub", folder / "in/sub/above");
  fs::create_symlink("nothing", folder / "in/dangling.json");
  fs::create_symlink(".round", folder / "in/.round");
  store_text(folder / "in/sub/vocab.txt", "words");
  const auto report = pack_and_verify(folder / "in", folder / "out", by(layout::linear, "nvfp4/amax"));
  CHECK(report.files_left.empty());
  CHECK(fs::file_size(folder / "out/sub/vocab.txt") == 5);
  CHECK(fs::exists(folder / "out/tokenizer.json"));
  CHECK_FALSE(fs::exists(fs::symlink_status(folder / "out/round.json")));
  CHECK_FALSE(fs::exists(fs::symlink_status(folder / "out/dangling.json")));
}

TEST_CASE("a directory packed to one file says in the file how it is quantized") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}, {experts + "0.up_proj.weight", {64, 64}}});
  for (const layout where : {layout::modelopt, layout::compressed_tensors, layout::linear}) {
    CAPTURE(std::string(io::name(where)));
    fs::create_directories(folder / "out");
    const fs::path out = folder / "out/model.safetensors";
    pack_and_verify(folder / "in", out, by(where, "nvfp4/amax"));
    const auto metadata = io::checkpoint::open(out).metadata();
    CHECK(metadata.contains("quantization_config") == (where != layout::linear));
    if (where == layout::linear) continue;
    CHECK(nlohmann::json::parse(metadata.at("quantization_config"))["quant_method"] == std::string(io::name(where)));
  }
}

TEST_CASE("a file that names another recipe than its weights is found") {
  const temporary_directory folder;
  write_model(folder / "in", {{"hidden_size", 64}}, {{q, {64, 64}}, {experts + "0.up_proj.weight", {64, 64}}});
  pack_and_verify(folder / "in", folder / "out", by(layout::linear, "mxfp4-32/floor"));
  const auto verified = [&](const std::string& key, const std::string& value) {
    rewrite(folder / "out/model.safetensors", [&](auto& file) {
      file.metadata.erase("tetromino.recipe");
      file.metadata[key] = value;
    });
    return io::try_verify(tt::scalar, io::checkpoint::open(folder / "in"), io::checkpoint::open(folder / "out"));
  };
  CHECK(verified("tetromino.recipe", "mxfp4-32/floor"));
  for (const char* other : {"nvfp4/amax", "mxfp4-32/oas"}) {
    const auto found = verified("tetromino.recipe", other);
    REQUIRE_FALSE(found);
    CHECK_THAT(found.error().what(), contains("says it is packed as mxfp4-32/floor, but"));
  }
  const auto mixed = verified("tetromino.recipes", R"([{"weights": "experts", "recipe": "mxfp4-32/floor"},
                                                       {"weights": "q_proj", "recipe": "nvfp4/amax"}])");
  REQUIRE_FALSE(mixed);
  CHECK_THAT(mixed.error().what(), contains("q_proj"));
}

TEST_CASE("values that are refused are named by their row of the matrix, however it is cut") {
  const temporary_directory folder;
  for (const std::size_t matrices : {1u, 3u}) {
    const std::size_t rows = 4096, bad = (matrices - 1) * rows + 3333;
    std::vector<float> values(matrices * rows * 32, 0.5f);
    values[bad * 32 + 9] = std::numeric_limits<float>::quiet_NaN();
    const std::string name = matrices == 1 ? q : experts + "gate_up_proj";
    const std::vector<std::size_t> shape =
        matrices == 1 ? std::vector<std::size_t>{rows, 32} : std::vector<std::size_t>{matrices, rows, 32};
    const auto in = folder / std::to_string(matrices);
    write_raw(in, {{"hidden_size", 32}, {"num_local_experts", matrices}},
              {{name, io::dtype::F32, shape, bytes_of(values)}});
    const auto model = io::checkpoint::open(in);
    const auto parameters = io::parameters_of(model);
    io::pack_options options;
    options.slice_bytes = 100'000;
    for (const char* recipe : {"mxfp4-32/oas", "nvfp4/amax"}) {
      const auto plan = io::plan(model, parameters, by(layout::linear, recipe));
      const auto done = io::try_pack(tt::scalar, model, plan, folder / "out", options);
      REQUIRE_FALSE(done);
      CHECK(done.error().code() == errc::non_finite);
      CHECK_THAT(done.error().what(), contains(std::string("expected finite values, got NaN at ") +
                                               (matrices == 1 ? "" : "matrix 2, ") + "row 3333, column 9"));
    }
  }
}

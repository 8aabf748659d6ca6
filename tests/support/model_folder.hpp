#pragma once

#include "check.hpp"

#include <tetromino/io/safetensors.hpp>

#include "reference/safetensors_reader.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>   // std::sort
#include <cmath>       // std::ldexp, std::log10
#include <cstring>     // std::memcpy
#include <filesystem>  // std::filesystem
#include <fstream>     // std::ofstream
#include <map>         // std::map
#include <random>      // std::mt19937_64
#include <string>      // std::string
#include <vector>      // std::vector

/// Small models with the names and shapes of published ones, written as Hugging Face saves them, and read back without
/// the library.
namespace tetromino_test {

namespace fs = std::filesystem;

/// A tensor of a model, in bfloat16 unless it is packed or FP8 already.
struct model_tensor {
  std::string name;
  std::vector<std::size_t> shape;
};

inline std::size_t product(const std::vector<std::size_t>& shape) {
  std::size_t n = 1;
  for (const std::size_t size : shape) n *= size;
  return n;
}

/// The values that a model's tensor has: normal numbers from a seed and its name, every row of its own size.
inline std::vector<float> model_values(const model_tensor& tensor) {
  std::seed_seq seed{tetromino_test::seed(), std::hash<std::string>{}(tensor.name)};
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> size(0.5f, 2.0f);
  std::vector<float> out(product(tensor.shape));
  const float whole = std::ldexp(size(random), -4);  // siblings differ, so that their scales do
  for (float& value : out) value = float(tetromino::bfloat16(whole * normal(random)));
  return out;
}

inline void store_text(const fs::path& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
}

/// Writes a model folder: config.json, a tokenizer, and bfloat16 tensors dealt in turn to `shards` files.
inline void write_model(const fs::path& folder, const nlohmann::json& config, const std::vector<model_tensor>& tensors,
                        std::size_t shards = 2) {
  namespace io = tetromino::io;
  fs::create_directories(folder);
  store_text(folder / "config.json", config.dump(2));
  store_text(folder / "tokenizer.json", "{\"version\": \"1.0\"}");
  nlohmann::json map = nlohmann::json::object();
  for (std::size_t s = 0; s < shards; ++s) {
    std::vector<io::tensor_declaration> declarations;
    for (std::size_t i = s; i < tensors.size(); i += shards) {
      declarations.push_back({tensors[i].name, io::dtype::BF16, tensors[i].shape});
    }
    const std::string name =
        shards == 1 ? std::string("model.safetensors")
                    : "model-0000" + std::to_string(s + 1) + "-of-0000" + std::to_string(shards) + ".safetensors";
    auto writer = io::safetensors_writer::create(folder / name, declarations, {{"format", "pt"}, {"made", "by hand"}});
    for (std::size_t i = s; i < tensors.size(); i += shards) {
      std::vector<tetromino::bfloat16> values;
      for (const float value : model_values(tensors[i])) values.push_back(tetromino::bfloat16(value));
      writer.append_values<tetromino::bfloat16>(tensors[i].name, values);
      map[tensors[i].name] = name;
    }
    writer.finish();
  }
  if (shards > 1) {
    store_text(folder / "model.safetensors.index.json", nlohmann::json{{"metadata", {}}, {"weight_map", map}}.dump());
  }
}

/// All tensors of a folder's safetensors files.
inline std::map<std::string, reference::stored_tensor> read_model(const fs::path& folder) {
  std::map<std::string, reference::stored_tensor> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".safetensors") continue;
    for (auto& [name, tensor] : reference::read_safetensors(entry.path()).tensors) out[name] = std::move(tensor);
  }
  return out;
}

/// Writes a safetensors file anew, after a change to its tensors and metadata.
template <class Change>
void rewrite(const fs::path& path, const Change& change) {
  namespace io = tetromino::io;
  auto file = reference::read_safetensors(path);
  change(file);
  std::vector<io::tensor_declaration> declarations;
  for (const auto& [name, tensor] : file.tensors) {
    declarations.push_back({name, *io::dtype_named(tensor.dtype), {tensor.shape.begin(), tensor.shape.end()}});
  }
  auto writer = io::safetensors_writer::create(path, io::aligned_order(declarations),
                                               {file.metadata.begin(), file.metadata.end()});
  for (const auto& [name, tensor] : file.tensors) writer.append(name, tensor.bytes);
  writer.finish();
}

inline nlohmann::json read_json(const fs::path& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file);
}

/// The value of a stored 4-bit element, from the description of the formats.
inline float e2m1_value(std::uint8_t pair, std::size_t k) {
  static const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const int code = (pair >> (4 * (k % 2))) & 15;
  return code < 8 ? values[code] : -values[code - 8];
}
inline float e8m0_value(std::uint8_t b) { return std::ldexp(1.0f, b - 127); }
inline float e4m3_value(std::uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(1.0f + static_cast<float>(mantissa) / 8, exponent - 7);
  return b < 128 ? size : -size;
}
inline float first_float(const reference::stored_tensor& tensor) {
  float value = 0;
  std::memcpy(&value, tensor.bytes.data(), sizeof value);
  return value;
}

/// Values of codes under block scales, as readers decode them: NVFP4 where `tensor_scale` is not 0.
inline std::vector<float> decode(const std::vector<std::uint8_t>& codes, const std::vector<std::uint8_t>& scales,
                                 float tensor_scale) {
  const std::size_t block = codes.size() * 2 / scales.size();
  std::vector<float> out(codes.size() * 2);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::uint8_t scale = scales[i / block];
    out[i] = e2m1_value(codes[i / 2], i) * (tensor_scale == 0 ? e8m0_value(scale) : e4m3_value(scale) * tensor_scale);
  }
  return out;
}

/// Signal over noise in dB.
inline double qsnr_of(const std::vector<float>& x, const std::vector<float>& y) {
  double signal = 0, noise = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    signal += double(x[i]) * double(x[i]);
    noise += (double(x[i]) - double(y[i])) * (double(x[i]) - double(y[i]));
  }
  return noise == 0 ? 999.0 : 10 * std::log10(signal / noise);
}

}  // namespace tetromino_test

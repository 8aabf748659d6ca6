#pragma once

/// The recorded routing of examples/data for benchmarks on the GPU, which do without the JSON library that
/// moe/trace_io.hpp needs.

#include <tetromino/moe/trace.hpp>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bundled {

/// Requests of routing-128x8.safetensors or its smaller sister: 8 layers of 128 experts, 8 per token.
inline tetromino::moe::trace read_routing(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::uint64_t header_bytes = 0;
  file.read(reinterpret_cast<char*>(&header_bytes), 8);
  std::string header(file && header_bytes < (std::uint64_t{1} << 20) ? header_bytes : 0, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  const auto read = [&]<class T>(const char* name, std::vector<T>& to) {
    const std::size_t tensor = header.find(std::string("\"") + name + "\"");
    const std::size_t at = tensor == std::string::npos ? tensor : header.find("data_offsets\":[", tensor);
    if (at == std::string::npos) throw std::runtime_error(path + ": expected a recorded routing with " + name);
    char* end = nullptr;
    const std::uint64_t begin = std::strtoull(header.c_str() + at + 15, &end, 10);
    to.resize((std::strtoull(end + 1, nullptr, 10) - begin) / sizeof(T));
    file.seekg(static_cast<std::streamoff>(8 + header_bytes + begin));
    file.read(reinterpret_cast<char*>(to.data()), static_cast<std::streamsize>(to.size() * sizeof(T)));
    if (!file) throw std::runtime_error(path + ": too short for " + name);
  };
  std::vector<std::uint8_t> experts, domain;
  std::vector<std::int64_t> offsets;
  std::vector<std::int32_t> prefill;
  read("experts", experts), read("request_offsets", offsets), read("prefill_length", prefill), read("domain", domain);
  std::vector<tetromino::moe::request> requests;
  for (std::size_t r = 0; r + 1 < offsets.size(); ++r) {
    requests.push_back({static_cast<std::uint64_t>(offsets[r]), static_cast<std::uint32_t>(offsets[r + 1] - offsets[r]),
                        static_cast<std::uint32_t>(prefill.at(r)), domain.at(r)});
  }
  return tetromino::moe::trace::make({8, 128, 8}, {experts.begin(), experts.end()}, std::move(requests));
}

}  // namespace bundled

#pragma once

/// A second GGUF reader and writer, from the description of the format (docs/gguf.md of ggml). The reader copies
/// everything, and throws std::runtime_error where it does not understand. It includes nothing of tetromino.

#include <cstdint>    // std::uint8_t, std::uint32_t, std::uint64_t
#include <cstring>    // std::memcpy
#include <map>        // std::map
#include <stdexcept>  // std::runtime_error
#include <string>     // std::string
#include <vector>     // std::vector

namespace reference {

struct gguf_tensor {
  std::uint32_t type = 0;
  std::vector<std::uint64_t> dimensions;  ///< as the file says, the one along rows first
  std::vector<std::uint8_t> bytes;
};

struct gguf_contents {
  std::map<std::string, std::pair<std::uint32_t, std::string>> metadata;  ///< type and stored bytes
  std::map<std::string, gguf_tensor> tensors;
};

/// Elements and bytes of one block of the types that tests use.
inline std::pair<std::uint64_t, std::uint64_t> gguf_block(std::uint32_t type) {
  static const std::map<std::uint32_t, std::pair<std::uint64_t, std::uint64_t>> blocks{
      {0, {1, 4}},      {1, {1, 2}},      {2, {32, 18}},   {3, {32, 20}},    {6, {32, 22}},    {7, {32, 24}},
      {8, {32, 34}},    {9, {32, 36}},    {10, {256, 84}}, {11, {256, 110}}, {12, {256, 144}}, {13, {256, 176}},
      {14, {256, 210}}, {15, {256, 292}}, {16, {256, 66}}, {17, {256, 74}},  {18, {256, 98}},  {19, {256, 50}},
      {20, {32, 18}},   {21, {256, 110}}, {22, {256, 82}}, {23, {256, 136}}, {24, {1, 1}},     {25, {1, 2}},
      {26, {1, 4}},     {27, {1, 8}},     {28, {1, 8}},    {29, {256, 56}},  {30, {1, 2}},     {34, {256, 54}},
      {35, {256, 66}},  {39, {32, 17}},   {40, {64, 36}},  {41, {128, 18}},  {42, {64, 18}}};
  const auto found = blocks.find(type);
  if (found == blocks.end()) throw std::runtime_error("no such type");
  return found->second;
}

class gguf_cursor {
 public:
  explicit gguf_cursor(const std::vector<std::uint8_t>& file) : file_(file) {}
  std::size_t at = 0;

  std::string raw(std::uint64_t count) {
    if (count > file_.size() - at) throw std::runtime_error("the file ends");
    const std::string out(file_.begin() + static_cast<std::ptrdiff_t>(at),
                          file_.begin() + static_cast<std::ptrdiff_t>(at + count));
    at += count;
    return out;
  }
  template <class T>
  T number() {
    const std::string bytes = raw(sizeof(T));
    T out;
    std::memcpy(&out, bytes.data(), sizeof out);
    return out;
  }
  std::string string() { return raw(number<std::uint64_t>()); }

 private:
  const std::vector<std::uint8_t>& file_;
};

inline std::uint64_t gguf_value_bytes(std::uint32_t type) {
  static const std::uint64_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  if (type >= 13) throw std::runtime_error("no such type of value");
  return sizes[type];
}

inline gguf_contents read_gguf(const std::vector<std::uint8_t>& file) {
  gguf_cursor cursor(file);
  gguf_contents out;
  if (cursor.raw(4) != "GGUF") throw std::runtime_error("no GGUF file");
  if (const auto version = cursor.number<std::uint32_t>(); version != 2 && version != 3) {
    throw std::runtime_error("another version");
  }
  const auto tensors = cursor.number<std::uint64_t>(), entries = cursor.number<std::uint64_t>();
  std::uint64_t alignment = 32;
  const auto skip = [&](std::uint32_t type) {
    if (type == 8) {
      cursor.string();
    } else {
      cursor.raw(gguf_value_bytes(type));
    }
  };
  for (std::uint64_t i = 0; i < entries; ++i) {
    const std::string key = cursor.string();
    const auto type = cursor.number<std::uint32_t>();
    const std::size_t begin = cursor.at;
    if (type == 9) {
      const auto element = cursor.number<std::uint32_t>();
      const auto count = cursor.number<std::uint64_t>();
      if (element == 9) throw std::runtime_error("nested arrays");
      for (std::uint64_t k = 0; k < count; ++k) skip(element);
    } else {
      skip(type);
    }
    const std::string value(file.begin() + static_cast<std::ptrdiff_t>(begin),
                            file.begin() + static_cast<std::ptrdiff_t>(cursor.at));
    if (key == "general.alignment") {
      std::uint32_t number = 0;
      std::memcpy(&number, value.data(), 4);
      alignment = number;
    }
    if (!out.metadata.emplace(key, std::pair{type, value}).second) throw std::runtime_error("a key twice");
  }
  struct place {
    std::string name;
    std::uint64_t offset;
  };
  std::vector<place> places;
  for (std::uint64_t i = 0; i < tensors; ++i) {
    const std::string name = cursor.string();
    gguf_tensor tensor;
    const auto dimensions = cursor.number<std::uint32_t>();
    for (std::uint32_t k = 0; k < dimensions; ++k) tensor.dimensions.push_back(cursor.number<std::uint64_t>());
    tensor.type = cursor.number<std::uint32_t>();
    places.push_back({name, cursor.number<std::uint64_t>()});
    if (!out.tensors.emplace(name, tensor).second) throw std::runtime_error("a name twice");
  }
  const std::uint64_t data = (cursor.at + alignment - 1) / alignment * alignment;
  for (const auto& [name, offset] : places) {
    auto& tensor = out.tensors.at(name);
    const auto [elements, bytes] = gguf_block(tensor.type);
    std::uint64_t size = bytes;
    bool first = true;
    for (const std::uint64_t n : tensor.dimensions) {
      size *= first ? n / elements : n;
      first = false;
    }
    cursor.at = data + offset;
    const std::string raw = cursor.raw(size);
    tensor.bytes.assign(raw.begin(), raw.end());
  }
  return out;
}

/// The pieces of a file made by hand.
template <class T>
std::string gguf_number(T value) {
  std::string out(sizeof(T), '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}
inline std::string gguf_string(const std::string& value) { return gguf_number(std::uint64_t{value.size()}) + value; }
inline std::string gguf_entry(const std::string& key, std::uint32_t type, const std::string& value) {
  return gguf_string(key) + gguf_number(type) + value;
}
inline std::string gguf_tensor_info(const std::string& name, const std::vector<std::uint64_t>& dimensions,
                                    std::uint32_t type, std::uint64_t offset) {
  std::string out = gguf_string(name) + gguf_number(static_cast<std::uint32_t>(dimensions.size()));
  for (const std::uint64_t n : dimensions) out += gguf_number(n);
  return out + gguf_number(type) + gguf_number(offset);
}
inline std::string gguf_start(std::uint64_t tensors, std::uint64_t entries, std::uint32_t version = 3) {
  return "GGUF" + gguf_number(version) + gguf_number(tensors) + gguf_number(entries);
}
/// A header, padded, and its data.
inline std::string gguf_with(std::string header, const std::string& data, std::size_t alignment = 32) {
  header.resize((header.size() + alignment - 1) / alignment * alignment);
  return header + data;
}

}  // namespace reference

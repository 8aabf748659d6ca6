#pragma once

/// A second safetensors reader, from the description of the format: eight bytes of header length, a JSON object, the
/// data. It copies everything, and throws std::runtime_error where it does not understand. It includes nothing of
/// tetromino.

#include <cstdint>     // std::uint8_t, std::uint64_t
#include <filesystem>  // std::filesystem::path
#include <fstream>     // std::ifstream
#include <iterator>    // std::istreambuf_iterator
#include <map>         // std::map
#include <stdexcept>   // std::runtime_error
#include <string>      // std::string
#include <vector>      // std::vector

namespace reference {

struct stored_tensor {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::vector<std::uint8_t> bytes;
};

struct stored_file {
  std::map<std::string, std::string> metadata;
  std::map<std::string, stored_tensor> tensors;
};

/// Reads the subset of JSON that headers use: objects, strings, arrays of whole numbers.
class json_cursor {
 public:
  explicit json_cursor(std::string text) : text_(std::move(text)) {}

  /// Whether the next thing is `c`; if so, it is passed.
  bool accept(char c) {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void need(char c) {
    if (!accept(c)) throw std::runtime_error(std::string("header: no '") + c + "' at byte " + std::to_string(at_));
  }
  bool at_end() { return !accept('\0') && at_ == text_.size(); }

  std::string string() {
    need('"');
    std::string out;
    for (char c = next(); c != '"'; c = next()) {
      if (c != '\\') {
        out += c;
        continue;
      }
      const char escape = next();
      const std::string letters = "\"\\/bfnrt";
      const auto letter = letters.find(escape);
      if (letter != std::string::npos) {
        out += "\"\\/\b\f\n\r\t"[letter];
      } else if (escape == 'u') {
        std::uint32_t code = hex();
        if (code >= 0xD800 && code < 0xDC00) {
          if (next() != '\\' || next() != 'u') throw std::runtime_error("header: half a surrogate pair");
          code = 0x10000 + ((code - 0xD800) << 10) + (hex() - 0xDC00);
        }
        append_utf8(out, code);
      } else {
        throw std::runtime_error("header: unknown escape");
      }
    }
    return out;
  }

  /// Whether the next thing is null; if so, it is passed.
  bool null() {
    if (!accept('n')) return false;
    for (const char c : {'u', 'l', 'l'}) {
      if (next() != c) throw std::runtime_error("header: not null");
    }
    return true;
  }

  std::vector<std::uint64_t> numbers() {
    std::vector<std::uint64_t> out;
    need('[');
    if (accept(']')) return out;
    do {
      accept(' ');
      std::size_t used = 0;
      out.push_back(std::stoull(text_.substr(at_, 21), &used));
      at_ += used;
    } while (accept(','));
    need(']');
    return out;
  }

  /// Calls `member` with each key, standing before the value.
  template <class Member>
  void object(Member member) {
    need('{');
    if (accept('}')) return;
    do {
      accept(' ');
      const std::string key = string();
      need(':');
      member(key);
    } while (accept(','));
    need('}');
  }

 private:
  char next() {
    if (at_ == text_.size()) throw std::runtime_error("header: a string without end");
    return text_[at_++];
  }
  std::uint32_t hex() {
    const std::string digits{next(), next(), next(), next()};
    return static_cast<std::uint32_t>(std::stoul(digits, nullptr, 16));
  }
  static void append_utf8(std::string& out, std::uint32_t code) {
    const auto put = [&](std::uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xE0 | code >> 12);
      } else {
        put(0xF0 | code >> 18);
        put(0x80 | (code >> 12 & 63));
      }
      put(0x80 | (code >> 6 & 63));
    }
    put(0x80 | (code & 63));
  }

  std::string text_;
  std::size_t at_ = 0;
};

inline stored_file parse_safetensors(const std::vector<std::uint8_t>& file) {
  if (file.size() < 8) throw std::runtime_error("no header length");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length * 256 + file[static_cast<std::size_t>(i)];
  if (length > file.size() - 8) throw std::runtime_error("no header");
  const auto data = file.begin() + 8 + static_cast<std::ptrdiff_t>(length);

  stored_file out;
  json_cursor json(std::string(file.begin() + 8, data));
  json.object([&](const std::string& name) {
    if (name == "__metadata__") {
      if (json.null()) return;
      json.object([&](const std::string& key) { out.metadata[key] = json.string(); });
      return;
    }
    if (out.tensors.count(name) != 0) throw std::runtime_error("two tensors " + name);
    stored_tensor& tensor = out.tensors[name];
    json.object([&](const std::string& key) {
      if (key == "dtype") {
        tensor.dtype = json.string();
      } else if (key == "shape") {
        tensor.shape = json.numbers();
      } else {
        const auto offsets = json.numbers();
        tensor.begin = offsets.at(0);
        tensor.end = offsets.at(1);
      }
    });
    if (tensor.begin > tensor.end || tensor.end > static_cast<std::uint64_t>(file.end() - data)) {
      throw std::runtime_error("offsets of " + name);
    }
    tensor.bytes.assign(data + static_cast<std::ptrdiff_t>(tensor.begin),
                        data + static_cast<std::ptrdiff_t>(tensor.end));
  });
  if (!json.at_end()) throw std::runtime_error("something after the header's object");
  return out;
}

inline std::vector<std::uint8_t> read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline stored_file read_safetensors(const std::filesystem::path& path) { return parse_safetensors(read_bytes(path)); }

}  // namespace reference

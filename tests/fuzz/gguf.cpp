/// Feeds any bytes to the GGUF parser. What it accepts must hold together, must read the same with the independent
/// reader, and must come out the same after being written and read again.

#include <tetromino/io/detail/gguf_header.hpp>

#include "fuzz/replay.hpp"
#include "reference/gguf_reader.hpp"

#include <cstdint>      // std::uint8_t
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

namespace {

void require_same(const tetromino::detail::gguf_header& header, std::span<const std::uint8_t> file) {
  const auto second = reference::read_gguf({file.begin(), file.end()});
  require(second.metadata.size() == header.metadata.size(), "the same number of keys");
  for (const auto& [key, value] : header.metadata) {
    const auto& [type, stored] = second.metadata.at(key);
    require(static_cast<std::uint32_t>(value.type()) == type, "the same type of value");
    require(std::string(value.bytes().begin(), value.bytes().end()) == stored, "the same value");
  }
  require(second.tensors.size() == header.tensors.size(), "the same number of tensors");
  for (const auto& tensor : header.tensors) {
    const auto& same = second.tensors.at(tensor.name);
    require(same.type == static_cast<std::uint32_t>(tensor.type), "the same type");
    require(same.dimensions == std::vector<std::uint64_t>(tensor.shape.rbegin(), tensor.shape.rend()),
            "the same shape");
    const auto bytes = file.subspan(header.data_begin + tensor.begin, tensor.end - tensor.begin);
    require(same.bytes == std::vector<std::uint8_t>(bytes.begin(), bytes.end()), "the same bytes");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::uint8_t> file(data, size);
  const auto header = tetromino::detail::parse_gguf(file, "input");
  if (!header) {
    require(header.error().code() == tetromino::errc::malformed_file, "the kind of the error");
    require(std::string_view(header.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }
  require_same(*header, file);
  if (header->alignment > 4096) return 0;  // padding of that size would be written

  auto written = tetromino::detail::write_gguf_header(header->metadata, header->tensors, header->alignment);
  require(written.size() % header->alignment == 0, "data that begins at a multiple of the alignment");
  const auto contents = file.subspan(header->data_begin);
  written.insert(written.end(), contents.begin(), contents.end());
  const auto again = tetromino::detail::parse_gguf(written, "output");
  require(again.has_value(), "a written header that can be read");
  require_same(*again, written);
  return 0;
}

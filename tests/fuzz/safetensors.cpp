/// Feeds any bytes to the safetensors header parser. What it accepts must hold together, must read the same with the
/// independent reader, and must come out the same after being written and read again.
///
/// With libFuzzer: clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -DTETROMINO_LIBFUZZER -Iinclude
/// -Itests
///                 tests/fuzz/safetensors.cpp && ./a.out tests/fuzz/corpus/safetensors
/// Without it, this is a program that replays the files and directories named on its command line.

#include <tetromino/io/detail/safetensors_header.hpp>

#include "fuzz/replay.hpp"
#include "reference/safetensors_reader.hpp"

#include <cstdint>      // std::uint8_t
#include <span>         // std::span
#include <string>       // std::string
#include <string_view>  // std::string_view
#include <vector>       // std::vector

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::uint8_t> file(data, size);
  const auto header = tetromino::detail::parse_safetensors(file, file.size(), "input");
  if (!header) {
    require(header.error().code() == tetromino::errc::malformed_file, "the kind of the error");
    require(std::string_view(header.error().what()).size() < 1000, "an error that fits on a screen");
    return 0;
  }

  const auto second = reference::parse_safetensors({file.begin(), file.end()});
  require(second.tensors.size() == header->tensors.size(), "the same number of tensors");
  require(std::map<std::string, std::string>(header->metadata.begin(), header->metadata.end()) == second.metadata,
          "the same metadata");
  std::size_t end = 0;
  for (const auto& tensor : header->tensors) {
    require(tensor.begin == end && tensor.end >= tensor.begin, "tensors that follow each other");
    end = tensor.end;
    const auto& same = second.tensors.at(tensor.name);
    require(same.dtype == tetromino::io::name(tensor.type), "the same type");
    require(same.shape == std::vector<std::uint64_t>(tensor.shape.begin(), tensor.shape.end()), "the same shape");
    require(same.begin == tensor.begin && same.end == tensor.end, "the same offsets");
  }
  require(header->data_begin + end == size, "tensors that cover the file");

  std::string written = tetromino::detail::write_safetensors_header(header->tensors, header->metadata);
  written.append(file.begin() + static_cast<std::ptrdiff_t>(header->data_begin), file.end());
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(written.data());
  const auto again = tetromino::detail::parse_safetensors({bytes, written.size()}, written.size(), "output");
  require(again.has_value(), "a written header that can be read");
  require(again->data_begin % 8 == 0, "data that begins at a multiple of 8 bytes");
  require(again->metadata == header->metadata && again->tensors.size() == header->tensors.size(), "the same header");
  for (std::size_t i = 0; i < again->tensors.size(); ++i) {
    const auto &a = header->tensors[i], &b = again->tensors[i];
    require(a.name == b.name && a.type == b.type && a.shape == b.shape && a.begin == b.begin && a.end == b.end,
            "the same tensor");
  }
  return 0;
}

/// Feeds any bytes to the readers of placements, text and JSON. What they accept must come out the same after being
/// written and read again, in either way, and must not be taken for valid unless each expert has its slots. Built and
/// run as tests/fuzz/safetensors.cpp.

#include <tetromino/moe/placement_io.hpp>

#include "fuzz/replay.hpp"

#include <set>          // std::set
#include <string_view>  // std::string_view

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace moe = tetromino::moe;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const auto& read : {moe::try_placement_from_text(text), moe::try_placement_from_json(text)}) {
    if (!read) {
      require(read.error().code() == tetromino::errc::malformed_file ||
                  read.error().code() == tetromino::errc::invalid_argument ||
                  read.error().code() == tetromino::errc::shape_mismatch,
              "the kind of the error");
      require(std::string_view(read.error().what()).size() < 1000, "an error that fits on a screen");
      continue;
    }
    require(read->slot_to_expert().size() == read->layers() * read->slots(), "an entry for each slot");
    require(moe::placement_from_text(moe::to_text(*read)) == *read, "the same placement as text");
    require(moe::placement_from_json(moe::to_json(*read)) == *read, "the same placement as JSON");

    // one GPU per slot; counted anew what makes it valid there
    bool whole = true;
    for (std::size_t l = 0; l < read->layers(); ++l) {
      std::set<std::int32_t> placed(read->layer(l).begin(), read->layer(l).end());
      placed.erase(moe::empty_slot);
      whole = whole && placed.size() == read->experts();
    }
    const moe::topology each_alone = moe::topology::uniform(1, read->slots(), 1);
    require(moe::try_validate(*read, each_alone).has_value() == whole, "valid where each expert has a slot");
  }
  return 0;
}

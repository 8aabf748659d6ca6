/// Calls the C interface with any names, types, sizes, pointers that are NULL and clusters, over buffers of exactly the
/// sizes that c.h states. What is refused must say so in a text with an end, what is packed must unpack, and sizes
/// whose products wrap must be refused. Built and run as tests/fuzz/safetensors.cpp.

#define TETROMINO_C_INSTANCE
#define TETROMINO_CPU_SELECT 1
// Named by macros, so that the build does not link tetromino::cpu: the kernels are the scalar ones of this file.
#define TETROMINO_FUZZ_KERNELS <tetromino/detail/dispatch/select.hpp>
#define TETROMINO_FUZZ_INTERFACE <tetromino/detail/c.hpp>
#include TETROMINO_FUZZ_KERNELS
#include TETROMINO_FUZZ_INTERFACE

#include "fuzz/bytes.hpp"
#include "fuzz/replay.hpp"

#include <cstring>  // std::memchr
#include <string>   // std::string
#include <vector>   // std::vector

namespace {

__extension__ using wide = unsigned __int128;
constexpr wide most = 1 << 14;        // elements for which there is room
constexpr wide huge = wide{1} << 48;  // more than any memory has room for

/// Whether a buffer of so many elements can be made, or none can: then a call must refuse before it looks at one.
bool has_room(wide n) { return n <= most || n > huge; }
/// So many elements and one more, so that there is always a first.
std::size_t room(wide n) { return n > huge ? 1 : static_cast<std::size_t>(n) + 1; }

/// Mostly a small number, from 1 to `usual`; else any.
std::size_t any_size(fuzz_bytes& in, std::size_t usual) {
  switch (in.below(32)) {
    case 0:
      return std::size_t{1} << in.below(64);
    case 1:
      return in.next<std::size_t>();
    case 2:
      return 0;
    default:
      return 1 + in.below(usual);
  }
}

std::string any_recipe(fuzz_bytes& in) {
  const char* const known[] = {"mxfp4-32",
                               "mxfp4-32/oas/mbs-static",
                               "mxfp4-16/even",
                               "nvfp4/min-error",
                               "nvfp4/four-over-six",
                               "mxfp4-32/min-error/mbs-search@64",
                               "mxfp4-32/floor/mbs-search@16x2",
                               "nvfp4/hadamard-32",
                               "mxfp4-32/gptq"};
  const std::size_t which = in.below(11);
  if (which < 9) return known[which];
  const std::vector<char> bytes = in.fill<char>(in.below(40));
  return std::string(bytes.begin(), bytes.end());
}

/// Room for words, and whether a call left words with an end in it.
class words {
 public:
  explicit words(fuzz_bytes& in) : bytes_(in.below(4) == 0 ? in.below(8) : 200, 'x') {}

  [[nodiscard]] char* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
  [[nodiscard]] std::size_t size() const { return bytes_.size(); }

  bool check(tetromino_status status) const {
    require(status >= TETROMINO_OK && status <= TETROMINO_FAILED, "a status that c.h names");
    require(status != TETROMINO_FAILED, "an error with a kind");
    if (bytes_.empty()) return status == TETROMINO_OK;
    require(std::memchr(bytes_.data(), 0, bytes_.size()) != nullptr, "words with an end");
    require((status == TETROMINO_OK) == (bytes_.size() < 2 ? status == TETROMINO_OK : bytes_[0] == '\0'),
            "words exactly where something is wrong");
    return status == TETROMINO_OK;
  }

 private:
  std::vector<char> bytes_;
};

void backwards(void*, std::size_t count, tetromino_task task, void* work) {
  while (count-- > 0) task(work, count);
}

/// The pointer, or at times NULL.
template <class T>
T* perhaps(fuzz_bytes& in, std::vector<T>& buffer) {
  return in.below(24) == 0 || buffer.empty() ? nullptr : buffer.data();
}

void pack_any(fuzz_bytes& in) {
  const std::string name = any_recipe(in);
  const std::size_t unit = in.below(2) == 0 ? 1 : 32, rows = any_size(in, 9);
  const std::size_t cols = any_size(in, unit == 1 ? 200 : 6) * unit;
  words message(in);
  tetromino_sizes sizes{};
  const bool known = message.check(tetromino_packed_sizes(
      name.c_str(), rows, cols, in.below(24) == 0 ? nullptr : &sizes, message.data(), message.size()));
  const wide elements = wide{rows} * cols;
  if (elements > huge) require(!known, "sizes that wrap");
  if (elements > most || cols > most || (known && sizes.codes > 4 * most)) return;

  const auto type = static_cast<tetromino_type>(in.below(7));
  const std::size_t size = type == TETROMINO_FLOAT ? 4 : 2;
  std::vector<std::uint8_t> codes(sizes.codes), scales(sizes.scales), macros(sizes.macros), blocks(sizes.ggml);
  std::vector<float> weights(cols, 1.0f);
  const bool as_ggml = in.below(3) == 0;
  float tensor_scale = in.below(3) == 0 ? in.next<float>() : 0.0f;
  const tetromino_packed out{as_ggml ? perhaps(in, blocks) : nullptr, perhaps(in, codes), perhaps(in, scales),
                             perhaps(in, macros), in.below(2) == 0 ? nullptr : &tensor_scale};
  tetromino_options options{in.below(3) == 0 ? weights.data() : nullptr, in.below(2) == 0 ? &backwards : nullptr,
                            nullptr};
  if (options.column_weights != nullptr && cols > 0) weights[0] = in.next<float>();
  const bool has_options = in.below(4) != 0;
  const tetromino_type back_type = in.below(4) == 0 ? type : TETROMINO_FLOAT;
  const auto x = in.fill<std::uint8_t>(static_cast<std::size_t>(elements) * size + 1);  // of what is left
  const bool packed =
      message.check(tetromino_quantize(name.c_str(), x.data(), type, rows, cols, has_options ? &options : nullptr, &out,
                                       message.data(), message.size()));
  require(known || !packed, "a recipe that is known");
  std::vector<float> back(static_cast<std::size_t>(elements) + 1);
  message.check(tetromino_dequantize(name.c_str(), &out, rows, cols, &options, back.data(), back_type, message.data(),
                                     message.size()));
}

void balance_any(fuzz_bytes& in) {
  const std::size_t layers = any_size(in, 3), experts = any_size(in, 12), groups = any_size(in, 3);
  const tetromino_cluster cluster{any_size(in, 3), any_size(in, 4), any_size(in, 4)};
  const wide cells = wide{layers} * experts,
             slots = wide{cluster.nodes} * cluster.gpus_per_node * cluster.slots_per_gpu;
  const wide placed = wide{layers} * slots, reached = slots >= experts ? cells * (slots - experts + 1) : 0;
  if (!has_room(cells) || !has_room(placed) || !has_room(reached)) return;
  std::vector<std::int64_t> slot(room(placed)), copies(room(cells)), places(room(reached));
  words message(in);
  const auto type = static_cast<tetromino_type>(in.below(7));
  const tetromino_cluster* const given = in.below(24) == 0 ? nullptr : &cluster;
  auto *const to_slots = perhaps(in, slot), *const to_places = perhaps(in, places),
              *const to_copies = perhaps(in, copies);
  const auto loads = in.fill<std::uint8_t>(room(cells) * 8);  // of what is left
  const bool done = message.check(tetromino_balanced_eplb(loads.data(), type, layers, experts, groups, given, to_slots,
                                                          to_places, to_copies, message.data(), message.size()));
  if (!done) return;
  require(cells <= huge && placed <= huge, "sizes that wrap");
  if (to_slots != nullptr) {
    for (std::size_t i = 0; i + 1 < slot.size(); ++i) {
      require(slot[i] >= 0 && static_cast<std::size_t>(slot[i]) < experts, "an expert in each slot");
    }
  }
  if (to_copies != nullptr) {
    std::size_t all = 0;
    for (std::size_t i = 0; i + 1 < copies.size(); ++i) all += static_cast<std::size_t>(copies[i]);
    require(all == slot.size() - 1, "copies in all slots");
  }
}

void place_any(fuzz_bytes& in) {
  const std::size_t layers = any_size(in, 3), k = any_size(in, 3), experts = any_size(in, 12);
  const tetromino_cluster cluster{any_size(in, 3), any_size(in, 4), any_size(in, 4)};
  std::vector<std::uint32_t> tokens(in.below(5));
  wide all = 0;
  for (std::uint32_t& n : tokens)
    all += n = in.below(40) == 0 ? in.next<std::uint32_t>() : static_cast<std::uint32_t>(in.below(9));
  const wide cells = all * layers * k, slots = wide{cluster.nodes} * cluster.gpus_per_node * cluster.slots_per_gpu;
  const wide placed = wide{layers} * slots;
  if (!has_room(cells) || !has_room(placed) || wide{layers} * experts > most) return;
  std::vector<std::int32_t> ids(room(cells));
  for (std::int32_t& id : ids) {
    const auto byte = in.next<std::uint8_t>();
    id = byte > 250 ? static_cast<std::int32_t>(in.next<std::uint32_t>()) : byte % 16 - 1;
  }
  std::vector<std::int32_t> slot(room(placed));
  std::vector<std::uint32_t> node(tokens.size() + 1);
  words message(in);
  tokens.push_back(0);  // data() of no requests would be NULL
  const bool done = message.check(tetromino_local(ids.data(), layers, experts, k, tokens.data(), tokens.size() - 1,
                                                  in.below(24) == 0 ? nullptr : &cluster, perhaps(in, slot),
                                                  perhaps(in, node), message.data(), message.size()));
  if (!done) return;
  require(cells <= huge && placed <= huge, "sizes that wrap");
  for (std::size_t i = 0; i + 1 < slot.size(); ++i) {
    require(slot[i] >= -1 && slot[i] < static_cast<std::int64_t>(experts), "an expert or nobody in each slot");
  }
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) require(node[i] < cluster.nodes, "a node that exists");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz_bytes in(data, size);
  switch (in.below(4)) {
    case 0:
      balance_any(in);
      break;
    case 1:
      place_any(in);
      break;
    default:
      pack_any(in);
  }
  return 0;
}

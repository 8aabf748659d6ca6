#pragma once

#include "../../../detail/macros_off.hpp"

#include "node_mask.hpp"    // wide_mask
#include "node_visits.hpp"  // count_visits, cover_lanes

#include <cstddef>      // std::byte, std::size_t
#include <cstdint>      // std::uint8_t, std::uint16_t, std::uint32_t
#include <cstring>      // std::memcpy
#include <span>         // std::span
#include <type_traits>  // std::is_same_v
#include <vector>       // std::vector

namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA {

/// Nodes of tokens and of the holders of their experts, 64 tokens side by side: a chunk is a row of 64 homes, then a
/// row of 64 holders for each of `rows` experts. A Mask is kept in as few bytes as the nodes need, since most of a
/// search is spent counting over these; that loop alone is compiled for each width.
template <class Mask>
class token_lanes {
 public:
  token_lanes(std::size_t nodes, std::size_t rows) : rows_(rows), kernels_(kernels_for(nodes)) {}

  /// `chunks` chunks of no home and no holder.
  void clear(std::size_t chunks) { bytes_.assign(chunks * chunk_lanes() * kernels_.bytes, std::byte{0}); }

  [[nodiscard]] std::size_t chunk_lanes() const noexcept { return (rows_ + 1) * cover_lanes; }
  /// Where token `token` of the whole list has its home; its expert j is (j + 1) × cover_lanes further.
  [[nodiscard]] std::size_t lane(std::size_t chunk, std::size_t token) const noexcept {
    return chunk * chunk_lanes() + token;
  }
  void set(std::size_t lane, Mask nodes) { kernels_.set(bytes_.data() + lane * kernels_.bytes, nodes); }
  /// The same nodes in many lanes.
  void set(std::span<const std::uint32_t> lanes, Mask nodes) { kernels_.set_many(bytes_.data(), lanes, nodes); }
  /// The same home for all tokens of a chunk.
  void set_homes(std::size_t chunk, Mask home) {
    for (std::size_t i = 0; i < cover_lanes; ++i) set(lane(chunk, i), home);
  }

  /// Nodes that each token of a chunk visits besides its home: visits[cover_lanes]. `last` holds one more expert that
  /// all of them share; without copies each expert has one holder.
  void count(std::size_t chunk, Mask last, bool copies, std::uint8_t* visits) const {
    const std::byte* const home = bytes_.data() + chunk * chunk_lanes() * kernels_.bytes;
    (copies ? kernels_.with_copies : kernels_.without)(home, rows_, last, visits);
  }

 private:
  struct kernel_table {
    std::size_t bytes;
    void (*set)(std::byte* to, Mask nodes);
    void (*set_many)(std::byte* to, std::span<const std::uint32_t> lanes, Mask nodes);
    void (*with_copies)(const std::byte* chunk, std::size_t rows, Mask last, std::uint8_t* visits);
    void (*without)(const std::byte* chunk, std::size_t rows, Mask last, std::uint8_t* visits);
  };

  template <class Lane>
  static void set_lane(std::byte* to, Mask nodes) {
    const auto narrow = static_cast<Lane>(nodes);
    std::memcpy(to, &narrow, sizeof narrow);
  }
  template <class Lane>
  static void set_lanes(std::byte* to, std::span<const std::uint32_t> lanes, Mask nodes) {
    const auto narrow = static_cast<Lane>(nodes);
    for (const std::uint32_t lane : lanes) std::memcpy(to + lane * sizeof narrow, &narrow, sizeof narrow);
  }
  template <class Lane, bool Copies>
  static void count_chunk(const std::byte* chunk, std::size_t rows, Mask last, std::uint8_t* visits) {
    const auto* const home = reinterpret_cast<const Lane*>(chunk);  // vectors of bytes are aligned for any number
    count_visits<Lane, Copies>(home + cover_lanes, rows, static_cast<Lane>(last), home, visits);
  }
  template <class Lane>
  [[nodiscard]] static kernel_table kernels_of() {
    return {sizeof(Lane), &set_lane<Lane>, &set_lanes<Lane>, &count_chunk<Lane, true>, &count_chunk<Lane, false>};
  }
  [[nodiscard]] static kernel_table kernels_for([[maybe_unused]] std::size_t nodes) {
    if constexpr (!std::is_same_v<Mask, wide_mask>) {
      if (nodes <= 8) return kernels_of<std::uint8_t>();
      if (nodes <= 16) return kernels_of<std::uint16_t>();
      if (nodes <= 32) return kernels_of<std::uint32_t>();
    }
    return kernels_of<Mask>();
  }

  std::size_t rows_;
  kernel_table kernels_;
  std::vector<std::byte> bytes_;
};

}  // namespace TETROMINO_NAMESPACE::moe::detail::inline TETROMINO_ISA

#include "../../../detail/macros_back.hpp"

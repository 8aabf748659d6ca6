#pragma once

#include "../detail/macros_off.hpp"

#include "../error.hpp"  // tetromino::result, tetromino::error
#include "ids.hpp"       // id_array, no_expert, detail::to_id
#include "topology.hpp"  // tetromino::moe::topology

#include <algorithm>     // std::copy, std::fill, std::max
#include <charconv>      // std::from_chars
#include <cstddef>       // std::size_t
#include <cstdint>       // std::int32_t, std::int64_t, std::uint32_t
#include <iterator>      // std::data, std::size
#include <span>          // std::span
#include <string>        // std::string
#include <string_view>   // std::string_view
#include <system_error>  // std::errc
#include <utility>       // std::move
#include <vector>        // std::vector

namespace TETROMINO_NAMESPACE::moe {

/// What a slot holds when it holds no expert.
inline constexpr std::int32_t empty_slot = -1;

/// Where experts live: for each layer, slot → logical expert, or empty_slot. A second slot with the same expert is a
/// replica. Slots are numbered as in `topology`. A placement by itself may be partial; `try_validate` tells.
class placement {
 public:
  static constexpr std::size_t max_experts = 65'535;

  TETROMINO_ABI placement() = default;

  /// All slots empty: experts[layers, slots]. Precondition: at most 2^48 slots in all layers.
  TETROMINO_ABI placement(std::size_t layers, std::size_t experts, std::size_t slots)
      : layers_(layers), experts_(experts), slots_(slots), slot_to_expert_(layers * slots, empty_slot) {
    TETROMINO_EXPECTS(detail::can_be_array({layers, slots}), "placement: sizes of an array", layers, slots);
  }

  /// From slot_to_expert[layers, slots], integers of any type, such as EPLB's int64 phy2log; −1 (or the largest number
  /// of an unsigned type) is an empty slot. Errors: a size that is zero or does not fit, an entry outside −1 … experts
  /// − 1.
  template <id_array Experts = std::vector<std::int32_t>>
  [[nodiscard]] TETROMINO_ABI static result<placement> try_make(std::size_t layers, std::size_t experts,
                                                                std::size_t slots, const Experts& slot_to_expert) {
    const std::size_t count = std::size(slot_to_expert);
    if (layers == 0 || slots == 0 || slots > topology::max_slots || experts == 0 || experts > max_experts) {
      return error(errc::invalid_argument,
                   {"placement: expected layers ≥ 1, slots 1 to ", topology::max_slots, " and experts 1 to ",
                    max_experts, ", got ", layers, ", ", slots, " and ", experts});
    }
    if (count % slots != 0 || count / slots != layers) {
      return error(errc::shape_mismatch, {"placement: expected ", layers, " × ", slots, " entries, got ", count});
    }
    placement p(layers, experts, slots);
    for (std::size_t i = 0; i < count; ++i) {
      const auto expert = std::data(slot_to_expert)[i];
      const std::uint32_t id = detail::to_id(expert, experts);
      if (id == detail::no_id) {
        return error(errc::invalid_argument, {"placement: expected experts from -1 (empty) to ", experts - 1, ", got ",
                                              expert, " in layer ", i / slots, ", slot ", i % slots});
      }
      if (id != no_expert) p.slot_to_expert_[i] = static_cast<std::int32_t>(id);
    }
    return p;
  }
  template <id_array Experts = std::vector<std::int32_t>>
  [[nodiscard]] TETROMINO_ABI static placement make(std::size_t layers, std::size_t experts, std::size_t slots,
                                                    const Experts& slot_to_expert) {
    return try_make(layers, experts, slots, slot_to_expert).value();
  }

  [[nodiscard]] TETROMINO_ABI std::size_t layers() const noexcept { return layers_; }
  [[nodiscard]] TETROMINO_ABI std::size_t experts() const noexcept { return experts_; }
  [[nodiscard]] TETROMINO_ABI std::size_t slots() const noexcept { return slots_; }

  /// slot → expert of one layer: [slots].
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> layer(std::size_t l) const {
    TETROMINO_EXPECTS(l < layers_, "placement: layer number out of range", l, layers_);
    return std::span(slot_to_expert_).subspan(l * slots_, slots_);
  }
  [[nodiscard]] TETROMINO_ABI std::span<std::int32_t> layer(std::size_t l) {
    TETROMINO_EXPECTS(l < layers_, "placement: layer number out of range", l, layers_);
    return std::span(slot_to_expert_).subspan(l * slots_, slots_);
  }
  /// slot → expert of all layers: [layers, slots].
  [[nodiscard]] TETROMINO_ABI std::span<const std::int32_t> slot_to_expert() const noexcept { return slot_to_expert_; }

  friend TETROMINO_ABI bool operator==(const placement&, const placement&) = default;

 private:
  std::size_t layers_ = 0;
  std::size_t experts_ = 0;
  std::size_t slots_ = 0;
  std::vector<std::int32_t> slot_to_expert_;  // [layers, slots]
};

/// expert → its slots, for all layers of a placement; slots ascend, so the first copy comes first.
class replica_index {
 public:
  TETROMINO_ABI replica_index() = default;
  TETROMINO_ABI explicit replica_index(const placement& p)
      : experts_(p.experts()), first_(p.layers() * p.experts() + 1, 0) {
    for (std::size_t l = 0; l < p.layers(); ++l) {
      for (const std::int32_t e : p.layer(l)) {
        if (e != empty_slot) ++first_[l * experts_ + static_cast<std::size_t>(e) + 1];
      }
    }
    for (std::size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    slots_.resize(first_.back());
    std::vector<std::size_t> next(first_.begin(), first_.end() - 1);
    for (std::size_t l = 0; l < p.layers(); ++l) {
      const std::span<const std::int32_t> row = p.layer(l);
      for (std::size_t s = 0; s < row.size(); ++s) {
        if (row[s] != empty_slot) {
          slots_[next[l * experts_ + static_cast<std::size_t>(row[s])]++] = static_cast<std::uint32_t>(s);
        }
      }
    }
  }

  [[nodiscard]] TETROMINO_ABI std::size_t experts() const noexcept { return experts_; }
  /// Slots that hold `expert` in `layer`, ascending; none if it is not placed.
  [[nodiscard]] TETROMINO_ABI std::span<const std::uint32_t> slots_of(std::size_t layer, std::size_t expert) const {
    const std::size_t i = layer * experts_ + expert;
    TETROMINO_EXPECTS(expert < experts_ && i + 1 < first_.size(), "replica_index: layer or expert out of range", expert,
                      experts_, i + 1, first_.size());
    return std::span(slots_).subspan(first_[i], first_[i + 1] - first_[i]);
  }

 private:
  std::size_t experts_ = 0;
  std::vector<std::size_t> first_;    // [layers × experts + 1]
  std::vector<std::uint32_t> slots_;  // [placed slots of all layers]
};

/// What a placement must obey besides "each expert at least once".
struct placement_rules {
  bool one_copy_per_gpu = true;      ///< DeepSeek EPLB may put two copies of an expert on one GPU: false accepts that
  bool each_expert = true;           ///< false: experts may be missing, as after the loss of a GPU
  std::size_t nodes_per_expert = 1;  ///< on how many nodes at least each expert that is there has a copy
};

inline namespace TETROMINO_ISA {

/// Checks a placement against a cluster: slots as many as the topology has, and by the rules: each expert in each layer
/// at least once, no expert twice on one GPU, copies on enough nodes. Errors name layer and expert.
[[nodiscard]] inline result<void> try_validate(const placement& p, const topology& t, placement_rules rules = {}) {
  if (p.slots() != t.slots()) {
    return error(errc::shape_mismatch,
                 {"placement: expected ", t.slots(), " slots as in the topology, got ", p.slots()});
  }
  constexpr std::uint32_t nowhere = 0xFFFF'FFFF;
  std::vector<std::uint32_t> last_gpu(p.experts()), last_node(p.experts()), nodes(p.experts());
  for (std::size_t l = 0; l < p.layers(); ++l) {
    std::fill(last_gpu.begin(), last_gpu.end(), nowhere);
    std::fill(last_node.begin(), last_node.end(), nowhere);
    std::fill(nodes.begin(), nodes.end(), 0);
    const std::span<const std::int32_t> row = p.layer(l);
    for (std::size_t s = 0; s < row.size(); ++s) {
      if (row[s] == empty_slot) continue;
      const auto e = static_cast<std::size_t>(row[s]);
      const auto gpu = static_cast<std::uint32_t>(t.gpu_of_slot(s));
      const auto node = static_cast<std::uint32_t>(t.node_of_gpu(gpu));
      if (rules.one_copy_per_gpu && last_gpu[e] == gpu) {
        return error(errc::invalid_argument, {"placement: expected an expert once per GPU, got expert ", e,
                                              " twice on GPU ", gpu, " in layer ", l});
      }
      nodes[e] += last_node[e] == node ? 0U : 1U;
      last_gpu[e] = gpu;
      last_node[e] = node;
    }
    for (std::size_t e = 0; e < p.experts(); ++e) {
      if (last_gpu[e] == nowhere && !rules.each_expert) continue;
      if (last_gpu[e] == nowhere) {
        return error(errc::invalid_argument,
                     {"placement: expected each expert at least once, got expert ", e, " nowhere in layer ", l});
      }
      if (nodes[e] < rules.nodes_per_expert) {
        return error(errc::invalid_argument, {"placement: expected each expert on ", rules.nodes_per_expert,
                                              " nodes, got expert ", e, " on ", nodes[e], " in layer ", l});
      }
    }
  }
  return {};
}
inline void validate(const placement& p, const topology& t, placement_rules rules = {}) {
  try_validate(p, t, rules).value();
}

/// What the GPUs of one topology hold, said in the slots of another: GPU g of `to` holds what `gpu_before[g]` held on
/// `from` (a list [GPUs of `to`], new_gpu for one that was not there; empty: GPUs keep their numbers, and those beyond
/// are new). Experts keep the order of their slots; what finds none is left out, as is what was on GPUs that are not
/// there any more. So the result may lack experts: a start for solvers and for migrate. Errors: a placement for another
/// topology, a list of another length, a GPU that was not there.
inline constexpr std::uint32_t new_gpu = 0xFFFF'FFFF;
[[nodiscard]] inline result<placement> try_carry_over(const placement& p, const topology& from, const topology& to,
                                                      std::span<const std::uint32_t> gpu_before = {}) {
  if (p.slots() != from.slots() || (!gpu_before.empty() && gpu_before.size() != to.gpus())) {
    return error(errc::shape_mismatch, {"carry_over: expected ", from.slots(), " slots and a former GPU for each of ",
                                        to.gpus(), ", got ", p.slots(), " and ", gpu_before.size()});
  }
  placement out(p.layers(), p.experts(), to.slots());
  for (std::size_t g = 0; g < to.gpus(); ++g) {
    const std::uint32_t before = !gpu_before.empty() ? gpu_before[g]
                                 : g < from.gpus()   ? static_cast<std::uint32_t>(g)
                                                     : new_gpu;
    if (before == new_gpu) continue;
    if (before >= from.gpus()) {
      return error(errc::invalid_argument, {"carry_over: expected former GPUs below ", from.gpus(), ", got ", before});
    }
    for (std::size_t l = 0; l < p.layers(); ++l) {
      std::size_t next = to.first_slot(g);
      const std::size_t last = next + to.slots_on_gpu(g);
      const bool keeps_slots = to.slots_on_gpu(g) == from.slots_on_gpu(before);
      for (const std::int32_t e : p.layer(l).subspan(from.first_slot(before), from.slots_on_gpu(before))) {
        if (next == last) break;
        if (e != empty_slot || keeps_slots) out.layer(l)[next++] = e;
      }
    }
  }
  return out;
}
[[nodiscard]] inline placement carry_over(const placement& p, const topology& from, const topology& to,
                                          std::span<const std::uint32_t> gpu_before = {}) {
  return try_carry_over(p, from, to, gpu_before).value();
}

/// Puts a further copy of some expert into each empty slot, as engines want it that know no empty ones: in each, of the
/// experts that its GPU lacks, the one with the fewest copies, the lowest number of equals. Errors: a placement for
/// another topology; a GPU with more slots than there are experts.
[[nodiscard]] inline result<placement> try_fill_empty_slots(placement p, const topology& t) {
  if (p.slots() != t.slots()) {
    return error(errc::shape_mismatch,
                 {"placement: expected ", t.slots(), " slots as in the topology, got ", p.slots()});
  }
  std::vector<std::uint32_t> copies(p.experts());
  std::vector<bool> held(p.experts());
  for (std::size_t l = 0; l < p.layers(); ++l) {
    const std::span<std::int32_t> row = p.layer(l);
    std::fill(copies.begin(), copies.end(), 0);
    for (const std::int32_t e : row) {
      if (e != empty_slot) ++copies[static_cast<std::size_t>(e)];
    }
    for (std::size_t g = 0; g < t.gpus(); ++g) {
      const std::span<std::int32_t> slots = row.subspan(t.first_slot(g), t.slots_on_gpu(g));
      std::fill(held.begin(), held.end(), false);
      for (const std::int32_t e : slots) {
        if (e != empty_slot) held[static_cast<std::size_t>(e)] = true;
      }
      for (std::int32_t& slot : slots) {
        if (slot != empty_slot) continue;
        std::size_t best = p.experts();
        for (std::size_t e = 0; e < p.experts(); ++e) {
          if (!held[e] && (best == p.experts() || copies[e] < copies[best])) best = e;
        }
        if (best == p.experts()) {
          return error(errc::infeasible, {"placement: expected at most ", p.experts(),
                                          " slots per GPU, one for each expert, got ", slots.size(), " on GPU ", g});
        }
        slot = static_cast<std::int32_t>(best);
        held[best] = true;
        ++copies[best];
      }
    }
  }
  return p;
}
[[nodiscard]] inline placement fill_empty_slots(placement p, const topology& t) {
  return try_fill_empty_slots(std::move(p), t).value();
}

}  // namespace TETROMINO_ISA

/// The three tensors that callers of DeepSeek EPLB expect, row-major.
struct index_tensors {
  std::size_t layers = 0;
  std::size_t experts = 0;
  std::size_t slots = 0;
  std::size_t max_copies = 0;                     ///< largest entry of `count`
  std::vector<std::int64_t> physical_to_logical;  ///< [layers, slots]
  std::vector<std::int64_t> logical_to_physical;  ///< [layers, experts, max_copies], −1 where there is no further copy
  std::vector<std::int64_t> count;                ///< [layers, experts]

  friend TETROMINO_ABI bool operator==(const index_tensors&, const index_tensors&) = default;
};

inline namespace TETROMINO_ISA {

/// The index tensors of a placement, copies in slot order; empty slots are −1 in physical_to_logical.
[[nodiscard]] inline index_tensors to_index_tensors(const placement& p) {
  const replica_index where(p);
  index_tensors out{p.layers(), p.experts(), p.slots(), 0, {}, {}, {}};
  out.physical_to_logical.assign(p.slot_to_expert().begin(), p.slot_to_expert().end());
  out.count.resize(p.layers() * p.experts());
  for (std::size_t i = 0; i < out.count.size(); ++i) {
    const std::size_t n = where.slots_of(i / p.experts(), i % p.experts()).size();
    out.count[i] = static_cast<std::int64_t>(n);
    out.max_copies = std::max(out.max_copies, n);
  }
  out.logical_to_physical.assign(out.count.size() * out.max_copies, -1);
  for (std::size_t i = 0; i < out.count.size(); ++i) {
    const std::span<const std::uint32_t> slots = where.slots_of(i / p.experts(), i % p.experts());
    std::copy(slots.begin(), slots.end(),
              out.logical_to_physical.begin() + static_cast<std::ptrdiff_t>(i * out.max_copies));
  }
  return out;
}

/// The placement of index tensors made elsewhere; reads physical_to_logical alone. Errors: as placement::try_make.
[[nodiscard]] inline result<placement> try_to_placement(const index_tensors& maps) {
  return placement::try_make(maps.layers, maps.experts, maps.slots, maps.physical_to_logical);
}
[[nodiscard]] inline placement to_placement(const index_tensors& maps) { return try_to_placement(maps).value(); }

/// A placement as text: a first line `placement layers L experts E slots S`, then a line of S entries per layer, −1 for
/// an empty slot.
[[nodiscard]] inline std::string to_text(const placement& p) {
  std::string out = detail::text("placement layers ", p.layers(), " experts ", p.experts(), " slots ", p.slots(), "\n");
  for (std::size_t l = 0; l < p.layers(); ++l) {
    const std::span<const std::int32_t> row = p.layer(l);
    for (std::size_t s = 0; s < row.size(); ++s) {
      out += std::to_string(row[s]);
      out += s + 1 < row.size() ? ' ' : '\n';
    }
  }
  return out;
}

}  // namespace TETROMINO_ISA

namespace detail::inline TETROMINO_ISA {

/// Words and numbers of a text, with the line they stand on.
class word_reader {
 public:
  explicit word_reader(std::string_view written) : rest_(written) {}

  [[nodiscard]] std::size_t line() const noexcept { return line_; }

  /// The next word, or an empty one at the end.
  std::string_view word() {
    std::size_t skip = 0;
    for (; skip < rest_.size() && is_space(rest_[skip]); ++skip) line_ += rest_[skip] == '\n' ? 1U : 0U;
    rest_.remove_prefix(skip);
    std::size_t n = 0;
    while (n < rest_.size() && !is_space(rest_[n])) ++n;
    const std::string_view found = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return found;
  }

  /// Reads a number into `out`; false if the next word is none that fits.
  template <class Integer>
  [[nodiscard]] bool number(Integer& out) {
    const std::string_view w = word();
    const auto [end, code] = std::from_chars(w.data(), w.data() + w.size(), out);
    return !w.empty() && code == std::errc() && end == w.data() + w.size();
  }

 private:
  static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

  std::string_view rest_;
  std::size_t line_ = 1;
};

}  // namespace detail::inline TETROMINO_ISA

inline namespace TETROMINO_ISA {

/// Reads what `to_text` wrote. Errors name the line.
[[nodiscard]] inline result<placement> try_placement_from_text(std::string_view written) {
  detail::word_reader in(written);
  std::size_t layers = 0, experts = 0, slots = 0;
  if (in.word() != "placement" || in.word() != "layers" || !in.number(layers) || in.word() != "experts" ||
      !in.number(experts) || in.word() != "slots" || !in.number(slots)) {
    return error(errc::malformed_file, {"placement: expected \"placement layers L experts E slots S\", got "
                                        "something else on line ",
                                        in.line()});
  }
  // each entry takes two characters at least: a text that promises more than it holds allocates nothing
  if (slots == 0 || layers > written.size() / slots) {
    return error(errc::malformed_file,
                 {"placement: expected ", layers, " × ", slots, " entries, got a text of ", written.size(), " bytes"});
  }
  std::vector<std::int32_t> entries(layers * slots);
  for (std::int32_t& e : entries) {
    if (!in.number(e)) {
      return error(errc::malformed_file, {"placement: expected ", layers, " × ", slots,
                                          " expert numbers, got something else on line ", in.line()});
    }
  }
  if (const std::string_view more = in.word(); !more.empty()) {
    return error(errc::malformed_file,
                 {"placement: expected the end of the text, got \"", more.substr(0, 40), "\" on line ", in.line()});
  }
  return placement::try_make(layers, experts, slots, entries);
}
[[nodiscard]] inline placement placement_from_text(std::string_view written) {
  return try_placement_from_text(written).value();
}

}  // namespace TETROMINO_ISA

}  // namespace TETROMINO_NAMESPACE::moe

#include "../detail/macros_back.hpp"

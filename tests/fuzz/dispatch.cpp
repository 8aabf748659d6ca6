/// Feeds any calls, counts and index tensors to a dispatch_plan and to try_to_placement: what they accept must lie in
/// the buffers that they plan. Built and run as tests/fuzz/safetensors.cpp.

#include <tetromino/moe/dispatch.hpp>
#include <tetromino/moe/placement.hpp>

#include "fuzz/bytes.hpp"
#include "fuzz/replay.hpp"

#include <algorithm>  // std::copy, std::all_of
#include <vector>     // std::vector

namespace {

namespace moe = tetromino::moe;

void plan_any(fuzz_bytes& in) {
  const std::size_t ranks = 1 + in.below(5), k = 1 + in.below(4), slots = in.below(9), width = in.below(3);
  moe::dispatch_plan plan(ranks, k);
  std::vector<std::uint32_t> rank_of_slot(slots);
  for (auto& rank : rank_of_slot) rank = static_cast<std::uint32_t>(in.below(ranks + 1));  // one too many at times
  std::vector<moe::expert_call> calls(in.below(64));
  for (auto& call : calls) {
    const std::size_t slot = in.below(slots + 2);
    call = {slot > slots ? moe::no_slot : static_cast<std::uint32_t>(slot), 1.0f};
  }
  const auto copies = in.below(2) == 0 ? moe::row_copies::per_rank : moe::row_copies::per_expert;
  if (plan.try_plan_send(calls, rank_of_slot, copies)) {
    std::size_t sent = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
      require(static_cast<std::size_t>(plan.send_offsets()[r]) == sent, "offsets that follow each other");
      sent += static_cast<std::size_t>(plan.send_counts()[r]);
    }
    require(plan.sent() == sent && plan.send_calls().size() == sent * k, "rows and calls for all counts");
    for (const std::uint32_t row : plan.send_rows()) require(row < plan.rows(), "rows that exist");
    std::vector<float> answers(sent * width, 1.0f), out(plan.rows() * width);
    plan.add_copies(answers, out, width);
  }
  // what others claim to send, and calls for any slot
  std::vector<std::int32_t> counts(in.below(ranks + 2));
  for (auto& count : counts) {
    const auto raw = in.next<std::int32_t>();
    count = in.below(8) == 0 ? raw : raw & 15;
    if (in.below(8) != 0 && count > 4096) count = 3;
  }
  for (const std::int32_t count : counts) {
    if (count > 4096) return;  // planned, it would be memory for 2^31 rows
  }
  if (!plan.try_plan_receive(counts)) return;
  for (auto& call : plan.receive_calls()) call = {in.next<std::uint32_t>() & (in.below(4) == 0 ? ~0u : 7u), 1.0f};
  const std::size_t first = in.below(4), held = in.below(9);
  if (!plan.try_group_by_expert(first, held)) return;
  require(plan.expert_offsets().size() == held + 1, "an offset for each slot");
  require(plan.expert_offsets().back() == plan.expert_rows().size(), "pairs for all offsets");
  for (const std::uint32_t row : plan.expert_rows()) require(row < plan.received(), "rows that came");
  std::vector<float> y(plan.expert_rows().size() * width, 1.0f), sums(plan.received() * width);
  plan.add_expert_outputs(y, sums, width);
}

void place_any(fuzz_bytes& in) {
  moe::index_tensors maps;
  const auto size = [&] { return in.below(4) == 0 ? in.next<std::size_t>() : in.below(9); };
  maps.layers = size(), maps.experts = size(), maps.slots = size();
  maps.physical_to_logical = in.fill<std::int64_t>(in.below(2) == 0 ? in.below(80) : in.below(9) * in.below(9));
  for (auto& e : maps.physical_to_logical) {
    if (in.below(16) != 0) e = e % 10 - 1;
  }
  const auto made = moe::try_to_placement(maps);
  if (!made) return;
  require(made->layers() == maps.layers && made->slots() == maps.slots, "the sizes that were asked for");
  const bool each_is_placed = [&] {
    for (std::size_t l = 0; l < made->layers(); ++l) {
      for (std::size_t e = 0; e < made->experts(); ++e) {
        if (std::find(made->layer(l).begin(), made->layer(l).end(), static_cast<std::int32_t>(e)) ==
            made->layer(l).end())
          return false;
      }
    }
    return true;
  }();
  if (each_is_placed && made->layers() * made->experts() < 4096) {
    require(moe::to_index_tensors(*made).physical_to_logical == maps.physical_to_logical, "the same tensor");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz_bytes in(data, size);
  in.below(2) == 0 ? plan_any(in) : place_any(in);
  return 0;
}

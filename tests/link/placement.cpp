/// Routing, placement, dispatch and files, with a name of its own for SET: see verbs.cpp.

#include <tetromino/comm/dispatcher.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/replica.hpp>
#include <tetromino/moe/router.hpp>

#include <cstdint>  // std::uint16_t, std::uint32_t
#include <vector>   // std::vector

#if __has_include(<nlohmann/json.hpp>)
#include <tetromino/io/safetensors.hpp>

#include <filesystem>  // std::filesystem::path
#include <string>      // std::string
#endif

#define JOIN(a, b) a##_##b
#define NAMED(a, b) JOIN(a, b)

namespace {

namespace tt = tetromino;
namespace moe = tetromino::moe;

constexpr moe::routing_shape shape{.layers = 2, .experts = 16, .experts_per_token = 2};

moe::trace recorded() {
  std::vector<std::uint16_t> ids;
  std::vector<moe::request> requests;
  for (std::uint32_t r = 0; r < 12; ++r) {
    requests.push_back({.first_token = 20 * r, .tokens = 20, .prefill_length = 8, .domain = r % 3});
    for (std::uint32_t i = 0; i < 20 * 2; ++i) {
      const std::uint32_t first = r % 3 * 5 + (i * 7) % 4;
      ids.push_back(static_cast<std::uint16_t>(first % 16));
      ids.push_back(static_cast<std::uint16_t>((first + 1 + i % 3) % 16));
    }
  }
  return moe::trace::make(shape, ids, requests);
}

bool plans(const moe::trace& seen, const moe::topology& t) {
  moe::profile counted = moe::profile::make({.shape = shape});
  counted.add(seen.view());
  const moe::placement even = moe::balanced(counted.loads(moe::phase::decode), t);
  const moe::placement copy = even;  // which the compiler writes
  const moe::local_plan plan = moe::local(seen.view(), t, {.start = &copy, .effort = 0.1});
  const auto cost = moe::evaluate(seen.view(), plan.experts, t, plan.source_of_request);
  const auto affinity = moe::node_affinity::make(plan.experts, t, seen.view());
  moe::signature_builder prompt = affinity.builder();
  const auto signature = moe::signature_of(seen.view(), seen.requests()[0], prompt);
  moe::online_grouper grouper(affinity);
  auto renewed = moe::rebalancer::make(even, t, {.plan = {.effort = 0.1}, .least_tokens = 1});
  const moe::rebalance_report report = renewed.consider(seen.view());
  return cost.nodes_per_token() > 0 && report.nodes_per_token > 0 && grouper.assign(signature, 20) < t.nodes() &&
         moe::placement_from_text(moe::to_text(copy)) == even && !moe::placement::try_make(1, 1, 0, {}) &&
         moe::migrate(even, plan.experts, t, 1e6).seconds >= 0;
}

bool serves() {
  const auto alone = moe::topology::uniform(1, 1, shape.experts);
  const moe::placement where = moe::contiguous(shape.layers, shape.experts, alone);
  const std::size_t tokens = 3, k = shape.experts_per_token, width = 8;
  std::vector<float> logits(tokens * shape.experts), weights(tokens * k), x(tokens * width, 1.5f), out(x.size());
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 16);
  std::vector<std::uint16_t> ids(tokens * k);
  std::vector<std::uint32_t> gpus(ids.size()), tags(tokens);
  std::vector<moe::expert_call> calls(ids.size());
  moe::route(logits, shape.experts, {.experts_per_token = k}, ids, weights);
  moe::replica_chooser chooser(where, alone);
  for (std::size_t i = 0; i < tokens; ++i) {
    chooser.choose(0, std::span(ids).subspan(i * k, k), 0, std::span(gpus).subspan(i * k, k));
  }
  moe::make_calls(moe::replica_index(where), alone, 0, ids, weights, gpus, calls);
  const tt::comm::local_exchange exchange;
  tt::comm::dispatcher through(exchange, alone, k);
  through.dispatch<float>(calls, x, tags, width);
  const auto rows = through.received_rows<float>();
  std::vector<float> y;  // the experts give back what they get
  for (const std::uint32_t row : through.plan().expert_rows()) {
    y.insert(y.end(), rows.begin() + static_cast<std::ptrdiff_t>(row * width),
             rows.begin() + static_cast<std::ptrdiff_t>((row + 1) * width));
  }
  through.combine(y, out, width);
  return out[0] > 1.4f && out[0] < 1.6f;  // the weights of a token add up to 1
}

bool reads_files(const char* folder) {
#if __has_include(<nlohmann/json.hpp>)
  const std::filesystem::path path = std::filesystem::path(folder) / "numbers.safetensors";
  const std::vector<float> numbers(20, 0.5f);
  const tt::io::tensor_declaration one{.name = "x", .dtype = tt::io::dtype::F32, .shape = {4, 5}};
  auto writer = tt::io::safetensors_writer::create(path, std::span(&one, 1), {{"format", "pt"}});
  writer.append_values<float>("x", numbers);
  writer.finish();
  const auto file = tt::io::safetensors_file::open(path);
  return file["x"].as<float>()[19] == 0.5f && !tt::io::safetensors_file::try_open(folder);
#else
  return folder != nullptr;
#endif
}

}  // namespace

/// 0 where everything is right.
int NAMED(place, SET)(const char* folder);
int NAMED(place, SET)(const char* folder) {
  const moe::trace seen = recorded();
  const auto t = moe::topology::uniform(2, 2, 5).with_speeds(std::vector<double>{1, 1, 0.5, 1}).with_racks(1, 2);
  if (!plans(seen, t)) return 4;
  return serves() ? (reads_files(folder) ? 0 : 6) : 5;
}

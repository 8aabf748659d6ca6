#include "check.hpp"

/// Memory that runs out, at each allocation of every public call in turn: the call throws std::bad_alloc, or gives what
/// it always gives; nothing leaks, no file is left, objects can still be used, and the call made again gives the same.
/// What writes JSON, or verifies it, is left out: the destructor of nlohmann::json allocates, and ends the program
/// where it cannot. What reads it has a destructor of its own.

#include <tetromino/comm/dispatcher.hpp>
#include <tetromino/dequantize.hpp>
#include <tetromino/io/checkpoint.hpp>
#include <tetromino/io/gguf.hpp>
#include <tetromino/io/gguf/pack.hpp>
#include <tetromino/io/imatrix.hpp>
#include <tetromino/io/safetensors.hpp>
#include <tetromino/layout.hpp>
#include <tetromino/matmul.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/moe/group.hpp>
#include <tetromino/moe/migrate.hpp>
#include <tetromino/moe/place.hpp>
#include <tetromino/moe/place_exact.hpp>
#include <tetromino/moe/place_local.hpp>
#include <tetromino/moe/profile.hpp>
#include <tetromino/moe/rebalance.hpp>
#include <tetromino/moe/recorder.hpp>
#include <tetromino/moe/replica.hpp>
#include <tetromino/moe/trace_io.hpp>
#include <tetromino/quantize.hpp>
#include <tetromino/repacked.hpp>

#include "reference/generators.hpp"
#include "support/fastest.hpp"
#include "support/safetensors_files.hpp"
#include "support/sanitized.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>

#if defined(TETROMINO_TEST_SHADOW_MEMORY)
TEST_CASE("memory that runs out") { WARN("a sanitizer has its own operator new: there is nothing to test"); }
#else

namespace {
std::size_t blocks = 0;  // allocated and not yet freed
long left = -1;          // allocations until one fails; negative: none does
bool has_failed = false;
}  // namespace

[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  if (left == 0) {
    has_failed = true;
    return nullptr;
  }
  if (left > 0) --left;
  void* const p = std::malloc(bytes > 0 ? bytes : 1);
  blocks += p != nullptr ? 1 : 0;
  return p;
}
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  if (void* const p = operator new(bytes, std::nothrow)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  blocks -= p != nullptr ? 1 : 0;
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { operator delete(p); }

namespace {

using namespace tetromino;
using tetromino_test::fastest;
namespace io = tetromino::io;

/// Makes the allocations of `call` fail in turn. `call` returns what it made, which can be compared.
template <class Call>
void fail_each(const char* name, const Call& call) {
  INFO(name);
  const auto expected = call();
  static_cast<void>(call());  // what is allocated once for good is there now
  std::size_t failures = 0;
  for (long n = 0;; n += std::max(1L, n / 100)) {  // each of the first 200, then one in a hundred so far
    const std::size_t before = blocks;
    bool is_done = false, is_same = true;
    left = n, has_failed = false;
    try {
      const auto got = call();
      left = -1;
      is_same = got == expected;
      is_done = !has_failed;
    } catch (const std::bad_alloc&) {
      left = -1;
      ++failures;
    }
    const std::size_t after = blocks;
    if (!is_same || after != before) {
      INFO("allocation " << n);
      CHECK(is_same);
      CHECK(after == before);
    }
    if (is_done) break;
    REQUIRE(n < 200'000);
  }
  CHECK(failures > 0);
  CHECK(call() == expected);
}

/// An importance matrix of the old form, with two columns of one tensor.
std::string imatrix_of(const std::string& tensor) {
  const auto number = [](std::uint32_t n) { return std::string(reinterpret_cast<const char*>(&n), 4); };
  return number(1) + number(static_cast<std::uint32_t>(tensor.size())) + tensor + number(1) + number(2) +
         std::string("\0\0\x80\x3f\0\0\0\x40", 8);
}

std::vector<float> sample(std::size_t n) { return reference::normal_sample(7, n); }

moe::trace small_trace() {
  std::vector<std::uint16_t> ids;
  for (std::size_t i = 0; i < 48; ++i) {
    ids.push_back(static_cast<std::uint16_t>(i * 5 % 8));
    ids.push_back(static_cast<std::uint16_t>((i * 5 + 1 + i % 3) % 8));
  }
  return moe::trace::make({.layers = 2, .experts = 8, .experts_per_token = 2}, ids, {{0, 8}, {8, 8}, {16, 8}});
}

TEST_CASE("memory that runs out: packing, unpacking and products") {
  const auto values = sample(4 * 256), rows = sample(2 * 256);
  const matrix_view<const float> x(values.data(), 4, 256), a(rows.data(), 2, 256);
  for (const char* name : {"mxfp4-32/oas", "nvfp4/min-error", "mxfp4-16/oas/mbs-search", "nvfp4/amax/hadamard-32"}) {
    const recipe r = recipe::parse(name);
    fail_each(name, [&] {
      const auto p = quantize(fastest, x, r);
      return std::tuple(p.codes, p.scales, p.macros, p.tensor_scales);
    });
    std::vector<float> weights(256, 1.0f);
    weights[3] = 1e-40f;
    fail_each("with weights", [&] {
      const auto p = quantize(fastest, x, r, {.column_weights = weights});
      return std::tuple(p.codes, p.scales, p.macros, p.tensor_scales);
    });
    const auto packed = quantize(fastest, x, r);
    fail_each("dequantize", [&] { return dequantize<float>(fastest, packed).data; });
    fail_each("fake_quantize", [&] {
      matrix<float> out(4, 256);
      fake_quantize(fastest, x, r, out.view());
      return out.data;
    });
    fail_each("by its name", [&] { return quantize(fastest, x, name).codes; });
    if (r.rotation == 0) {
      fail_each("repack and multiply", [&] {
        matrix<float> out(2, 4);
        matmul(fastest, a, repack(fastest, packed), out.view()[0]);
        return out.data;
      });
    }
  }
  const auto mx = quantize(fastest, x, "mxfp4-32"), nv = quantize(fastest, x, "nvfp4");
  fail_each("to_ggml", [&] { return layout::to_ggml(mx); });
  fail_each("swizzled_scales", [&] { return layout::swizzled_scales(nv); });
  fail_each("an error's message", [&] { return std::string(recipe::try_parse("mxfp5-32/oas").error().what()); });
}

TEST_CASE("memory that runs out: placing experts") {
  const moe::trace seen = small_trace();
  const auto cluster = moe::topology::uniform(2, 2, 3);
  std::vector<double> load(16);
  for (std::size_t i = 0; i < load.size(); ++i) load[i] = static_cast<double>(1 + i * 7 % 5);
  const moe::load_view loads{2, 8, load};
  const std::vector<std::uint32_t> sources{0, 1, 0};
  fail_each("topology", [] { return moe::topology::uniform(2, 2, 3).slots(); });
  fail_each("trace", [] { return small_trace().tokens(); });
  fail_each("contiguous", [&] { return moe::contiguous(2, 8, cluster); });
  fail_each("round_robin", [&] { return moe::round_robin(2, 8, cluster); });
  fail_each("balanced", [&] { return moe::balanced(loads, cluster); });
  fail_each("local", [&] {
    const auto plan = moe::local(seen.view(), cluster);
    return std::pair(plan.experts, plan.source_of_request);
  });
  const auto plan = moe::contiguous(2, 8, cluster), next = moe::balanced(loads, cluster);
  fail_each("evaluate", [&] { return moe::evaluate(seen.view(), plan, cluster, sources).pairs_on_gpu; });
  fail_each("migrate", [&] { return moe::migrate(plan, next, cluster, 1e6).moves; });
  fail_each("replica_index", [&] { return moe::replica_index(next).slots_of(0, 3).size(); });
  fail_each("replica_chooser", [&] {
    std::vector<std::uint32_t> gpus(2);
    moe::replica_chooser(next, cluster).choose(0, seen.view().experts_of(0, 0), 0, gpus);
    return gpus;
  });
  fail_each("profile", [&] {
    moe::profile p = moe::profile::make({seen.shape(), 1, seen.requests().size(), true, true});
    p.add(seen.view());
    return moe::imbalance(p.loads(moe::phase::decode)).mean;
  });
  fail_each("exact", [&] { return moe::exact(seen.view(), cluster).experts; });
  fail_each("balanced_eplb", [&] { return moe::balanced_eplb(loads, {12, 1, 2, 4}).physical_to_logical; });
  fail_each("migrate_within", [&] { return moe::migrate_within(plan, next, cluster, 1e6, {3e6, 3e6}).reached; });
  fail_each("step_chooser", [&] {
    std::vector<std::uint32_t> gpus(4);
    const std::vector<std::uint16_t> ids{0, 1, 0, 5};
    return moe::step_chooser(next, cluster, moe::replica_choice::step_pairs).choose(0, ids, gpus);
  });
  fail_each("group", [&] {
    const auto affinity = moe::node_affinity::make(next, cluster, seen.view());
    auto builder = affinity.builder();
    const std::vector<moe::request_signature> signatures(2,
                                                         moe::signature_of(seen.view(), seen.requests()[0], builder));
    return moe::group(affinity, signatures, std::vector<std::uint64_t>{8, 8});
  });
  fail_each("recorder", [&] {
    auto recorded = moe::recorder::make({.shape = seen.shape(), .tokens = 8});
    const std::vector<moe::recorded_row> rows{{1, moe::phase::prefill}, {2, moe::phase::decode}};
    recorded.add_pass(rows, std::vector<std::uint16_t>{0, 1, 2, 3, 4, 5, 6, 7});
    auto joined = moe::recorder::make({.shape = seen.shape(), .tokens = 8});
    joined.merge(recorded.to_bytes());
    return joined.to_trace().tokens();
  });
  fail_each("rebalancer", [&] {
    moe::rebalance_options options;
    options.least_tokens = 1;
    auto loop = moe::rebalancer::make(plan, cluster, options);
    return loop.try_consider(seen.view()).value().verdict;
  });
  fail_each("text", [&] { return moe::placement_from_text(moe::to_text(next)); });
  fail_each("index tensors", [&] { return moe::to_placement(moe::to_index_tensors(next)); });
}

TEST_CASE("memory that runs out: a dispatcher can be used again") {
  const auto cluster = moe::topology::uniform(1, 1, 4);
  const comm::local_exchange alone;
  const auto x = sample(6 * 8);
  std::vector<moe::expert_call> calls(12);
  for (std::size_t i = 0; i < calls.size(); ++i) calls[i] = {static_cast<std::uint32_t>(i * 3 % 4), 0.5f};
  const std::vector<std::uint32_t> tags(6, 1);
  std::optional<comm::dispatcher<comm::local_exchange> > kept;
  const auto run = [&](auto& d) {
    std::vector<float> y, out(x.size());
    d.template dispatch<float>(calls, x, tags, 8);
    y.resize(d.plan().expert_rows().size() * 8);
    moe::gather_rows(d.plan().expert_rows(), d.template received_rows<float>(), std::span(y), 8);
    d.combine(y, out, 8);
    return out;
  };
  fail_each("a new one each time", [&] {
    comm::dispatcher<comm::local_exchange> d(alone, cluster, 2);
    return run(d);
  });
  // one that has lived through failures
  comm::dispatcher<comm::local_exchange> fresh(alone, cluster, 2);
  const std::vector<float> expected = run(fresh);
  for (long n = 0; n < 60; ++n) {
    kept.emplace(alone, cluster, 2);
    left = n;
    try {
      static_cast<void>(run(*kept));
    } catch (const std::bad_alloc&) {
    }
    left = -1;
    CHECK(run(*kept) == expected);
  }
}

TEST_CASE("memory that runs out: files") {
  const tetromino_test::temporary_directory folder;
  const auto path = folder / "t.safetensors", out = folder / "out.safetensors";
  const auto write = [](const std::filesystem::path& to) {
    const std::vector<io::tensor_declaration> declared{{"experts", io::dtype::U8, {2, 1, 2}},
                                                       {"w", io::dtype::F32, {2, 2}}};
    auto file = io::safetensors_writer::create(to, declared, {{"num_experts", "4"}});
    file.append_values<std::uint8_t>("experts", std::vector<std::uint8_t>{0, 1, 2, 3});
    file.append_values<float>("w", std::vector<float>{1, 2, 3, 4});
    file.finish();
  };
  write(path);
  const std::string before = tetromino_test::load(path);
  fail_each("writing safetensors", [&] {
    write(out);
    return true;
  });
  CHECK(tetromino_test::load(out) == before);
  std::filesystem::remove(out);
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
  fail_each("reading safetensors", [&] { return io::safetensors_file::open(path)["w"].copy_as<float>(); });
  fail_each("reading a checkpoint", [&] { return io::checkpoint::open(path).tensors().size(); });
  fail_each("reading a trace", [&] { return moe::read_trace(path).tokens(); });
  fail_each("a refused file", [&] { return std::string(io::gguf_file::try_open(path).error().what()); });
  const auto csv = tetromino_test::store(folder / "csv", "layer,expert,count\n0,0,1\n1,1,2\n");
  const auto lines = tetromino_test::store(
      folder / "lines", R"({"req_id":"a","token_idx":0,"layer":0,"topk_ids":[1,0],"domain":"x"})"
                        "\n"
                        R"({"req_id":"a","token_idx":1,"layer":0,"topk_ids":[2,3],"more":{"a":[1,[2]],"b":{}}})");
  fail_each("reading JSON lines", [&] { return moe::read_trace(lines).tokens(); });
  const auto counts = tetromino_test::store(folder / "counts", R"({"logical_count":[[1,2,3],[4,5,6]],"x":[{"y":[]}]})");
  fail_each("reading counts", [&] { return std::get<moe::load_table>(moe::read_routing(counts).content).values; });
  const std::string plan = R"({"physical_to_logical_map":[[0,1,2,1],[2,1,0,0]]})";
  fail_each("reading a plan", [&] { return moe::read_plan(plan).experts; });
  const std::string placed = moe::to_json(moe::placement::make(1, 2, 3, {0, 1, 1}));
  fail_each("reading a placement", [&] { return moe::placement_from_json(placed); });
  fail_each("broken JSON", [&] { return std::string(moe::try_read_plan("{\"a\":[1,{").error().what()); });
  const auto model = folder / "model";
  std::filesystem::create_directory(model);
  std::filesystem::copy_file(path, model / "model-1.safetensors");
  tetromino_test::store(model / "config.json", R"({"model_type":"llama","layers":[1,{"a":[2]}]})");
  tetromino_test::store(model / "model.safetensors.index.json",
                        R"({"weight_map":{"experts":"model-1.safetensors","w":"model-1.safetensors"}})");
  fail_each("reading a model", [&] { return io::checkpoint::open(model).tensors().size(); });
  fail_each("parameters of a model", [&] { return io::parameters_of(io::checkpoint::open(model)).size(); });
  const auto legacy = tetromino_test::store(folder / "imatrix", imatrix_of("blk.0.ffn_up.weight"));
  fail_each("reading an importance matrix",
            [&] { return io::imatrix::open(legacy).column_weights("blk.0.ffn_up.weight", 0, 1, 2); });
  const auto gguf = folder / "gguf";
  const auto write_gguf = [](const std::filesystem::path& to) {
    io::gguf_metadata metadata;
    metadata.set("general.architecture", std::string("llama"));
    const std::vector<io::gguf_declaration> declared{{"blk.0.ffn_up.weight", io::ggml_type::F32, {4, 32}}};
    auto file = io::gguf_writer::create(to, metadata, declared);
    file.append_values<float>("blk.0.ffn_up.weight", std::vector<float>(128, 1.0f));
    file.finish();
  };
  write_gguf(gguf);
  fail_each("writing GGUF", [&] {
    write_gguf(out);
    return true;
  });
  std::filesystem::remove(out);
  fail_each("packing GGUF", [&] {
    const auto file = io::gguf_file::open(gguf);
    const auto how = io::plan_gguf(file, {.rules = {{"", recipe::parse("mxfp4-32")}}});
    return io::pack_gguf(fastest, file, how, out).size();
  });
  fail_each("reading CSV", [&] { return std::get<moe::load_table>(moe::read_routing(csv).content).values; });
}

}  // namespace
#endif

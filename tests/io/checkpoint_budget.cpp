#include "support/model_folder.hpp"

#include <tetromino/io/checkpoint.hpp>
#include <tetromino/io/checkpoint/pack.hpp>
#include <tetromino/io/checkpoint/plan_within.hpp>
#include <tetromino/io/checkpoint/verify.hpp>
#include <tetromino/thread_executor.hpp>

#include "moe/code_of.hpp"

#include <limits>  // std::numeric_limits
#include <set>     // std::set

/// Plans within a budget of bits, beside all choices there are, judged by what a reader of the files decodes.

namespace {

using namespace tetromino_test;
namespace io = tetromino::io;
namespace tt = tetromino;
using tt::errc;
using layout = io::checkpoint_layout;

const std::string attention = "model.layers.0.self_attn.", experts = "model.layers.0.mlp.experts.";
const std::vector<model_tensor> tensors = {
    {attention + "q_proj.weight", {64, 64}},    {attention + "k_proj.weight", {32, 64}},
    {attention + "v_proj.weight", {32, 64}},    {attention + "o_proj.weight", {64, 64}},
    {experts + "0.gate_proj.weight", {96, 64}}, {experts + "0.up_proj.weight", {96, 64}},
    {experts + "0.down_proj.weight", {64, 96}}, {experts + "1.gate_proj.weight", {96, 64}},
    {experts + "1.up_proj.weight", {96, 64}},   {experts + "1.down_proj.weight", {64, 96}},
};
const nlohmann::json config = {{"hidden_size", 64}, {"num_local_experts", 2}};
const std::vector<std::string> candidates = {"mxfp4-32/floor", "mxfp4-16/oas", "nvfp4/amax"};

/// A model, its parameters, and a temporary place.
struct opened {
  temporary_directory folder;
  std::vector<model_tensor> made;
  io::checkpoint model;
  std::vector<io::parameter> parameters;

  explicit opened(std::vector<model_tensor> list = tensors)
      : made(std::move(list)),
        model((write_model(folder / "in", config, made), io::checkpoint::open(folder / "in"))),
        parameters(io::parameters_of(model)) {}
};

io::bit_budget budget_of(double bits, const std::vector<std::string>& names, bool may_keep) {
  io::bit_budget out{bits, {}, may_keep};
  for (const auto& name : names) out.candidates.push_back(tt::recipe::parse(name));
  return out;
}

/// Squares of products with inputs whose moments are 1 on the diagonal for even columns and 4 for odd ones, 0.5 beside
/// it.
double squared_products_of(const float* rows, std::size_t count, std::size_t cols) {
  double sum = 0;
  for (std::size_t r = 0; r < count; ++r) {
    for (std::size_t k = 0; k < cols; ++k) {
      const auto x = static_cast<double>(rows[r * cols + k]);
      sum += (k % 2 == 0 ? 1 : 4) * x * x;
      if (k + 1 < cols) sum += 2 * 0.5 * x * static_cast<double>(rows[r * cols + k + 1]);
    }
  }
  return sum;
}
class known_moments final : public io::input_knowledge {
 public:
  tt::result<std::vector<float>> column_weights(const io::parameter& weight, std::size_t, std::size_t) const override {
    return std::vector<float>(weight.cols, 1.0f);
  }
  tt::result<double> squared_products(const tt::matrix_view<const float>& rows, const io::parameter& weight,
                                      std::size_t) const override {
    CHECK(rows.rows == weight.rows);
    return squared_products_of(rows.data, rows.rows, rows.cols);
  }
  std::optional<float> input_amax(const io::parameter&, std::size_t) const override { return {}; }
  tt::result<tt::packed<>> feed_back(const tt::matrix_view<const float>&, const io::parameter&, std::size_t,
                                     const tt::recipe&, const tt::quantize_options&) const override {
    return tt::error(errc::invalid_argument, "no moments");
  }
};

/// What one recipe makes of one tensor, by packing the whole model with it and reading the files.
struct measured {
  double signal = 0, noise = 0;
  double loss = 0;  // noise over the signal of its product
  std::uint64_t bits = 0;
};

/// The experts of the layer make one product for each of gate, up and down.
std::string product_of(const std::string& tensor) {
  return tensor.starts_with(experts) ? tensor.substr(experts.size() + 2) : tensor;
}
std::map<std::string, measured> measure(const opened& in, const std::string& name, const io::input_knowledge* inputs,
                                        bool separate_scales = false) {
  const auto out = in.folder / "uniform";
  fs::remove_all(out);
  io::plan_options options;
  options.rules.push_back({"", tt::recipe::parse(name)});
  options.inputs = inputs;
  options.separate_scales = separate_scales;
  io::pack(tt::scalar, in.model, io::plan(in.model, in.parameters, options), out);
  const auto files = read_model(out);
  std::map<std::string, measured> all;
  for (const auto& tensor : in.made) {
    const auto before = model_values(tensor);
    const auto& codes = files.at(tensor.name + ".codes").bytes;
    const auto& scales = files.at(tensor.name + ".scales").bytes;
    const auto scale = files.find(tensor.name + ".tensor_scales");
    measured& one = all[tensor.name];
    one.bits = 8 * (codes.size() + scales.size() + (scale == files.end() ? 0 : scale->second.bytes.size()));
    const std::size_t matrices = tensor.shape.size() == 3 ? tensor.shape[0] : 1, each = before.size() / matrices;
    for (std::size_t e = 0; e < matrices; ++e) {
      const auto part = [&](const std::vector<std::uint8_t>& bytes) {
        const std::size_t size = bytes.size() / matrices;
        return std::vector<std::uint8_t>(bytes.begin() + static_cast<std::ptrdiff_t>(e * size),
                                         bytes.begin() + static_cast<std::ptrdiff_t>((e + 1) * size));
      };
      float factor = 0;
      if (scale != files.end()) std::memcpy(&factor, scale->second.bytes.data() + e * sizeof factor, sizeof factor);
      auto errors = decode(part(codes), part(scales), factor);
      const float* const x = before.data() + e * each;
      if (inputs != nullptr) {
        for (std::size_t i = 0; i < each; ++i) errors[i] = x[i] - errors[i];
        const std::size_t cols = tensor.shape.back();
        one.signal += squared_products_of(x, each / cols, cols);
        one.noise += squared_products_of(errors.data(), each / cols, cols);
        continue;
      }
      for (std::size_t i = 0; i < each; ++i) {
        one.signal += double(x[i]) * double(x[i]);
        one.noise += double(x[i] - errors[i]) * double(x[i] - errors[i]);
      }
    }
  }
  for (auto& [tensor, one] : all) {
    double signal = 0;
    for (const auto& [other, its] : all) signal += product_of(other) == product_of(tensor) ? its.signal : 0;
    one.loss = one.noise / signal;
  }
  return all;
}

/// Tensors that choose together, each with a loss and bits for every candidate, the last of which keeps them.
using groups = std::vector<std::vector<std::string>>;
struct best_choice {
  double loss = std::numeric_limits<double>::infinity();
  std::uint64_t bits = 0;
  std::vector<std::size_t> chosen;
};
best_choice best_by_trying(const groups& sets, const std::vector<std::map<std::string, measured>>& ways,
                           double budget) {
  best_choice best;
  std::vector<std::size_t> digits(sets.size(), 0);
  for (bool more = true; more;) {
    best_choice one{0, 0, digits};
    for (std::size_t s = 0; s < sets.size(); ++s) {
      for (const auto& name : sets[s]) {
        one.loss += ways[digits[s]].at(name).loss;
        one.bits += ways[digits[s]].at(name).bits;
      }
    }
    if (static_cast<double>(one.bits) <= budget && one.loss < best.loss) best = one;
    std::size_t s = sets.size();
    while (s > 0 && ++digits[s - 1] == ways.size()) digits[--s] = 0;
    more = s > 0;
  }
  return best;
}

std::string recipe_of(const io::pack_plan& plan, const std::string& name) {
  for (const auto& planned : plan.parameters) {
    if (planned.source->name == name) return planned.is_packed() ? planned.how.name() : "keep";
  }
  return "no such tensor";
}

io::plan_options in_layout(layout where) {
  io::plan_options out;
  out.layout = where;
  return out;
}

std::string message_of(const opened& in, io::plan_options options, const io::bit_budget& budget, errc code,
                       const io::pack_options& how = {}) {
  const auto made = io::try_plan_within(tt::scalar, in.model, in.parameters, std::move(options), budget, how);
  REQUIRE_FALSE(made.has_value());
  CHECK(made.error().code() == code);
  return made.error().what();
}

/// What the plan packs, a verifier that packs it again finds byte for byte.
void check_packed(const opened& in, const io::pack_plan& plan) {
  const auto out = in.folder / "out";
  fs::remove_all(out);
  io::pack(tt::scalar, in.model, plan, out);
  CHECK(io::verify(tt::scalar, in.model, io::checkpoint::open(out)).packed_again);
}

}  // namespace

TEST_CASE("recipes within a budget: the best of all choices, by what a reader decodes") {
  const opened in;
  INFO("seed " << seed());
  const groups sets = {{attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
                       {attention + "o_proj.weight"},
                       {experts + "0.gate_proj.weight", experts + "0.up_proj.weight"},
                       {experts + "0.down_proj.weight"},
                       {experts + "1.gate_proj.weight", experts + "1.up_proj.weight"},
                       {experts + "1.down_proj.weight"}};
  constexpr double products = 7;  // q, k, v, o, and gate, up and down of all experts
  std::size_t weights = 0;
  for (const auto& tensor : tensors) weights += product(tensor.shape);
  const known_moments moments;
  for (const io::input_knowledge* inputs :
       {static_cast<const io::input_knowledge*>(nullptr), static_cast<const io::input_knowledge*>(&moments)}) {
    std::vector<std::map<std::string, measured>> ways;
    for (const auto& name : candidates) ways.push_back(measure(in, name, inputs));
    auto& kept = ways.emplace_back();
    for (const auto& tensor : tensors) kept[tensor.name].bits = 16 * product(tensor.shape);
    for (const double bits : {4.25, 4.3, 4.4, 4.5, 4.6, 5.0, 6.0, 9.0, 15.0}) {
      CAPTURE(bits, inputs == nullptr);
      const auto expected = best_by_trying(sets, ways, bits * static_cast<double>(weights));
      io::plan_options options;
      options.inputs = inputs;
      const auto got = io::plan_within(tt::scalar, in.model, in.parameters, options, budget_of(bits, candidates, true));
      CHECK(got.weights == weights);
      CHECK(got.bits == expected.bits);
      CHECK(got.error == Approx(expected.loss / products).epsilon(1e-9));
      for (std::size_t s = 0; s < sets.size(); ++s) {
        const std::string wanted = expected.chosen[s] == candidates.size() ? "keep" : candidates[expected.chosen[s]];
        for (const auto& name : sets[s]) CHECK(recipe_of(got.plan, name) == wanted);
      }

      const auto out = in.folder / "out";
      fs::remove_all(out);
      io::pack(tt::scalar, in.model, got.plan, out);
      std::size_t stored = 0;
      for (const auto& [name, tensor] : read_model(out)) stored += 8 * tensor.bytes.size();
      CHECK(stored == got.bits);
      CHECK(static_cast<double>(stored) <= bits * static_cast<double>(weights));
      const auto verified = io::verify(tt::scalar, in.model, io::checkpoint::open(out), {inputs});
      CHECK(verified.packed_again);
    }
  }
}

TEST_CASE("recipes within a budget: the same on any number of threads, with slices of any size") {
  std::vector<model_tensor> list = tensors;
  list.push_back({"model.layers.1.mlp.experts.gate_up_proj", {2, 96, 64}});
  list.push_back({"model.layers.1.mlp.experts.down_proj", {2, 64, 48}});
  const opened in(list);
  const auto budget = budget_of(4.6, {"mxfp4-32/oas/mbs-search", "nvfp4/min-error", "nvfp4/amax/hadamard-16"}, true);
  const auto expected = io::plan_within(tt::scalar, in.model, in.parameters, {}, budget);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20}) {
    for (const unsigned count : {1u, 3u}) {
      CAPTURE(bytes, count);
      const tt::thread_executor threads(count);
      io::pack_options how;
      how.slice_bytes = how.window_bytes = bytes;
      const auto got = io::plan_within(tt::scalar.on(threads), in.model, in.parameters, {}, budget, how);
      CHECK(got.error == expected.error);
      CHECK(got.bits == expected.bits);
      for (const auto& tensor : list) {
        CHECK(recipe_of(got.plan, tensor.name) == recipe_of(expected.plan, tensor.name));
      }
    }
  }
}

TEST_CASE("recipes within a budget: readers of other layouts get one recipe for all experts of a layer") {
  const opened in;
  for (const layout where : {layout::compressed_tensors, layout::modelopt}) {
    const auto names = where == layout::modelopt ? std::vector<std::string>{"nvfp4/amax", "nvfp4/four-over-six"}
                                                 : std::vector<std::string>{"mxfp4-32/oas", "nvfp4/amax"};
    std::set<std::set<std::string>> seen;
    for (const double bits : {4.52, 5.0, 6.0, 8.0, 12.0}) {
      CAPTURE(bits, io::name(where));
      const auto got =
          io::plan_within(tt::scalar, in.model, in.parameters, in_layout(where), budget_of(bits, names, true));
      std::set<std::string> of_experts, of_all;
      for (const auto& tensor : tensors) {
        const bool is_expert = tensor.name.find("experts") != std::string::npos;
        of_all.insert(recipe_of(got.plan, tensor.name));
        if (is_expert) of_experts.insert(recipe_of(got.plan, tensor.name));
      }
      CHECK(of_experts.size() == 1);
      seen.insert(of_all);
      check_packed(in, got.plan);
    }
    CHECK(seen.size() > 1);
  }
}

TEST_CASE("recipes within a budget: every weight alone, and inputs that are packed too") {
  const opened in({tensors[0], tensors[1], tensors[2], tensors[4], tensors[7]});
  groups sets;
  std::size_t weights = 0;
  for (const auto& tensor : in.made) {
    sets.push_back({tensor.name});
    weights += product(tensor.shape);
  }
  std::set<std::string> seen;
  for (const double input_noise : {0.0, 0.002, 0.1}) {
    std::vector<std::map<std::string, measured>> ways;
    for (const auto& name : candidates) {
      ways.push_back(measure(in, name, nullptr, true));
      for (auto& [tensor, one] : ways.back()) {
        one.loss += input_noise * (tensor.starts_with(experts) ? 0.5 : 1.0);  // two experts of one size share a product
      }
    }
    auto& kept = ways.emplace_back();
    for (const auto& tensor : in.made) kept[tensor.name].bits = 16 * product(tensor.shape);
    for (const double bits : {4.4, 5.0, 6.0, 8.0}) {
      CAPTURE(bits, input_noise);
      const auto expected = best_by_trying(sets, ways, bits * static_cast<double>(weights));
      io::plan_options options;
      options.separate_scales = true;
      auto budget = budget_of(bits, candidates, true);
      budget.input_noise = input_noise;
      const auto got = io::plan_within(tt::scalar, in.model, in.parameters, options, budget);
      CHECK(got.error == Approx(expected.loss / 4).epsilon(1e-9));
      std::string all;
      for (std::size_t s = 0; s < sets.size(); ++s) {
        const std::string wanted = expected.chosen[s] == candidates.size() ? "keep" : candidates[expected.chosen[s]];
        CHECK(recipe_of(got.plan, sets[s].front()) == wanted);
        all += wanted + ' ';
      }
      seen.insert(all);
      check_packed(in, got.plan);
    }
  }
  CHECK(seen.size() > 3);
}

TEST_CASE("recipes within a budget: rules stay, and count") {
  const opened in;
  io::plan_options options;
  options.rules.push_back({"experts", tt::recipe::parse("mxfp4-16/floor")});
  options.keep.push_back("*.o_proj.*");
  const auto got = io::plan_within(tt::scalar, in.model, in.parameters, options, budget_of(4.7, {"nvfp4/amax"}, true));
  std::size_t bits = 0, weights = 0;
  for (const auto& planned : got.plan.parameters) {
    const std::string& name = planned.source->name;
    if (name.find("experts") != std::string::npos) CHECK(recipe_of(got.plan, name) == "mxfp4-16/floor");
    if (name.find("o_proj") != std::string::npos) {
      CHECK(planned.reason == "--keep *.o_proj.*");
      continue;
    }
    bits += io::stored_bits(planned);
    weights += planned.source->elements();
  }
  CHECK(got.bits == bits);
  CHECK(got.weights == weights);
  CHECK(recipe_of(got.plan, attention + "q_proj.weight") == "nvfp4/amax");
}

TEST_CASE("recipes within a budget: codes that stay lose nothing") {
  const opened in;
  io::plan_options nvfp4 = in_layout(layout::modelopt);
  nvfp4.rules.push_back({"", tt::recipe::parse("nvfp4/amax")});
  io::pack(tt::scalar, in.model, io::plan(in.model, in.parameters, nvfp4), in.folder / "nvfp4");
  const auto packed = io::checkpoint::open(in.folder / "nvfp4");
  const auto parameters = io::parameters_of(packed);
  const auto got =
      io::plan_within(tt::scalar, packed, parameters, {}, budget_of(16, {"mxfp4-16/oas", "nvfp4/amax"}, true));
  CHECK(got.error == 0);
  for (const auto& planned : got.plan.parameters) {
    if (planned.source->is_weight()) CHECK(planned.action == io::pack_action::copy);
  }
}

TEST_CASE("recipes within a budget: what is refused") {
  const opened in;
  CHECK(message_of(in, {}, budget_of(4.2, {"nvfp4/amax", "mxfp4-32/oas"}, true), errc::infeasible) ==
        "expected a budget of at least 4.25 bits for each weight, the least that the candidates allow, got 4.2");
  io::plan_options for_all;
  for_all.rules.push_back({"", tt::recipe::parse("mxfp4-32/oas")});
  CHECK_THAT(message_of(in, for_all, budget_of(5, {"nvfp4/amax"}, true), errc::invalid_argument),
             contains("recipe mxfp4-32/oas is for all weights"));
  CHECK_THAT(message_of(in, {}, budget_of(5, {}, true), errc::invalid_argument),
             contains("among the candidates, got none"));
  CHECK_THAT(message_of(in, in_layout(layout::modelopt), budget_of(5, {"nvfp4/amax", "mxfp4-32/oas"}, true),
                        errc::invalid_argument),
             contains("layout modelopt stores nvfp4, not mxfp4-32"));
  CHECK_THAT(message_of(in, in_layout(layout::gpt_oss), budget_of(5, {"nvfp4/amax"}, true), errc::invalid_argument),
             contains("layout gpt-oss stores mxfp4-32, not nvfp4"));
  CHECK_THAT(message_of(in, {}, budget_of(5, {"nvfp4/amax/gptq", "mxfp4-32/oas"}, false), errc::invalid_argument),
             contains("recipe nvfp4/amax/gptq needs statistics"));
  auto noisy = budget_of(5, {"nvfp4/amax"}, true);
  noisy.input_noise = -0.5;
  CHECK(message_of(in, {}, noisy, errc::invalid_argument) == "expected a finite input noise of at least 0, got -0.5");
  io::pack_options stopping;
  stopping.progress = [](std::size_t) { return false; };
  CHECK_THAT(message_of(in, {}, budget_of(5, {"nvfp4/amax", "mxfp4-32/oas"}, true), errc::io, stopping),
             contains("stopped"));
}

TEST_CASE("recipes within a budget: values that are not finite are refused, or lost alike") {
  const temporary_directory folder;
  const std::string name = "layers.0.mlp.up_proj.weight", other = "layers.0.mlp.down_proj.weight";
  auto values = model_values({name, {64, 32}});
  values[5 * 32 + 7] = std::numeric_limits<float>::infinity();
  {
    const std::vector<io::tensor_declaration> both = {{name, io::dtype::F32, {64, 32}},
                                                      {other, io::dtype::F32, {32, 64}}};
    auto writer = io::safetensors_writer::create(folder / "in.safetensors", both);
    writer.append_values<float>(name, values);
    writer.append_values<float>(other, model_values({other, {32, 64}}));
    writer.finish();
  }
  const auto model = io::checkpoint::open(folder / "in.safetensors");
  const auto parameters = io::parameters_of(model);
  const auto budget = budget_of(4.4, {"mxfp4-32/oas", "mxfp4-16/oas"}, false);
  CHECK(code_of(io::try_plan_within(tt::scalar, model, parameters, {}, budget)) == errc::non_finite);
  for (const auto special : {tt::special_values::poison, tt::special_values::saturate}) {
    io::pack_options how;
    how.special = special;
    const auto got = io::plan_within(tt::scalar, model, parameters, {}, budget, how);
    CHECK(got.error > 0);
    CHECK(got.error < 1);
  }
}

#include "check.hpp"

/// End to end: what 4-bit weights and activations make of a real model. The example model is compared with a plain one
/// in double, and with a table that another implementation computed.

#include "support/perplexity.hpp"

#include "reference/moe_lm.hpp"

namespace {

namespace io = tetromino::io;
using namespace tetromino_test;
using moe_lm::precision;

const std::size_t threads = std::max(1u, std::thread::hardware_concurrency());

struct inputs {
  io::safetensors_file model = io::safetensors_file::open(data_file("moe-16x2.safetensors"));
  moe_lm::documents text{io::safetensors_file::open(data_file("moe-16x2.heldout.safetensors")),
                         moe_lm::shape(model).vocab};
};

TEST_CASE("perplexity: the example model and a plain one in double agree, in float and in 4 bits") {
  const inputs in;
  const auto stored = reference::read_safetensors(data_file("moe-16x2.safetensors"));
  std::size_t shortest = 0;
  for (std::size_t d = 1; d < in.text.count(); ++d) {
    if (in.text.tokens_of(d).size() < in.text.tokens_of(shortest).size()) shortest = d;
  }
  const auto tokens = in.text.tokens_of(shortest);

  reference::recipe mx, nv;
  mx.block = nv.block = 16;
  mx.mx = reference::mx_rule::oas;
  mx.macro = 128;
  nv.nv = true;
  using maybe = std::optional<reference::recipe>;
  struct {
    const char *weights, *activations;
    maybe reference_weights, reference_activations;
    double tolerance;
  } const cases[] = {
      {"float32", "float32", {}, {}, 1e-5},
      {"mxfp4-16/oas/mbs-static", "float32", mx, {}, 1e-5},
      // a last bit can turn the rounding of an activation, and with it the rest
      {"mxfp4-16/oas/mbs-static", "mxfp4-16/oas/mbs-static", mx, mx, 0.01},
      {"nvfp4/amax", "nvfp4/amax", nv, nv, 0.01},
  };
  for (const auto& c : cases) {
    const whole_model ours(in.model, precision::parse(c.weights, c.activations));
    const reference::moe_lm plain(stored, c.reference_weights, c.reference_activations);
    INFO(c.weights << ' ' << c.activations << ", document " << shortest);
    CHECK(ours.loss(tokens) == Approx(plain.loss({tokens.begin(), tokens.end()})).epsilon(c.tolerance));
  }
}

TEST_CASE("perplexity: float32 losses are those of the file") {
  const inputs in;
  const whole_model model(in.model, precision::parse("float32", "float32"));
  std::vector<std::size_t> chosen;
  for (std::size_t d = 0; d < in.text.count(); d += 24) chosen.push_back(d);
  const auto losses = model.losses(in.text, chosen, threads);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    CHECK(losses[i] == Approx(static_cast<double>(in.text.reference_nll[chosen[i]])).epsilon(1e-4));
  }
}

TEST_CASE("perplexity: on some of the documents, recipes cost what the table says") {
  const inputs in;
  std::vector<std::size_t> chosen;
  std::vector<double> float_losses;
  for (std::size_t d = 4; d < in.text.count(); d += 12) {
    chosen.push_back(d);
    float_losses.push_back(static_cast<double>(in.text.reference_nll[d]));
  }
  const double whole = perplexity_table[0].expected[4], part = perplexities(in.text, chosen, float_losses)[4];
  for (const auto& row : std::span(perplexity_table).subspan(1)) {  // float32 is above
    const bool quick = std::string(row.weights).find("search") == std::string::npos;
    if (row.expected[0] == 0 || !quick) continue;
    const whole_model model(in.model, precision::parse(row.weights, row.activations));
    const double got = perplexities(in.text, chosen, model.losses(in.text, chosen, threads))[4];
    INFO(row.weights);
    CHECK(got / part == Approx(row.expected[4] / whole).epsilon(0.02));  // 16 of 192 documents
  }
}

TEST_CASE("perplexity: the whole table", "[.slow]") {
  const inputs in;
  std::vector<std::size_t> chosen(in.text.count());
  std::iota(chosen.begin(), chosen.end(), std::size_t{0});
  for (const auto& row : perplexity_table) {
    const whole_model model(in.model, precision::parse(row.weights, row.activations));
    const auto got = perplexities(in.text, chosen, model.losses(in.text, chosen, threads));
    INFO(row.weights << ' ' << row.activations);
    for (std::size_t g = 0; g < 4; ++g) {
      // a domain is 48 documents: which way exact ties are rounded moves it by up to half a percent
      if (row.expected[g] != 0) CHECK(got[g] == Approx(row.expected[g]).epsilon(0.01));
    }
    CHECK(got[4] == Approx(row.expected[4]).epsilon(0.005));
  }
}

}  // namespace

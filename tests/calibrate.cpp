#include "check.hpp"

/// Statistics of the example model's inputs, in one stream and in two, beside a plain model in double that says what
/// its weights meet.

#include "../examples/tools/moe/calibrate.hpp"

#include "reference/moe_lm.hpp"

#include <tetromino/thread_executor.hpp>

namespace {

namespace io = tetromino::io;
using moe_lm::precision;

struct inputs {
  io::safetensors_file model = io::safetensors_file::open(tetromino_test::data_file("moe-16x2.safetensors"));
  moe_lm::shape size{model};
  moe_lm::documents text{io::safetensors_file::open(tetromino_test::data_file("moe-16x2.heldout.safetensors")),
                         size.vocab};
  std::vector<std::size_t> chosen;  // the shortest documents

  explicit inputs(std::size_t count) : chosen(text.count()) {
    std::iota(chosen.begin(), chosen.end(), std::size_t{0});
    std::sort(chosen.begin(), chosen.end(),
              [&](std::size_t a, std::size_t b) { return text.tokens_of(a).size() < text.tokens_of(b).size(); });
    chosen.resize(count);
  }

  [[nodiscard]] input_statistics statistics(const precision& p, tetromino::executor_ref executor = {}) const {
    return moe_lm::calibrator(model, text, chosen, p, executor).run([](std::size_t) {});
  }
  [[nodiscard]] std::vector<std::string> weights() const {
    std::vector<std::string> out;
    for (std::size_t l = 0; l < size.layers; ++l) {
      for (const char* part : {"attn.q", "attn.o", "moe.gate", "moe.down"}) out.push_back(moe_lm::tensor_name(l, part));
    }
    return out;
  }
  [[nodiscard]] std::size_t matrices(const std::string& weight) const {
    return weight.find(".moe.") == std::string::npos ? 1 : size.experts;
  }
};

/// Rows that met each matrix of each weight, document after document.
using seen_rows = std::map<std::pair<std::string, std::size_t>, reference::rows>;

seen_rows rows_in(const inputs& in, reference::moe_lm& plain) {
  seen_rows out;
  plain.saw = [&](const std::string& weight, std::size_t e, const reference::rows& rows) {
    auto& to = out[{weight, e}];
    to.insert(to.end(), rows.begin(), rows.end());
  };
  for (const std::size_t d : in.chosen) {
    const auto tokens = in.text.tokens_of(d);
    static_cast<void>(plain.loss({tokens.begin(), tokens.end()}));
  }
  return out;
}

Eigen::MatrixXd matrix_of(const reference::rows& rows, std::size_t cols) {
  Eigen::MatrixXd out(static_cast<Eigen::Index>(rows.size()), static_cast<Eigen::Index>(cols));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t c = 0; c < cols; ++c) out(static_cast<Eigen::Index>(r), static_cast<Eigen::Index>(c)) = rows[r][c];
  }
  return out;
}

/// One matrix's own moments: what statistics blend with all the experts' is the sum of those and a share of all.
tetromino::calibration one_of(input_statistics& seen, const inputs& in, const std::string& weight, std::size_t e) {
  const std::string part = weight.substr(weight.find('.', 7) + 1);
  const std::size_t layer = std::stoul(weight.substr(7));
  return seen.input(moe_lm::input_of(layer, part.substr(0, part.rfind('.'))), in.matrices(weight), 0).moments[e];
}

void check_near(const Eigen::MatrixXd& got, const Eigen::MatrixXd& expected, double tolerance) {
  CHECK((got - expected).norm() <= tolerance * expected.norm());
}

TEST_CASE("calibrate: one stream sees what the weights of a plain model meet") {
  const inputs in(2);
  const auto stored = reference::read_safetensors(tetromino_test::data_file("moe-16x2.safetensors"));
  reference::moe_lm plain(stored, {}, {});
  seen_rows rows = rows_in(in, plain);
  input_statistics seen = in.statistics({});
  for (const std::string& weight : in.weights()) {
    for (std::size_t e = 0; e < in.matrices(weight); ++e) {
      CAPTURE(weight, e);
      const tetromino::calibration got = one_of(seen, in, weight, e);
      const Eigen::MatrixXd x = matrix_of(rows[{weight, e}], got.cols());
      CHECK(got.rows() == static_cast<double>(x.rows()));
      CHECK(got.drift().size() == 0);
      check_near(got.moments().selfadjointView<Eigen::Lower>(), x.transpose() * x, 1e-4);
    }
  }
}

TEST_CASE("calibrate: two streams see what the packed weights meet, and how far it drifted") {
  const inputs in(2);
  const auto stored = reference::read_safetensors(tetromino_test::data_file("moe-16x2.safetensors"));
  auto rounding = precision::parse("mxfp4-32/floor/gptq", "float32");
  input_statistics seen = in.statistics(rounding);

  // the plain model with the weights that these statistics lead to
  reference::moe_lm plain(stored, {}, {}), packed(stored, {}, {});
  for (const auto& tensor : in.model) {
    const std::string name = tensor.name();
    if (!seen.knows(name)) continue;
    const auto& shape = tensor.shape();
    const std::size_t rows = shape[shape.size() - 2], cols = shape.back(), matrices = in.matrices(name);
    const auto values = moe_lm::read(in.model, name, shape);
    for (std::size_t e = 0; e < matrices; ++e) {
      const tetromino::matrix_view<const float> w(values.data() + e * rows * cols, rows, cols);
      const auto back = tetromino::dequantize<float>(
          tetromino::cpu, tetromino::gptq(tetromino::cpu, w, *rounding.weights, seen.of(name, e, matrices, cols)));
      reference::rows plain_rows;
      for (std::size_t r = 0; r < rows; ++r) {
        plain_rows.emplace_back(back.data.begin() + static_cast<std::ptrdiff_t>(r * cols),
                                back.data.begin() + static_cast<std::ptrdiff_t>((r + 1) * cols));
      }
      packed.replace(name, e, plain_rows);
    }
  }
  seen_rows original = rows_in(in, plain), met = rows_in(in, packed);
  for (const std::string& weight : in.weights()) {
    for (std::size_t e = 0; e < in.matrices(weight); ++e) {
      CAPTURE(weight, e);
      const tetromino::calibration got = one_of(seen, in, weight, e);
      const Eigen::MatrixXd y = matrix_of(met[{weight, e}], got.cols());
      CHECK(got.rows() == static_cast<double>(y.rows()));
      check_near(got.moments().selfadjointView<Eigen::Lower>(), y.transpose() * y, 1e-3);
      if (in.matrices(weight) > 1) continue;  // the float model may have routed other tokens there
      const Eigen::MatrixXd away = matrix_of(original[{weight, e}], got.cols()) - y;
      const bool is_first = weight == in.weights().front();
      CHECK((away.norm() == 0) == is_first);  // nothing is packed before it
      CHECK((got.drift() - away.transpose() * y).norm() <= 1e-3 * away.norm() * y.norm());
    }
  }
}

TEST_CASE("calibrate: activations are rounded on their way into the packed model") {
  const inputs in(1);
  const auto stored = reference::read_safetensors(tetromino_test::data_file("moe-16x2.safetensors"));
  reference::recipe nv;
  nv.nv = true;
  nv.block = 16;
  const std::string first = in.weights().front();
  reference::moe_lm plain(stored, {}, {}), rounding(stored, {}, nv);
  const Eigen::MatrixXd x = matrix_of(rows_in(in, plain)[{first, 0}], in.size.hidden);
  const Eigen::MatrixXd y = matrix_of(rows_in(in, rounding)[{first, 0}], in.size.hidden);
  for (const char* weights : {"nvfp4/amax/gptq", "nvfp4/amax/hadamard-32/gptq"}) {
    CAPTURE(weights);
    input_statistics seen = in.statistics(precision::parse(weights, "nvfp4/amax"));
    const tetromino::calibration got = one_of(seen, in, first, 0);
    const double lost = (got.drift() - (x - y).transpose() * y).norm() / (x - y).norm() / y.norm();
    if (std::string(weights).find("hadamard") == std::string::npos) {
      CHECK(lost < 1e-3);
      check_near(got.moments().selfadjointView<Eigen::Lower>(), y.transpose() * y, 1e-3);
    } else {  // other roundings, of the same size, and of rows that are not turned
      CHECK(got.drift().norm() < 2 * ((x - y).transpose() * y).norm());
      check_near(got.moments().selfadjointView<Eigen::Lower>(), x.transpose() * x, 0.2);
    }
  }
  input_statistics int8 = in.statistics(precision::parse("mxfp4-32/oas/gptq", "int8"));
  check_near(one_of(int8, in, first, 0).moments().selfadjointView<Eigen::Lower>(), x.transpose() * x, 0.01);
  CHECK(one_of(int8, in, first, 0).drift().norm() > 0);
}

TEST_CASE("calibrate: the same on one and on many threads") {
  const inputs in(17);  // more than are run at once
  const tetromino::thread_executor threads(4);
  const auto rounding = precision::parse("nvfp4/amax/gptq", "nvfp4/amax");
  input_statistics alone = in.statistics(rounding), together = in.statistics(rounding, threads);
  for (const std::string& weight : in.weights()) {
    for (std::size_t e = 0; e < in.matrices(weight); ++e) {
      const auto a = one_of(alone, in, weight, e), b = one_of(together, in, weight, e);
      CHECK(a.moments() == b.moments());
      CHECK(a.drift() == b.drift());
      CHECK(a.rows() == b.rows());
    }
    for (std::size_t e = 0; e < in.matrices(weight); ++e) CHECK(alone.amax(weight, e) == together.amax(weight, e));
  }
}

}  // namespace

/// An expert-parallel language model: evaluates documents on one rank or many, in float or 4 bits.
///   moe_engine MODEL.safetensors HELDOUT.safetensors --weights mxfp4-16/oas/mbs-search --activations mxfp4-16/oas
///   moe_engine MODEL.safetensors HELDOUT.safetensors --compare
///   moe_engine MODEL.safetensors HELDOUT.safetensors --calibrate HELDOUT.safetensors --half even --compare
///   mpirun -n 4 moe_engine MODEL.safetensors HELDOUT.safetensors --nodes 2 --placement local
///   mpirun -n 4 moe_engine MODEL.safetensors HELDOUT.safetensors --nodes 2 --rebalance 24
/// Each rank runs attention for its own documents and holds its own experts. In each layer the router chooses experts,
/// a replica_chooser their copies, a dispatcher carries the rows there and the answers back.

#include <tetromino/io/safetensors.hpp>

#include "command_line.hpp"
#include "moe/calibrate.hpp"
#include "moe/engine_plan.hpp"
#include "moe/mpi_session.hpp"
#include "moe/service.hpp"
#include "output_file.hpp"
#include "ui.hpp"

#include <tetromino/dequantize.hpp>
#include <tetromino/metrics.hpp>
#include <tetromino/moe/cost.hpp>
#include <tetromino/thread_executor.hpp>

#include <nlohmann/json.hpp>

#include <chrono>
#include <filesystem>
#include <functional>
#include <thread>

namespace {

namespace io = tetromino::io;
namespace moe = tetromino::moe;
using tetromino::errc;
using tetromino::error;
using namespace moe_lm;

/// What the cost model says of serving the routing that a run recorded.
struct prediction {
  traffic bytes;
  double gpu_imbalance = 0, node_imbalance = 0, nodes_per_token = 0;
};

prediction predict(const workplace& w, const outcome& ran, const moe::placement& p,
                   std::span<const std::uint32_t> source_of_document, std::size_t envelope_bytes) {
  const std::size_t width = w.size.hidden;
  moe::cost_options options;
  options.tokens = moe::phase::all;
  options.copies = w.options.route == "per-node" ? moe::dispatch_copies::per_node : moe::dispatch_copies::per_expert;
  options.sources = moe::source_kind::gpu;
  options.hidden = width;
  options.dispatch_bytes_per_value = 4.0 + static_cast<double>(envelope_bytes) / static_cast<double>(width);
  options.combine_bytes_per_value = 4.0;
  std::vector<std::uint32_t> sources;
  for (const std::size_t i : ran.mine) sources.push_back(source_of_document[i]);
  const auto mine = moe::evaluate({routing_of(w.size), ran.ids, ran.spans}, p, w.cluster, sources, options);

  // each rank knows the routing of its own documents: the whole is the sum
  std::vector<std::uint64_t> sums{static_cast<std::uint64_t>(std::llround(mine.between_nodes.total())),
                                  static_cast<std::uint64_t>(std::llround(mine.inside_nodes.total())),
                                  mine.remote_visits, mine.tokens};
  sums.insert(sums.end(), mine.pairs_on_gpu.begin(), mine.pairs_on_gpu.end());
  w.mpi.add_up(sums);
  moe::cost_report all = mine;
  all.pairs_on_gpu.assign(sums.begin() + 4, sums.end());
  prediction out{{sums[0], sums[1]}};
  const auto layers = static_cast<double>(w.size.layers);
  out.nodes_per_token = static_cast<double>(sums[2]) / (static_cast<double>(sums[3]) * layers);
  for (std::size_t l = 0; l < w.size.layers; ++l) {
    const auto over_mean = [](std::span<const std::uint64_t> pairs) {
      const auto sum = static_cast<double>(std::accumulate(pairs.begin(), pairs.end(), std::uint64_t{0}));
      return static_cast<double>(*std::max_element(pairs.begin(), pairs.end())) * static_cast<double>(pairs.size()) /
             sum;
    };
    out.gpu_imbalance +=
        over_mean(std::span(all.pairs_on_gpu).subspan(l * w.cluster.gpus(), w.cluster.gpus())) / layers;
    out.node_imbalance += over_mean(all.pairs_on_nodes(l, w.cluster)) / layers;
  }
  return out;
}

/// Perplexities of each domain, then of all: exp of the losses over the number of predicted tokens.
std::vector<double> perplexities(const workplace& w, const std::vector<double>& losses) {
  const std::size_t domains = w.text.domain_names.size();
  std::vector<double> loss(domains + 1), tokens(domains + 1);
  for (std::size_t i = 0; i < losses.size(); ++i) {
    for (const std::size_t group : {static_cast<std::size_t>(w.text.domain[w.chosen[i]]), domains}) {
      loss[group] += losses[i];
      tokens[group] += static_cast<double>(w.text.tokens_of(w.chosen[i]).size() - 1);
    }
  }
  for (std::size_t g = 0; g <= domains; ++g) loss[g] = std::exp(loss[g] / tokens[g]);
  return loss;
}

/// The largest difference from the file's float32 losses, as a fraction of them.
double worst_difference(const workplace& w, const std::vector<double>& losses) {
  double worst = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    const auto reference = static_cast<double>(w.text.reference_nll[w.chosen[i]]);
    worst = std::max(worst, std::abs(losses[i] - reference) / reference);
  }
  return worst;
}

std::vector<std::string> header_of(const workplace& w, std::vector<std::string> first) {
  first.insert(first.end(), w.text.domain_names.begin(), w.text.domain_names.end());
  first.emplace_back("all");
  return first;
}

/// The same for programs, by domain.
nlohmann::ordered_json perplexities_json(const workplace& w, const std::vector<double>& losses) {
  nlohmann::ordered_json out;
  const std::vector<std::string> names = header_of(w, {});
  const std::vector<double> values = perplexities(w, losses);
  for (std::size_t i = 0; i < names.size(); ++i) out[names[i]] = values[i];
  return out;
}

/// What calibration text says of the model's inputs, under weights and activations of this precision. Each rank reads
/// all of it, so all of them know the same to the last bit and pack the same weights.
input_statistics calibrated(const workplace& w, const moe_lm::precision& rounding) {
  std::optional<ui::progress> progress;
  if (w.mpi.is_first()) progress.emplace("calibrating", w.size.layers, w.options.print.quiet);
  const auto cores = static_cast<std::size_t>(std::thread::hardware_concurrency());
  const tetromino::thread_executor threads(static_cast<unsigned>(std::max<std::size_t>(1, cores / w.mpi.ranks())));
  return moe_lm::calibrator(w.model_file, w.calibration->text, w.calibration->chosen, rounding, threads)
      .run([&](std::size_t) {
        if (progress) progress->add(1);
      });
}

void write_statistics(const workplace& w, const input_statistics& seen) {
  if (w.options.statistics.empty() || !w.mpi.is_first()) return;
  const ui::stop_signals signals;  // which wait for the file to be whole
  seen.save(w.options.statistics);
}

/// Bits and QSNR of all matrices that a recipe packs, then perplexity, recipe by recipe.
void compare(const workplace& w) {
  struct row {
    std::string weights, activations;
    bool calibrated = false;
  };
  std::vector<row> rows{{"float32", "float32"},
                        {"mxfp4-32/floor", "mxfp4-32/floor"},
                        {"mxfp4-16/oas", "mxfp4-16/oas"},
                        {"mxfp4-16/oas/mbs-search", "mxfp4-16/oas/mbs-static"},
                        {"nvfp4/amax", "nvfp4/amax"},
                        {"nvfp4/four-over-six", "nvfp4/four-over-six"},
                        {"mxfp4-16/oas/mbs-search", "float32"}};
  std::optional<input_statistics> one_stream;
  if (w.calibration != nullptr) {
    w.mpi.together("moe_engine", [&] {
      one_stream = calibrated(w, {});
      write_statistics(w, *one_stream);
    });
    rows.push_back({"mxfp4-32/min-error/mbs-search@32", "mxfp4-32/min-error/mbs-search@32", true});
    rows.push_back({"mxfp4-32/min-error/mbs-search@32/gptq", "mxfp4-32/min-error/mbs-search@32", true});
    rows.push_back({"nvfp4/min-error/gptq", "nvfp4/min-error", true});
  }
  ui::table table(header_of(w, {"weights", "activations", "bits", "QSNR dB"}));
  nlohmann::ordered_json json = {{"documents", w.chosen.size()}};
  const moe::placement p = moe::contiguous(w.size.layers, w.size.experts, w.cluster);
  for (const auto& [weights, activations, is_calibrated] : rows) {
    auto rounding = moe_lm::precision::parse(weights, activations);
    std::optional<input_statistics> two_streams;
    if (is_calibrated) {
      if (rounding.weights->error_feedback) two_streams = calibrated(w, rounding);
      rounding.seen = two_streams ? &*two_streams : &*one_stream;
    }
    const moe_lm::model model(w.model_file, rounding);
    const outcome ran = engine(w, model, p).run(w.all(), w.in_turn(), std::string::npos, weights.c_str());
    std::vector<std::string> line{weights, activations, "32", "-"};
    const auto& recipe = model.rounding.weights;
    nlohmann::ordered_json found = {{"weights", weights}, {"activations", activations}, {"calibrated", is_calibrated}};
    found["bits"] = recipe ? bits_per_weight(recipe->format) : 32.0;
    if (recipe) line[2] = fmt::format("{:.3f}", bits_per_weight(recipe->format));
    if (recipe && !is_calibrated) {  // calibrated weights are not the nearest ones, on purpose
      tetromino::error_report report;
      for (const auto& tensor : w.model_file) {
        if (tensor.name().find(".attn.") == std::string::npos && tensor.name().find(".moe.") == std::string::npos)
          continue;
        if (tensor.name().find("router") != std::string::npos) continue;
        const auto& shape = tensor.shape();
        const auto values = moe_lm::read(w.model_file, tensor.name(), shape);
        const tetromino::batch_view<const float> x(values.data(), shape.size() == 3 ? shape[0] : 1,
                                                   shape[shape.size() - 2], shape.back());
        const auto packed = quantize(tetromino::cpu, x, *recipe, {.scope = tetromino::tensor_scale_scope::per_matrix});
        report.add(compare(x, tetromino::dequantize<float>(tetromino::cpu, packed)));
      }
      line[3] = fmt::format("{:.2f}", report.qsnr());
      found["qsnr_db"] = report.qsnr();
    }
    for (const double perplexity : perplexities(w, ran.losses)) line.push_back(fmt::format("{:.3f}", perplexity));
    table.add(std::move(line));
    found["perplexity"] = perplexities_json(w, ran.losses);
    json["recipes"].push_back(std::move(found));
  }
  if (!w.mpi.is_first() || w.options.print.quiet) return;
  if (w.options.print.json) return ui::print_json(json);
  fmt::print("perplexity of {} documents; weights and activations of experts and attention\n", w.chosen.size());
  table.print();
}

/// Writes each document's number and loss.
void write_losses(const workplace& w, const std::vector<double>& losses) {
  std::string lines;
  for (std::size_t i = 0; i < w.chosen.size(); ++i) lines += fmt::format("{} {:.17g}\n", w.chosen[i], losses[i]);
  w.mpi.together("moe_engine", [&] {
    if (!w.options.losses.empty() && w.mpi.is_first()) ui::write_file(w.options.losses, lines);
  });
}

nlohmann::ordered_json bytes_json(const traffic& t) {
  return {{"between_nodes", t.between_nodes}, {"inside_nodes", t.inside_nodes}};
}

const char* name_of(moe::rebalance_verdict verdict) {
  using enum moe::rebalance_verdict;
  return verdict == new_plan    ? "new plan"
         : verdict == no_gain   ? "no gain"
         : verdict == steady    ? "steady"
         : verdict == migrating ? "migrating"
                                : "too few tokens";
}

/// Serves documents domain by domain, and shows what became of each few of them.
void serve(const workplace& w, const moe_lm::model& model) {
  const service_outcome ran = service(w, model, plan_by_name(w, model).placement).run();
  write_losses(w, ran.losses);
  if (!w.mpi.is_first() || w.options.print.quiet) return;
  nlohmann::ordered_json json = {
      {"documents", w.chosen.size()},
      {"ranks", w.mpi.ranks()},
      {"nodes", w.cluster.nodes()},
      {"perplexity", perplexities_json(w, ran.losses)},
      {"bytes_per_expert", ran.bytes_per_expert},
      {"weights", {{"planned", bytes_json(ran.planned)}, {"measured", bytes_json(ran.moved)}}}};
  ui::table table({"served", "tokens", "bytes between nodes per token", "layers switched", "then", "experts to move",
                   "experts on ranks"});
  for (const auto& window : ran.windows) {
    std::vector<std::string> domains;
    for (const std::size_t i : window.which) {
      const std::string& domain = w.text.domain_names[w.text.domain[w.chosen[i]]];
      if (domains.empty() || domains.back() != domain) domains.push_back(domain);
    }
    json["windows"].push_back({{"documents", window.which.size()},
                               {"domains", domains},
                               {"tokens", window.tokens},
                               {"bytes", bytes_json(window.measured)},
                               {"layers_switched", window.layers},
                               {"documents_on_rank", window.documents_on_rank},
                               {"experts_on_rank", window.experts_on_rank},
                               {"verdict", name_of(window.then.verdict)},
                               {"experts_to_move", window.then.way.moves}});
    table.add(
        {fmt::format("{}", fmt::join(domains, ", ")), std::to_string(window.tokens),
         fmt::format("{:.0f}", static_cast<double>(window.measured.between_nodes) / static_cast<double>(window.tokens)),
         std::to_string(window.layers), name_of(window.then.verdict), std::to_string(window.then.way.moves),
         fmt::format("{}", fmt::join(window.experts_on_rank, " "))});
  }
  if (w.options.print.json) return ui::print_json(json);
  fmt::print("weights {}, {} bytes for an expert; {} documents on {} ranks, {} nodes, domain by domain\n\n",
             w.options.weights, ran.bytes_per_expert, w.chosen.size(), w.mpi.ranks(), w.cluster.nodes());
  table.print();
  fmt::print("\n");
  ui::table links({"bytes of weights", "between nodes", "inside nodes"});
  links.add({"planned", std::to_string(ran.planned.between_nodes), std::to_string(ran.planned.inside_nodes)});
  links.add({"measured", std::to_string(ran.moved.between_nodes), std::to_string(ran.moved.inside_nodes)});
  links.print();
}

void run(const workplace& w) {
  std::optional<moe_lm::model> loaded;
  std::optional<input_statistics> seen;
  w.mpi.together("moe_engine", [&] {
    auto rounding = moe_lm::precision::parse(w.options.weights, w.options.activations);
    if (w.calibration != nullptr) {
      seen = calibrated(w, rounding);
      write_statistics(w, *seen);
      rounding.seen = &*seen;
    }
    loaded.emplace(w.model_file, rounding);
  });
  if (w.options.rebalance > 0) return serve(w, *loaded);
  const plan chosen = plan_by_name(w, *loaded);
  const outcome ran =
      engine(w, *loaded, chosen.placement).run(w.all(), chosen.source_of_document, std::string::npos, "running");
  write_losses(w, ran.losses);
  const std::size_t envelope = w.size.top_k * sizeof(moe::expert_call) + sizeof(std::uint32_t);
  const prediction here = predict(w, ran, chosen.placement, chosen.source_of_document, envelope);
  const prediction plain =
      predict(w, ran, moe::contiguous(w.size.layers, w.size.experts, w.cluster), w.in_turn(), envelope);
  if (!w.mpi.is_first() || w.options.print.quiet) return;
  if (w.options.print.json) {
    nlohmann::ordered_json out = {{"weights", w.options.weights}, {"activations", w.options.activations},
                                  {"documents", w.chosen.size()}, {"ranks", w.mpi.ranks()},
                                  {"nodes", w.cluster.nodes()},   {"placement", w.options.placement}};
    out["perplexity"] = perplexities_json(w, ran.losses);
    out["worst_difference"] = worst_difference(w, ran.losses);
    out["tokens"] = ran.tokens;
    out["seconds"] = ran.seconds;
    out["bytes"] = {{"measured", bytes_json(ran.measured)}};
    if (w.options.route != "per-rank") {
      out["bytes"]["predicted"] = bytes_json(here.bytes);
      out["bytes"]["contiguous"] = bytes_json(plain.bytes);
    }
    out["nodes_per_token"] = here.nodes_per_token;
    out["gpu_imbalance"] = here.gpu_imbalance;
    out["node_imbalance"] = here.node_imbalance;
    return ui::print_json(out);
  }

  fmt::print("weights {}, activations {}; {} documents on {} ranks, {} nodes; experts placed: {}\n\n",
             w.options.weights, w.options.activations, w.chosen.size(), w.mpi.ranks(), w.cluster.nodes(),
             w.options.placement);
  ui::table quality(header_of(w, {""}));
  std::vector<std::string> row{"perplexity"};
  for (const double perplexity : perplexities(w, ran.losses)) row.push_back(fmt::format("{:.3f}", perplexity));
  quality.add(std::move(row));
  quality.print();
  fmt::print("\nlosses differ from those of float32 arithmetic by {:.2g} at most\n", worst_difference(w, ran.losses));
  fmt::print("{} tokens in {:.2f} s: {:.0f} tokens/s\n", ran.tokens, ran.seconds,
             static_cast<double>(ran.tokens) / ran.seconds);
  if (w.mpi.ranks() == 1) return;

  fmt::print("\n");
  ui::table links({"bytes sent", "between nodes", "inside nodes"});
  const auto bytes = [&](const char* name, const traffic& t) {
    links.add({name, std::to_string(t.between_nodes), std::to_string(t.inside_nodes)});
  };
  if (w.options.route != "per-rank") bytes("predicted", here.bytes);
  bytes("measured", ran.measured);
  if (w.options.route != "per-rank") bytes("contiguous, documents in turn", plain.bytes);
  links.print();
  if (w.cluster.nodes() > 1 && plain.bytes.between_nodes > 0) {
    fmt::print(
        "\nbetween nodes: {:.3f} of what contiguous experts and documents in turn would send; {:.2f} other nodes "
        "per token and layer\n",
        static_cast<double>(here.bytes.between_nodes) / static_cast<double>(plain.bytes.between_nodes),
        here.nodes_per_token);
  }
  fmt::print("imbalance (most loaded / mean): ranks {:.3f}, nodes {:.3f}\n", here.gpu_imbalance, here.node_imbalance);
}

/// Experts spread over nodes, with room for replicas.
moe::topology make_cluster(const settings& s, const mpi::session& mpi, const moe_lm::shape& size) {
  const std::size_t ranks = mpi.ranks();
  if (ranks > size.experts) {
    throw error(
        errc::invalid_argument,
        fmt::format("expected at most {} ranks, one for each expert of the model, got {}", size.experts, ranks));
  }
  if (s.replicas > size.experts) {
    throw error(errc::invalid_argument,
                fmt::format("--replicas: expected at most {}, one for each expert, got {}", size.experts, s.replicas));
  }
  const std::size_t per_node = (size.experts + s.nodes - 1) / s.nodes + s.replicas;
  const auto cluster = moe::topology::with_node_slots(s.nodes, ranks / s.nodes, per_node);
  if (s.drain && cluster.slots() - cluster.slots_on_gpu(*s.drain) < size.experts) {
    throw error(
        errc::infeasible,
        fmt::format("--drain {}: expected slots for {} experts on the other ranks, got {}: --replicas adds some",
                    *s.drain, size.experts, cluster.slots() - cluster.slots_on_gpu(*s.drain)));
  }
  return cluster;
}

/// Text that is judged too has to be cut in halves.
calibration_text read_calibration(const settings& s, const io::safetensors_file& judged, std::size_t vocab) {
  const auto file = io::safetensors_file::open(s.calibrate);
  calibration_text out{moe_lm::documents(file, vocab), {}};
  const bool same = file.identity() == judged.identity();
  if (same && s.half.empty()) {
    throw error(errc::invalid_argument,
                "--calibrate: expected other documents than those that are judged; of one file, "
                "--half even or --half odd judges one half and calibrates on the other");
  }
  for (std::size_t d = 0; d < out.text.count(); ++d) {
    if (!same || (d % 2 == 0) != (s.half == "even")) out.chosen.push_back(d);
  }
  return out;
}

/// What every rank has to have alike: all options, and the contents of all files.
std::vector<std::pair<std::string, std::string>> shared_settings(const settings& s) {
  const auto content = [](const std::string& path) {
    if (path.empty()) return std::string();
    const auto file = tetromino::io::file_mapping::try_open(path);
    const auto bytes = file.value().bytes();
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  std::vector<std::pair<std::string, std::string>> out{
      {"MODEL", content(s.model)},
      {"HELDOUT", content(s.text)},
      {"--calibrate", content(s.calibrate)},
      {"--placement", std::filesystem::is_regular_file(s.placement) ? content(s.placement) : s.placement},
      {"--weights", s.weights},
      {"--activations", s.activations},
      {"--route", s.route},
      {"--half", s.half},
      {"--losses", s.losses.empty() ? "" : "written"},
      {"--statistics", s.statistics.empty() ? "" : "written"},
      {"--compare", s.compare ? "yes" : "no"},
      {"--drain", s.drain ? std::to_string(*s.drain) : ""},
      {"--rejoin", s.rejoin ? "yes" : "no"}};
  for (const auto& [name, number] :
       {std::pair{"--nodes", s.nodes}, std::pair{"--replicas", s.replicas}, std::pair{"--documents", s.documents},
        std::pair{"--prefill", s.prefill}, std::pair{"--batch", s.batch}, std::pair{"--rebalance", s.rebalance}}) {
    out.emplace_back(name, std::to_string(number));
  }
  return out;
}

/// Everything that can be said before a file is opened. Errors: usage_error.
void check_options(const settings& s, const mpi::session& mpi) {
  std::optional<moe_lm::precision> rounding;
  try {
    rounding = moe_lm::precision::parse(s.weights, s.activations);
  } catch (const error& e) {
    throw ui::usage_error(e.what());
  }
  if (rounding->weights && rounding->weights->error_feedback && s.calibrate.empty()) {
    throw ui::usage_error(fmt::format("weights in {} need --calibrate TEXT", s.weights));
  }
  if (s.nodes == 0 || mpi.ranks() % s.nodes != 0) {
    throw ui::usage_error(
        fmt::format("--nodes: expected a number that divides the {} ranks, got {}", mpi.ranks(), s.nodes));
  }
  if (s.drain && *s.drain >= mpi.ranks()) {
    throw ui::usage_error(fmt::format("--drain: expected a rank below {}, got {}", mpi.ranks(), *s.drain));
  }
}

void run_all(const settings& s, const mpi::session& mpi) {
  std::vector<std::pair<std::string, std::string>> shared;
  mpi.together("moe_engine", [&] {
    check_options(s, mpi);
    if (mpi.is_first()) {
      ui::check_outputs(
          {{"--losses", s.losses}, {"--statistics", s.statistics}},
          {{"MODEL", s.model}, {"HELDOUT", s.text}, {"--calibrate", s.calibrate}, {"--placement", s.placement}});
    }
    shared = shared_settings(s);
  });
  mpi.agree("moe_engine", shared);
  shared.clear();
  std::optional<io::safetensors_file> model_file, text_file;
  std::optional<moe_lm::shape> size;
  std::optional<moe_lm::documents> text;
  std::optional<moe::topology> cluster;
  std::optional<calibration_text> calibration;
  std::vector<std::size_t> chosen;
  mpi.together("moe_engine", [&] {
    model_file = io::safetensors_file::open(s.model);
    size.emplace(*model_file);
    text_file = io::safetensors_file::open(s.text);
    text.emplace(*text_file, size->vocab);
    cluster = make_cluster(s, mpi, *size);
    const std::size_t first = s.half == "odd" ? 1 : 0, step = s.half.empty() ? 1 : 2;
    const std::size_t all = (text->count() - first + step - 1) / step;
    const std::size_t wanted = std::min(s.documents != 0 ? s.documents : s.compare ? 48 : all, all);
    for (std::size_t i = 0; i < wanted; ++i) chosen.push_back(first + i * all / wanted * step);  // of all domains alike
    if (chosen.empty()) throw error(errc::invalid_argument, fmt::format("{}: no documents in this half", s.text));
    if (!s.calibrate.empty()) calibration = read_calibration(s, *text_file, size->vocab);
  });
  const workplace w{s, mpi, *model_file, *size, *text, chosen, *cluster, calibration ? &*calibration : nullptr};
  mpi::carried_to().assign(mpi.ranks(), 0);
  s.compare ? compare(w) : run(w);
  mpi.together("moe_engine", ui::flush_output);
}

}  // namespace

/// Count what the program hands to MPI for each rank, then do what they always do (MPI 4.0, sec. 15.2).
extern "C" int MPI_Alltoallv(const void* from, const int* send_counts, const int* send_offsets, MPI_Datatype send_type,
                             void* to, const int* receive_counts, const int* receive_offsets, MPI_Datatype receive_type,
                             MPI_Comm communicator) {
  int size = 0;
  PMPI_Type_size(send_type, &size);
  auto& bytes = mpi::carried_to();
  for (std::size_t r = 0; r < bytes.size(); ++r) {
    bytes[r] += static_cast<std::uint64_t>(send_counts[r]) * static_cast<std::uint64_t>(size);
  }
  return PMPI_Alltoallv(from, send_counts, send_offsets, send_type, to, receive_counts, receive_offsets, receive_type,
                        communicator);
}

extern "C" int MPI_Sendrecv(const void* out, int out_count, MPI_Datatype out_type, int to, int out_tag, void* in,
                            int in_count, MPI_Datatype in_type, int from, int in_tag, MPI_Comm communicator,
                            MPI_Status* status) {
  int size = 0;
  PMPI_Type_size(out_type, &size);
  if (to != MPI_PROC_NULL) {
    mpi::carried_to()[static_cast<std::size_t>(to)] +=
        static_cast<std::uint64_t>(out_count) * static_cast<std::uint64_t>(size);
  }
  return PMPI_Sendrecv(out, out_count, out_type, to, out_tag, in, in_count, in_type, from, in_tag, communicator,
                       status);
}

int main(int argc, char** argv) {
  ui::ignore_write_signals();
  const mpi::session mpi(argc, argv);
  settings s;
  ui::command_line app("moe_engine",
                       "Evaluates a mixture-of-experts language model on one rank or, under mpirun, on many",
                       {"MODEL HELDOUT --compare", "MODEL HELDOUT --weights nvfp4/min-error --activations int8",
                        "MODEL HELDOUT --calibrate HELDOUT --half even --statistics statistics.safetensors"});
  app.add_file("MODEL", s.model, "the model (safetensors)").required();
  app.add_file("HELDOUT", s.text, "documents to evaluate (safetensors)").required();
  app.add_option("--weights", s.weights, "float32, or a recipe such as mxfp4-16/oas/mbs-search")
      .value_name("RECIPE")
      .shows_default();
  app.add_option("--activations", s.activations, "float32, int8, or a recipe").value_name("RECIPE").shows_default();
  app.add_option("--placement", s.placement, "contiguous, balanced, local, or a file with a placement")
      .value_name("NAME or FILE")
      .shows_default();
  app.add_option("--replicas", s.replicas, "slots that each node has beyond its share of the experts").shows_default();
  app.add_option("--nodes", s.nodes, "count ranks as those of so many nodes").shows_default();
  app.add_option("--route", s.route, "copies of a row that travel: per-node, per-rank or per-expert")
      .one_of({"per-node", "per-rank", "per-expert"})
      .shows_default();
  app.add_option("--documents", s.documents, "evaluate so many documents (default: all; with --compare 48)");
  app.add_option("--prefill", s.prefill, "tokens of each document that balanced and local plan with")
      .positive()
      .shows_default();
  const auto rebalance =
      app.add_option("--rebalance", s.rebalance,
                     "documents come domain by domain; after every N, move weights where a better placement pays")
          .value_name("N")
          .positive();
  const auto drain =
      app.add_option("--drain", s.drain, "this rank gives its documents and experts away after the first N documents")
          .value_name("RANK")
          .needs(rebalance);
  app.add_flag("--rejoin", s.rejoin, "it is back for the last N").needs(drain);
  app.add_option("--batch", s.batch, "tokens that a rank runs together").shows_default();
  const auto calibrate = app.add_file(
      "--calibrate", s.calibrate, "text (safetensors) that weighs errors in searched scales and makes gptq possible");
  app.add_option("--half", s.half, "evaluate every second document; --calibrate on the same file takes the others")
      .one_of({"even", "odd"});
  app.add_file("--statistics", s.statistics, "write what calibration found, for quantize_checkpoint").needs(calibrate);
  app.add_file("--losses", s.losses, "write each document's loss to this file");
  app.add_flag("--compare", s.compare, "recipes side by side: bits, QSNR, perplexity").excludes(rebalance);
  app.add_output(s.print);
  const auto leave = app.read(argc, argv);  // instead of work: after --help, or a mistake
  if (const std::size_t first = mpi.first_where(leave != nullptr); first < mpi.ranks()) {
    return mpi.value_of(first, first == mpi.rank() ? leave() : 0);  // the first rank that has something to say, says it
  }
  try {
    run_all(s, mpi);
    return 0;
  } catch (const mpi::reported& said) {
    return said.status;
  } catch (const std::exception& e) {
    // in the middle of an exchange: the others are waiting, and would for ever
    fmt::print(stderr, "moe_engine: rank {}: {}\n", mpi.rank(), e.what());
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, 1);
    return 1;
  }
}

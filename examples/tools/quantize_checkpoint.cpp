/// Packs the linear and expert weights of a model into 4-bit blocks, in a layout that engines open:
///   quantize_checkpoint Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4 --recipe nvfp4/min-error --layout compressed-tensors
///   quantize_checkpoint gpt-oss-20b OUT --layout modelopt --recipe nvfp4/amax     # MXFP4 to NVFP4, without loss
///   quantize_checkpoint MODEL OUT --recipe mxfp4-32/oas --recipe attn=nvfp4/amax --layout compressed-tensors
///   quantize_checkpoint MODEL OUT --bits 4.5 --candidates mxfp4-32/oas,nvfp4/min-error,keep --layout modelopt
///   quantize_checkpoint MODEL OUT --dry-run    # what would be packed, and why not
///   quantize_checkpoint MODEL --compare        # recipes side by side
///   quantize_checkpoint model-f16.gguf model-nvfp4.gguf --recipe nvfp4/min-error --imatrix imatrix.gguf
/// MODEL is a directory as Hugging Face saves it, its index, or a safetensors file; OUT is a directory, or a file whose
/// name ends with .safetensors. Memory stays bounded whatever the model's size; with gptq, by its largest matrix.

#include <tetromino/io/checkpoint/pack.hpp>

#include "checkpoint/compare_recipes.hpp"
#include "checkpoint/pack_gguf.hpp"
#include "checkpoint/settings.hpp"
#include "command_line.hpp"

#include <tetromino/thread_executor.hpp>

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <thread>

namespace {

using namespace checkpoint;

struct settings {
  std::string input, output;
  std::vector<std::string> recipes, keep, pack;
  std::string layout = "linear", statistics, imatrix, special = "reject";
  unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  double shard_gigabytes = 5;
  std::optional<double> bits;
  std::vector<std::string> candidates;
  bool separate_scales = false, dry_run = false, compare = false, list = false;
  ui::output_options print;
  std::vector<std::string> of_safetensors;  // options given that GGUF files have no use for
};

void check_recipe(const settings& s, io::checkpoint_layout layout, const recipe& how) {
  io::try_fit(layout, how).value();
  if (how.error_feedback && s.statistics.empty()) {
    throw ui::usage_error(fmt::format("recipe {} needs --statistics FILE", how.name()));
  }
}

/// What --bits and --candidates ask for.
io::bit_budget budget_of(const settings& s) {
  return usage([&] {
    io::bit_budget out{*s.bits};
    for (const auto& name : s.candidates) {
      if (name == "keep") {
        out.may_keep = true;
        continue;
      }
      out.candidates.push_back(recipe::parse(name));
      check_recipe(s, io::checkpoint_layout_named(s.layout), out.candidates.back());
    }
    if (out.candidates.empty()) throw ui::usage_error("--candidates: expected a recipe besides keep");
    return out;
  });
}

/// Everything that can be said before the model is opened.
io::plan_options plan_options_of(const settings& s) {
  return usage([&] {
    io::plan_options out;
    out.layout = io::checkpoint_layout_named(s.layout);
    for (const auto& text : s.recipes) add_rules(text, out.rules);
    if (out.rules.empty() && !s.bits) {
      const bool is_nvfp4 =
          out.layout == io::checkpoint_layout::modelopt || out.layout == io::checkpoint_layout::compressed_tensors;
      const char* const best = is_nvfp4                                       ? "nvfp4/four-over-six"
                               : out.layout == io::checkpoint_layout::gpt_oss ? "mxfp4-32/oas"
                                                                              : "mxfp4-16/oas/mbs-search";
      out.rules.push_back({"", recipe::parse(best)});
    }
    for (const auto& rule : out.rules) {
      if (s.bits && rule.pattern.empty()) {
        throw ui::usage_error(
            fmt::format("--recipe {} is for all weights: with --bits, give it to --candidates", rule.how.name()));
      }
      check_recipe(s, out.layout, rule.how);
    }
    out.keep = s.keep;
    out.pack = s.pack;
    out.separate_scales = s.separate_scales;
    return out;
  });
}

tetromino::special_values special_of(const std::string& name) {
  return name == "poison"     ? tetromino::special_values::poison
         : name == "saturate" ? tetromino::special_values::saturate
                              : tetromino::special_values::reject;
}

/// Parameters that one line of a table counts.
struct group {
  std::size_t tensors = 0, elements = 0, bits = 0, rounded = 0;
  tetromino::error_report errors;
  std::string example;

  void add(const io::planned_parameter& planned, const io::packed_parameter* made) {
    ++tensors;
    elements += planned.source->elements();
    bits += io::stored_bits(planned);
    if (example.empty()) example = planned.source->name;
    if (made == nullptr) return;
    rounded += made->rounded_blocks;
    errors.add(made->errors);
  }
};

std::string way_of(const io::planned_parameter& planned) {
  switch (planned.action) {
    case io::pack_action::keep:
      return "kept";
    case io::pack_action::decode:
      return "kept, as BF16";
    case io::pack_action::copy:
      return fmt::format("{} codes as they are", tetromino::name_of(planned.how.format));
    case io::pack_action::cast:
      return "MXFP4 values as NVFP4";
    default:
      return planned.how.name();
  }
}

std::string qsnr_text(const tetromino::error_report& errors) {
  return errors.count == 0 ? std::string("-") : fmt::format("{:.3f}", errors.qsnr());
}

void print_tables(const io::pack_plan& plan, const io::pack_report* report) {
  std::map<std::pair<std::string, std::string>, group> packed, kept;
  group total;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const auto& planned = plan.parameters[i];
    const auto* made = report == nullptr ? nullptr : &report->parameters[i];
    const std::string role(io::name(planned.source->kind.role));
    if (planned.is_packed() || plan.options.chosen.contains(planned.source->name)) {
      packed[{role, way_of(planned)}].add(planned, made);
      total.add(planned, made);
    } else {
      const bool decoded = planned.action == io::pack_action::decode;
      kept[{role, decoded ? planned.reason + ", as BF16" : planned.reason}].add(planned, made);
    }
  }
  ui::table table({"packed", "recipe", "tensors", "weights", "bits/weight", "QSNR dB"});
  const auto row = [&](const std::string& role, const std::string& how, const group& g) {
    const double bits = static_cast<double>(g.bits) / static_cast<double>(std::max<std::size_t>(1, g.elements));
    table.add({role, how, fmt::format("{}", g.tensors), fmt::format("{}", g.elements), fmt::format("{:.3f}", bits),
               qsnr_text(g.errors)});
  };
  for (const auto& [key, g] : packed) row(key.first, key.second, g);
  row("total", "", total);
  table.print();
  if (report != nullptr && report->sampled_one_in > 1) {
    fmt::print("QSNR of one slice in {}; verify_checkpoint measures all\n", report->sampled_one_in);
  }
  if (total.rounded != 0)
    fmt::print("{} blocks of 32 could not be kept exactly: their scales are too small\n", total.rounded);
  if (kept.empty()) return;
  ui::table rest({"kept", "why", "tensors", "values", "such as"});
  for (const auto& [key, g] : kept) {
    rest.add({key.first, ui::printable(key.second), fmt::format("{}", g.tensors), fmt::format("{}", g.elements),
              ui::printable(g.example)});
  }
  fmt::print("\n");
  rest.print();
}

void print_list(const io::pack_plan& plan) {
  for (const auto& planned : plan.parameters) {
    const io::parameter& p = *planned.source;
    const bool decoded = planned.action == io::pack_action::decode;
    fmt::print("{}  {}  {}\n", ui::printable(p.name), io::name(p.kind.role),
               planned.is_packed()
                   ? fmt::format("{} {}", shape_of(p), way_of(planned))
                   : fmt::format("kept{}: {}", decoded ? " as BF16" : "", ui::printable(planned.reason)));
  }
}

/// Bits for each weight that a budget is for.
double reached(const io::budgeted_plan& within) {
  return static_cast<double>(within.bits) / static_cast<double>(within.weights);
}

/// The same for programs: one JSON object.
nlohmann::ordered_json json_of(const settings& s, const io::budgeted_plan& within, const io::pack_report* report) {
  const io::pack_plan& plan = within.plan;
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const auto& planned = plan.parameters[i];
    const io::parameter& p = *planned.source;
    nlohmann::ordered_json one = {{"name", p.name}, {"role", io::name(p.kind.role)}, {"shape", p.shape}};
    one["packed"] = planned.is_packed();
    if (planned.is_packed()) {
      one["recipe"] = planned.how.name();
      one["values_kept"] = planned.action != io::pack_action::pack;
    } else {
      one["why"] = planned.reason;
    }
    one["bits"] = io::stored_bits(planned);
    if (report != nullptr) {
      const auto& made = report->parameters[i];
      if (planned.action == io::pack_action::pack) one["qsnr_db"] = made.errors.qsnr();
      if (planned.action == io::pack_action::cast) one["rounded_blocks"] = made.rounded_blocks;
    }
    tensors.push_back(std::move(one));
  }
  nlohmann::ordered_json out = {{"input", s.input}, {"output", s.output}, {"layout", s.layout}};
  if (s.bits) {
    out["budget"] = {{"bits", *s.bits},
                     {"candidates", s.candidates},
                     {"weights", within.weights},
                     {"reached", reached(within)},
                     {"noise_to_signal", within.error}};
  }
  if (report != nullptr) {
    out["bytes_read"] = report->bytes_read;
    out["bytes_written"] = report->bytes_written;
    out["sampled_one_in"] = report->sampled_one_in;
    out["files_left"] = report->files_left;
  }
  out["tensors"] = std::move(tensors);
  return out;
}

void report_plan(const settings& s, const io::budgeted_plan& within, const io::pack_report* report) {
  if (s.print.json) {
    ui::print_json(json_of(s, within, report));
    return;
  }
  if (s.print.quiet) return;
  if (s.list) print_list(within.plan);
  print_tables(within.plan, report);
  if (!s.bits) return;
  fmt::print("\n--bits {}: {:.4f} for each of {} weights, noise over signal {:.3g}\n", *s.bits, reached(within),
             within.weights, within.error);
}

io::pack_options pack_options_of(const settings& s) {
  io::pack_options out;
  out.special = special_of(s.special);
  out.shard_bytes = static_cast<std::size_t>(s.shard_gigabytes * 1e9);
  out.slice_bytes = ui::slice_bytes(s.threads);
  return out;
}

std::size_t bytes_of(const io::checkpoint& model) {
  std::size_t bytes = 0;
  for (const auto& tensor : model.tensors()) bytes += tensor.bytes;
  return bytes;
}

/// The plan that --bits and --candidates ask for, or else the rules alone.
io::budgeted_plan plan_of(const settings& s, const io::checkpoint& model, const std::vector<io::parameter>& parameters,
                          io::plan_options options, const tetromino::cpu_t& policy) {
  if (!s.bits) return {usage([&] { return io::plan(model, parameters, std::move(options)); })};
  const io::bit_budget budget = budget_of(s);
  io::pack_options how = pack_options_of(s);
  const ui::stop_signals signals;
  ui::progress progress("measuring", bytes_of(model) * budget.candidates.size(), s.print.quiet);
  how.progress = [&](std::size_t done) {
    progress.add(done);
    return ui::stop_signals::seen() == 0;
  };
  auto made = io::try_plan_within(policy, model, parameters, std::move(options), budget, how);
  if (!made && ui::stop_signals::seen() != 0) throw error(errc::io, "stopped by a signal; nothing was written");
  if (!made && made.error().code() == errc::infeasible)
    throw ui::usage_error(fmt::format("--bits {}: {}", *s.bits, made.error().what()));
  if (!made && made.error().code() == errc::invalid_argument) throw ui::usage_error(made.error().what());
  return std::move(made).value();
}

int write(const settings& s, const io::checkpoint& model, const io::budgeted_plan& within,
          const tetromino::cpu_t& policy) {
  const io::pack_plan& plan = within.plan;
  io::pack_options options = pack_options_of(s);
  if (plan.options.inputs != nullptr) {
    options.metadata["tetromino.statistics"] = std::filesystem::path(s.statistics).filename().string();
  }
  io::pack_report report;
  {
    const ui::stop_signals signals;
    ui::progress progress("packing", bytes_of(model), s.print.quiet);
    options.progress = [&](std::size_t done) {
      progress.add(done);
      return ui::stop_signals::seen() == 0;
    };
    auto done = io::try_pack(policy, model, plan, s.output, options);
    if (!done && ui::stop_signals::seen() != 0) throw error(errc::io, "stopped by a signal; nothing was written");
    report = std::move(done).value();
    ui::say_if_too_late(s.output);
  }
  report_plan(s, within, &report);
  if (s.print.json || s.print.quiet) return 0;
  fmt::print("\n{}: {} in layout {}, {} -> {}\n", s.output,
             report.files == 1 ? "one file" : fmt::format("{} files", report.files), s.layout,
             ui::bytes(report.bytes_read), ui::bytes(report.bytes_written));
  for (const auto& file : report.files_left) {
    fmt::print("not copied, since it holds weights that were not read: {}\n", ui::printable(file));
  }
  return 0;
}

/// No output may replace an input; one that cannot be written is refused before the work.
void check_output(const settings& s) {
  if (s.output.empty()) throw ui::usage_error("expected OUT, --dry-run or --compare");
  std::error_code ignored;
  for (const auto* input : {&s.input, &s.statistics, &s.imatrix}) {
    if (!input->empty() && std::filesystem::equivalent(s.output, *input, ignored)) {
      throw ui::usage_error(fmt::format("{}: expected another file than {} being read", s.output,
                                        input == &s.input ? "the one" : "the statistics"));
    }
  }
}

/// llama.cpp's own files: GGUF in, GGUF out.
int run_gguf(const settings& s) {
  io::gguf_options options;
  usage([&] {
    for (const auto& text : s.recipes) add_rules(text, options.rules);
    if (options.rules.empty()) options.rules.push_back({"", recipe::parse("mxfp4-32/min-error")});
    return 0;
  });
  if (!s.statistics.empty()) throw ui::usage_error("--statistics is for safetensors; GGUF files take --imatrix");
  if (!s.of_safetensors.empty()) {
    throw ui::usage_error(fmt::format("{} is for safetensors, not for GGUF files", s.of_safetensors.front()));
  }
  if (!s.dry_run && !s.output.ends_with(".gguf")) throw ui::usage_error("expected OUT.gguf or --dry-run");
  options.keep = s.keep;
  options.pack = s.pack;
  options.special = special_of(s.special);
  if (!s.dry_run) check_output(s);
  std::optional<io::imatrix> weights;
  if (!s.imatrix.empty()) {
    weights = io::imatrix::open(s.imatrix);
    options.column_weights = &*weights;
  }
  const tetromino::thread_executor threads(s.threads);
  return pack_gguf({s.input, s.dry_run ? std::string() : s.output, s.print, s.list}, std::move(options),
                   tetromino::cpu.on(threads));
}

int run(const settings& s) {
  if (s.input.ends_with(".gguf")) return run_gguf(s);
  if (!s.imatrix.empty()) throw ui::usage_error("--imatrix is for GGUF files; safetensors take --statistics");
  if (s.output.ends_with(".gguf")) {
    throw ui::usage_error(
        fmt::format("{}: GGUF files are written from GGUF files; from {}, expected a directory or a "
                    ".safetensors file",
                    s.output, s.input));
  }
  io::plan_options options = s.compare ? io::plan_options{.keep = s.keep, .pack = s.pack} : plan_options_of(s);
  comparison_job comparison{s.input, {}, nullptr, s.print};
  if (s.compare) comparison.recipes = recipes_to_compare(s.recipes, !s.statistics.empty());
  if (s.bits) budget_of(s);
  if (!s.compare && !s.dry_run) check_output(s);
  const auto model = io::checkpoint::open(s.input);
  const auto parameters = io::parameters_of(model);
  std::unique_ptr<gathered_inputs> inputs;
  if (!s.statistics.empty()) inputs = std::make_unique<gathered_inputs>(input_statistics::load(s.statistics));
  options.inputs = inputs.get();
  const tetromino::thread_executor threads(s.threads);
  const auto policy = tetromino::cpu.on(threads);
  if (s.compare) {
    comparison.inputs = inputs.get();
    return compare_recipes(comparison, model, parameters, std::move(options), policy);
  }
  const auto within = plan_of(s, model, parameters, std::move(options), policy);
  if (!s.dry_run) return write(s, model, within, policy);
  report_plan(s, within, nullptr);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  settings s;
  ui::command_line app(
      "quantize_checkpoint", "Packs the linear and expert weights of a model into 4-bit blocks",
      {"MODEL --compare", "MODEL OUT --recipe nvfp4/four-over-six --layout modelopt",
       "MODEL OUT --recipe nvfp4/amax --recipe experts=mxfp4-32/oas --dry-run --list",
       "MODEL OUT --bits 4.5 --candidates mxfp4-32/oas,nvfp4/min-error,keep --layout compressed-tensors",
       "model.gguf packed.gguf --recipe mxfp4-32/min-error --imatrix imatrix.gguf"});
  app.add_file("IN", s.input, "model to read: a directory, an index, a .safetensors or a .gguf file").required();
  const auto out =
      app.add_file("OUT", s.output, "what to write: a directory that does not exist, or a .safetensors or .gguf file");
  app.add_option("--recipe", s.recipes,
                 "FORMAT/RULE[/MACRO][/hadamard-N][/gptq], such as nvfp4/min-error; or WEIGHTS=RECIPE for some weights "
                 "(experts, linear, a part of names, or a pattern), later ones before earlier ones; or a .json file")
      .value_name("RECIPE");
  const auto bits =
      app.add_option("--bits", s.bits,
                     "bits for each weight, on average: for each the candidate that keeps the whole best, "
                     "measured before packing")
          .within(1.0, 32.0);
  const auto candidates = app.add_option("--candidates", s.candidates,
                                         "recipes that --bits chooses among, and keep, which leaves a weight as it is")
                              .split_at(',')
                              .value_name("RECIPE,..[,keep]");
  bits.needs(candidates);
  candidates.needs(bits);
  const auto layout = app.add_option("--layout", s.layout, "linear, gpt-oss, compressed-tensors or modelopt")
                          .value_name("LAYOUT")
                          .shows_default();
  app.add_option("--keep", s.keep, "leave tensors whose name matches this pattern (* and ?) as they are")
      .value_name("PATTERN");
  app.add_option("--pack", s.pack, "pack tensors whose name matches this pattern although they are not known")
      .value_name("PATTERN");
  const auto separate =
      app.add_flag("--separate-scales", s.separate_scales,
                   "NVFP4: a tensor scale for each weight, also where readers take one for q, k and v or gate and up");
  app.add_option("--on-special", s.special, "NaN and infinities: reject, poison (the block) or saturate")
      .one_of({"reject", "poison", "saturate"})
      .shows_default();
  app.add_file("--statistics", s.statistics,
               "calibration statistics of the weights' inputs: they weigh errors in searches, and gptq needs them");
  app.add_file("--imatrix", s.imatrix, "llama.cpp's importance matrix, which weighs errors; for GGUF files");
  const auto shard = app.add_option("--shard-size", s.shard_gigabytes, "largest file to write, in GB")
                         .within(0.001, 1e6)
                         .shows_default();
  app.add_threads(s.threads);
  const auto dry_run =
      app.add_flag("--dry-run", s.dry_run, "print what would be packed and what kept, and write nothing");
  const auto compare = app.add_flag("--compare", s.compare, "print the recipes side by side and write nothing");
  const auto list = app.add_flag("--list", s.list, "print every tensor with its role, too");
  for (const auto& other : {out, layout, separate, shard, dry_run, list, bits}) compare.excludes(other);
  app.add_output(s.print);
  if (const auto leave = app.read(argc, argv)) return leave();
  for (const auto& option : {layout, separate, shard, compare, bits}) {
    if (option.is_given()) s.of_safetensors.push_back(option.name());
  }
  return ui::run("quantize_checkpoint", [&] { return run(s); });
}

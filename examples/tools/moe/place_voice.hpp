#pragma once

/// What place_experts says, on the terminal, in its report and as JSON.

#include "../command_line.hpp"
#include "../output_file.hpp"
#include "../ui.hpp"
#include "place_report.hpp"
#include "place_settings.hpp"
#include "place_study.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstddef>
#include <ctime>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace place_experts {

using rows = std::vector<std::vector<std::string>>;
using nlohmann::ordered_json;

/// Everything said goes to the terminal and, if there is one, to the report; with --json, what was found goes to
/// standard output instead, as one object.
class voice {
 public:
  explicit voice(const settings& s)
      : report_path_(s.report_path), speaks_(!s.print.json && !s.print.quiet), json_(s.print.json) {
    found = {{"program", "place_experts"}, {"version", ui::version()}, {"input", s.trace_path}};
    if (report_path_.empty()) return;
    page_.emplace(fmt::format("Where the experts of {} live",
                              ui::printable(std::filesystem::path(s.trace_path).filename().string())));
    const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
    char date[32] = "";
    std::tm utc{};
    if (gmtime_r(&now, &utc) != nullptr) std::strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", &utc);
    page_->origin(fmt::format("{}, Tetromino {}: {}", date, ui::version(), ui::printable(s.command, 1000)));
  }

  void line(const std::string& text) const {
    if (speaks_) fmt::print("{}\n", text);
  }
  void section(const std::string& title, const std::string& text) {
    line(fmt::format("\n{}\n{}\n", title, text));
    if (page_) page_->heading(title), page_->paragraph(text);
  }
  /// `best` is the row to point out; 0 is none.
  void table(const rows& r, std::size_t best = 0) {
    if (speaks_) {
      ui::table out(r.front());
      for (std::size_t i = 1; i < r.size(); ++i) {
        out.add(r[i]);
        if (i == best) out.mark_last();
      }
      out.print();
    }
    if (page_) page_->table(r, best);
  }
  void figure(const std::vector<std::string>& pictures, const std::string& caption) {
    if (page_) page_->figure(pictures, caption);
  }
  /// What was gained, in one sentence: the report begins with it, the terminal ends with it.
  void summary(const std::string& text) {
    summary_ = text;
    if (page_) page_->lead(text);
  }
  void end(const std::string& plan_path) {
    if (page_) ui::write_file(report_path_, page_->html());
    if (!summary_.empty()) line("\n" + summary_);
    if (!plan_path.empty()) line(fmt::format("The plan: {}", plan_path)), found["plan_file"] = plan_path;
    if (page_) line(fmt::format("The report with pictures: {}", report_path_)), found["report_file"] = report_path_;
    if (json_) ui::print_json(found);
  }

  ordered_json found;

 private:
  std::string report_path_, summary_;
  bool speaks_, json_;
  std::optional<report::page> page_;
};

/// What cannot be measured is null.
inline ordered_json mean_of(const statistic& s) { return s.count() == 0 ? ordered_json() : ordered_json(s.mean()); }
inline ordered_json json_of(const statistic& s) {
  return {{"mean", mean_of(s)},
          {"deviation", s.count() < 2 ? ordered_json() : ordered_json(s.deviation())},
          {"count", s.count()}};
}

inline std::string number(double x, int digits = 3) { return fmt::format("{:.{}f}", x, digits); }
inline std::string number(const statistic& s, int digits = 3) {
  if (s.count() == 0) return "–";
  return s.count() < 2 ? number(s.mean(), digits)
                       : fmt::format("{:.{}f} ± {:.{}f}", s.mean(), digits, s.deviation(), digits);
}

}  // namespace place_experts

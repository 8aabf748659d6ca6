#pragma once

/// One HTML file that explains a placement: text, tables and pictures (inline SVG), nothing loaded from anywhere.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace report {

/// Text as it may stand in HTML and SVG.
inline std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

struct rgb {
  double r, g, b;
};

/// A colour between stops at equal distances, as #rrggbb; t from 0 to 1.
inline std::string colour(const std::vector<rgb>& stops, double t) {
  const double at = std::clamp(t, 0.0, 1.0) * static_cast<double>(stops.size() - 1);
  const auto i = std::min(static_cast<std::size_t>(at), stops.size() - 2);
  const double f = at - static_cast<double>(i);
  const auto mix = [&](double rgb::*c) {
    return static_cast<int>(std::lround(stops[i].*c * (1 - f) + stops[i + 1].*c * f));
  };
  return fmt::format("#{:02x}{:02x}{:02x}", mix(&rgb::r), mix(&rgb::g), mix(&rgb::b));
}

/// From blue (little) over grey-white (the middle) to red (much).
inline const std::vector<rgb> diverging = {
    {33, 102, 172}, {146, 197, 222}, {247, 247, 247}, {244, 165, 130}, {178, 24, 43}};
/// From white to dark blue.
inline const std::vector<rgb> sequential = {
    {247, 251, 255}, {198, 219, 239}, {107, 174, 214}, {33, 113, 181}, {8, 48, 107}};

/// Values in a grid of coloured cells; row 0 on top.
struct heat_map {
  std::string title;
  std::string row_name, column_name;
  std::size_t rows = 0, columns = 0;
  std::vector<double> values;  ///< [rows, columns]
  double low = 0, high = 1;    ///< ends of the colour scale
  const std::vector<rgb>* colours = &sequential;
  std::string unit;               ///< what a value is, for the scale
  std::size_t columns_apart = 0;  ///< a gap after every so many columns; 0: none
  bool square = false;            ///< cells as high as they are wide, with their values written in
  std::string high_name = {};     ///< the upper end of the scale, where values beyond it have its colour
  std::vector<std::string> row_names = {}, column_names = {};  ///< instead of numbers
};

/// The beginning of a picture whose elements with a <title> are read out: under the mouse, by a touch, or by the arrow
/// keys, which step `across` of them up and down.
inline std::string picture(double width, double height, const std::string& title, double title_at, std::size_t across) {
  return fmt::format(
      R"(<svg viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" role="group" tabindex="0" data-across="{2}" aria-label="{3}: arrow keys read its values out"><text x="{4}" y="16" class="t">{3}</text>)",
      width, height, across, escaped(title), title_at);
}

inline std::string svg(const heat_map& m) {
  std::size_t longest = 0;
  for (const std::string& name : m.row_names) longest = std::max(longest, name.size());
  const double left = std::max(46.0, 14 + 6.2 * static_cast<double>(longest)), top = 38, width = 640;
  const std::size_t gaps = m.columns_apart == 0 ? 0 : (m.columns - 1) / m.columns_apart;
  const double gap = 3;
  double cell = (width - gap * static_cast<double>(gaps)) / static_cast<double>(m.columns);
  if (m.square) cell = std::min(cell, 44.0);
  const double height = m.square ? cell : std::clamp(220.0 / static_cast<double>(m.rows), 3.0, 18.0);
  const double used = cell * static_cast<double>(m.columns) + gap * static_cast<double>(gaps);
  const double bottom = top + height * static_cast<double>(m.rows);
  const double below = m.column_names.empty() ? 26 : 40 + 4.5 * static_cast<double>(longest);
  std::string out = picture(std::max(left + used + 90, left + 7.5 * static_cast<double>(m.title.size())),
                            bottom + below, m.title, left, m.columns);
  const auto name_of = [](const std::string& kind, const std::vector<std::string>& names, std::size_t i) {
    return names.empty() ? fmt::format("{} {}", kind, i) : names[i];
  };
  for (std::size_t r = 0; r < m.rows; ++r) {
    for (std::size_t c = 0; c < m.columns; ++c) {
      const double v = m.values[r * m.columns + c];
      const double t = m.high > m.low ? (v - m.low) / (m.high - m.low) : 0;
      const double x = left + cell * static_cast<double>(c) +
                       (m.columns_apart == 0 ? 0 : gap * static_cast<double>(c / m.columns_apart));
      const double y = top + height * static_cast<double>(r);
      out += fmt::format(
          R"(<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" fill="{}"><title>{}, {}: {:.3g} ({})</title></rect>)",
          x, y, cell + (m.square ? -1 : 0.05), height + (m.square ? -1 : 0.05), colour(*m.colours, t),
          escaped(name_of(m.row_name, m.row_names, r)), escaped(name_of(m.column_name, m.column_names, c)), v,
          escaped(m.unit));
      if (m.square) {
        out += fmt::format(R"(<text x="{:.2f}" y="{:.2f}" class="c" fill="{}">{}</text>)", x + cell / 2,
                           y + height / 2 + 4, t > 0.55 ? "#fff" : "#222", v == 0 ? "–" : fmt::format("{:.2f}", v));
      }
    }
  }
  const auto label = [&](double x, double y, const char* kind, const std::string& text) {
    out += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>)", x, y, kind, escaped(text));
  };
  const std::size_t row_step = m.row_names.empty() ? std::max<std::size_t>(1, (m.rows + 19) / 20) : 1;
  for (std::size_t r = 0; r < m.rows; r += row_step) {
    label(left - 5, top + height * (static_cast<double>(r) + 0.5) + 4, "r",
          m.row_names.empty() ? std::to_string(r) : m.row_names[r]);
  }
  const std::size_t column_step = !m.column_names.empty() ? 1
                                  : m.columns_apart > 0   ? m.columns_apart
                                                          : std::max<std::size_t>(1, (m.columns + 15) / 16);
  for (std::size_t c = 0; c < m.columns; c += column_step) {
    const double shift = m.columns_apart == 0 ? 0 : gap * static_cast<double>(c / m.columns_apart);
    const double x = left + cell * (static_cast<double>(c) + 0.5) + shift;
    if (m.column_names.empty()) {
      label(x, bottom + 12, "m", std::to_string(c));
    } else {
      out += fmt::format(R"svg(<text transform="translate({:.1f} {:.1f}) rotate(40)">{}</text>)svg", x - 4, bottom + 12,
                         escaped(m.column_names[c]));
    }
  }
  out += fmt::format(R"(<text x="{}" y="{:.1f}" class="m">{}</text>)", left + used / 2, bottom + 24,
                     escaped(m.column_name));
  out += fmt::format(R"svg(<text transform="translate(11 {:.1f}) rotate(-90)" class="m">{}</text>)svg",
                     (top + bottom) / 2, escaped(m.row_name));
  // the scale
  const double x = left + used + 16, steps = 40, tall = bottom - top;
  for (int i = 0; i < 40; ++i) {
    out += fmt::format(R"(<rect x="{:.1f}" y="{:.2f}" width="12" height="{:.2f}" fill="{}"/>)", x,
                       bottom - tall * (i + 1) / steps, tall / steps + 0.2, colour(*m.colours, (i + 0.5) / steps));
  }
  out += fmt::format(R"(<text x="{0:.1f}" y="{1:.1f}">{2}</text><text x="{0:.1f}" y="{3:.1f}">{4:.3g}</text>)", x + 16,
                     top + 9, m.high_name.empty() ? fmt::format("{:.3g}", m.high) : m.high_name, bottom, m.low);
  out += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" class="e">{}</text>)", left + used + 90, top - 8, escaped(m.unit));
  return out + "</svg>";
}

/// Points joined in order of x.
struct series {
  std::string name;
  std::vector<std::pair<double, double>> points;
  bool joined = true;  ///< false: lone markers
};

struct curve {
  std::string title, x_name, y_name;
  std::vector<series> lines;
};

/// Round numbers from `low` to `high`, about `count` of them.
inline std::vector<double> ticks(double low, double high, int count) {
  const double rough = (high - low) / count, power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = power;
  for (const double s : {1.0, 2.0, 2.5, 5.0, 10.0}) {
    step = s * power;
    if (step >= rough) break;
  }
  std::vector<double> out;
  for (double t = std::ceil(low / step - 1e-9) * step; t <= high + 1e-9 * step; t += step) out.push_back(t);
  return out;
}

inline std::string svg(const curve& c) {
  static const char* const palette[] = {"#1f6fb4", "#c8102e", "#2a8a3e", "#8a4fbf",
                                        "#d98200", "#4d4d4d", "#00838f", "#a0522d"};
  const double left = 60, top = 34, width = 520, height = 320, legend = 270;
  double x0 = 1e300, x1 = -1e300, y0 = 1e300, y1 = -1e300;
  for (const series& s : c.lines) {
    for (const auto& [x, y] : s.points) {
      x0 = std::min(x0, x), x1 = std::max(x1, x), y0 = std::min(y0, y), y1 = std::max(y1, y);
    }
  }
  if (x0 > x1) return {};
  const auto widen = [](double& low, double& high) {
    const double by = std::max(0.06 * (high - low), 1e-3 * std::max(1.0, std::abs(high)));
    low -= by, high += by;
  };
  widen(x0, x1);
  widen(y0, y1);
  const auto px = [&](double x) { return left + width * (x - x0) / (x1 - x0); };
  const auto py = [&](double y) { return top + height * (y1 - y) / (y1 - y0); };
  std::string out = picture(left + width + legend, top + height + 44, c.title, left, 1);
  for (const double t : ticks(x0, x1, 7)) {
    out += fmt::format(
        R"(<path d="M{0:.1f} {1:.1f}V{2:.1f}" class="g"/><text x="{0:.1f}" y="{3:.1f}" class="m">{4:.4g}</text>)",
        px(t), top, top + height, top + height + 15, t);
  }
  for (const double t : ticks(y0, y1, 6)) {
    out += fmt::format(
        R"(<path d="M{0:.1f} {1:.1f}H{2:.1f}" class="g"/><text x="{3:.1f}" y="{4:.1f}" class="r">{5:.4g}</text>)", left,
        py(t), left + width, left - 6, py(t) + 4, t);
  }
  out += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" class="m">{}</text>)", left + width / 2, top + height + 34,
                     escaped(c.x_name));
  out += fmt::format(R"svg(<text transform="translate(14 {:.1f}) rotate(-90)" class="m">{}</text>)svg",
                     top + height / 2, escaped(c.y_name));
  for (std::size_t i = 0; i < c.lines.size(); ++i) {
    const series& s = c.lines[i];
    const char* const ink = palette[i % std::size(palette)];
    std::string path;
    for (const auto& [x, y] : s.points) path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px(x), py(y));
    if (s.joined) out += fmt::format(R"(<path d="{}" fill="none" stroke="{}" stroke-width="2"/>)", path, ink);
    const auto mark = [&](double x, double y, const std::string& tip) {
      if (s.joined) {
        out += fmt::format(R"(<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}">{}</circle>)", x, y, ink, tip);
      } else {
        out += fmt::format(R"(<rect x="{:.1f}" y="{:.1f}" width="9" height="9" fill="{}">{}</rect>)", x - 4.5, y - 4.5,
                           ink, tip);
      }
    };
    for (const auto& [x, y] : s.points) {
      mark(px(x), py(y), fmt::format("<title>{}: {:.3f}, {:.3f}</title>", escaped(s.name), x, y));
    }
    const double row = top + 12 + 20 * static_cast<double>(i);
    mark(left + width + 20, row - 4, "");
    out += fmt::format(R"(<text x="{:.1f}" y="{:.1f}">{}</text>)", left + width + 32, row, escaped(s.name));
  }
  return out + "</svg>";
}

/// The page, from top to bottom.
class page {
 public:
  explicit page(std::string title) : title_(std::move(title)) {}

  /// When, with what and how the page was made; what it says in one sentence.
  void origin(std::string_view text) { origin_ = text; }
  void lead(std::string_view text) { lead_ = text; }
  void heading(std::string_view text) { body_ += fmt::format("<h2>{}</h2>\n", escaped(text)); }
  void paragraph(std::string_view text) { body_ += fmt::format("<p>{}</p>\n", escaped(text)); }
  void figure(const std::vector<std::string>& pictures, std::string_view caption) {
    body_ += "<figure>";
    for (const std::string& p : pictures) body_ += p + "<output aria-live=\"polite\"></output>";
    body_ += fmt::format("<figcaption>{}</figcaption></figure>\n", escaped(caption));
  }
  /// Row `best` is pointed out; 0, the header, is none.
  void table(const std::vector<std::vector<std::string>>& rows, std::size_t best = 0) {
    body_ += "<div class=\"wide\" tabindex=\"0\"><table>";  // scrolls by itself where the page is narrow
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const bool is_best = best != 0 && r == best;
      body_ += is_best ? "<tr class=\"best\">" : "<tr>";
      for (std::size_t c = 0; c < rows[r].size(); ++c) {
        const char* const begin = r == 0 ? "th scope=\"col\"" : c == 0 ? "th scope=\"row\"" : "td";
        body_ += fmt::format("<{}>{}{}</{}>", begin, escaped(rows[r][c]), is_best && c == 0 ? " (best)" : "",
                             std::string_view(begin, 2));
      }
      body_ += "</tr>";
    }
    body_ += "</table></div>\n";
  }

  [[nodiscard]] std::string html() const {
    return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
           "content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\"><title>" +
           escaped(title_) + "</title><style>" + std::string(style) + "</style></head><body>\n<h1>" + escaped(title_) +
           "</h1>\n<p class=\"origin\">" + escaped(origin_) + "</p>\n<p class=\"lead\">" + escaped(lead_) + "</p>\n" +
           body_ + "<script>" + std::string(script) + "</script></body></html>\n";
  }

 private:
  static constexpr std::string_view style =
      ":root{--ink:#222;--paper:#fff;--dim:#555;--rule:#ddd;--best:#e6f3e6}"
      "@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181c;--dim:#9aa;--rule:#3a3f47;--best:#1f3a26}}"
      "body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:2rem "
      "auto;padding:0 "
      "1rem}"
      "h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}figure{margin:1rem "
      "0}figcaption{color:var(--dim);max-width:46rem}"
      "td:not(:first-child){white-space:nowrap}svg{max-width:100%;height:auto;display:block;margin:.6rem 0;font:11px "
      "system-ui,sans-serif;fill:var(--ink)}"
      "svg .t{font-size:13px;font-weight:600}svg .r,svg .e{text-anchor:end}svg .m,svg .c{text-anchor:middle}"
      "svg .g{stroke:var(--rule);stroke-width:1}"
      "table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .7rem;text-align:right;"
      "border-bottom:1px solid var(--rule)}th:first-child{text-align:left;font-weight:inherit}tr:first-child "
      "th{font-weight:600;"
      "border-bottom:2px solid var(--dim)}.wide{overflow-x:auto}figure{overflow-x:auto}"
      ".origin{color:var(--dim);overflow-wrap:anywhere}.lead{font-size:1.1rem;max-width:46rem}"
      ".best>*{background:var(--best)}output{display:block;min-height:1.5em;color:var(--dim)}"
      "svg:focus-visible,.wide:focus-visible{outline:2px solid var(--dim);outline-offset:2px}"
      ".at{stroke:var(--ink);stroke-width:2}"
      "@media(max-width:40rem){svg{max-width:none}}";  // pictures scroll there, rather than shrink

  // Without it, a mouse still shows titles. Pointers and arrow keys put the title of an element under its picture.
  static constexpr std::string_view script =
      "document.querySelectorAll('svg').forEach(svg=>{"
      "const all=[...svg.querySelectorAll('title')].map(t=>t.parentNode),says=svg.nextElementSibling;let at=-1;"
      "const show=i=>{if(i<0||i>=all.length)return;if(at>=0)all[at].classList.remove('at');at=i;"
      "all[i].classList.add('at');says.textContent=all[i].querySelector('title').textContent};"
      "const point=e=>show(all.indexOf(e.target));"
      "svg.addEventListener('pointerdown',point);svg.addEventListener('pointermove',point);"
      "svg.addEventListener('keydown',e=>{const across=+svg.dataset.across,"
      "step={ArrowRight:1,ArrowLeft:-1,ArrowDown:across,ArrowUp:-across}[e.key];"
      "if(!step)return;e.preventDefault();show(at<0?0:at+step)})});";

  std::string title_, origin_, lead_;
  std::string body_;
};

}  // namespace report

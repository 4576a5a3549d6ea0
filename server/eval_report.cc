#include "server/eval_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "server/svg_plot.h"

namespace innerq {
namespace {

using OrderedJson = nlohmann::ordered_json;

std::string Cell(std::optional<double> value, EvalColumn::Format format) {
  if (!value) return "";
  switch (format) {
    case EvalColumn::Format::kRatio:
      return fmt::format("{:.3f}", *value);
    case EvalColumn::Format::kPercent:
      return fmt::format("{:.1f} %", std::round(1000 * *value) / 10 + 0.0);  // never -0.0
    case EvalColumn::Format::kSmall:
      return *value == 0 ? "0" : fmt::format("{:.3g}", *value);
    case EvalColumn::Format::kCount:
      return fmt::format("{:.1f}", *value);
    case EvalColumn::Format::kInteger:
      return fmt::format("{:.0f}", *value);
    case EvalColumn::Format::kMiB:
      return fmt::format("{:.1f}", *value / (1 << 20));
  }
  return "";
}

std::string Dump(const OrderedJson& json, int indent) {
  return json.dump(indent, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace

std::string FormatTable(const EvalReport& report) {
  std::vector<std::vector<std::string>> lines(1);
  lines[0] = {"cache", "bits", "effective"};
  for (const EvalColumn& column : report.columns) lines[0].push_back(column.heading);
  for (const EvalRow& row : report.rows) {
    std::vector<std::string>& cells = lines.emplace_back();
    cells = {row.cache, fmt::format("{:.2f}", row.sealed_bits),
             fmt::format("{:.2f}", row.effective_bits)};
    for (size_t i = 0; i < report.columns.size(); ++i) {
      cells.push_back(Cell(row.values[i], report.columns[i].format));
    }
  }
  std::vector<size_t> widths(lines[0].size());
  for (const auto& cells : lines) {
    for (size_t i = 0; i < cells.size(); ++i) widths[i] = std::max(widths[i], cells[i].size());
  }
  std::string text = report.scope + "\n\n";
  for (size_t line = 0; line < lines.size(); ++line) {
    text += fmt::format("| {:<{}} |", lines[line][0], widths[0]);
    for (size_t i = 1; i < widths.size(); ++i) {
      text += fmt::format(" {:>{}} |", lines[line][i], widths[i]);
    }
    text += "\n";
    if (line > 0) continue;
    text += fmt::format("|{}|", std::string(widths[0] + 2, '-'));
    for (size_t i = 1; i < widths.size(); ++i) text += std::string(widths[i] + 1, '-') + ":|";
    text += "\n";
  }
  return text;
}

std::string FormatJson(const EvalReport& report) {
  OrderedJson caches = OrderedJson::array();
  for (const EvalRow& row : report.rows) {
    OrderedJson json = {{"cache", row.cache},
                        {"sealed_bits", row.sealed_bits},
                        {"effective_bits", row.effective_bits}};
    for (size_t i = 0; i < report.columns.size(); ++i) {
      json[report.columns[i].key] =
          row.values[i] ? OrderedJson(*row.values[i]) : OrderedJson(nullptr);
    }
    json.update(OrderedJson::parse(row.details));
    caches.push_back(std::move(json));
  }
  OrderedJson json = {{"task", report.task},
                      {"model", report.model},
                      {"device", report.device},
                      {"scope", report.scope},
                      {"settings", OrderedJson::parse(report.settings)}};
  json.update(OrderedJson::parse(report.details));
  json["caches"] = std::move(caches);
  return Dump(json, 2) + "\n";
}

std::string FormatPlot(const EvalReport& report) {
  const EvalColumn& column = report.columns[report.plot_column];
  const double scale = column.format == EvalColumn::Format::kPercent ? 100 : 1;
  SvgPlot plot{.title = fmt::format("{}: {}", report.model, report.task),
               .x_label = "bits per cached element, F16 windows included",
               .y_label = column.heading + (scale == 100 ? ", %" : ""),
               .log_y = report.plot_log,
               .points = {}};
  for (const EvalRow& row : report.rows) {
    const std::optional<double> value = row.values[report.plot_column];
    if (value) plot.points.push_back({row.cache, row.effective_bits, scale * *value});
  }
  return RenderSvg(plot);
}

}  // namespace innerq

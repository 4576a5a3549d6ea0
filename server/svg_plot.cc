#include "server/svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>

namespace innerq {
namespace {

// Everything in CSS pixels.
constexpr double kPlotWidth = 476, kMinHeight = 440;
constexpr double kLeft = 84, kTop = 48, kBottom = 60;
constexpr double kLegendLine = 18, kLegendIndent = 36;
constexpr double kCharWidth = 7;  // of most characters at 12 pixels, generously

std::string EscapeXml(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        // XML 1.0 has no other control characters.
        escaped += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return escaped;
}

// The part of an axis that is shown, and where its values are drawn.
struct Axis {
  bool log = false;
  double low = 0, high = 1;        // values; exponents of ten if `log`
  double from = 0, to = 1;         // pixels of `low` and `high`
  std::vector<double> ticks = {};  // as `low`

  double At(double value) const {
    const double shown = log ? std::log10(value) : value;
    return from + (shown - low) / (high - low) * (to - from);
  }
};

// The largest of 1, 2, 5 times a power of ten that gives at least four steps over `range`.
double TickStep(double range) {
  const double rough = range / 4;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  for (const double factor : {5.0, 2.0}) {
    if (factor * power <= rough) return factor * power;
  }
  return power;
}

// An axis over `values`, with some room on both sides; of positive ones alone if `log`.
Axis Cover(std::vector<double> values, bool log) {
  Axis axis{.log = log};
  if (log) {
    std::erase_if(values, [](double value) { return !(value > 0); });
    for (double& value : values) value = std::log10(value);
  }
  if (!values.empty()) {
    axis.low = *std::min_element(values.begin(), values.end());
    axis.high = *std::max_element(values.begin(), values.end());
  }
  if (log) {
    axis.low = std::floor(axis.low - 0.05);
    axis.high = std::ceil(axis.high + 0.05);
    for (double tick = axis.low; tick <= axis.high; ++tick) axis.ticks.push_back(tick);
    return axis;
  }
  const double least = std::max(std::abs(axis.high) * 1e-3, 1e-9);  // all values may be the same
  const double room = std::max((axis.high - axis.low) * 0.08, least);
  axis.low -= room;
  axis.high += room;
  const double step = TickStep(axis.high - axis.low);
  for (double i = std::ceil(axis.low / step); i * step <= axis.high; ++i) {
    axis.ticks.push_back(i * step);
  }
  return axis;
}

std::string TickText(const Axis& axis, double tick) {
  return axis.log ? fmt::format("1e{}", static_cast<int>(tick)) : fmt::format("{:.6g}", tick + 0.0);
}

void AppendText(std::string& svg, double x, double y, std::string_view attributes,
                std::string_view text) {
  svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\"{}>{}</text>\n", x, y, attributes,
                     EscapeXml(text));
}

void AppendAxes(std::string& svg, const Axis& x, const Axis& y) {
  svg += "<g stroke=\"#ddd\">\n";
  const auto line = [&svg](double x1, double y1, double x2, double y2) {
    svg += fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\"/>\n", x1, y1,
                       x2, y2);
  };
  const auto pixel = [](const Axis& axis, double tick) {
    return axis.from + (tick - axis.low) / (axis.high - axis.low) * (axis.to - axis.from);
  };
  for (const double tick : x.ticks) line(pixel(x, tick), y.from, pixel(x, tick), y.to);
  for (const double tick : y.ticks) line(x.from, pixel(y, tick), x.to, pixel(y, tick));
  svg += "</g>\n<g fill=\"#555\">\n";
  for (const double tick : x.ticks) {
    AppendText(svg, pixel(x, tick), y.from + 18, " text-anchor=\"middle\"", TickText(x, tick));
  }
  for (const double tick : y.ticks) {
    AppendText(svg, x.from - 8, pixel(y, tick) + 4, " text-anchor=\"end\"", TickText(y, tick));
  }
  svg += "</g>\n";
}

// Tells points apart: ten colors (Tableau 10), filled, then the same as rings.
std::string Style(size_t index) {
  constexpr std::string_view kColors[] = {"#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f",
                                          "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"};
  const std::string_view color = kColors[index % std::size(kColors)];
  return fmt::format("fill=\"{}\" stroke=\"{}\" stroke-width=\"2\"",
                     index / std::size(kColors) % 2 == 0 ? color : "white", color);
}

}  // namespace

std::string RenderSvg(SvgPlot plot) {
  std::erase_if(plot.points, [](const PlotPoint& point) {
    return !std::isfinite(point.x) || !std::isfinite(point.y);
  });
  std::vector<double> x_values, y_values;
  for (const PlotPoint& point : plot.points) {
    x_values.push_back(point.x);
    y_values.push_back(point.y);
  }
  const double height =
      std::max(kMinHeight, kTop + kLegendLine * static_cast<double>(plot.points.size() + 1));
  size_t longest = 30;
  for (const PlotPoint& point : plot.points) {
    longest = std::max(longest, point.label.size() + std::string_view(" = 0").size());
  }
  const double width =
      kLeft + kPlotWidth + kLegendIndent + kCharWidth * static_cast<double>(longest);
  Axis x = Cover(x_values, false);
  x.from = kLeft;
  x.to = kLeft + kPlotWidth;
  Axis y = Cover(y_values, plot.log_y);
  y.from = height - kBottom;
  y.to = kTop;

  std::string svg = fmt::format(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" "
      "viewBox=\"0 0 {0} {1}\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"{0}\" height=\"{1}\" fill=\"white\"/>\n",
      width, height);
  AppendText(svg, kLeft, 24, " font-size=\"15\"", plot.title);
  AppendAxes(svg, x, y);
  AppendText(svg, (x.from + x.to) / 2, height - 16, " text-anchor=\"middle\"", plot.x_label);
  svg += fmt::format("<g transform=\"translate(20 {:.1f}) rotate(-90)\">\n", (y.from + y.to) / 2);
  AppendText(svg, 0, 0, " text-anchor=\"middle\"", plot.y_label);
  svg += "</g>\n";

  const auto at_edge = [&plot](double value) { return plot.log_y && !(value > 0); };
  for (size_t i = 0; i < plot.points.size(); ++i) {
    const PlotPoint& point = plot.points[i];
    const std::string style = Style(i);
    svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"5\" {}/>\n", x.At(point.x),
                       at_edge(point.y) ? y.from : y.At(point.y), style);
    const double line = kTop + 6 + kLegendLine * static_cast<double>(i);
    svg += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"9\" height=\"9\" {}/>\n", x.to + 20,
                       line - 9, style);
    AppendText(svg, x.to + kLegendIndent, line, "", point.label + (at_edge(point.y) ? " = 0" : ""));
  }
  return svg + "</svg>\n";
}

}  // namespace innerq

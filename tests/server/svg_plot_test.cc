#include "server/svg_plot.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <regex>

#include "tests/models/test_files.h"

namespace innerq {
namespace {

// Whether Python's XML parser takes it.
bool IsXml(const std::string& text) {
  const TemporaryDirectory directory;
  WriteAll(directory.path() / "plot.svg", text);
  const char* python = std::getenv("INNERQ_PYTHON");
  const std::string command = std::string(python != nullptr ? python : "python3") +
                              " -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' " +
                              (directory.path() / "plot.svg").string();
  return std::system(command.c_str()) == 0;
}

// The dots' centers, in order.
std::vector<std::pair<double, double>> Dots(const std::string& svg) {
  std::vector<std::pair<double, double>> dots;
  const std::regex circle("<circle cx=\"([^\"]+)\" cy=\"([^\"]+)\"");
  for (std::sregex_iterator it(svg.begin(), svg.end(), circle), end; it != end; ++it) {
    dots.emplace_back(std::stod((*it)[1]), std::stod((*it)[2]));
  }
  return dots;
}

TEST(SvgPlot, PutsPointsWhereTheyBelong) {
  const SvgPlot plot{.title = "t",
                     .x_label = "x",
                     .y_label = "y",
                     .points = {{"a", 3, 10}, {"b", 4, 30}, {"c", 5, 20}}};
  const std::string svg = RenderSvg(plot);
  EXPECT_TRUE(IsXml(svg));
  const auto dots = Dots(svg);
  ASSERT_EQ(dots.size(), 3u);
  EXPECT_NEAR(dots[1].first - dots[0].first, dots[2].first - dots[1].first, 0.11) << "rounded";
  EXPECT_NEAR(dots[0].second - dots[2].second, dots[2].second - dots[1].second, 0.11);
  EXPECT_GT(dots[0].second, dots[1].second) << "upwards";
  EXPECT_EQ(svg, RenderSvg(plot));
}

TEST(SvgPlot, HasRoomForLongLabels) {
  SvgPlot plot{.title = "t", .x_label = "x", .y_label = "y", .points = {{"a", 3, 10}}};
  const auto width = [&plot] {
    const std::string svg = RenderSvg(plot);
    std::smatch found;
    EXPECT_TRUE(std::regex_search(svg, found, std::regex("<svg [^>]*width=\"([0-9.]+)\"")));
    return std::stod(found[1]);
  };
  const double narrow = width();
  plot.points[0].label = std::string(80, 'm');
  EXPECT_GT(width(), narrow + 40 * 6);
}

TEST(SvgPlot, LogarithmicAxesHaveAPlaceForZero) {
  const std::string svg = RenderSvg({.title = "t",
                                     .x_label = "x",
                                     .y_label = "y",
                                     .log_y = true,
                                     .points = {{"zero", 16, 0}, {"a", 3, 1e-3}, {"b", 4, 1e-1}}});
  EXPECT_TRUE(IsXml(svg));
  EXPECT_NE(svg.find(">zero = 0<"), std::string::npos);
  EXPECT_NE(svg.find(">1e-2<"), std::string::npos) << "ticks at powers of ten";
  const auto dots = Dots(svg);
  ASSERT_EQ(dots.size(), 3u);
  EXPECT_GT(dots[0].second, dots[1].second) << "on the lower edge";
}

TEST(SvgPlot, LeavesOutWhatIsNotFinite) {
  const SvgPlot finite{.title = "t", .x_label = "x", .y_label = "y", .points = {{"a", 3, 10}}};
  SvgPlot plot = finite;
  plot.points.push_back({"b", 4, std::numeric_limits<double>::infinity()});
  plot.points.push_back({"c", std::nan(""), 5});
  EXPECT_EQ(RenderSvg(plot), RenderSvg(finite));
}

TEST(SvgPlot, StaysXmlWhateverItIsGiven) {
  EXPECT_TRUE(IsXml(RenderSvg({.title = "<a> & \"b\"",
                               .x_label = "\x01",
                               .y_label = "]]>",
                               .points = {{"x,<y>=\"2\"&", 1, 1}, {"same", 1, 1}}})));
  EXPECT_TRUE(IsXml(RenderSvg({.title = "none", .x_label = "", .y_label = "", .points = {}})));
  EXPECT_TRUE(IsXml(RenderSvg({.title = "all zero",
                               .x_label = "",
                               .y_label = "",
                               .log_y = true,
                               .points = {{"a", 0, 0}}})));
}

}  // namespace
}  // namespace innerq

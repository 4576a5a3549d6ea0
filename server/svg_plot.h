// SvgPlot: a picture of measured points, as text.
#pragma once

#include <string>
#include <vector>

namespace innerq {

// A point with its name in the legend.
struct PlotPoint {
  std::string label;
  double x = 0;
  double y = 0;
};

struct SvgPlot {
  std::string title;
  std::string x_label;
  std::string y_label;
  bool log_y = false;  // points that are not above 0 then stand on the lower edge, marked "= 0"
  std::vector<PlotPoint> points;
};

// The plot as a stand-alone SVG document: axes with ticks at round values, a dot per point and a
// legend in the points' order. Points that are not finite are left out. Equal plots give equal
// bytes.
std::string RenderSvg(SvgPlot plot);

}  // namespace innerq

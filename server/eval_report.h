// EvalReport: what an evaluation or a benchmark found, as a table, JSON and a plot.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace innerq {

// A measured figure of every cache.
struct EvalColumn {
  enum class Format {
    kRatio,    // 12.345
    kPercent,  // 98.7 %
    kSmall,    // 0.00123
    kCount,    // 12.3
    kInteger,  // 12
    kMiB,      // 12.3, of bytes
  };

  std::string key;      // in JSON
  std::string heading;  // in the table
  Format format = Format::kRatio;
};

// One cache's figures.
struct EvalRow {
  std::string cache;
  double sealed_bits = 0;                          // per element of sealed pages, scales included
  double effective_bits = 0;                       // F16 windows included, over what was measured
  std::vector<std::optional<double>> values = {};  // one per column; none: does not apply
  std::string details = "{}";                      // JSON object: further keys of the row
};

struct EvalReport {
  std::string task;             // perplexity, kl, ..., bench
  std::string model;            // its alias
  std::string device;           // "cpu/amx"
  std::string scope;            // what was measured, in a line
  std::string settings = "{}";  // JSON object: the same for programs
  std::string details = "{}";   // JSON object: further keys of the report
  std::vector<EvalColumn> columns = {};
  std::vector<EvalRow> rows = {};
  size_t plot_column = 0;
  bool plot_log = false;
};

// The scope and a table, in Markdown, aligned.
std::string FormatTable(const EvalReport& report);
// {"task", "model", "device", "scope", "settings": {}, further keys of the report, "caches":
// [{"cache", "sealed_bits", "effective_bits", a number or null per column's key, further keys of
// the row}]}
std::string FormatJson(const EvalReport& report);
// The plot column against effective bits.
std::string FormatPlot(const EvalReport& report);

}  // namespace innerq

#include "server/low_bit_args.h"

#include <fmt/format.h>

namespace innerq {
namespace {

// What costs a model the least, see tests/eval/README.md.
LowBitScheme BestScheme(int bits) {
  if (bits == 4) return LowBitScheme::kApot;
  return bits == 8 ? LowBitScheme::kUniform : LowBitScheme::kPow2;
}

}  // namespace

std::string KnownLowBitBits() {
  std::string text;
  for (const LowBitScheme scheme :
       {LowBitScheme::kPow2, LowBitScheme::kApot, LowBitScheme::kUniform}) {
    text += fmt::format("{}{} for {}", text.empty() ? "" : "; ", LowBitSchemeBits(scheme),
                        LowBitSchemeName(scheme));
  }
  return text;
}

Result<LowBitSpec> SpecOf(const LowBitArgs& args) {
  LowBitSpec spec;  // valid; what a change makes invalid is the change's fault
  const auto scheme = args.scheme.empty() ? BestScheme(args.bits) : FindLowBitScheme(args.scheme);
  if (!scheme) {
    return InvalidArgument("--scheme: expected pow2, apot or uniform, found " + args.scheme);
  }
  spec.scheme = *scheme;
  spec.bits = args.bits;
  if (!spec.valid()) {
    const std::string known = args.scheme.empty()
                                  ? KnownLowBitBits()
                                  : fmt::format("{} for --scheme {}", LowBitSchemeBits(*scheme),
                                                LowBitSchemeName(*scheme));
    return InvalidArgument(fmt::format("--bits: expected {}, found {}", known, args.bits));
  }
  spec.group_size = args.group_size;
  if (!spec.valid()) {
    return InvalidArgument(
        fmt::format("--group-size: expected 32, 64 or 128, or 0 for all inputs of an output, "
                    "found {}",
                    args.group_size));
  }
  spec.activation_bits = args.activation_bits;
  if (!spec.valid()) {
    return InvalidArgument(
        fmt::format("--activation-bits: expected 3, 4, 8 or 16, found {}", args.activation_bits));
  }
  return spec;
}

Result<std::optional<LowBitSpec>> HeadSpecOf(const LowBitArgs& args) {
  if (args.head_bits == 0) return std::optional<LowBitSpec>();
  const LowBitSpec spec{
      .scheme = BestScheme(args.head_bits), .bits = args.head_bits, .group_size = args.group_size};
  if (!spec.valid()) {
    return InvalidArgument(
        fmt::format("--head-bits: expected 2, 3, 4 or 8, found {}", args.head_bits));
  }
  return std::optional(spec);
}

}  // namespace innerq

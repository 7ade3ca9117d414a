#include "rows.h"

#include <cmath>

namespace nybble {

namespace {

struct Named {
  const char* name;
  int number;
};
constexpr Named kActs[] = {{"", NYBBLE_ACT_IDENTITY},
                           {"gelu", NYBBLE_ACT_GELU},
                           {"gelu_tanh", NYBBLE_ACT_GELU_TANH},
                           {"quick_gelu", NYBBLE_ACT_QUICK_GELU},
                           {"silu", NYBBLE_ACT_SILU},
                           {"relu", NYBBLE_ACT_RELU},
                           {"tanh", NYBBLE_ACT_TANH}};
constexpr Named kNorms[] = {{"none", NYBBLE_NORM_NONE}, {"layer", NYBBLE_NORM_LAYER}, {"rms", NYBBLE_NORM_RMS}};

template <class Table>
int number_of(const char* argument, const Table& table, const std::string& name) {
  std::string known;
  for (const Named& row : table) {
    if (name == row.name) return row.number;
    known += std::string(known.empty() ? "\"" : ", \"") + row.name + "\"";
  }
  refuse(std::string(argument) + "=\"" + name + "\": must be one of " + known);
}

void check_vector(const char* name, const Vector& vector, int64_t elements) {
  if (!vector.span.address) return;
  if (vector.dtype == NYBBLE_S32) refuse(std::string(name) + ": must be float32, bfloat16 or float16");
  require(name, vector.span, elements, dtype_bytes(vector.dtype));
}

}  // namespace

NybbleScale Norm::scale() const {
  return {reinterpret_cast<const void*>(weight.span.address),
          reinterpret_cast<const void*>(bias.span.address),
          weight.dtype,
          bias.dtype,
          eps,
          weight_offset};
}

void check_norm(const Norm& norm, int64_t columns) {
  check_vector("weight", norm.weight, columns);
  check_vector("bias", norm.bias, columns);
  if (!(norm.eps >= 0 && std::isfinite(norm.eps))) refuse("eps: must be finite and not negative");
  if (!std::isfinite(norm.weight_offset)) refuse("weight_offset: must be finite");
  if (norm.kind != NYBBLE_NORM_LAYER && norm.bias.span.address) refuse("bias: only layer norms have one");
  if (norm.kind != NYBBLE_NORM_RMS && norm.weight_offset != 0) refuse("weight_offset: only RMS norms have one");
  if (norm.kind == NYBBLE_NORM_NONE && norm.weight.span.address) refuse("weight: a plain sum has none");
}

int act_of(const std::string& name) { return number_of("act", kActs, name); }

int norm_of(const std::string& name) { return number_of("kind", kNorms, name); }

NybbleNormArgs rows_of(NybbleNormArgs args, int64_t begin, int64_t end) {
  for (NybbleMatrix* matrix : {&args.x, &args.residual, &args.sum, &args.y})
    *matrix = part_of(*matrix, begin, 0, args.dtype);
  args.rows = end - begin;
  return args;
}

NybbleActivateArgs rows_of(NybbleActivateArgs args, int64_t begin, int64_t end) {
  for (NybbleMatrix* matrix : {&args.x, &args.other, &args.residual, &args.y})
    *matrix = part_of(*matrix, begin, 0, args.dtype);
  args.rows = end - begin;
  return args;
}

NybbleRotateArgs rows_of(NybbleRotateArgs args, int64_t begin, int64_t end) {
  args.x = part_of(args.x, begin, 0, args.dtype);
  args.y = part_of(args.y, begin, 0, args.dtype);
  args.row0 += begin;
  args.rows = end - begin;
  return args;
}

NybbleMixArgs rows_of(NybbleMixArgs args, int64_t begin, int64_t end) {
  args.from += begin * args.terms;
  args.weight += begin * args.terms;
  args.y = part_of(args.y, begin, 0, args.dtype);
  args.rows = end - begin;
  return args;
}

}  // namespace nybble

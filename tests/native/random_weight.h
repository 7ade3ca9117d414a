// Random dense weights for the comparison programs, and pairs of kernels that must agree on them.
#pragma once

#include "random_problem.h"

namespace {

struct Weight {
  WeightShape shape;
  Bytes qweight, scale, zero_point, minimum, order, book, levels, packed, plain;
  explicit Weight(const WeightShape& s)
      : shape(s),
        qweight(s.qweight_bytes()),
        scale(s.scale_bytes()),
        zero_point(s.zero_point_bytes()),
        minimum(s.minimum_bytes()),
        order(s.order_bytes()),
        book(s.book_bytes()),
        levels(s.levels_bytes()) {}
  Portable portable() {
    return {qweight.data(), scale.data(), zero_point.data(), minimum.data(), order.data(), book.data(), levels.data()};
  }
};

// The shape in the layout that the scalar kernels read.
inline WeightShape plain_shape(WeightShape shape) {
  shape.paired = false;
  return shape;
}

// A random packed weight of magnitude 1, also packed for the scalar kernels as `plain`. Throws if unpacking does not
// restore it.
Weight random_weight(const WeightShape& shape, Random& random, int threads) {
  Weight w(shape);
  // In some weights, most codes are small: then sums of products fit in fewer bits.
  const int small = shape.bits == 8 && random.integer(0, 1) ? 2 : 0;
  for (uint8_t& code : w.qweight) {
    const int64_t any = shape.bits == 8 ? random.integer(-128, 127) : random.integer(0, 255);
    code = static_cast<uint8_t>(random.integer(0, 63) ? any >> small : any);
    if (shape.bits == 3) code &= 0x77;
  }
  if (shape.bits != 8 && shape.k % 2)
    for (int64_t n = 1; n <= shape.n; n++) w.qweight[static_cast<size_t>(n * ((shape.k + 1) / 2) - 1)] &= 15;
  const NybbleDtype dtype = shape.scale_dtype();
  for (size_t i = 0; i < w.scale.size(); i += bytes_of(dtype))
    store(&w.scale[i], dtype,
          (1.5f + 0.5f * random.real()) / (shape.bits == 8 ? 127.0f
                                           : shape.levels  ? 256.0f
                                                           : 8.0f));
  for (uint8_t& level : w.levels) level = static_cast<uint8_t>(random.integer(0, 63));
  for (uint8_t& zero : w.zero_point)
    zero = static_cast<uint8_t>(random.integer(0, shape.bits == 8 ? 255 : (1 << shape.bits) - 1));
  for (int32_t k = 0; shape.ordered && k < shape.k; k++) {  // each input changes places with one before it
    const size_t other = static_cast<size_t>(random.integer(0, k));
    std::memcpy(&w.order[static_cast<size_t>(k) * 4], &w.order[other * 4], 4);
    std::memcpy(&w.order[other * 4], &k, 4);
  }
  for (size_t i = 0; i < w.minimum.size(); i += bytes_of(dtype))
    store(&w.minimum[i], dtype, (shape.levels ? 0.02f : 0.5f) * random.real());
  for (size_t i = 0; i < w.book.size(); i += 4)  // values that bfloat16 has
    store(&w.book[i], NYBBLE_F32, static_cast<float>(random.integer(-64, 64)) / 8);
  w.packed.resize(sections_of(shape).total);
  pack(shape, w.portable(), w.packed.data(), threads);
  Weight back(shape);
  unpack(shape, w.packed.data(), back.portable(), threads);
  if (back.qweight != w.qweight || back.scale != w.scale || back.zero_point != w.zero_point ||
      back.minimum != w.minimum || back.order != w.order || back.book != w.book || back.levels != w.levels)
    throw std::runtime_error("unpack is not the inverse of pack");
  w.plain.resize(sections_of(plain_shape(shape)).total);
  pack(plain_shape(shape), w.portable(), w.plain.data(), threads);
  return w;
}

// A random shape of (n, k) for the kernel.
inline WeightShape random_shape(const KernelEntry& kernel, int64_t n, int64_t k, Random& random) {
  const int64_t group_sizes[] = {0, 16, 32, 64, 128};
  WeightShape shape{kernel.weight_bits(), n, k};
  shape.grouped = is_grouped(kernel);
  shape.paired = is_paired(kernel);
  if (shape.by_group()) {
    const bool whole = is_grouped(kernel) && !std::strcmp(kernel.target, "amx");  // it multiplies whole groups
    shape.group_size = random.pick(group_sizes);
    if (shape.bits == 3 || (whole && !shape.group_size)) shape.group_size = 32 << random.integer(0, 2);
    shape.book = kernel.reads_book();
    shape.symmetric = shape.book || random.integer(0, 1);
    if (kernel.reads_levels()) {
      shape.group_size = 32;
      shape.symmetric = shape.minimum = shape.levels = true;
      shape.group_scale = NYBBLE_F16;
    }
  }
  return shape;
}

// A call with the kernel, or with the scalar one of its scheme, that lacks its weight, x and y.
inline LinearCall call_with(const KernelEntry& kernel, bool scalar, int steps) {
  LinearCall call{};
  const std::string weight = "w" + std::to_string(kernel.weight_bits()) +
                             (kernel.reads_book()     ? "nf"
                              : kernel.reads_levels() ? "k"
                                                      : "");
  const std::string scheme = weight + (kernel.int_activations() ? "a8" : "a16");
  call.kernel = scalar ? &find_kernel(scheme + "_scalar" + (is_grouped(kernel) ? "_groups" : "")) : &kernel;
  call.prepare = prepare_for(*call.kernel);
  call.act_steps = steps;
  return call;
}

// Makes the call take a weight, in the layout of its kernel or of the scalar ones.
inline void take_weight(LinearCall& call, Weight& weight, bool scalar) {
  call.shape = scalar ? plain_shape(weight.shape) : weight.shape;
  call.packed = span(scalar ? weight.plain : weight.packed);
}

// Steps of the codes of activations that the kernel can take.
inline int random_steps(const KernelEntry& kernel, Random& random) {
  return kernel.panel == NYBBLE_PANEL_U7 || random.integer(0, 3) == 0 ? 127 : 255;
}

inline NybbleDtype random_dtype(const KernelEntry& kernel, Random& random) {
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  return kernel.bf16_activations() ? NYBBLE_BF16 : random.pick(dtypes);
}

inline bool is_dense(const KernelEntry& kernel) { return std::strchr(kernel.layout, 'n') == kernel.layout; }
inline bool is_dense_linear(const KernelEntry& kernel) { return kernel.linear && is_dense(kernel); }

}  // namespace

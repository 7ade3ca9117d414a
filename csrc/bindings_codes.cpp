#include "bindings.h"
#include "codes.h"
#include "memory.h"

namespace {

// Throws std::invalid_argument unless the number is in [least, most].
void check(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": must be in [" +
                                std::to_string(least) + ", " + std::to_string(most) + "]");
}

constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // of each size: products of two fit

template <class Item>
Item* at(const char* name, const Pair& pair, int64_t count) {
  require(name, span(pair), count, sizeof(Item));
  return reinterpret_cast<Item*>(pair.first);
}

}  // namespace

void bind_codes(py::module_& m) {
  m.def("unpack_bits",
        [](const Pair& from, int64_t rows, int64_t row_bytes, int bits, int64_t count, const Pair& to, int threads) {
          check("bits", bits, 1, 7);
          check("rows", rows, 1, kMost);
          check("row_bytes", row_bytes, 1, kMost);
          check("count", count, 1, row_bytes * 8 / bits);
          const auto* packed = at<const uint8_t>("from", from, rows * row_bytes);
          auto* codes = at<uint8_t>("to", to, rows * count);
          py::gil_scoped_release release;
          unpack_bits(packed, rows, row_bytes, bits, count, codes, threads);
        });
  m.def("select_nibbles", [](const Pair& from, int64_t rows, int64_t row_bytes, const Pair& order, int64_t count,
                             const Pair& to, int threads) {
    check("rows", rows, 1, kMost);
    check("row_bytes", row_bytes, 1, kMost);
    check("count", count, 1, kMost);
    const auto* packed = at<const uint8_t>("from", from, rows * row_bytes);
    const auto* places = at<const int32_t>("order", order, count);
    auto* selected = at<uint8_t>("to", to, rows * ((count + 1) / 2));
    py::gil_scoped_release release;
    select_nibbles(packed, rows, row_bytes, places, count, selected, threads);
  });
  m.def("transpose_nibbles",
        [](const Pair& from, int64_t k, int64_t words, const Pair& places, const Pair& to, int threads) {
          check("k", k, 1, kMost);
          check("words", words, 1, kMost / 8);
          const auto* packed = at<const uint32_t>("from", from, k * words);
          const auto* columns = at<const int32_t>("places", places, 8);
          auto* rows = at<uint8_t>("to", to, words * 8 * ((k + 1) / 2));
          py::gil_scoped_release release;
          transpose_nibbles(packed, k, words, columns, rows, threads);
        });
}

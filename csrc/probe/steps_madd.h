// Multiply steps without VNNI, for vectors of any width. Both instructions are one asm statement, as in the kernels.
#pragma once

#include "loops.h"

namespace {

// Lanes::Vector: the type of the registers.
template <class Lanes>
struct Madd {
  using Vector = typename Lanes::Vector;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
};

// Exact int8 codes, widened to 16 bits before: vpmaddwd, then vpaddd. Two products per 4 bytes.
template <class Lanes>
struct Int8 : Madd<Lanes> {
  using V = typename Lanes::Vector;
  static constexpr uint64_t kProducts = sizeof(V) / 2;
  static void step(V& acc, V a, V b) {
    V product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
  }
};

// Unsigned 7-bit by signed 8-bit codes: two vpmaddubsw, summed by vpaddw where the sums of four products fit 16 bits,
// then vpmaddwd by ones and vpaddd. Eight products per 4 bytes. b stands in for the ones, which saves a register and
// costs the same.
template <class Lanes>
struct Int7 : Madd<Lanes> {
  using V = typename Lanes::Vector;
  static constexpr uint64_t kProducts = 2 * sizeof(V);
  static void step(V& acc, V a, V b) {
    V product, second;
    __asm__(
        "vpmaddubsw %4, %3, %1\n\tvpmaddubsw %3, %4, %2\n\tvpaddw %2, %1, %1\n\t"
        "vpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
        : "+v"(acc), "=&v"(product), "=&v"(second)
        : "v"(a), "v"(b));
  }
};

// 4-bit codes: vpmaddubsw, then sums of 16 bits by vpaddw. Two products per 2 bytes.
template <class Lanes>
struct Int4 : Madd<Lanes> {
  using V = typename Lanes::Vector;
  static constexpr uint64_t kProducts = sizeof(V);
  static void step(V& acc, V a, V b) {
    V product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
  }
};

// The operations of `rounds` rounds: two per product.
template <class Step, int kCount>
inline uint64_t operations(uint64_t rounds) {
  return multiply<Step, kCount>(rounds) * Step::kProducts * 2;
}

}  // namespace

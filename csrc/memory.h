// Memory that the drivers are given, and memory that they take for a while.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "abi.h"

namespace nybble {

// An address and the number of bytes there.
struct Span {
  uintptr_t address = 0;
  size_t bytes = 0;
};

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// dtype: a NybbleDtype.
inline int64_t dtype_bytes(int dtype) {
  return dtype == NYBBLE_F32 || dtype == NYBBLE_S32 ? 4 : dtype == NYBBLE_S8 ? 1 : 2;
}

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Throws unless the span holds `count` items of `size` bytes; count must be below 2^62.
inline void require(const char* name, const Span& span, int64_t count, int64_t size) {
  int64_t bytes;
  if (count < 0 || __builtin_mul_overflow(count, size, &bytes)) refuse(std::string(name) + ": size out of range");
  if (bytes > 0 && (!span.address || span.bytes < static_cast<size_t>(bytes)))
    refuse(std::string(name) + ": has " + std::to_string(span.bytes) + " bytes, needs " + std::to_string(bytes));
}

// A buffer that grows and never shrinks; one per calling thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  uint8_t* reserve(size_t bytes) {
    uint8_t* data = try_reserve(bytes);
    if (!data) throw std::bad_alloc();
    return data;
  }

  // Null if the allocation fails.
  uint8_t* try_reserve(size_t bytes) {
    bytes = bytes / 64 * 64 + 64;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
      if (!data_) return nullptr;
      bytes_ = bytes;
    }
    return data_;
  }

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nybble

// Memory for `new` that ends at a page that must not be touched, so that a program stops at an access beyond a buffer.
// For emulated CPUs, on which the address sanitizer does not run.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace {

// Bytes of the mapping of a block, kept in its first page.
struct Mapping {
  std::size_t bytes;
};

std::size_t page() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Of blocks that name none: counters in the texts of exceptions, which share a block with them, must lie at multiples
// of it.
constexpr std::size_t kAlignment = 4;

// A page with the Mapping, the block at the end of its pages, and a page that cannot be read or written.
void* allocate(std::size_t asked, std::size_t alignment = kAlignment) {
  const std::size_t size = (asked + alignment - 1) / alignment * alignment;
  const std::size_t whole = (size + page() - 1) / page() * page(), bytes = whole + 2 * page();
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  uint8_t* first = static_cast<uint8_t*>(at);
  if (mprotect(first + page() + whole, page(), PROT_NONE) != 0) throw std::bad_alloc();
  static_cast<Mapping*>(at)->bytes = bytes;
  return first + page() + whole - size;
}

void release(void* block) {
  if (!block) return;
  // The block begins in the first page after the Mapping, or at the guard if it is empty.
  const uintptr_t place = reinterpret_cast<uintptr_t>(block) / page() * page();
  void* first = reinterpret_cast<void*>(place - page());
  munmap(first, static_cast<Mapping*>(first)->bytes);
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* block) noexcept { release(block); }
void operator delete[](void* block) noexcept { release(block); }
void operator delete(void* block, std::size_t) noexcept { release(block); }
void operator delete[](void* block, std::size_t) noexcept { release(block); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* block, std::align_val_t) noexcept { release(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { release(block); }

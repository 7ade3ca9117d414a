// Compares the emulated tiles with sums written out, and breaks each rule of the hardware.
//   emulate_amx            compares; "ok"
//   emulate_amx BREACH     must abort
#define NYBBLE_EMULATE_AMX
#define NYBBLE_EMULATE
#include "../../csrc/cpu/tile_amx.h"

#include <functional>
#include <map>
#include <random>
#include <string>

namespace {

std::mt19937 engine(7);

struct Operands {
  int8_t a[kMostRows][64], b[2][16][64];
  Operands() {
    for (auto& row : a)
      for (int8_t& x : row) x = static_cast<int8_t>(engine());
    for (auto& tile : b)
      for (auto& row : tile)
        for (int8_t& x : row) x = static_cast<int8_t>(engine());
    a[0][0] = b[0][0][0] = -128;
  }
};

void require(bool holds, const char* what) {
  if (holds) return;
  printf("wrong: %s\n", what);
  exit(1);
}

// The sums of unsigned bytes, which keep their highest bit, and signed ones.
void unsigned_codes_agree() {
  const Operands at;
  int32_t sums[16][16];
  TileConfig config;
  for (int tile : {0, 4, 6}) config.set(tile, 16, 64);
  tile_configure(config);
  tile_zero<0>();
  tile_load<4>(at.a, 64);
  tile_load<6>(at.b[0], 64);
  for (int twice = 0; twice < 2; twice++) emulated::tdpbusd(0, 4, 6);
  tile_store<0>(sums, 64);
  tile_release();
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) {
      int32_t sum = 0;
      for (int k = 0; k < 64; k++) sum += static_cast<uint8_t>(at.a[r][k]) * at.b[0][k / 4][c * 4 + k % 4];
      require(sums[r][c] == 2 * sum, "sums of unsigned codes");
    }
}

// A kernel that runs between another library's use of tiles leaves it its configuration.
void configuration_is_kept() {
  TileConfig theirs, after;
  theirs.set(0, 3, 12);
  theirs.set(5, 16, 64);
  tile_configure(theirs);
  {
    TileScope tiles;
    tiles.set(7, 64);
    tile_zero<0>();
  }
  tile_read_config(after);
  require(memcmp(&theirs, &after, sizeof after) == 0, "the configuration from before the kernel");
  tile_release();
  {
    TileScope none;
  }
  tile_read_config(after);
  require(after.palette == 0, "no configuration where there was none");
}

// The sums of `rows` rows and 32 columns over steps of `bytes` bytes; twice, so that they accumulate.
void codes_agree(int rows, int bytes) {
  const Operands at;
  TileSums<CodesOp> sums;
  memset(&sums, 0x55, sizeof sums);
  {
    TileScope tiles;
    tiles.set(rows, bytes);
    for (int twice = 0; twice < 2; twice++) {
      TileOperands o{reinterpret_cast<const uint8_t*>(at.a),
                     {reinterpret_cast<const uint8_t*>(at.b[0]), reinterpret_cast<const uint8_t*>(at.b[1])},
                     0,
                     0};
      if (rows > kTileRows) {
        zero_tiles<2, 2>();
        multiply_tiles<CodesOp, 2, 2>(o, 2);
        store_tiles<CodesOp, 2, 2>(sums);
      } else {
        zero_tiles<1, 2>();
        multiply_tiles<CodesOp, 1, 2>(o, 2);
        store_tiles<CodesOp, 1, 2>(sums);
      }
    }
    require(nybble_emulated_tiles.configured, "configured meanwhile");
  }
  require(!nybble_emulated_tiles.configured, "released at the end");
  for (int r = 0; r < kMostRows; r++)
    for (int c = 0; c < 32; c++) {
      int32_t sum = 0;
      for (int k = 0; k < bytes; k++) sum += at.a[r][k] * at.b[c / 16][k / 4][c % 16 * 4 + k % 4];
      require(sums.at[r][c] == (r < rows ? 2 * sum : 0x55555555), "sums of codes");
    }
}

// Each sum of bfloat16 products is exact here.
void bf16_agrees() {
  uint16_t a[kMostRows][32], b[2][16][32];
  const auto half = [](float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  for (auto& row : a)
    for (uint16_t& x : row) x = half(static_cast<float>(static_cast<int>(engine() % 15) - 7));
  for (auto& tile : b)
    for (auto& row : tile)
      for (uint16_t& x : row) x = half(static_cast<float>(static_cast<int>(engine() % 255) - 127));
  TileSums<Bf16Op> sums;
  TileScope tiles;
  tiles.set(kMostRows, 64);
  zero_tiles<2, 2>();
  TileOperands o{reinterpret_cast<const uint8_t*>(a),
                 {reinterpret_cast<const uint8_t*>(b[0]), reinterpret_cast<const uint8_t*>(b[1])},
                 0,
                 0};
  multiply_tiles<Bf16Op, 2, 2>(o, 1);
  store_tiles<Bf16Op, 2, 2>(sums);
  const auto value = [](uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float of;
    memcpy(&of, &wide, 4);
    return of;
  };
  for (int r = 0; r < kMostRows; r++)
    for (int c = 0; c < 32; c++) {
      float sum = 0;
      for (int k = 0; k < 32; k++) sum += value(a[r][k]) * value(b[c / 16][k / 2][c % 16 * 2 + k % 2]);
      require(sums.at[r][c] == sum, "sums of bfloat16 products");
    }
}

// Sums that are loaded are those that were stored, tile by tile; no steps change neither sums nor operands. Rows and
// columns that the register tile does not have are left alone.
template <int T, int V>
void sums_pass_through_memory(int rows) {
  TileSums<CodesOp> before, after;
  for (auto& row : before.at)
    for (int32_t& sum : row) sum = static_cast<int32_t>(engine());
  memset(&after, 0x55, sizeof after);
  const uint8_t nothing[1] = {};
  TileScope tiles;
  tiles.set(rows, 64);
  load_tiles<CodesOp, T, V>(before);
  TileOperands o{nothing, {nothing, nothing}, 64, 64};
  multiply_tiles<CodesOp, T, V>(o, 0);
  require(o.x == nothing && o.w[0] == nothing && o.w[1] == nothing, "no steps leave the operands");
  store_tiles<CodesOp, T, V>(after);
  for (int r = 0; r < kMostRows; r++)
    for (int c = 0; c < 32; c++) {
      const bool inside = r < rows && c < 16 * V;
      require(after.at[r][c] == (inside ? before.at[r][c] : 0x55555555), "sums that were loaded");
    }
}

TileConfig whole() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.set(t, 16, 64);
  return config;
}

void configure(const std::function<void(TileConfig&)>& change) {
  TileConfig config = whole();
  change(config);
  tile_configure(config);
}

const std::map<std::string, std::function<void()>> kBreaches = {
    {"unconfigured", [] { tile_zero<0>(); }},
    {"released",
     [] {
       tile_configure(whole());
       tile_release();
       tile_zero<0>();
     }},
    {"left_out",
     [] {
       configure([](TileConfig& c) { c.set(5, 0, 0); });
       tile_zero<5>();
     }},
    {"palette", [] { configure([](TileConfig& c) { c.palette = 2; }); }},
    {"reserved", [] { configure([](TileConfig& c) { c.reserved[3] = 1; }); }},
    {"rows", [] { configure([](TileConfig& c) { c.set(1, 17, 64); }); }},
    {"bytes", [] { configure([](TileConfig& c) { c.set(1, 16, 68); }); }},
    {"half_empty", [] { configure([](TileConfig& c) { c.colsb[2] = 0; }); }},
    {"ninth_tile", [] { configure([](TileConfig& c) { c.set(8, 16, 64); }); }},
    {"operands",
     [] {
       configure([](TileConfig& c) { c.set(4, 16, 32); });
       tile_dot_s8<0, 4, 6>();
     }},
    {"sums",
     [] {
       configure([](TileConfig& c) { c.set(0, 8, 64); });
       tile_dot_bf16<0, 4, 6>();
     }},
    {"same_tile",
     [] {
       tile_configure(whole());
       tile_dot_s8<0, 4, 4>();
     }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    kBreaches.at(argv[1])();
    return 0;
  }
  for (const int rows : {1, 5, 16, 17, 31, 32})
    for (const int bytes : {4, 32, 36, 64}) codes_agree(rows, bytes);
  unsigned_codes_agree();
  configuration_is_kept();
  bf16_agrees();
  for (const int rows : {1, 16}) {
    sums_pass_through_memory<1, 1>(rows);
    sums_pass_through_memory<1, 2>(rows);
  }
  for (const int rows : {17, 32}) {
    sums_pass_through_memory<2, 1>(rows);
    sums_pass_through_memory<2, 2>(rows);
  }
  puts("ok");
  for (const auto& breach : kBreaches) puts(breach.first.c_str());
}

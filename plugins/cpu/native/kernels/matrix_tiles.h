// Matrix tiles: registers of 16 rows of 64 bytes and their products, as instructions or emulated.
//
// Emulation defines, operation by operation and rounding by rounding, what the instructions do (Intel's
// instruction set reference, TDPBF16PS and TDPBSSD), so that what is written over tiles is tested on any processor.
// A product always uses the same eight tiles: four of sums [rows, 16], two of inputs and two of weights.
#ifndef MIDSPAN_CPU_MATRIX_TILES_H
#define MIDSPAN_CPU_MATRIX_TILES_H

#include <string.h>

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

/// Numbers of the tiles: sums of upper and lower input rows with left and right outputs.
enum Tile { UPPER_LEFT, UPPER_RIGHT, LOWER_LEFT, LOWER_RIGHT, UPPER_INPUTS, LOWER_INPUTS, LEFT_WEIGHTS, RIGHT_WEIGHTS };

/// How many rows the tiles of upper and lower input rows have; lower may be 0.
struct TileShape {
  int upper;
  int lower;
  bool operator==(const TileShape& other) const { return upper == other.upper && lower == other.lower; }
};

struct TileConfiguration {
  uint8_t palette = 1;
  uint8_t reserved[15] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfiguration(TileShape shape) {
    const int heights[8] = {shape.upper, shape.upper, shape.lower, shape.lower,
                            shape.upper, shape.lower, kTileRows,   kTileRows};
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = static_cast<uint8_t>(heights[tile]);
      row_bytes[tile] = heights[tile] > 0 ? kTileBytes : 0;
    }
  }
};

#if defined(MIDSPAN_EMULATED_TILES)

/// The tiles of one thread of work.
class Tiles {
 public:
  void configure(TileShape shape) {
    memset(data_, 0, sizeof(data_));
    configuration_ = TileConfiguration(shape);
  }
  void release() {}

  template <int tile>
  void zero() {
    memset(data_[tile], 0, sizeof(data_[tile]));
  }
  template <int tile>
  void load(const void* from, int64_t row_bytes) {
    for (int row = 0; row < configuration_.rows[tile]; ++row) {
      memcpy(data_[tile][row], static_cast<const char*>(from) + row * row_bytes, kTileBytes);
    }
  }
  template <int tile>
  void store(void* to, int64_t row_bytes) {
    for (int row = 0; row < configuration_.rows[tile]; ++row) {
      memcpy(static_cast<char*>(to) + row * row_bytes, data_[tile][row], kTileBytes);
    }
  }
  /// sums += inputs * weights of bfloat16: even and odd columns in two chains of multiply-adds, then their sum.
  template <int sums, int inputs, int weights>
  void multiply(float) {
    for (int row = 0; row < configuration_.rows[inputs]; ++row) {
      for (int column = 0; column < 16; ++column) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < 16; ++k) {
          even = flushed(__builtin_fmaf(number(data_[inputs][row], 2 * k), number(data_[weights][k], 2 * column), even));
          odd = flushed(
              __builtin_fmaf(number(data_[inputs][row], 2 * k + 1), number(data_[weights][k], 2 * column + 1), odd));
        }
        float* sum = reinterpret_cast<float*>(data_[sums][row]) + column;
        *sum = flushed(flushed(*sum) + flushed(even + odd));
      }
    }
  }
  /// sums += inputs * weights of signed bytes, exact.
  template <int sums, int inputs, int weights>
  void multiply(int32_t) {
    for (int row = 0; row < configuration_.rows[inputs]; ++row) {
      const int8_t* x = reinterpret_cast<const int8_t*>(data_[inputs][row]);
      int32_t* sum = reinterpret_cast<int32_t*>(data_[sums][row]);
      for (int column = 0; column < 16; ++column) {
        for (int k = 0; k < 64; ++k) {
          sum[column] += int32_t{x[k]} * reinterpret_cast<const int8_t*>(data_[weights][k / 4])[column * 4 + k % 4];
        }
      }
    }
  }

 private:
  /// Subnormal numbers count as zero.
  static float flushed(float value) {
    return __builtin_fabsf(value) < 0x1p-126f ? __builtin_copysignf(0.0f, value) : value;
  }
  static float number(const uint8_t* row, int index) {
    uint16_t bits;
    memcpy(&bits, row + 2 * index, 2);
    return flushed(bits_as<float>(static_cast<uint32_t>(bits) << 16));
  }

  TileConfiguration configuration_{{0, 0}};
  alignas(64) uint8_t data_[8][kTileRows][kTileBytes];
};

#elif defined(__AMX_TILE__)

class Tiles {
 public:
  void configure(TileShape shape) {
    const TileConfiguration configuration(shape);
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  void release() { asm volatile("tilerelease"); }

  template <int tile>
  MIDSPAN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  MIDSPAN_INLINE void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int tile>
  MIDSPAN_INLINE void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
  }
  template <int sums, int inputs, int weights>
  MIDSPAN_INLINE void multiply(float) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(inputs), "i"(weights));
  }
  template <int sums, int inputs, int weights>
  MIDSPAN_INLINE void multiply(int32_t) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(inputs), "i"(weights));
  }
};

#endif

#if defined(MIDSPAN_EMULATED_TILES) || defined(__AMX_TILE__)
#define MIDSPAN_HAS_TILES 1

/// sums [rows, 32] = x [rows, pieces * 64 bytes] * a panel of 32 outputs, [pieces][16][2][64 bytes]; at most 32 rows.
/// The configuration fits the number of rows.
template <class Sum>
MIDSPAN_INLINE void multiply_tiles(Tiles& tiles, TileShape shape, const uint8_t* x, int64_t x_row_bytes,
                                   const uint8_t* panel, int64_t pieces, Sum* sums) {
  constexpr int64_t kPieceBytes = 2 * kTileRows * kTileBytes, kSumsRowBytes = 32 * int64_t{sizeof(Sum)};
  constexpr int64_t kAhead = 2 * kPieceBytes;
  const uint8_t* lower = x + shape.upper * x_row_bytes;
  tiles.zero<UPPER_LEFT>();
  tiles.zero<UPPER_RIGHT>();
  if (shape.lower > 0) {
    tiles.zero<LOWER_LEFT>();
    tiles.zero<LOWER_RIGHT>();
  }
  for (int64_t piece = 0; piece < pieces; ++piece, panel += kPieceBytes) {
    for (int64_t line = 0; line < kPieceBytes; line += 64) __builtin_prefetch(panel + kAhead + line);
    tiles.load<LEFT_WEIGHTS>(panel, 2 * kTileBytes);
    tiles.load<RIGHT_WEIGHTS>(panel + kTileBytes, 2 * kTileBytes);
    tiles.load<UPPER_INPUTS>(x + piece * kTileBytes, x_row_bytes);
    tiles.multiply<UPPER_LEFT, UPPER_INPUTS, LEFT_WEIGHTS>(Sum{});
    tiles.multiply<UPPER_RIGHT, UPPER_INPUTS, RIGHT_WEIGHTS>(Sum{});
    if (shape.lower > 0) {
      tiles.load<LOWER_INPUTS>(lower + piece * kTileBytes, x_row_bytes);
      tiles.multiply<LOWER_LEFT, LOWER_INPUTS, LEFT_WEIGHTS>(Sum{});
      tiles.multiply<LOWER_RIGHT, LOWER_INPUTS, RIGHT_WEIGHTS>(Sum{});
    }
  }
  tiles.store<UPPER_LEFT>(sums, kSumsRowBytes);
  tiles.store<UPPER_RIGHT>(sums + 16, kSumsRowBytes);
  if (shape.lower > 0) {
    Sum* below = sums + shape.upper * 32;
    tiles.store<LOWER_LEFT>(below, kSumsRowBytes);
    tiles.store<LOWER_RIGHT>(below + 16, kSumsRowBytes);
  }
}

/// body(first row, number of rows, shape) for rows cut into pieces of up to 32, tiles configured for each.
template <class Body>
MIDSPAN_INLINE void for_tile_rows(Tiles& tiles, int64_t begin, int64_t end, Body body) {
  TileShape configured = {0, 0};
  for (int64_t row = begin; row < end; row += 2 * kTileRows) {
    const int count = static_cast<int>(end - row < 2 * kTileRows ? end - row : 2 * kTileRows);
    const int upper = count < kTileRows ? count : kTileRows;
    const TileShape shape = {upper, count - upper};
    if (!(shape == configured)) {
      tiles.configure(shape);
      configured = shape;
    }
    body(row, count, shape);
  }
  tiles.release();
}
#endif

}  // namespace midspan::MIDSPAN_ISA

#endif

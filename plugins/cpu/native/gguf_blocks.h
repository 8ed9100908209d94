// Blocks of GGUF files, read 32 columns at a time: integers and the numbers that belong to them.
//
// Source of the layouts: the GGUF specification. Everything is static: this is compiled for several processors.
#ifndef MIDSPAN_CPU_GGUF_BLOCKS_H
#define MIDSPAN_CPU_GGUF_BLOCKS_H

#include <stdint.h>
#include <string.h>

#include "midspan_cpu.h"

namespace midspan {
namespace {

struct GgufLayout {
  int64_t columns;  // of a block
  int64_t bytes;    // of a block
};

/// The layout of a format; no columns when it is none of GGUF's.
inline __attribute__((always_inline)) GgufLayout gguf_layout(int32_t format) {
  switch (format) {
    case MIDSPAN_CPU_GGUF_Q4_0:
      return {32, 18};
    case MIDSPAN_CPU_GGUF_Q4_1:
      return {32, 20};
    case MIDSPAN_CPU_GGUF_Q8_0:
      return {32, 34};
    case MIDSPAN_CPU_GGUF_Q5_0:
      return {32, 22};
    case MIDSPAN_CPU_GGUF_Q5_1:
      return {32, 24};
    case MIDSPAN_CPU_GGUF_Q4_K:
      return {256, 144};
    case MIDSPAN_CPU_GGUF_Q5_K:
      return {256, 176};
    case MIDSPAN_CPU_GGUF_Q6_K:
      return {256, 210};
    default:
      return {0, 0};
  }
}

/// 32 columns of a row: w = d * scale * (q - zero) + m, with m or -dmin * minimum.
struct GgufRun {
  int8_t quants[32];
  uint16_t d;         // fp16
  uint16_t m;         // fp16: m or dmin
  uint8_t scales[2];  // of the first and last 16 columns; for Q6_K signed; without meaning for blocks of 32
  uint8_t minimum;
};

inline __attribute__((always_inline)) uint16_t gguf_half(const uint8_t* at) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  return bits;
}

/// Low halves of 16 or more bytes, then high halves; `high` holds the fifth bits, bit `index` for column index.
inline __attribute__((always_inline)) void gguf_nibbles(const uint8_t* packed, GgufRun& to) {
  for (int index = 0; index < 16; ++index) {
    to.quants[index] = static_cast<int8_t>(packed[index] & 15);
    to.quants[16 + index] = static_cast<int8_t>(packed[index] >> 4);
  }
}

/// The eight scales and minimums of six bits that stand in twelve bytes, see the specification.
inline __attribute__((always_inline)) void gguf_scales(const uint8_t* packed, int64_t run, GgufRun& to) {
  uint8_t scale, minimum;
  if (run < 4) {
    scale = packed[run] & 63;
    minimum = packed[4 + run] & 63;
  } else {
    scale = static_cast<uint8_t>((packed[4 + run] & 15) | packed[run - 4] >> 6 << 4);
    minimum = static_cast<uint8_t>(packed[4 + run] >> 4 | packed[run] >> 6 << 4);
  }
  to.scales[0] = to.scales[1] = scale;
  to.minimum = minimum;
}

/// Columns 32 * run and on of a block.
inline __attribute__((always_inline)) void read_gguf_run(int32_t format, const uint8_t* block, int64_t run,
                                                         GgufRun& to) {
  to.d = gguf_half(block);
  to.m = 0;
  switch (format) {
    case MIDSPAN_CPU_GGUF_Q4_0:
      return gguf_nibbles(block + 2, to);
    case MIDSPAN_CPU_GGUF_Q4_1:
      to.m = gguf_half(block + 2);
      return gguf_nibbles(block + 4, to);
    case MIDSPAN_CPU_GGUF_Q8_0:
      memcpy(to.quants, block + 2, 32);
      return;
    case MIDSPAN_CPU_GGUF_Q5_0:
    case MIDSPAN_CPU_GGUF_Q5_1: {
      const bool has_minimum = format == MIDSPAN_CPU_GGUF_Q5_1;
      const uint8_t* bits = block + (has_minimum ? 4 : 2);
      if (has_minimum) to.m = gguf_half(block + 2);
      gguf_nibbles(bits + 4, to);
      for (int index = 0; index < 32; ++index) {
        const int high = bits[index / 8] >> (index % 8) & 1;
        to.quants[index] = static_cast<int8_t>(to.quants[index] + 16 * high - (has_minimum ? 0 : 16));
      }
      return;
    }
    case MIDSPAN_CPU_GGUF_Q4_K:
    case MIDSPAN_CPU_GGUF_Q5_K: {
      to.m = gguf_half(block + 2);
      gguf_scales(block + 4, run, to);
      const bool five = format == MIDSPAN_CPU_GGUF_Q5_K;
      const uint8_t* packed = block + (five ? 48 : 16) + run / 2 * 32;
      for (int index = 0; index < 32; ++index) {
        const int low = run % 2 == 0 ? packed[index] & 15 : packed[index] >> 4;
        const int high = five ? block[16 + index] >> run & 1 : 0;
        to.quants[index] = static_cast<int8_t>(low + 16 * high);
      }
      return;
    }
    case MIDSPAN_CPU_GGUF_Q6_K: {
      const int64_t half = run / 4, quarter = run % 4;  // 128 columns, and 32 of them
      const uint8_t* low = block + half * 64 + quarter % 2 * 32;
      const uint8_t* high = block + 128 + half * 32;
      for (int index = 0; index < 32; ++index) {
        const int nibble = quarter < 2 ? low[index] & 15 : low[index] >> 4;
        to.quants[index] = static_cast<int8_t>((nibble | (high[index] >> (2 * quarter) & 3) << 4) - 32);
      }
      memcpy(to.scales, block + 192 + 2 * run, 2);
      to.d = gguf_half(block + 208);
      return;
    }
    default:
      return;
  }
}

}  // namespace
}  // namespace midspan

#endif

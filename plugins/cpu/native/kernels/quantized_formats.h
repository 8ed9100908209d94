// How small integers and their scales lie in packed panels of 16 outputs; quantized_linear.cpp says where.
//
// Numbers of a group or block are arrays of 16, one entry for each output. packing.cpp writes what is read here.
#ifndef MIDSPAN_CPU_QUANTIZED_FORMATS_H
#define MIDSPAN_CPU_QUANTIZED_FORMATS_H

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

constexpr int kQuantizedPanel = 16;

/// 4-bit quants, without sign.
struct Nibbles {
  static constexpr int tiles = 4;  // in 32 columns
  static constexpr int pairs = 4;  // of k, in a tile

  template <int pair>
  MIDSPAN_INLINE Shorts unpack(UnsignedShorts words) {
    const UnsignedShorts shifted = words >> (4 * pair);
    return bits_as<Shorts>(pair == 3 ? shifted : shifted & 15);
  }
};

/// 8-bit quants, with sign.
struct Bytes {
  static constexpr int tiles = 8;
  static constexpr int pairs = 2;

  template <int pair>
  MIDSPAN_INLINE Shorts unpack(UnsignedShorts words) {
    const Shorts high_byte = bits_as<Shorts>(pair == 0 ? words << 8 : words);
    return high_byte >> 8;
  }
};

/// What turns quants into weights: w = d * (q - zero) + m.
struct Numbers {
  Floats d;
  Floats m;
  Ints zero;
};

/// What most formats have in common.
template <class QuantsOfFormat>
struct Format {
  using Quants = QuantsOfFormat;
  static constexpr int group_blocks = 1;  // blocks of 32 columns in a group; 0: the layer says it
  static constexpr int group_bytes = 0;   // of the numbers of a group
  static constexpr int block_bytes = 32;  // of the numbers of a block
  static constexpr int parts = 1;         // of a block, with numbers of their own
  static constexpr bool has_zero = false;
  static constexpr bool has_minimum = false;
};

MIDSPAN_INLINE Floats load_halves(const uint8_t* array, int lane) {
  return load(reinterpret_cast<const Float16*>(array) + lane);
}
MIDSPAN_INLINE Ints load_bytes(const uint8_t* array, int lane) { return bits_as<Ints>(widen_bytes(array + lane)); }

/// Block: 16 fp16 d.
struct FormatQ4_0 : Format<Nibbles> {
  static constexpr bool has_zero = true;
  MIDSPAN_INLINE Numbers numbers(const uint8_t*, const uint8_t* block, int, int lane) {
    return {load_halves(block, lane), Floats{}, splat(8)};
  }
};

/// Block: 16 fp16 d.
struct FormatQ8_0 : Format<Bytes> {
  MIDSPAN_INLINE Numbers numbers(const uint8_t*, const uint8_t* block, int, int lane) {
    return {load_halves(block, lane), Floats{}, Ints{}};
  }
};

/// Block: 16 fp16 d, 16 fp16 m.
template <class Quants>
struct FormatWithMinimum : Format<Quants> {
  static constexpr int block_bytes = 64;
  static constexpr bool has_minimum = true;
  MIDSPAN_INLINE Numbers numbers(const uint8_t*, const uint8_t* block, int, int lane) {
    return {load_halves(block, lane), load_halves(block + 32, lane), Ints{}};
  }
};
using FormatQ4_1 = FormatWithMinimum<Nibbles>;
using FormatQ5_1 = FormatWithMinimum<Bytes>;

/// Group of 256 columns: 16 fp16 d, 16 fp16 dmin; block: 16 bytes of scales, 16 bytes of minimums.
template <class Quants>
struct FormatK : Format<Quants> {
  static constexpr int group_blocks = 8;
  static constexpr int group_bytes = 64;
  static constexpr bool has_minimum = true;
  MIDSPAN_INLINE Numbers numbers(const uint8_t* group, const uint8_t* block, int, int lane) {
    const Floats scale = to_floats(load_bytes(block, lane)), minimum = to_floats(load_bytes(block + 16, lane));
    return {load_halves(group, lane) * scale, -(load_halves(group + 32, lane) * minimum), Ints{}};
  }
};

/// Group of 256 columns: 16 fp16 d; block: 16 signed bytes of scales for its first 16 columns, 16 for the others.
struct FormatQ6_K : Format<Bytes> {
  static constexpr int group_blocks = 8;
  static constexpr int group_bytes = 32;
  static constexpr int parts = 2;
  MIDSPAN_INLINE Numbers numbers(const uint8_t* group, const uint8_t* block, int part, int lane) {
    const Floats scale = load(reinterpret_cast<const Int8*>(block + part * 16 + lane));
    return {load_halves(group, lane) * scale, Floats{}, Ints{}};
  }
};

/// Group: 16 float32 scales, 16 bytes of zeros.
struct FormatInt4 : Format<Nibbles> {
  static constexpr int group_blocks = 0;
  static constexpr int group_bytes = 80;
  static constexpr int block_bytes = 0;
  static constexpr bool has_zero = true;
  MIDSPAN_INLINE Numbers numbers(const uint8_t* group, const uint8_t*, int, int lane) {
    return {load(reinterpret_cast<const float*>(group) + lane), Floats{}, load_bytes(group + 64, lane)};
  }
};

template <class Format>
constexpr int64_t quantized_panel_bytes(int64_t blocks, int64_t group_blocks) {
  const int64_t block_bytes = Format::block_bytes + Format::Quants::tiles * 64;
  return blocks / group_blocks * Format::group_bytes + blocks * block_bytes;
}

}  // namespace midspan::MIDSPAN_ISA

#endif

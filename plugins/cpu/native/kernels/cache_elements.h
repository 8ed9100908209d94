// Elements of 8 bits in caches: to float and back, and where their scales lie.
//
// What a row becomes is said in midspan_cpu.h. Knows neither blocks' numbers nor requests.
#ifndef MIDSPAN_CPU_CACHE_ELEMENTS_H
#define MIDSPAN_CPU_CACHE_ELEMENTS_H

#include "parallel.h"

namespace midspan::MIDSPAN_ISA {

/// Float8 that may be not a number.
struct CachedFloat8 {
  uint8_t bits;
};

using Bytes = uint8_t __attribute__((vector_size(kLanes)));

/// Whether rows of the type have scales.
template <class C>
constexpr bool has_scales = __is_same(C, Int8);

/// What loaded numbers are to be multiplied with: a power of two, so it may be done once at the end, exactly.
template <class C>
constexpr float kLoadedScale = __is_same(C, CachedFloat8) ? 256.0f : 1.0f;

/// Elements of one head of a block, its scales included.
template <class C>
MIDSPAN_INLINE int64_t head_elements(int64_t size, int64_t block_size) {
  return size * block_size + (has_scales<C> ? block_size * static_cast<int64_t>(sizeof(BFloat16)) : 0);
}

/// The scales of one head of a block.
template <class C>
MIDSPAN_INLINE const BFloat16* scales_of(const C* head, int64_t size, int64_t block_size) {
  return reinterpret_cast<const BFloat16*>(head + size * block_size);
}
template <class C>
MIDSPAN_INLINE BFloat16* scales_of(C* head, int64_t size, int64_t block_size) {
  return reinterpret_cast<BFloat16*>(head + size * block_size);
}

/// The numbers divided by kLoadedScale. Sign, exponent and mantissa are put where float16 has its own, whose exponent
/// counts from eight further down; subnormal numbers stay right, because float16 has the same rule for them. Only
/// magnitude 0x7f, not-a-number, carries when one is added; the carry becomes the exponent's top bit.
MIDSPAN_INLINE Floats load(const CachedFloat8* from) {
#if defined(__AVX512F__)
  const __m256i places = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_as<__m128i>(from)), 7);
  const __m256i carried = _mm256_add_epi16(places, _mm256_set1_epi16(0x80));
  return _mm512_cvtph_ps(_mm256_ternarylogic_epi32(places, carried, _mm256_set1_epi16(0x4000), 0x78));
#elif defined(__AVX2__)
  const __m128i places = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 7);
  const __m128i carried = _mm_add_epi16(places, _mm_set1_epi16(0x80));
  return _mm256_cvtph_ps(_mm_xor_si128(places, _mm_and_si128(carried, _mm_set1_epi16(0x4000))));
#else
  const Words bits = __builtin_convertvector(load_as<Bytes>(from), Words);
  const Words sign = (bits & 0x80u) << 24, magnitude = bits & 0x7fu;
  const Words special = bits_as<Words>(magnitude == splat(0x7fu)) & 0x7f800000u;
  // The exponents of the two types differ by 120; multiplying makes subnormal numbers normal ones.
  const Floats scaled = bits_as<Floats>(magnitude << 20) * splat(0x1p112f);
  return bits_as<Floats>(bits_as<Words>(scaled) | special | sign);
#endif
}

/// To nearest even, beyond 448 to 448, NaN to NaN. The numbers themselves, not divided.
MIDSPAN_INLINE void store(CachedFloat8* to, Floats value) {
  const Words bits = bits_as<Words>(value);
  const Words sign = (bits >> 24) & 0x80u;
  const Floats magnitude = smaller(bits_as<Floats>(bits & 0x7fffffffu), splat(448.0f));
  // Adding and removing a power of two rounds to three bits; see Float16. Below 2^-6 steps stay the same.
  const Words exponent = bits_as<Words>(magnitude) & 0x7f800000u;
  const Words floor = splat(0x3c800000u);
  const Floats anchor = bits_as<Floats>((exponent > floor ? exponent : floor) + (20u << 23));
  const Floats rounded = (magnitude + anchor) - anchor;
  const Words normal = (bits_as<Words>(rounded) >> 20) - (120u << 3);
  const Words subnormal = __builtin_convertvector(rounded * splat(512.0f), Words);
  const Words code = rounded < splat(0x1p-6f) ? subnormal : normal;
  const Words whole = (value == value ? code : splat(0x7fu)) | sign;
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = static_cast<uint8_t>(whole[lane]);
}

/// Whole numbers from -127 to 127.
MIDSPAN_INLINE void store(Int8* to, Floats value) {
  const Ints whole = __builtin_convertvector(value, Ints);
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = static_cast<int8_t>(whole[lane]);
}

/// function(C{}) with the cache type that the code names.
template <class Function>
MIDSPAN_INLINE int32_t with_cache_type(int32_t type, Function function) {
  switch (type) {
    case MIDSPAN_CPU_CACHE_FLOAT8_E4M3:
      return function(CachedFloat8{});
    case MIDSPAN_CPU_CACHE_INT8:
      return function(Int8{});
    default:
      return with_type(type, function);
  }
}

}  // namespace midspan::MIDSPAN_ISA

#endif

// Vectors of the instruction set that this file is compiled for, behind one set of names.
//
// GCC vector extensions where they do, intrinsics where they do not. Everything is forced inline and lies
// in the instruction set's own namespace, so that no symbol is shared between instruction sets.
#ifndef MIDSPAN_CPU_SIMD_H
#define MIDSPAN_CPU_SIMD_H

#include <math.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define MIDSPAN_INLINE static inline __attribute__((always_inline))

namespace midspan::MIDSPAN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
using Shorts = int16_t __attribute__((vector_size(kLanes * 4)));           // two for each lane
using UnsignedShorts = uint16_t __attribute__((vector_size(kLanes * 4)));  // two for each lane

struct BFloat16 {
  static constexpr bool even_and_odd = true;  // see load_cheaply
  uint16_t bits;
};
struct Float16 {
  static constexpr bool even_and_odd = false;
  uint16_t bits;
};

/// A signed byte as a number.
struct Int8 {
  static constexpr bool even_and_odd = false;
  int8_t bits;
};
/// Four bits of exponent and three of mantissa; neither infinities nor, here, what is not a number.
struct Float8 {
  static constexpr bool even_and_odd = false;
  uint8_t bits;
};

/// A value at an address of any alignment and type. (memcpy does the same, but gcc 12 leaves a copy on the stack.)
template <class T>
struct __attribute__((packed, may_alias)) Anywhere {
  T value;
};

template <class T>
MIDSPAN_INLINE T load_as(const void* address) {
  return static_cast<const Anywhere<T>*>(address)->value;
}

template <class T>
MIDSPAN_INLINE void store_as(void* address, T value) {
  static_cast<Anywhere<T>*>(address)->value = value;
}

template <class To, class From>
MIDSPAN_INLINE To bits_as(From value) {
  return __builtin_bit_cast(To, value);
}

MIDSPAN_INLINE Floats splat(float value) { return value - Floats{}; }
MIDSPAN_INLINE Ints splat(int32_t value) { return value - Ints{}; }
MIDSPAN_INLINE Words splat(uint32_t value) { return value - Words{}; }

/// a * b + c, rounded once where the processor can.
MIDSPAN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return result;
#else
  return a * b + c;
#endif
}

/// The larger; b where either is NaN.
MIDSPAN_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
/// The smaller; b where either is NaN.
MIDSPAN_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

/// Lane numbers.
MIDSPAN_INLINE Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

/// `value` in lanes begin <= lane < end, else `other`.
MIDSPAN_INLINE Floats keep_lanes(Floats value, int begin, int end, Floats other) {
  const Ints lanes = lane_numbers();
  return (lanes >= splat(begin)) & (lanes < splat(end)) ? value : other;
}

/// Each lane's value from the lane whose number differs by one bit.
MIDSPAN_INLINE Floats swap_lanes(Floats value, int bit) { return __builtin_shuffle(value, lane_numbers() ^ bit); }

/// Sum of the lanes, always in the same order.
MIDSPAN_INLINE float sum_of(Floats value) {
  if (kLanes > 8) value += swap_lanes(value, 8);
  if (kLanes > 4) value += swap_lanes(value, 4);
  value += swap_lanes(value, 2);
  value += swap_lanes(value, 1);
  return value[0];
}

/// The largest lane; any of them when there are NaNs.
MIDSPAN_INLINE float largest_of(Floats value) {
  if (kLanes > 8) value = larger(value, swap_lanes(value, 8));
  if (kLanes > 4) value = larger(value, swap_lanes(value, 4));
  value = larger(value, swap_lanes(value, 2));
  value = larger(value, swap_lanes(value, 1));
  return value[0];
}

/// The same pointer, which gcc takes for another: what is read through it is read again and not kept in a register.
/// Broadcasts from memory are free beside multiply-adds, spilled accumulators are not.
MIDSPAN_INLINE const float* read_again(const float* pointer) {
  asm volatile("" : "+r"(pointer));
  return pointer;
}

// ---- elements to float and back -------------------------------------------------------

MIDSPAN_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
MIDSPAN_INLINE void store(float* to, Floats value) { store_as(to, value); }

MIDSPAN_INLINE Words widen(Halves value) {
#if defined(__AVX512F__)
  return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(value)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(value)));
#else
  return __builtin_convertvector(value, Words);
#endif
}
/// The low halves.
MIDSPAN_INLINE Halves narrow(Words value) {
#if defined(__AVX512F__)
  return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256(bits_as<__m256i>(value), _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return bits_as<Halves>(_mm256_castsi256_si128(packed));
#else
  return __builtin_convertvector(value, Halves);
#endif
}

MIDSPAN_INLINE Floats load(const BFloat16* from) { return bits_as<Floats>(widen(load_as<Halves>(from)) << 16); }

MIDSPAN_INLINE void store(BFloat16* to, Floats value) {
  const Words bits = bits_as<Words>(value);
  const Words rounded = (bits + splat(0x7fffu) + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  store_as(to, narrow(value == value ? rounded : quiet));
}

#if defined(__AVX512F__)
MIDSPAN_INLINE Floats load(const Float16* from) { return _mm512_cvtph_ps(load_as<__m256i>(from)); }
MIDSPAN_INLINE void store(Float16* to, Floats value) {
  store_as(to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
MIDSPAN_INLINE Floats load(const Float16* from) { return _mm256_cvtph_ps(load_as<__m128i>(from)); }
MIDSPAN_INLINE void store(Float16* to, Floats value) {
  store_as(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#else
MIDSPAN_INLINE Floats load(const Float16* from) {
  const Words bits = widen(load_as<Halves>(from));
  const Words sign = (bits & 0x8000u) << 16;
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words special = bits_as<Words>((bits & 0x7c00u) == splat(0x7c00u)) & 0x7f800000u;
  const Floats scaled = bits_as<Floats>(magnitude) * splat(0x1p112f);
  return bits_as<Floats>(bits_as<Words>(scaled) | special | sign);
}
MIDSPAN_INLINE void store(Float16* to, Floats value) {
  // Adding and removing a power of two rounds to the ten bits that are kept, to nearest even; its exponent
  // follows the value's, and stops where halves become subnormal.
  const Words bits = bits_as<Words>(value);
  const Words sign = (bits >> 16) & 0x8000u;
  const Floats magnitude = bits_as<Floats>(bits & 0x7fffffffu);
  const Words exponent = bits & 0x7f800000u;
  const Words floor = splat(0x38800000u);
  const Words used = exponent > floor ? exponent : floor;
  const Floats anchor = bits_as<Floats>(used + (13u << 23));
  const Floats rounded = (magnitude + anchor) - anchor;
  const Words rounded_bits = bits_as<Words>(rounded * splat(0x1p-112f)) >> 13;
  const Words infinite = rounded >= splat(65536.0f) ? splat(0x7c00u) : rounded_bits;
  const Words special = magnitude == magnitude ? infinite : splat(0x7e00u);
  store_as(to, narrow((magnitude > splat(65536.0f) ? splat(0x7c00u) : special) | sign));
}
#endif

/// Bytes as words.
MIDSPAN_INLINE Words widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return bits_as<Words>(_mm512_cvtepu8_epi32(load_as<__m128i>(from)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Words words;
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = from[lane];
  return words;
#endif
}
MIDSPAN_INLINE Floats load(const Int8* from) {
  const Words words = widen_bytes(reinterpret_cast<const uint8_t*>(from));
  return __builtin_convertvector(bits_as<Ints>(words << 24) >> 24, Floats);
}
/// The bits of exponent and mantissa, put where float32 has them, are the number times 2^-120; subnormal ones too.
MIDSPAN_INLINE Floats load(const Float8* from) {
  const Words words = widen_bytes(reinterpret_cast<const uint8_t*>(from));
  const Words bits = (words & 0x80u) << 24 | (words & 0x7fu) << 20;
  return bits_as<Floats>(bits) * splat(0x1p120f);
}

/// `count` vectors of consecutive elements, in an order of lanes that is cheap to get: for bfloat16, pairs of
/// vectors hold even and odd elements. natural_order gives vectors of consecutive elements, cheap_order undoes it.
template <int count, class T>
MIDSPAN_INLINE void load_cheaply(const T* from, Floats (&to)[count]) {
  for (int v = 0; v < count; ++v) to[v] = load(from + v * kLanes);
}
template <int count>
MIDSPAN_INLINE void load_cheaply(const BFloat16* from, Floats (&to)[count]) {
  if constexpr (count % 2 == 0) {
    for (int v = 0; v < count; v += 2) {
      const Words both = load_as<Words>(from + v * kLanes);
      to[v] = bits_as<Floats>(both << 16);
      to[v + 1] = bits_as<Floats>(both & 0xffff0000u);
    }
  } else {
    for (int v = 0; v < count; ++v) to[v] = load(from + v * kLanes);
  }
}

template <class T>
constexpr bool is_even_and_odd() {
  if constexpr (sizeof(T) == 2) return T::even_and_odd;
  return false;
}

template <class T, int count>
MIDSPAN_INLINE void natural_order(Floats (&values)[count]) {
  if constexpr (is_even_and_odd<T>() && count % 2 == 0) {
    const Ints lanes = lane_numbers(), low = (lanes >> 1) + (lanes & 1) * kLanes;
    for (int v = 0; v < count; v += 2) {
      const Floats even = values[v], odd = values[v + 1];
      values[v] = __builtin_shuffle(even, odd, low);
      values[v + 1] = __builtin_shuffle(even, odd, low + kLanes / 2);
    }
  }
}

template <class T, int count>
MIDSPAN_INLINE void cheap_order(Floats (&values)[count]) {
  if constexpr (is_even_and_odd<T>() && count % 2 == 0) {
    const Ints even = lane_numbers() << 1;
    for (int v = 0; v < count; v += 2) {
      const Floats low = values[v], high = values[v + 1];
      values[v] = __builtin_shuffle(low, high, even);
      values[v + 1] = __builtin_shuffle(low, high, even + 1);
    }
  }
}

/// The first `count` elements (below kLanes) and zeros; reads nothing behind them.
template <class T>
MIDSPAN_INLINE Floats load_some(const T* from, int64_t count) {
  T buffer[kLanes] = {};
  for (int64_t index = 0; index < count; ++index) buffer[index] = from[index];
  return load(buffer);
}

template <class T>
MIDSPAN_INLINE void store_some(T* to, Floats value, int64_t count) {
  T buffer[kLanes];
  store(buffer, value);
  for (int64_t index = 0; index < count; ++index) to[index] = buffer[index];
}

template <class T>
MIDSPAN_INLINE float to_float(T value) {
  T buffer[kLanes] = {value};
  return load(buffer)[0];
}

// ---- integers -------------------------------------------------------------------------

/// The two shorts at `from`, in every lane.
MIDSPAN_INLINE Shorts splat_pair(const int16_t* from) { return bits_as<Shorts>(splat(load_as<int32_t>(from))); }

/// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in each lane i, exact while it fits.
/// The empty asm keeps gcc from summing several products first, in a tree for which registers do not suffice.
MIDSPAN_INLINE Ints add_products(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
  return bits_as<Ints>(_mm512_dpwssd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX512BW__)
  return sum + bits_as<Ints>(_mm512_madd_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  sum += bits_as<Ints>(_mm256_madd_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)));
  asm("" : "+x"(sum));
  return sum;
#elif defined(__SSE2__)
  sum += bits_as<Ints>(_mm_madd_epi16(bits_as<__m128i>(a), bits_as<__m128i>(b)));
  asm("" : "+x"(sum));
  return sum;
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    sum[lane] += int32_t{a[2 * lane]} * b[2 * lane] + int32_t{a[2 * lane + 1]} * b[2 * lane + 1];
  }
  return sum;
#endif
}

MIDSPAN_INLINE Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

/// To the nearest integer, ties to even; |value| < 2^22.
MIDSPAN_INLINE Floats round_to_integer(Floats value) {
  const Floats anchor = splat(0x1.8p23f);
  return (value + anchor) - anchor;
}

}  // namespace midspan::MIDSPAN_ISA

#endif

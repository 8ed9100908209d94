// Exponential and what is made of it, on vectors.
//
// exponential(0) is exactly 1, and NaN goes through; both are relied on.
#ifndef MIDSPAN_CPU_VECTOR_MATH_H
#define MIDSPAN_CPU_VECTOR_MATH_H

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

/// e^x to about 2 units in the last place; below -87.3 and above 88.3 it stays at the value there.
MIDSPAN_INLINE Floats exponential(Floats x) {
  x = larger(splat(-87.3f), x);
  x = smaller(splat(88.3f), x);
  // Adding this rounds to an integer, which then also stands in the low bits.
  const Floats anchor = splat(0x1.8p23f);
  const Floats anchored = multiply_add(x, splat(1.44269504f), anchor);
  const Floats power = anchored - anchor;
  Floats rest = multiply_add(power, splat(-0.693145752f), x);  // ln 2 in two parts, the first with few bits
  rest = multiply_add(power, splat(-1.42860677e-6f), rest);
  // Taylor's series up to the seventh power: the rest is at most ln(2) / 2, so what is left out is below 6e-9.
  Floats series = splat(1.0f / 5040);
  series = multiply_add(series, rest, splat(1.0f / 720));
  series = multiply_add(series, rest, splat(1.0f / 120));
  series = multiply_add(series, rest, splat(1.0f / 24));
  series = multiply_add(series, rest, splat(1.0f / 6));
  series = multiply_add(series, rest, splat(0.5f));
  series = multiply_add(series, rest, splat(1.0f));
  series = multiply_add(series, rest, splat(1.0f));
  return series * bits_as<Floats>((bits_as<Ints>(anchored) + 127) << 23);
}

MIDSPAN_INLINE float exponential(float x) { return exponential(splat(x))[0]; }

/// tanh(x), absolute error below 2e-7.
MIDSPAN_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats magnitude = bits_as<Floats>(bits_as<Words>(x) & 0x7fffffffu);
  const Words sign = bits_as<Words>(x) & 0x80000000u;
  const Floats power = exponential(magnitude * splat(-2.0f));
  const Floats result = (splat(1.0f) - power) / (splat(1.0f) + power);
  return bits_as<Floats>(bits_as<Words>(result) | sign);
}

/// cap * tanh(x / cap).
MIDSPAN_INLINE Floats soft_capped(Floats x, float cap) { return splat(cap) * hyperbolic_tangent(x / splat(cap)); }

MIDSPAN_INLINE Floats silu(Floats x) { return x / (splat(1.0f) + exponential(-x)); }

/// x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).
MIDSPAN_INLINE Floats gelu_tanh(Floats x) {
  const Floats inner = splat(0.797884561f) * multiply_add(splat(0.044715f) * x * x, x, x);
  return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
}

/// x/2 * (1 + erf(x / sqrt(2))), through the C library.
MIDSPAN_INLINE Floats gelu(Floats x) {
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = 0.5f * x[lane] * erfcf(-0.707106781f * x[lane]);
  return result;
}

}  // namespace midspan::MIDSPAN_ISA

#endif

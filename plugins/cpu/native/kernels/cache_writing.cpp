// Keys and values of new tokens into the paged cache: keys transposed within a block, values as rows.
#include "attention_tiles.h"

namespace midspan::MIDSPAN_ISA {

namespace {

/// The scale of a row, and what divides its numbers; see midspan.interface.CacheLayout.
template <class T>
MIDSPAN_INLINE BFloat16 scale_of_row(const T* row, int64_t size) {
  Floats largest = {};
  Words unusual = {};  // exponents of all ones
  for (int64_t index = 0; index < size; index += kLanes) {
    const Floats value = index + kLanes <= size ? load(row + index) : load_some(row + index, size - index);
    const Words magnitude = bits_as<Words>(value) & 0x7fffffffu;
    unusual |= bits_as<Words>(magnitude >= splat(0x7f800000u));
    largest = larger(bits_as<Floats>(magnitude), largest);
  }
  BFloat16 scale[kLanes];
  store(scale, splat(largest_of(largest) / 127.0f));
  if (to_float(scale[0]) < 0x1p-126f) scale[0].bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (unusual[lane] != 0) scale[0].bits = 0x7fc0;
  }
  return scale[0];
}

/// A row's numbers as a cache holds them.
template <class C>
MIDSPAN_INLINE void store_scaled(C* to, Floats value, float scale) {
  if constexpr (has_scales<C>) {
    const Floats whole = round_to_integer(value / splat(scale));
    store(to, scale > 0.0f ? whole : splat(0.0f));  // also for NaN
  } else {
    store(to, value);
  }
}

/// One row: its numbers lie `step` elements apart.
template <class T, class C>
MIDSPAN_INLINE void write_row(const T* from, int64_t size, C* to, int64_t step, BFloat16* scale_place) {
  float scale = 1.0f;
  if constexpr (has_scales<C>) {
    *scale_place = scale_of_row(from, size);
    scale = to_float(*scale_place);
  }
  for (int64_t index = 0; index < size; index += kLanes) {
    const int64_t count = size - index < kLanes ? size - index : kLanes;
    const Floats value = count == kLanes ? load(from + index) : load_some(from + index, count);
    if (step == 1 && count == kLanes) {
      store_scaled(to + index, value, scale);
      continue;
    }
    C converted[kLanes];
    store_scaled(converted, value, scale);
    for (int64_t lane = 0; lane < count; ++lane) to[(index + lane) * step] = converted[lane];
  }
}

template <class T, class C>
MIDSPAN_INLINE void write_token(const midspan_cpu_attention& attention, const T* key, const T* value, int64_t slot) {
  const int64_t block_size = attention.block_size, block = slot / block_size, offset = slot % block_size;
  const int64_t key_size = attention.key_size, value_size = attention.value_size;
  for (int64_t head = 0; head < attention.kv_heads; ++head) {
    const int64_t at = block * attention.kv_heads + head;
    C* keys = static_cast<C*>(attention.key_cache) + at * head_elements<C>(key_size, block_size);
    C* values = static_cast<C*>(attention.value_cache) + at * head_elements<C>(value_size, block_size);
    write_row(key + head * key_size, key_size, keys + offset, block_size,
              scales_of(keys, key_size, block_size) + offset);
    write_row(value + head * value_size, value_size, values + offset * value_size, 1,
              scales_of(values, value_size, block_size) + offset);
  }
}

}  // namespace

int32_t write_cache(Context& context, const midspan_cpu_attention& attention, const void* key, int64_t key_stride,
                    const void* value, int64_t value_stride, const int32_t* slots, int64_t tokens) {
  if (!well_formed(attention)) return MIDSPAN_CPU_UNSUPPORTED;
  for (int64_t token = 0; token < tokens; ++token) {
    if (slots[token] < 0 || slots[token] >= attention.blocks * attention.block_size) return MIDSPAN_CPU_OUT_OF_RANGE;
  }
  return with_type(attention.type, [&](auto activation) {
    using T = decltype(activation);
    return with_cache_type(attention.cache_type, [&](auto cached) {
      using C = decltype(cached);
      auto write = [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          write_token<T, C>(attention, static_cast<const T*>(key) + token * key_stride,
                            static_cast<const T*>(value) + token * value_stride, slots[token]);
        }
      };
      for_row_parts(context, tokens, attention.kv_heads * (attention.key_size * 4 + attention.value_size), write);
      return MIDSPAN_CPU_OK;
    });
  });
}

}  // namespace midspan::MIDSPAN_ISA

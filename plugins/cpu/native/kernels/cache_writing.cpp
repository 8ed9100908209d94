// Keys and values of new tokens into the paged cache: keys transposed within a block, values as rows.
#include "attention_tiles.h"

namespace midspan::MIDSPAN_ISA {

namespace {

template <class T, class C>
MIDSPAN_INLINE void write_token(const midspan_cpu_attention& attention, const T* key, const T* value, int64_t slot) {
  const int64_t block_size = attention.block_size, block = slot / block_size, offset = slot % block_size;
  const int64_t key_size = attention.key_size, value_size = attention.value_size;
  for (int64_t head = 0; head < attention.kv_heads; ++head) {
    const int64_t at = block * attention.kv_heads + head;
    C* keys = static_cast<C*>(attention.key_cache) + at * key_size * block_size + offset;
    C* values = static_cast<C*>(attention.value_cache) + (at * block_size + offset) * value_size;
    for (int64_t index = 0; index < key_size; index += kLanes) {
      const int64_t count = key_size - index < kLanes ? key_size - index : kLanes;
      const T* from = key + head * key_size + index;
      C converted[kLanes];
      store(converted, count == kLanes ? load(from) : load_some(from, count));
      for (int64_t lane = 0; lane < count; ++lane) keys[(index + lane) * block_size] = converted[lane];
    }
    for (int64_t index = 0; index < value_size; index += kLanes) {
      const int64_t count = value_size - index < kLanes ? value_size - index : kLanes;
      const T* from = value + head * value_size + index;
      if (count == kLanes) {
        store(values + index, load(from));
      } else {
        store_some(values + index, load_some(from, count), count);
      }
    }
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
    return with_type(attention.cache_type, [&](auto cached) {
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

// Operations that treat each row by itself: norms, gates, rotary, embedding, sums and products.
#include "../gguf_blocks.h"
#include "parallel.h"
#include "row_vectors.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

namespace {

template <class T>
MIDSPAN_INLINE void add_row(const T* x, const T* residual, int64_t columns, T* sum) {
  for_vectors(columns, [&](int64_t index, int count) {
    store_up_to(sum + index, load_up_to(x + index, count) + load_up_to(residual + index, count), count);
  });
}

/// y = x * factor.
template <class T>
MIDSPAN_INLINE void scale_row(const T* x, float factor, int64_t columns, T* y) {
  for_vectors(columns, [&](int64_t index, int count) {
    store_up_to(y + index, load_up_to(x + index, count) * splat(factor), count);
  });
}

/// One row of MIDSPAN_CPU_OP_ADD, _MULTIPLY, _SCALE or _SCALE_ROWS.
template <class T>
MIDSPAN_INLINE void combine_row(const midspan_cpu_instruction& at, const T* x, const T* x2, T* y) {
  switch (at.op) {
    case MIDSPAN_CPU_OP_ADD:
      return add_row(x, x2, at.columns, y);
    case MIDSPAN_CPU_OP_MULTIPLY:
      return for_vectors(at.columns, [&](int64_t index, int count) {
        store_up_to(y + index, load_up_to(x + index, count) * load_up_to(x2 + index, count), count);
      });
    case MIDSPAN_CPU_OP_SCALE:
      return scale_row(x, at.real, at.columns, y);
    default: {
      const float factor = to_float(*x2);
      return scale_row(x, at.code != 0 ? 1.0f / (1.0f + exponential(-factor)) : factor, at.columns, y);
    }
  }
}

/// Sum of squares, in four chains a vector wide.
template <class T>
MIDSPAN_INLINE float squares_of(const T* x, int64_t columns) {
  Floats sums[4] = {};
  int64_t index = 0;
  for (; index + 4 * kLanes <= columns; index += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const Floats value = load(x + index + part * kLanes);
      sums[part] = multiply_add(value, value, sums[part]);
    }
  }
  for (; index < columns; index += kLanes) {
    const Floats value = load_up_to(x + index, columns - index < kLanes ? static_cast<int>(columns - index) : kLanes);
    sums[0] = multiply_add(value, value, sums[0]);
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
MIDSPAN_INLINE void norm_row(const T* x, int64_t columns, const float* weight, float epsilon, float offset, T* y) {
  const float mean = squares_of(x, columns) / static_cast<float>(columns);
  const Floats factor = splat(1.0f / sqrtf(mean + epsilon));
  for_vectors(columns, [&](int64_t index, int count) {
    const Floats scaled = load_up_to(x + index, count) * factor;
    store_up_to(y + index, scaled * (load_up_to(weight + index, count) + splat(offset)), count);
  });
}

template <class T>
MIDSPAN_INLINE void gate_row(int32_t function, const T* gate, const T* up, int64_t columns, T* y) {
  const auto apply = [&](auto activation) {
    for_vectors(columns, [&](int64_t index, int count) {
      const Floats value = activation(load_up_to(gate + index, count)) * load_up_to(up + index, count);
      store_up_to(y + index, value, count);
    });
  };
  switch (function) {
    case MIDSPAN_CPU_SILU:
      return apply([](Floats x) { return silu(x); });
    case MIDSPAN_CPU_GELU:
      return apply([](Floats x) { return gelu(x); });
    default:
      return apply([](Floats x) { return gelu_tanh(x); });
  }
}

template <class T>
MIDSPAN_INLINE void rotate_interleaved(const T* x, const float* table, int64_t half, T* y) {
  for (int64_t index = 0; index < half; ++index) {
    const float first = to_float(x[2 * index]), second = to_float(x[2 * index + 1]);
    const float cosine = table[index], sine = table[half + index];
    store_some(y + 2 * index, splat(first * cosine - second * sine), 1);
    store_some(y + 2 * index + 1, splat(second * cosine + first * sine), 1);
  }
}

template <class T>
MIDSPAN_INLINE void rotate_halves(const T* x, const float* table, int64_t half, T* y) {
  for_vectors(half, [&](int64_t index, int count) {
    const Floats first = load_up_to(x + index, count), second = load_up_to(x + half + index, count);
    const Floats cosine = load_up_to(table + index, count), sine = load_up_to(table + half + index, count);
    store_up_to(y + index, first * cosine - second * sine, count);
    store_up_to(y + half + index, second * cosine + first * sine, count);
  });
}

template <class T>
MIDSPAN_INLINE void rotate_heads(const midspan_cpu_rotary& rotary, const float* table, int64_t heads, const T* x,
                                 T* y) {
  for (int64_t head = 0; head < heads; ++head, x += rotary.head_size, y += rotary.head_size) {
    if (rotary.interleaved != 0) {
      rotate_interleaved(x, table, rotary.rotary_size / 2, y);
    } else {
      rotate_halves(x, table, rotary.rotary_size / 2, y);
    }
    if (x != y) {
      for (int64_t index = rotary.rotary_size; index < rotary.head_size; ++index) y[index] = x[index];
    }
  }
}

MIDSPAN_INLINE float half_at(const void* bytes) { return to_float(load_as<Float16>(bytes)); }

/// 32 columns of a GGUF row to float32.
MIDSPAN_INLINE void unpack_run(int32_t format, const uint8_t* block, int64_t index, float* to) {
  GgufRun run;
  read_gguf_run(format, block, index, run);
  const bool in_groups = gguf_layout(format).columns > 32, with_signed_scales = format == MIDSPAN_CPU_GGUF_Q6_K;
  const float d = half_at(&run.d), m = half_at(&run.m);
  float scales[2] = {d, d}, offset = 0.0f;
  if (in_groups) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t bits = run.scales[half];
      scales[half] = d * static_cast<float>(with_signed_scales ? static_cast<int8_t>(bits) : int{bits});
    }
    if (!with_signed_scales) offset = -(m * static_cast<float>(run.minimum));
  } else if (format == MIDSPAN_CPU_GGUF_Q4_1 || format == MIDSPAN_CPU_GGUF_Q5_1) {
    offset = m;
  }
  const int zero = format == MIDSPAN_CPU_GGUF_Q4_0 ? 8 : 0;
  for (int column = 0; column < 32; ++column) {
    to[column] = scales[column / 16] * static_cast<float>(run.quants[column] - zero);
  }
  // Adding nothing would turn -0 into 0.
  for (int column = 0; offset != 0.0f && column < 32; ++column) to[column] += offset;
}

template <class From, class To>
MIDSPAN_INLINE void embed_dense(const From* from, int64_t columns, float scale, To* to) {
  for_vectors(columns, [&](int64_t index, int count) {
    store_up_to(to + index, load_up_to(from + index, count) * splat(scale), count);
  });
}

template <class To>
MIDSPAN_INLINE void embed_row(int32_t format, const uint8_t* from, int64_t columns, float scale, To* to) {
  if (format <= MIDSPAN_CPU_DENSE_FLOAT16) {
    with_type(format, [&](auto element) {
      using From = decltype(element);
      embed_dense(reinterpret_cast<const From*>(from), columns, scale, to);
      return MIDSPAN_CPU_OK;
    });
    return;
  }
  const GgufLayout layout = gguf_layout(format);
  const int64_t runs = layout.columns / 32;
  for (int64_t run = 0; run < columns / 32; ++run) {
    float values[32];
    unpack_run(format, from + run / runs * layout.bytes, run % runs, values);
    embed_dense(values, 32, scale, to + run * 32);
  }
}

}  // namespace

int32_t add_rms_norm(Context& context, int32_t type, const void* x, int64_t x_stride, const void* residual,
                     int64_t residual_stride, int64_t rows, int64_t columns, const float* weight,
                     int64_t weight_columns, float epsilon, float offset, void* y, int64_t y_stride, void* sum,
                     int64_t sum_stride) {
  if (weight_columns <= 0 || columns % weight_columns != 0) return MIDSPAN_CPU_UNSUPPORTED;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto norm = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = static_cast<const T*>(x) + row * x_stride;
        if (residual != nullptr) {
          T* total = static_cast<T*>(sum) + row * sum_stride;
          add_row(from, static_cast<const T*>(residual) + row * residual_stride, columns, total);
          from = total;
        }
        for (int64_t at = 0; at < columns; at += weight_columns) {
          norm_row(from + at, weight_columns, weight, epsilon, offset, static_cast<T*>(y) + row * y_stride + at);
        }
      }
    };
    for_row_parts(context, rows, columns, norm);
    return MIDSPAN_CPU_OK;
  });
}

int32_t gated(Context& context, int32_t type, int32_t function, const void* gate, int64_t gate_stride, const void* up,
              int64_t up_stride, int64_t rows, int64_t columns, void* y, int64_t y_stride) {
  if (function < MIDSPAN_CPU_SILU || function > MIDSPAN_CPU_GELU_TANH) return MIDSPAN_CPU_UNSUPPORTED;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto apply = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        gate_row(function, static_cast<const T*>(gate) + row * gate_stride, static_cast<const T*>(up) + row * up_stride,
                 columns, static_cast<T*>(y) + row * y_stride);
      }
    };
    for_row_parts(context, rows, columns * 4, apply);
    return MIDSPAN_CPU_OK;
  });
}

int32_t run_rotary(Context& context, const midspan_cpu_rotary& rotary, const int32_t* positions, int64_t rows,
                   const void* query, int64_t query_stride, const void* key, int64_t key_stride, void* query_out,
                   int64_t query_out_stride, void* key_out, int64_t key_out_stride) {
  if (rotary.rotary_size % 2 != 0 || rotary.rotary_size > rotary.head_size) return MIDSPAN_CPU_UNSUPPORTED;
  for (int64_t row = 0; row < rows; ++row) {
    if (positions[row] < 0 || positions[row] >= rotary.table_rows) return MIDSPAN_CPU_OUT_OF_RANGE;
  }
  return with_type(rotary.type, [&](auto element) {
    using T = decltype(element);
    auto rotate = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* table = rotary.table + positions[row] * rotary.rotary_size;
        rotate_heads(rotary, table, rotary.query_heads, static_cast<const T*>(query) + row * query_stride,
                     static_cast<T*>(query_out) + row * query_out_stride);
        rotate_heads(rotary, table, rotary.key_heads, static_cast<const T*>(key) + row * key_stride,
                     static_cast<T*>(key_out) + row * key_out_stride);
      }
    };
    for_row_parts(context, rows, (rotary.query_heads + rotary.key_heads) * rotary.head_size, rotate);
    return MIDSPAN_CPU_OK;
  });
}

int32_t embedding(Context& context, int32_t format, const void* table, int64_t table_row_bytes, int64_t table_rows,
                  int64_t columns, float scale, const int32_t* ids, int64_t rows, int32_t output_type, void* y,
                  int64_t y_stride) {
  const bool dense = format >= MIDSPAN_CPU_DENSE_FLOAT32 && format <= MIDSPAN_CPU_DENSE_FLOAT16;
  const int64_t block = gguf_layout(format).columns;
  const bool quantized = block > 0 && columns % block == 0;
  if (!dense && !quantized) return MIDSPAN_CPU_UNSUPPORTED;
  for (int64_t row = 0; row < rows; ++row) {
    if (ids[row] < 0 || ids[row] >= table_rows) return MIDSPAN_CPU_OUT_OF_RANGE;
  }
  return with_type(output_type, [&](auto element) {
    using T = decltype(element);
    auto embed = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* from = static_cast<const uint8_t*>(table) + ids[row] * table_row_bytes;
        embed_row(format, from, columns, scale, static_cast<T*>(y) + row * y_stride);
      }
    };
    for_row_parts(context, rows, columns, embed);
    return MIDSPAN_CPU_OK;
  });
}

int32_t combine(Context& context, const midspan_cpu_instruction& at, int64_t rows) {
  return with_type(at.type, [&](auto element) {
    using T = decltype(element);
    auto run = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(at.x.data) + row * at.x.stride;
        const T* x2 = static_cast<const T*>(at.x2.data) + row * at.x2.stride;
        combine_row(at, x, x2, static_cast<T*>(at.y.data) + row * at.y.stride);
      }
    };
    for_row_parts(context, rows, at.columns, run);
    return MIDSPAN_CPU_OK;
  });
}

}  // namespace midspan::MIDSPAN_ISA

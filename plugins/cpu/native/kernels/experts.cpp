// Mixtures of experts: who is chosen, and what the chosen make of a row.
//
// Rows are put in order of their experts, so that an expert's weights are read once and multiplied by all of its
// rows; experts that nobody chose are not read. The products are those of the linear kernels, on a part of an expert's
// outputs at a time, each on one thread: their bits do not depend on the other rows, on the part or on the thread.
// What experts made of a row is added up in the order in which they were chosen.
#include <string.h>

#include "parallel.h"
#include "row_vectors.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int64_t kStrip = 64;         // outputs whose packed weights lie in one piece in every format
constexpr int64_t kRowsOfBlock = 96;   // of one expert at a time
constexpr int64_t kTasksOfThread = 6;  // wanted at least, so that threads end at about the same time
constexpr int64_t kMadeBytes = 64 << 20;

// ---- route

/// The place of the largest number, the first among equals, without those that are NaN; one at least is none.
MIDSPAN_INLINE int64_t largest_place(const float* numbers, int64_t count) {
  int64_t best = -1;
  for (int64_t index = 0; index < count; ++index) {
    if (numbers[index] != numbers[index]) continue;
    if (best < 0 || numbers[index] > numbers[best]) best = index;
  }
  return best;
}

/// Puts NaN in the place of all numbers outside of the best groups.
MIDSPAN_INLINE void keep_groups(const midspan_cpu_route& route, float* ranking, float* best) {
  const int64_t size = route.experts / route.groups;
  for (int64_t group = 0; group < route.groups; ++group) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t index = group * size; index < (group + 1) * size; ++index) {
      const float number = ranking[index];
      if (number > first) {
        second = first;
        first = number;
      } else if (number > second) {
        second = number;
      }
    }
    best[group] = route.two_largest != 0 ? first + second : first;
    if (best[group] != best[group]) best[group] = -INFINITY;  // opposite infinities
  }
  for (int64_t kept = 0; kept < route.top_groups; ++kept) best[largest_place(best, route.groups)] = NAN;
  for (int64_t group = 0; group < route.groups; ++group) {
    if (best[group] != best[group]) continue;
    for (int64_t index = group * size; index < (group + 1) * size; ++index) ranking[index] = NAN;
  }
}

/// Scores of one row, and what experts are ranked by. Both are readable and writable up to a whole vector.
template <class T>
MIDSPAN_INLINE void score_row(const midspan_cpu_route& route, const T* logits, float* scores, float* ranking) {
  const int64_t experts = route.experts;
  float most = -INFINITY;
  for_vectors(experts, [&](int64_t index, int count) { store(ranking + index, load_up_to(logits + index, count)); });
  for (int64_t index = 0; index < experts; ++index) {
    if (ranking[index] > most) most = ranking[index];
  }
  if (route.sigmoid != 0) {
    for_vectors(experts, [&](int64_t index, int) {
      store(scores + index, splat(1.0f) / (splat(1.0f) + exponential(-load(ranking + index))));
    });
  } else {
    float sum = 0.0f;
    for_vectors(experts, [&](int64_t index, int) {
      store(scores + index, exponential(load(ranking + index) - splat(most)));
    });
    for (int64_t index = 0; index < experts; ++index) sum += scores[index];
    for_vectors(experts, [&](int64_t index, int) { store(scores + index, load(scores + index) / splat(sum)); });
  }
  for (int64_t index = 0; index < experts; ++index) {
    if (route.bias != nullptr) {
      ranking[index] = scores[index] + route.bias[index];
    } else if (route.two_largest != 0) {
      ranking[index] = scores[index];
    }
    if (ranking[index] != ranking[index]) ranking[index] = -INFINITY;
  }
}

template <class T>
MIDSPAN_INLINE void route_row(const midspan_cpu_route& route, const T* logits, float* scratch, int32_t* ids,
                              float* shares) {
  const int64_t padded = (route.experts + kLanes - 1) / kLanes * kLanes;
  float *scores = scratch, *ranking = scratch + padded, *best = scratch + 2 * padded;
  score_row(route, logits, scores, ranking);
  if (route.groups > 1) keep_groups(route, ranking, best);
  float sum = 0.0f;
  for (int64_t place = 0; place < route.chosen; ++place) {
    const int64_t expert = largest_place(ranking, route.experts);
    ids[place] = static_cast<int32_t>(expert);
    shares[place] = scores[expert];
    sum += scores[expert];
    ranking[expert] = NAN;
  }
  const float divisor = route.normalize != 0 ? sum + 1e-20f : 1.0f;
  for (int64_t place = 0; place < route.chosen; ++place) shares[place] = shares[place] / divisor * route.scale;
}

// ---- experts

/// Rows of one expert: places `begin` to `end` of the order by experts.
struct Block {
  int64_t expert;
  int64_t begin;
  int64_t end;
};

/// Which rows go to which expert, in order of experts, and within one in order of rows.
struct Order {
  int32_t* rows;     // by place
  int32_t* places;   // [rows, chosen]: where a row's experts stand in the order
  int32_t* starts;   // [experts + 1]
  Block* blocks;
  int64_t count = 0;  // of blocks
};

int64_t order_bytes(const midspan_cpu_experts& config, int64_t rows) {
  const int64_t pairs = rows * config.chosen;
  return (2 * pairs + config.experts + 1) * 4 + 64 + (config.experts + pairs / kRowsOfBlock + 1) * int64_t{sizeof(Block)};
}

bool make_order(const midspan_cpu_experts& config, const int32_t* ids, int64_t ids_stride, int64_t rows, void* memory,
                Order& order) {
  const int64_t pairs = rows * config.chosen, experts = config.experts;
  order.blocks = static_cast<Block*>(memory);
  order.rows = reinterpret_cast<int32_t*>(order.blocks + experts + pairs / kRowsOfBlock + 1);
  order.places = order.rows + pairs;
  order.starts = order.places + pairs;
  memset(order.starts, 0, static_cast<size_t>(experts + 1) * 4);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t place = 0; place < config.chosen; ++place) {
      const int32_t expert = ids[row * ids_stride + place];
      if (expert < 0 || expert >= experts) return false;
      ++order.starts[expert + 1];
    }
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t begin = order.starts[expert], end = begin + order.starts[expert + 1];
    order.starts[expert + 1] = static_cast<int32_t>(end);
    for (int64_t first = begin; first < end; first += kRowsOfBlock) {
      order.blocks[order.count++] = {expert, first, first + kRowsOfBlock < end ? first + kRowsOfBlock : end};
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t place = 0; place < config.chosen; ++place) {
      const int32_t at = order.starts[ids[row * ids_stride + place]]++;  // starts are not needed afterwards
      order.rows[at] = static_cast<int32_t>(row);
      order.places[row * config.chosen + place] = at;
    }
  }
  return true;
}

/// How the outputs of a block are divided: parts of `width` columns, whole strips.
struct Parts {
  int64_t count;
  int64_t width;

  Parts(int64_t columns, int64_t blocks, int64_t threads) {
    const int64_t strips = (columns + kStrip - 1) / kStrip;
    int64_t wanted = threads == 1 ? 1 : (kTasksOfThread * threads + blocks - 1) / blocks;
    if (wanted > strips) wanted = strips;
    const int64_t each = (strips + wanted - 1) / wanted;
    width = each * kStrip;
    count = (strips + each - 1) / each;
  }
};

/// Part [column, column + n) of the outputs of one matrix of one expert.
MIDSPAN_INLINE midspan_cpu_linear part_of(const midspan_cpu_matrices& matrices, int64_t expert, int64_t column,
                                          int64_t n, int64_t k, int32_t input_type) {
  midspan_cpu_linear linear{};
  linear.packed = static_cast<const uint8_t*>(matrices.packed) + expert * matrices.bytes +
                  column / kStrip * matrices.strip_bytes;
  linear.bias = matrices.bias == nullptr ? nullptr : matrices.bias + expert * matrices.bias_stride + column;
  linear.n = n;
  linear.k = k;
  linear.format = matrices.format;
  linear.group = matrices.group;
  linear.input_type = input_type;
  linear.output_type = MIDSPAN_CPU_FLOAT32;
  linear.scale = 1.0f;
  return linear;
}

template <class T>
MIDSPAN_INLINE void gate_part(const midspan_cpu_experts& config, const float* gate, const float* up, int64_t columns,
                              T* to) {
  const Floats limit = splat(config.limit), slope = splat(config.slope), offset = splat(config.up_offset);
  const auto apply = [&](auto function) {
    for_vectors(columns, [&](int64_t index, int count) {
      const Floats cut = smaller(limit, load_up_to(gate + index, count));
      const Floats other = larger(-limit, smaller(limit, load_up_to(up + index, count)));
      store_up_to(to + index, function(cut * slope) / slope * (other + offset), count);
    });
  };
  switch (config.function) {
    case MIDSPAN_CPU_SILU:
      return apply([](Floats x) { return silu(x); });
    case MIDSPAN_CPU_GELU:
      return apply([](Floats x) { return gelu(x); });
    default:
      return apply([](Floats x) { return gelu_tanh(x); });
  }
}

template <class T>
MIDSPAN_INLINE void add_up(const float* made, const int32_t* places, const float* shares, int64_t chosen,
                           int64_t columns, T* y) {
  for_vectors(columns, [&](int64_t index, int count) {
    Floats sum = {};
    for (int64_t place = 0; place < chosen; ++place) {
      const Floats part = load_up_to(made + places[place] * columns + index, count);
      sum = multiply_add(splat(shares[place]), part, sum);
    }
    store_up_to(y + index, sum, count);
  });
}

int64_t rounded_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
int32_t run(Context& context, const midspan_cpu_experts& config, const T* x, int64_t x_stride, const int32_t* ids,
            int64_t ids_stride, const float* shares, int64_t shares_stride, int64_t rows, T* y, int64_t y_stride) {
  const int64_t pairs = rows * config.chosen, hidden = config.hidden, inner = config.inner;
  Order order;
  void* memory = scratch_memory(context, SCRATCH_PLAN, order_bytes(config, rows));
  if (memory == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  if (!make_order(config, ids, ids_stride, rows, memory, order)) return MIDSPAN_CPU_OUT_OF_RANGE;
  const Parts inner_parts(inner, order.count, context.threads), outer_parts(hidden, order.count, context.threads);

  T* inputs = static_cast<T*>(scratch_memory(context, SCRATCH_INPUTS, pairs * hidden * int64_t{sizeof(T)}));
  const int64_t middle_bytes = rounded_up(pairs * inner * int64_t{sizeof(T)});
  uint8_t* results =
      static_cast<uint8_t*>(scratch_memory(context, SCRATCH_PARTIALS, middle_bytes + pairs * hidden * 4));
  const int64_t part_floats = kRowsOfBlock * inner_parts.width;
  float* parts =
      static_cast<float*>(scratch_memory(context, SCRATCH_PER_THREAD, context.threads * 2 * part_floats * 4));
  Context* alone = contexts_of_one_thread(context);
  if (inputs == nullptr || results == nullptr || parts == nullptr || alone == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  T* middle = reinterpret_cast<T*>(results);
  float* made = reinterpret_cast<float*>(results + middle_bytes);
  const LinearKernel up_kernel = linear_kernel(*context.kernels, config.gate.format);
  const LinearKernel down_kernel = linear_kernel(*context.kernels, config.down.format);
  if (up_kernel == nullptr || down_kernel == nullptr) return MIDSPAN_CPU_UNSUPPORTED;

  auto gather = [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      memcpy(inputs + place * hidden, x + order.rows[place] * x_stride, static_cast<size_t>(hidden) * sizeof(T));
    }
  };
  for_row_parts(context, pairs, hidden, gather);

  int32_t failure = MIDSPAN_CPU_OK;
  const auto note = [&](int32_t result) {
    if (result != MIDSPAN_CPU_OK) __atomic_store_n(&failure, result, __ATOMIC_RELAXED);
  };
  auto into_middle = [&](int64_t task, int32_t slot) {
    const Block& block = order.blocks[task / inner_parts.count];
    const int64_t column = task % inner_parts.count * inner_parts.width, height = block.end - block.begin;
    const int64_t width = inner - column < inner_parts.width ? inner - column : inner_parts.width;
    float *gate = parts + slot * 2 * part_floats, *up = gate + part_floats;
    const T* from = inputs + block.begin * hidden;
    const auto gate_linear = part_of(config.gate, block.expert, column, width, hidden, config.type);
    const auto up_linear = part_of(config.up, block.expert, column, width, hidden, config.type);
    note(up_kernel(alone[slot], gate_linear, from, hidden, height, gate, width));
    note(up_kernel(alone[slot], up_linear, from, hidden, height, up, width));
    for (int64_t row = 0; row < height; ++row) {
      gate_part(config, gate + row * width, up + row * width, width, middle + (block.begin + row) * inner + column);
    }
  };
  for_each_task(context, order.count * inner_parts.count, 1, into_middle);

  auto out_of_middle = [&](int64_t task, int32_t slot) {
    const Block& block = order.blocks[task / outer_parts.count];
    const int64_t column = task % outer_parts.count * outer_parts.width, height = block.end - block.begin;
    const int64_t width = hidden - column < outer_parts.width ? hidden - column : outer_parts.width;
    const auto linear = part_of(config.down, block.expert, column, width, inner, config.type);
    note(down_kernel(alone[slot], linear, middle + block.begin * inner, inner, height,
                     made + block.begin * hidden + column, hidden));
  };
  for_each_task(context, order.count * outer_parts.count, 1, out_of_middle);

  auto sum = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      add_up(made, order.places + row * config.chosen, shares + row * shares_stride, config.chosen, hidden,
             y + row * y_stride);
    }
  };
  for_row_parts(context, rows, hidden * config.chosen, sum);
  return failure;
}

}  // namespace

int32_t run_route(Context& context, const midspan_cpu_route& route, const void* logits, int64_t logits_stride,
                  int64_t rows, int32_t* ids, int64_t ids_stride, float* shares, int64_t shares_stride) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  const int64_t padded = (route.experts + kLanes - 1) / kLanes * kLanes;
  float* scratch = static_cast<float*>(scratch_memory(context, SCRATCH_PER_THREAD, context.threads * 3 * padded * 4));
  if (scratch == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  return with_type(route.type, [&](auto element) {
    using T = decltype(element);
    const int64_t part = 16;  // rows: some tens of microseconds
    auto task = [&](int64_t index, int32_t slot) {
      const int64_t end = (index + 1) * part < rows ? (index + 1) * part : rows;
      for (int64_t row = index * part; row < end; ++row) {
        route_row(route, static_cast<const T*>(logits) + row * logits_stride, scratch + slot * 3 * padded,
                  ids + row * ids_stride, shares + row * shares_stride);
      }
    };
    for_each_task(context, (rows + part - 1) / part, 0, task);
    return MIDSPAN_CPU_OK;
  });
}

int32_t run_experts(Context& context, const midspan_cpu_experts& config, const void* x, int64_t x_stride,
                    const int32_t* ids, int64_t ids_stride, const float* shares, int64_t shares_stride, int64_t rows,
                    void* y, int64_t y_stride) {
  if (config.function < MIDSPAN_CPU_SILU || config.function > MIDSPAN_CPU_GELU_TANH) return MIDSPAN_CPU_UNSUPPORTED;
  return with_type(config.type, [&](auto element) {
    using T = decltype(element);
    // Long prefills go in pieces, so that what experts made takes no more memory than it must.
    const int64_t fitting = kMadeBytes / (config.chosen * config.hidden * 4);
    const int64_t piece = fitting > 256 ? fitting : 256;
    for (int64_t begin = 0; begin < rows; begin += piece) {
      const int64_t count = rows - begin < piece ? rows - begin : piece;
      const int32_t result = run(context, config, static_cast<const T*>(x) + begin * x_stride, x_stride,
                                 ids + begin * ids_stride, ids_stride, shares + begin * shares_stride, shares_stride,
                                 count, static_cast<T*>(y) + begin * y_stride, y_stride);
      if (result != MIDSPAN_CPU_OK) return result;
    }
    return int32_t{MIDSPAN_CPU_OK};
  });
}

}  // namespace midspan::MIDSPAN_ISA

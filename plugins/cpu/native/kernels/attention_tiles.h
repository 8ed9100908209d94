// The inner loops of attention: queries times keys, softmax of a piece of 64 positions, weights times values.
//
// Rows are (token, query head of the group) pairs that share one kv head. All loops run over absolute
// positions in order, so that what a row gets from a piece does not depend on its neighbours: positions
// that it may not see weigh exactly 0.
#ifndef MIDSPAN_CPU_ATTENTION_TILES_H
#define MIDSPAN_CPU_ATTENTION_TILES_H

#include "cache_elements.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

constexpr int kPiece = 64;  // positions of one softmax update
constexpr int kGroup = 16;  // positions that are sure to lie in one block
constexpr int kGroups = kPiece / kGroup;
constexpr int kGroupVectors = kGroup / kLanes;
// Rows of one register tile, as for linear layers.
constexpr int kMaxTileRows = kLanes >= 8 ? 6 : 3;

/// Groups of positions, or pairs of vectors of value columns, that a tile of some rows holds in registers.
constexpr int width_at_once(int rows) {
  if (kLanes == 16) return rows <= 3 ? 4 : 2;
  if (kLanes == 8) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}

/// scores[rows][64] of groups [begin, end). `query` is [size][rows]; keys[g] points to the first of the group's
/// 16 positions in [size][stride]. next_keys[g] is fetched ahead, a line at a time: blocks lie anywhere in memory, the
/// processor cannot guess where the next one is, and a burst of fetches would stand still.
template <class C, int rows, int groups>
MIDSPAN_INLINE void score_groups(const float* query, const C* const* keys, const C* const* next_keys, int64_t stride,
                                 int64_t size, float* scores) {
  Floats sum[rows][groups][kGroupVectors] = {};
  for (int64_t index = 0; index < size; ++index) {
    for (int group = 0; group < groups; ++group) {
      Floats key[kGroupVectors];
      load_cheaply(keys[group] + index * stride, key);
      __builtin_prefetch(next_keys[group] + index * stride);
      const float* factors = groups > 1 ? read_again(query + index * rows) : query + index * rows;
      for (int row = 0; row < rows; ++row) {
        const Floats factor = splat(factors[row]);
        for (int v = 0; v < kGroupVectors; ++v) {
          sum[row][group][v] = multiply_add(factor, key[v], sum[row][group][v]);
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int group = 0; group < groups; ++group) {
      natural_order<C>(sum[row][group]);
      for (int v = 0; v < kGroupVectors; ++v) {
        store(scores + row * kPiece + group * kGroup + v * kLanes, sum[row][group][v]);
      }
    }
  }
}

template <class C, int rows>
void score_tile(const float* query, const C* const* keys, const C* const* next_keys, int64_t stride, int64_t size,
                int begin, int end, float* scores) {
  constexpr int at_once = width_at_once(rows);
  int group = begin;
  for (; group + at_once <= end; group += at_once) {
    score_groups<C, rows, at_once>(query, keys + group, next_keys + group, stride, size, scores + group * kGroup);
  }
  for (; group < end; ++group) {
    score_groups<C, rows, 1>(query, keys + group, next_keys + group, stride, size, scores + group * kGroup);
  }
}

/// sums[rows][size] += weights[rows][64] @ values, over positions [begin, end) of the piece; columns
/// [column, column + vectors * kLanes). values[g] points to the group's 16 rows of `size` columns; next_values is
/// fetched ahead.
template <class C, int rows, int vectors>
MIDSPAN_INLINE void weigh_columns(const float* weights, const C* const* values, const C* const* next_values,
                                  int64_t size, int64_t column, int begin, int end, float* sums) {
  constexpr int pair = vectors % 2 == 0 ? 2 : 1;
  Floats sum[rows][vectors / pair][pair];
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      sum[row][v / pair][v % pair] = load(sums + row * size + column + v * kLanes);
    }
    for (int v = 0; v < vectors / pair; ++v) cheap_order<C>(sum[row][v]);
  }
  for (int at = begin; at < end;) {
    const C* value = values[at / kGroup] + (at % kGroup) * size + column;
    const C* next_value = next_values[at / kGroup] + (at % kGroup) * size + column;
    const int group_end = at / kGroup * kGroup + kGroup < end ? at / kGroup * kGroup + kGroup : end;
    for (; at < group_end; ++at, value += size, next_value += size) {
      __builtin_prefetch(next_value);
      for (int v = 0; v < vectors / pair; ++v) {
        Floats loaded[pair];
        load_cheaply(value + v * pair * kLanes, loaded);
        const float* factors = vectors > pair ? read_again(weights + at) : weights + at;
        for (int row = 0; row < rows; ++row) {
          const Floats weight = splat(factors[row * kPiece]);
          for (int half = 0; half < pair; ++half) {
            sum[row][v][half] = multiply_add(weight, loaded[half], sum[row][v][half]);
          }
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors / pair; ++v) natural_order<C>(sum[row][v]);
    for (int v = 0; v < vectors; ++v) {
      store(sums + row * size + column + v * kLanes, sum[row][v / pair][v % pair]);
    }
  }
}

template <class C, int rows>
void weigh_tile(const float* weights, const C* const* values, const C* const* next_values, int64_t size, int begin,
                int end, float* sums) {
  constexpr int at_once = 2 * width_at_once(rows);
  int64_t column = 0;
  for (; column + at_once * kLanes <= size; column += at_once * kLanes) {
    weigh_columns<C, rows, at_once>(weights, values, next_values, size, column, begin, end, sums);
  }
  for (; column + kLanes <= size; column += kLanes) {
    weigh_columns<C, rows, 1>(weights, values, next_values, size, column, begin, end, sums);
  }
  for (; column < size; ++column) {
    for (int row = 0; row < rows; ++row) {
      float sum = sums[row * size + column];
      for (int at = begin; at < end; ++at) {
        const float value = to_float(values[at / kGroup][(at % kGroup) * size + column]);
        sum = multiply_add(splat(weights[row * kPiece + at]), splat(value), splat(sum))[0];
      }
      sums[row * size + column] = sum;
    }
  }
}

template <class C>
struct TileFunctions {
  using Score = void (*)(const float*, const C* const*, const C* const*, int64_t, int64_t, int, int, float*);
  using Weigh = void (*)(const float*, const C* const*, const C* const*, int64_t, int, int, float*);
#if defined(__AVX2__)
  static constexpr Score score[] = {score_tile<C, 1>, score_tile<C, 2>, score_tile<C, 3>,
                                    score_tile<C, 4>, score_tile<C, 5>, score_tile<C, 6>};
  static constexpr Weigh weigh[] = {weigh_tile<C, 1>, weigh_tile<C, 2>, weigh_tile<C, 3>,
                                    weigh_tile<C, 4>, weigh_tile<C, 5>, weigh_tile<C, 6>};
#else
  static constexpr Score score[] = {score_tile<C, 1>, score_tile<C, 2>, score_tile<C, 3>};
  static constexpr Weigh weigh[] = {weigh_tile<C, 1>, weigh_tile<C, 2>, weigh_tile<C, 3>};
#endif
};

/// Softmax state of one row.
struct RowState {
  float largest = -INFINITY;
  float sum = 0.0f;
};

/// What a row's scores go through.
struct ScoreRule {
  float scale;
  float soft_cap;
  float slope;  // of ALiBi
  // For caches with scales, one for each position of the piece, those outside a row's view being anything:
  const float* key_scales;    // times `scale`
  const float* value_scales;  // what a weight is multiplied with before it meets the value
};

/// Scores [first, end) of a row, brought to their scale, with those outside [begin, end) masked; the largest.
template <bool whole, bool plain, bool scaled>
MIDSPAN_INLINE float prepare_scores(const ScoreRule& rule, float* scores, int begin, int end, int64_t distance) {
  const int first = whole ? 0 : begin / kLanes * kLanes;
  const int last = whole ? kPiece : end;
  Floats top = splat(-INFINITY);
  for (int at = first; at < last; at += kLanes) {
    Floats score = load(scores + at) * (scaled ? load(rule.key_scales + at) : splat(rule.scale));
    if (!plain && rule.soft_cap != 0.0f) score = soft_capped(score, rule.soft_cap);
    if (!plain && rule.slope != 0.0f) {
      const Ints apart = splat(static_cast<int32_t>(distance + at)) + lane_numbers();
      score += splat(rule.slope) * to_floats(apart);
    }
    if (!whole) score = keep_lanes(score, begin - at, end - at, splat(-INFINITY));
    store(scores + at, score);
    top = larger(top, score);
  }
  return largest_of(top);
}

/// Scores [first, end) of a row to weights e^(score - largest), 0 outside [begin, end); their sum. With scales of
/// values, the weights are multiplied by them, and the sum is not.
template <bool whole, bool scaled>
MIDSPAN_INLINE float weights_of(const ScoreRule& rule, float* scores, int begin, int end, float largest) {
  const int first = whole ? 0 : begin / kLanes * kLanes;
  const int last = whole ? kPiece : end;
  Floats total = {};
  for (int at = first; at < last; at += kLanes) {
    Floats weight = exponential(load(scores + at) - splat(largest));
    Floats factor = scaled ? weight * load(rule.value_scales + at) : weight;
    if (!whole) {
      weight = keep_lanes(weight, begin - at, end - at, splat(0.0f));
      factor = keep_lanes(factor, begin - at, end - at, splat(0.0f));
    }
    store(scores + at, factor);
    total += weight;
  }
  return sum_of(total);
}

/// Turns the scores of one row into weights e^(score - largest), with state and sums[size] brought to the new
/// largest. The row sees positions [begin, end) of the piece; others in [tile_begin, tile_end) get weight 0.
/// `distance` is piece start - query position.
template <bool scaled>
MIDSPAN_INLINE void softmax_row(const ScoreRule& rule, float* scores, int tile_begin, int tile_end, int begin, int end,
                                int64_t distance, RowState& state, float* sums, int64_t size) {
  const bool whole = begin == 0 && end == kPiece;
  const bool plain = rule.soft_cap == 0.0f && rule.slope == 0.0f;
  if (!whole) {
    const int first = begin < end ? begin / kLanes * kLanes : tile_end;
    for (int at = tile_begin; at < first; ++at) scores[at] = 0.0f;
    for (int at = (end + kLanes - 1) / kLanes * kLanes; at < tile_end; ++at) scores[at] = 0.0f;
    if (begin >= end) return;
  }
  const float found = whole ? plain ? prepare_scores<true, true, scaled>(rule, scores, begin, end, distance)
                                    : prepare_scores<true, false, scaled>(rule, scores, begin, end, distance)
                            : prepare_scores<false, false, scaled>(rule, scores, begin, end, distance);
  float largest = found < state.largest ? state.largest : found;
  if (largest == -INFINITY) largest = -3e38f;  // all scores are minus infinity: weights become 0, not NaN
  const float sum =
      whole ? weights_of<true, scaled>(rule, scores, begin, end, largest)
            : weights_of<false, scaled>(rule, scores, begin, end, largest);
  if (largest == state.largest) {
    state.sum += sum;
    return;
  }
  const float factor = exponential(state.largest - largest);
  state.sum = state.sum * factor + sum;
  state.largest = largest;
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) store(sums + index, load(sums + index) * splat(factor));
  for (; index < size; ++index) sums[index] *= factor;
}

/// Whether sizes are such as the kernels take.
MIDSPAN_INLINE bool well_formed(const midspan_cpu_attention& attention) {
  return attention.block_size > 0 && attention.block_size % kGroup == 0 && attention.kv_heads > 0 &&
         attention.heads % attention.kv_heads == 0 && attention.key_size > 0 && attention.value_size > 0 &&
         attention.window >= 0;
}

}  // namespace midspan::MIDSPAN_ISA

#endif

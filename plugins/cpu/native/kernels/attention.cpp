// Attention over a paged cache, prefill and decode in one call.
//
// The order of arithmetic is a function of a token's own position: positions are taken in pieces of 64, which
// begin at multiples of 64, with one softmax update each; pieces make parts of 256, each with its own softmax
// state; the states of parts are merged in order. So a token's bits do not depend on how the prompt was cut
// into chunks, nor on whether parts were worked on by one thread or by several.
//
// Work is cut into items: some tokens of a request, and a range of parts. Items of one part range each are made
// when there are too few requests to keep the threads busy; their states lie in memory until all are done.
#include <stdlib.h>

#include "attention_plan.h"
#include "attention_tiles.h"
#include "row_tiles.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int64_t kTilesWorthConverting = 3;  // from this many row tiles on, a piece is converted to float32 once

/// What one thread works with.
struct Workspace {
  float* keys;          // [key_size][64], one piece
  float* values;        // [64][value_size], one piece
  float* key_scales;    // [64], of one piece; for caches with scales
  float* value_scales;  // [64]
  float* query;         // tiles of [key_size][rows]
  float* scores;        // [rows][64]
  float* sums;          // [rows][value_size], of the part
  float* totals;        // [rows][value_size], of all parts so far
  RowState* part;
  RowState* total;

  Workspace(const Problem& problem, int32_t slot) {
    const midspan_cpu_attention& attention = *problem.attention;
    const int64_t rows = problem.tokens_of_item() * problem.group();
    keys = reinterpret_cast<float*>(problem.scratch + slot * problem.scratch_bytes);
    values = keys + kPiece * attention.key_size;
    key_scales = values + kPiece * attention.value_size;
    value_scales = key_scales + kPiece;
    query = value_scales + kPiece;
    scores = query + rows * attention.key_size;
    sums = scores + rows * kPiece;
    totals = sums + rows * attention.value_size;
    part = reinterpret_cast<RowState*>(totals + rows * attention.value_size);
    total = part + rows;
  }
  static int64_t bytes(const Problem& problem) {
    const midspan_cpu_attention& attention = *problem.attention;
    const int64_t rows = problem.tokens_of_item() * problem.group();
    const int64_t floats = kPiece * (attention.key_size + attention.value_size + 2) +
                           rows * (attention.key_size + kPiece + 2 * attention.value_size + 4);
    return (floats * 4 + 127) / 64 * 64;
  }
};

MIDSPAN_INLINE void merge_state(RowState& total, float* totals, const RowState& part, const float* sums, int64_t size) {
  if (part.largest == -INFINITY) return;
  const float largest = part.largest < total.largest ? total.largest : part.largest;
  const float old_factor = total.largest == -INFINITY ? 0.0f : exponential(total.largest - largest);
  const float new_factor = exponential(part.largest - largest);
  total.sum = total.sum * old_factor + part.sum * new_factor;
  total.largest = largest;
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) {
    const Floats scaled = load(totals + index) * splat(old_factor);
    store(totals + index, scaled + load(sums + index) * splat(new_factor));
  }
  for (; index < size; ++index) totals[index] = totals[index] * old_factor + sums[index] * new_factor;
}

/// Writes a finished row, sinks taken into account; `loaded_scale` is the values'.
template <class T>
MIDSPAN_INLINE void finish_row(const midspan_cpu_attention& attention, int64_t head, RowState state,
                               float loaded_scale, const float* totals, T* out) {
  float factor = 1.0f;
  if (attention.sinks != nullptr) {
    const float sink = attention.sinks[head];
    const float largest = sink < state.largest ? state.largest : sink;
    factor = exponential(state.largest - largest);
    state.sum = state.sum * factor + exponential(sink - largest);
  }
  const Floats scale = splat(factor * loaded_scale), divisor = splat(state.sum);
  const int64_t size = attention.value_size;
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) store(out + index, load(totals + index) * scale / divisor);
  if (index < size) store_some(out + index, load_some(totals + index, size - index) * scale / divisor, size - index);
}

/// Where 64 positions of one kv head lie, by groups of 16, and those after them.
template <class K>
struct Piece {
  int64_t start;
  const K* const* keys;
  const K* const* values;
  const K* const* next_keys;
  const K* const* next_values;
  int64_t key_stride;
};

/// Where up to 64 positions of one kv head lie, by groups of 16.
template <class C>
struct Groups {
  const C* keys[kGroups];
  const C* values[kGroups];
  const BFloat16* key_scales[kGroups];  // of types with scales
  const BFloat16* value_scales[kGroups];
};

/// One item for one kv head.
template <class C>
class Worker {
 public:
  Worker(const Problem& problem, const Item& item, int64_t kv_head, int32_t slot)
      : problem_(problem),
        attention_(*problem.attention),
        item_(item),
        kv_head_(kv_head),
        work_(problem, slot),
        group_(problem.group()),
        key_elements_(head_elements<C>(attention_.key_size, attention_.block_size)),
        value_elements_(head_elements<C>(attention_.value_size, attention_.block_size)),
        first_position_(problem.first_position(item.request)),
        tiles_((item.token_end - item.token_begin) * problem.group()) {}

  void run() {
    arrange_query();
    const int64_t size = attention_.value_size;
    for (int64_t row = 0; row < tiles_.rows; ++row) work_.total[row] = RowState{};
    for (int64_t index = 0; index < tiles_.rows * size; ++index) work_.totals[index] = 0.0f;
    for (int64_t part = item_.part_begin; part < item_.part_end; ++part) {
      run_part(part);
      for (int64_t row = 0; row < tiles_.rows; ++row) {
        if (item_.split != 0) {
          keep_state(row, part);
        } else {
          merge_state(work_.total[row], work_.totals + row * size, work_.part[row], work_.sums + row * size, size);
        }
      }
    }
    if (item_.split != 0) return;
    for (int64_t row = 0; row < tiles_.rows; ++row) {
      finish(row, work_.total[row], work_.totals + row * size);
    }
  }

  /// Merges the states of parts [begin, end), which the split items of these tokens have kept.
  void merge(int64_t begin, int64_t end) {
    const int64_t size = attention_.value_size;
    for (int64_t row = 0; row < tiles_.rows; ++row) {
      RowState total;
      for (int64_t index = 0; index < size; ++index) work_.totals[index] = 0.0f;
      for (int64_t part = begin; part < end; ++part) {
        const float* from = state_at(row, part);
        RowState state;
        state.largest = from[0];
        state.sum = from[1];
        merge_state(total, work_.totals, state, from + 2, size);
      }
      finish(row, total, work_.totals);
    }
  }

 private:
  int64_t head(int64_t row) const { return kv_head_ * group_ + row % group_; }
  int64_t token(int64_t row) const { return item_.token_begin + row / group_; }
  int64_t position(int64_t row) const { return first_position_ + token(row); }

  void finish(int64_t row, RowState state, const float* totals) const {
    const int64_t at = problem_.query_starts[item_.request] + token(row);
    const int64_t place = at * problem_.out_stride + head(row) * attention_.value_size;
    with_type(attention_.type, [&](auto element) {
      using T = decltype(element);
      finish_row(attention_, head(row), state, kLoadedScale<C>, totals, static_cast<T*>(problem_.out) + place);
      return MIDSPAN_CPU_OK;
    });
  }

  float* state_at(int64_t row, int64_t part) const {
    const int64_t parts = (problem_.context_lengths[item_.request] + kPart - 1) / kPart;
    const int64_t rows = tiles_.rows;
    return problem_.states + (item_.state_row + (kv_head_ * rows + row) * parts + part) * problem_.state_size();
  }

  void keep_state(int64_t row, int64_t part) const {
    float* to = state_at(row, part);
    to[0] = work_.part[row].largest;
    to[1] = work_.part[row].sum;
    const int64_t size = attention_.value_size;
    __builtin_memcpy(to + 2, work_.sums + row * size, static_cast<size_t>(size) * sizeof(float));
  }

  void arrange_query() {
    const int64_t size = attention_.key_size;
    with_type(attention_.type, [&](auto element) {
      using T = decltype(element);
      for (int64_t tile = 0; tile < tiles_.tiles; ++tile) {
        const int64_t begin = tiles_.begin(tile), rows = tiles_.begin(tile + 1) - begin;
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t at = problem_.query_starts[item_.request] + token(begin + row);
          const T* from = static_cast<const T*>(problem_.query) + at * problem_.query_stride;
          spread_row(from + head(begin + row) * size, size, work_.query + begin * size + row, rows);
        }
      }
      return MIDSPAN_CPU_OK;
    });
  }

  void run_part(int64_t part) {
    for (int64_t row = 0; row < tiles_.rows; ++row) work_.part[row] = RowState{};
    for (int64_t index = 0; index < tiles_.rows * attention_.value_size; ++index) work_.sums[index] = 0.0f;
    const int64_t seen_begin = problem_.window_begin(position(0)), seen_end = position(tiles_.rows - 1) + 1;
    for (int64_t start = part * kPart; start < (part + 1) * kPart && start < seen_end; start += kPiece) {
      if (start + kPiece > seen_begin) run_piece(start);
    }
  }

  /// Finds where the groups of the piece at `start` lie, up to the last position seen; returns how many there are.
  int find_groups(int64_t start, Groups<C>& found) const {
    const uint32_t size = static_cast<uint32_t>(attention_.block_size);
    const int32_t* table = problem_.block_table + item_.request * problem_.block_table_stride;
    const int64_t last = position(tiles_.rows - 1);
    int groups = 0;
    for (; groups < kGroups && start + groups * kGroup <= last; ++groups) {
      const uint32_t at = static_cast<uint32_t>(start + groups * kGroup);
      const int64_t block = table[at / size] * attention_.kv_heads + kv_head_, offset = at % size;
      const C* head_keys = static_cast<const C*>(attention_.key_cache) + block * key_elements_;
      const C* head_values = static_cast<const C*>(attention_.value_cache) + block * value_elements_;
      found.keys[groups] = head_keys + offset;
      found.values[groups] = head_values + offset * attention_.value_size;
      if constexpr (has_scales<C>) {
        found.key_scales[groups] = scales_of(head_keys, attention_.key_size, size) + offset;
        found.value_scales[groups] = scales_of(head_values, attention_.value_size, size) + offset;
      }
    }
    return groups;
  }

  void run_piece(int64_t start) {
    Groups<C> here, next;
    const int groups = find_groups(start, here);
    for (int group = find_groups(start + kPiece, next); group < groups; ++group) {
      next.keys[group] = here.keys[group];
      next.values[group] = here.values[group];
    }
    if constexpr (has_scales<C>) {
      for (int group = 0; group < groups; ++group) widen_scales(group, here);
    }
    if (sizeof(C) == sizeof(float) || tiles_.tiles < kTilesWorthConverting) {
      const Piece<C> piece = {start, here.keys, here.values, next.keys, next.values, attention_.block_size};
      for (int64_t tile = 0; tile < tiles_.tiles; ++tile) run_tile(tile, piece);
      return;
    }
    const float* wide_keys[kGroups];
    const float* wide_values[kGroups];
    for (int group = 0; group < groups; ++group) {
      wide_keys[group] = work_.keys + group * kGroup;
      wide_values[group] = work_.values + group * kGroup * attention_.value_size;
      widen_group(here.keys[group], here.values[group], work_.keys + group * kGroup,
                  work_.values + group * kGroup * attention_.value_size);
    }
    const Piece<float> piece = {start, wide_keys, wide_values, wide_keys, wide_values, kPiece};
    for (int64_t tile = 0; tile < tiles_.tiles; ++tile) run_tile(tile, piece);
  }

  /// A group's scales as float32, those of keys times the scale of scores.
  void widen_scales(int group, const Groups<C>& groups) const {
    for (int v = 0; v < kGroup; v += kLanes) {
      store(work_.key_scales + group * kGroup + v, load(groups.key_scales[group] + v) * splat(attention_.scale));
      store(work_.value_scales + group * kGroup + v, load(groups.value_scales[group] + v));
    }
  }

  /// A group's keys and values as float32.
  void widen_group(const C* keys, const C* values, float* wide_keys, float* wide_values) const {
    for (int64_t index = 0; index < attention_.key_size; ++index) {
      for (int v = 0; v < kGroup; v += kLanes) {
        store(wide_keys + index * kPiece + v, load(keys + index * attention_.block_size + v));
      }
    }
    const int64_t count = kGroup * attention_.value_size;  // a multiple of the lanes
    for (int64_t index = 0; index < count; index += kLanes) store(wide_values + index, load(values + index));
  }

  /// Where in the piece a row's view begins or ends.
  int clip(int64_t position, int64_t start) const {
    const int64_t at = position - start;
    return static_cast<int>(at < 0 ? 0 : at > kPiece ? int64_t{kPiece} : at);
  }

  template <class K>
  void run_tile(int64_t tile, const Piece<K>& piece) {
    const int64_t start = piece.start;
    const int64_t first = tiles_.begin(tile), rows = tiles_.begin(tile + 1) - first;
    const int begin = clip(problem_.window_begin(position(first)), start);
    const int end = clip(position(first + rows - 1) + 1, start);
    if (begin >= end) return;
    float* scores = work_.scores + first * kPiece;
    TileFunctions<K>::score[rows - 1](work_.query + first * attention_.key_size, piece.keys, piece.next_keys,
                                      piece.key_stride, attention_.key_size, begin / kGroup,
                                      (end + kGroup - 1) / kGroup, scores);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = position(first + row);
      const float slope = attention_.alibi_slopes == nullptr ? 0.0f : attention_.alibi_slopes[head(first + row)];
      const ScoreRule rule = {attention_.scale * kLoadedScale<C>, attention_.soft_cap, slope, work_.key_scales,
                              work_.value_scales};
      softmax_row<has_scales<C>>(rule, scores + row * kPiece, begin, end, clip(problem_.window_begin(at), start),
                                 clip(at + 1, start), start - at, work_.part[first + row],
                                 work_.sums + (first + row) * attention_.value_size, attention_.value_size);
    }
    TileFunctions<K>::weigh[rows - 1](scores, piece.values, piece.next_values, attention_.value_size, begin, end,
                                      work_.sums + first * attention_.value_size);
  }

  const Problem& problem_;
  const midspan_cpu_attention& attention_;
  const Item& item_;
  int64_t kv_head_;
  Workspace work_;
  int64_t group_;
  int64_t key_elements_;  // of a block's head
  int64_t value_elements_;
  int64_t first_position_;
  RowTiles<kMaxTileRows> tiles_;
};

template <class C>
int32_t run(Context& context, Problem& problem) {
  const Plan plan = make_plan(problem, context.threads, nullptr);
  const int64_t item_bytes = static_cast<int64_t>(sizeof(Item)) * (plan.items + plan.whole_items);
  problem.items = static_cast<Item*>(scratch_memory(context, SCRATCH_PLAN, item_bytes));
  problem.scratch_bytes = Workspace::bytes(problem);
  problem.scratch =
      static_cast<uint8_t*>(scratch_memory(context, SCRATCH_PER_THREAD, problem.scratch_bytes * context.threads));
  problem.states =
      static_cast<float*>(scratch_memory(context, SCRATCH_PARTIALS, plan.state_rows * problem.state_size() * 4 + 64));
  if (problem.items == nullptr || problem.scratch == nullptr || problem.states == nullptr) {
    return MIDSPAN_CPU_OUT_OF_MEMORY;
  }
  Item* whole = problem.items + plan.items;
  make_plan(problem, context.threads, whole);
  if (plan.items > 1) qsort(problem.items, static_cast<size_t>(plan.items), sizeof(Item), dearer_first);

  const int64_t kv_heads = problem.attention->kv_heads;
  auto attend = [&](int64_t task, int32_t slot) {
    Worker<C>(problem, problem.items[task / kv_heads], task % kv_heads, slot).run();
  };
  for_each_task(context, plan.items * kv_heads, 1, attend);
  if (plan.state_rows == 0) return MIDSPAN_CPU_OK;
  auto merge = [&](int64_t task, int32_t slot) {
    const Item& item = whole[task / kv_heads];
    if (item.split != 0) Worker<C>(problem, item, task % kv_heads, slot).merge(item.part_begin, item.part_end);
  };
  for_each_task(context, plan.whole_items * kv_heads, 0, merge);
  return MIDSPAN_CPU_OK;
}

/// Whether every block that a query may look at exists.
MIDSPAN_INLINE bool blocks_exist(const Problem& problem) {
  const midspan_cpu_attention& attention = *problem.attention;
  for (int64_t request = 0; request < problem.requests; ++request) {
    const int64_t length = problem.context_lengths[request];
    const int64_t blocks = (length + attention.block_size - 1) / attention.block_size;
    if (problem.tokens(request) > length || blocks > problem.block_table_stride) return false;
    const int32_t* table = problem.block_table + request * problem.block_table_stride;
    for (int64_t index = 0; index < blocks; ++index) {
      if (table[index] < 0 || table[index] >= attention.blocks) return false;
    }
  }
  return true;
}

}  // namespace

int32_t run_attention(Context& context, const midspan_cpu_attention& attention, const void* query, int64_t query_stride,
                      const int32_t* query_starts, const int32_t* context_lengths, const int32_t* block_table,
                      int64_t block_table_stride, int64_t requests, void* out, int64_t out_stride) {
  if (!well_formed(attention)) return MIDSPAN_CPU_UNSUPPORTED;
  Problem problem = {};
  problem.attention = &attention;
  problem.query = query;
  problem.query_stride = query_stride;
  problem.query_starts = query_starts;
  problem.context_lengths = context_lengths;
  problem.block_table = block_table;
  problem.block_table_stride = block_table_stride;
  problem.requests = requests;
  problem.out = out;
  problem.out_stride = out_stride;
  if (!blocks_exist(problem)) return MIDSPAN_CPU_OUT_OF_RANGE;
  if (attention.type < MIDSPAN_CPU_FLOAT32 || attention.type > MIDSPAN_CPU_FLOAT16) return MIDSPAN_CPU_UNSUPPORTED;
  return with_cache_type(attention.cache_type, [&](auto cached) { return run<decltype(cached)>(context, problem); });
}

}  // namespace midspan::MIDSPAN_ISA

// Choosing a token for each row, as midspan.runtimes.reference.sampling defines it.
//
// Sums are double, exponentials float32. Exponentials and the order of sums are this file's own, so a token may differ
// from the definition's where the random number falls within rounding of a border. A row is one task: its token
// depends on nothing else.
#include <algorithm>
#include <functional>

#include "largest.h"
#include "parallel.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int64_t kGroup = 64;      // members of a group whose largest bounds the k-th largest from below
constexpr int64_t kSumBlock = 128;  // weights between two remembered sums
constexpr float kLowest = -87.0f;   // below it a weight is zero

/// Memory of one thread: everything that one row needs.
struct RowMemory {
  float* weights;  // [columns]: edited logits, then weights
  float* sorted;   // [columns]
  int32_t* ids;    // [columns]
  double* sums;    // [columns / kSumBlock + 1]

  static int64_t bytes(int64_t columns) {
    return (columns * 12 + (columns / kSumBlock + 1) * 8 + 63 + 3 * 64) / 64 * 64;
  }
  RowMemory(uint8_t* memory, int64_t columns) {
    const int64_t part = (columns * 4 + 63) / 64 * 64;
    weights = reinterpret_cast<float*>(memory);
    sorted = reinterpret_cast<float*>(memory + part);
    ids = reinterpret_cast<int32_t*>(memory + 2 * part);
    sums = reinterpret_cast<double*>(memory + 3 * part);
  }
};

/// The row with its edits, in `to`.
void edit_row(const midspan_cpu_sampling& how, int64_t row, const float* logits, int64_t columns, float* to) {
  std::copy(logits, logits + columns, to);
  if (how.edit_starts != nullptr) {
    for (int32_t edit = how.edit_starts[row]; edit < how.edit_starts[row + 1]; ++edit) {
      float& value = to[how.edit_ids[edit]];
      value = (value > 0.0f ? value / how.edit_repetition[edit] : value * how.edit_repetition[edit]) +
              how.edit_bias[edit];
    }
  }
  if (how.allowed != nullptr) {
    const uint32_t* words = how.allowed + row * how.allowed_words;
    for (int64_t column = 0; column < columns; ++column) {
      if ((words[column / 32] >> (column % 32) & 1u) == 0) to[column] = -INFINITY;
    }
  }
}

/// Of `ids` (NULL: 0, 1, ...) keeps those whose value is above `last`, and the first `equal` of those that equal it.
int64_t keep_largest(const float* values, const int32_t* ids, int64_t count, float last, int64_t equal, float* to_values,
                     int32_t* to_ids) {
  int64_t kept = 0;
  for (int64_t index = 0; index < count; ++index) {
    const float value = values[index];
    if (!(value > last || (value == last && equal-- > 0))) continue;
    to_ids[kept] = ids == nullptr ? static_cast<int32_t>(index) : ids[index];
    to_values[kept++] = value;
  }
  return kept;
}

/// The first `wanted` in the order (value falling, id rising): their ids in rising order, their values in `to_values`.
void largest_columns(const float* values, int64_t columns, int64_t wanted, float* to_values, float* work,
                     int32_t* to_ids) {
  const int64_t groups = columns / kGroup;
  int64_t candidates = 0;
  float bound = -INFINITY;
  if (wanted <= groups) {
    for (int64_t group = 0; group < groups; ++group) {
      Floats most = splat(-INFINITY);
      for (int64_t index = 0; index < kGroup; index += kLanes) most = larger(load(values + group * kGroup + index), most);
      work[group] = largest_of(most);
    }
    std::nth_element(work, work + wanted - 1, work + groups, std::greater<float>());
    bound = work[wanted - 1];
  }
  for (int64_t column = 0; column < columns; ++column) {
    if (values[column] >= bound) work[candidates++] = values[column];
  }
  std::nth_element(work, work + wanted - 1, work + candidates, std::greater<float>());
  const float last = work[wanted - 1];
  int64_t above = 0;
  for (int64_t index = 0; index < candidates; ++index) above += work[index] > last;
  keep_largest(values, nullptr, columns, last, wanted - above, to_values, to_ids);
}

/// Weights of values relative to the largest.
void exponentiate(float* values, int64_t count, float largest, float temperature) {
  const Floats top = splat(largest), divisor = splat(temperature);
  const auto weigh = [&](Floats value) {
    const Floats power = (value - top) / divisor;
    return power > splat(kLowest) ? exponential(power) : Floats{};
  };
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) store(values + index, weigh(load(values + index)));
  if (index < count) store_some(values + index, weigh(load_some(values + index, count - index)), count - index);
}

using Doubles = double __attribute__((vector_size(kLanes * 8)));

/// The sum of all weights; `sums` gets the sums up to the end of each block.
double sum_of_weights(const float* weights, int64_t count, double* sums) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, count);
    Doubles lanes = {};
    int64_t index = begin;
    for (; index + kLanes <= end; index += kLanes) lanes += __builtin_convertvector(load(weights + index), Doubles);
    if (index < end) lanes += __builtin_convertvector(load_some(weights + index, end - index), Doubles);
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    sums[begin / kSumBlock] = total;
  }
  return total;
}

/// The last value of the shortest beginning of the falling order whose sum reaches `wanted`, and how many of its
/// equals belong to that beginning. Reorders the values.
struct Border {
  float last;
  int64_t equal;
};
Border find_border(float* values, int64_t count, double wanted) {
  float* begin = values;
  float* end = values + count;
  for (;;) {
    const float one = *begin, middle = begin[(end - begin) / 2], other = end[-1];
    const float pivot = std::max(std::min(one, middle), std::min(std::max(one, middle), other));
    float* const equal = std::partition(begin, end, [pivot](float value) { return value > pivot; });
    float* const below = std::partition(equal, end, [pivot](float value) { return value == pivot; });
    double above = 0.0;
    for (const float* value = begin; value < equal; ++value) above += *value;
    if (above >= wanted && equal > begin) {
      end = equal;
      continue;
    }
    wanted -= above;
    for (int64_t taken = 1; taken <= below - equal; ++taken) {
      wanted -= pivot;
      if (wanted <= 0.0) return {pivot, taken};
    }
    if (below == end) return {pivot, below - equal};  // all of them, but for a rounding
    begin = below;
  }
}

/// Keeps the shortest beginning of (weight falling, id rising) whose sum reaches top_p of the whole.
int64_t keep_nucleus(float* weights, int32_t* ids, int64_t count, float top_p, float* work, double* sums) {
  const double total = sum_of_weights(weights, count, sums);
  // Weights below the line weigh less than half of (1 - top_p) of the total together: the border is above it.
  const float line = static_cast<float>(0.5 * (1.0 - top_p) * total / static_cast<double>(count));
  int64_t candidates = 0;
  for (int64_t index = 0; index < count; ++index) {
    work[candidates] = weights[index];
    candidates += weights[index] >= line;
  }
  const Border border = find_border(work, candidates, top_p * total);
  return keep_largest(weights, ids, count, border.last, border.equal, weights, ids);
}

/// The first place whose cumulated weight exceeds `number` times the sum.
int64_t crossing(const float* weights, int64_t count, double number, double* sums) {
  const double wanted = number * sum_of_weights(weights, count, sums);
  const int64_t blocks = (count + kSumBlock - 1) / kSumBlock;
  int64_t block = std::upper_bound(sums, sums + blocks, wanted) - sums;
  block = std::min(block, blocks - 1);
  const int64_t begin = block * kSumBlock, end = std::min(begin + kSumBlock, count);
  double sum = block > 0 ? sums[block - 1] : 0.0;
  int64_t last = begin;
  for (int64_t index = begin; index < end; ++index) {
    sum += weights[index];
    if (sum > wanted) return index;
    if (weights[index] > 0.0f) last = index;
  }
  return last;  // the sums were added in another order and came out a rounding larger
}

struct Choice {
  int32_t id;
  bool failed;
};

Choice choose(const midspan_cpu_sampling& how, int64_t row, const float* logits, int64_t columns, RowMemory memory) {
  const Found raw = look(logits, 0, columns);
  const bool broken = raw.failed || raw.value == -INFINITY;
  if (how.has_target != nullptr && how.has_target[row] != 0) return {broken ? 0 : how.targets[row], broken};
  if (broken) return {0, true};
  const float* values = logits;
  Found best = raw;
  if (how.edit_starts != nullptr || how.allowed != nullptr) {
    edit_row(how, row, logits, columns, memory.weights);
    values = memory.weights;
    best = look(values, 0, columns);
    if (best.failed || best.value == -INFINITY) return {0, true};
  }
  if (how.temperature[row] == 0.0f) return {best.column, false};

  int64_t count = columns;
  int32_t* ids = memory.ids;
  const int64_t top_k = how.top_k[row];
  bool numbered = false;  // whether ids say which column a weight belongs to; else it is the place
  if (top_k > 0 && top_k < columns) {
    largest_columns(values, columns, top_k, memory.weights, memory.sorted, ids);
    count = top_k;
    numbered = true;
  } else if (values == logits) {
    std::copy(logits, logits + columns, memory.weights);
  }
  float* weights = memory.weights;
  exponentiate(weights, count, best.value, how.temperature[row]);
  if (!numbered && (how.min_p[row] > 0.0f || how.top_p[row] < 1.0f)) {
    for (int64_t index = 0; index < count; ++index) ids[index] = static_cast<int32_t>(index);
    numbered = true;
  }
  if (how.min_p[row] > 0.0f) {
    int64_t kept = 0;
    for (int64_t index = 0; index < count; ++index) {
      if (!(weights[index] >= how.min_p[row])) continue;
      ids[kept] = ids[index];
      weights[kept++] = weights[index];
    }
    count = kept;
  }
  if (how.top_p[row] < 1.0f) count = keep_nucleus(weights, ids, count, how.top_p[row], memory.sorted, memory.sums);
  const int64_t place = crossing(weights, count, how.numbers[row], memory.sums);
  return {numbered ? ids[place] : static_cast<int32_t>(place), false};
}

}  // namespace

int32_t sample(Context& context, const midspan_cpu_sampling& how, const float* logits, int64_t logits_stride,
               int64_t rows, int64_t columns, int32_t* ids, uint8_t* failed) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  for (int64_t edit = 0; how.edit_starts != nullptr && edit < how.edit_starts[rows]; ++edit) {
    if (how.edit_ids[edit] < 0 || how.edit_ids[edit] >= columns) return MIDSPAN_CPU_OUT_OF_RANGE;
  }
  const int64_t row_bytes = RowMemory::bytes(columns);
  uint8_t* memory =
      static_cast<uint8_t*>(scratch_memory(context, SCRATCH_PER_THREAD, row_bytes * context.threads));
  if (memory == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  auto task = [&](int64_t row, int32_t slot) {
    const Choice chosen =
        choose(how, row, logits + row * logits_stride, columns, RowMemory(memory + slot * row_bytes, columns));
    ids[row] = chosen.id;
    failed[row] = chosen.failed ? 1 : 0;
  };
  for_each_task(context, rows, 1, task);
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan::MIDSPAN_ISA

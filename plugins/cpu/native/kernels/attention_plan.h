// How a call of attention is cut into items of work.
//
// An item is some tokens of a request and a range of parts (see attention.cpp). Items of few parts each are made
// when there are too few requests to keep the threads busy; their states lie in memory until all are done.
#ifndef MIDSPAN_CPU_ATTENTION_PLAN_H
#define MIDSPAN_CPU_ATTENTION_PLAN_H

#include "parallel.h"

namespace midspan::MIDSPAN_ISA {

constexpr int64_t kPart = 256;
constexpr int64_t kRowsOfItem = 48;
constexpr int64_t kItemsForEachThread = 4;

struct Item {
  int32_t request;
  int32_t token_begin;  // in the request's own tokens
  int32_t token_end;
  int32_t part_begin;
  int32_t part_end;
  int32_t split;  // states go to memory, to be merged
  int64_t cost;
  int64_t state_row;  // of the first row's first part; kv head 0
};

/// One call, as all its tasks see it.
struct Problem {
  const midspan_cpu_attention* attention;
  const void* query;
  int64_t query_stride;
  const int32_t* query_starts;
  const int32_t* context_lengths;
  const int32_t* block_table;
  int64_t block_table_stride;
  int64_t requests;
  void* out;
  int64_t out_stride;
  Item* items;
  int64_t item_count;
  float* states;     // [rows over all kv heads][parts][2 + value_size] of split items
  uint8_t* scratch;  // per thread
  int64_t scratch_bytes;

  int64_t group() const { return attention->heads / attention->kv_heads; }
  int64_t tokens_of_item() const { return kRowsOfItem / group() > 0 ? kRowsOfItem / group() : 1; }
  int64_t state_size() const { return attention->value_size + 2; }
  int64_t tokens(int64_t request) const { return query_starts[request + 1] - query_starts[request]; }
  int64_t first_position(int64_t request) const { return context_lengths[request] - tokens(request); }
  /// The first position that the token at `position` sees.
  int64_t window_begin(int64_t position) const {
    const int64_t window = attention->window;
    return window > 0 && position - window + 1 > 0 ? position - window + 1 : 0;
  }
};

/// For qsort.
MIDSPAN_INLINE int dearer_first(const void* a, const void* b) {
  const int64_t left = static_cast<const Item*>(a)->cost, right = static_cast<const Item*>(b)->cost;
  return left < right ? 1 : left > right ? -1 : 0;
}

/// An item for tokens [begin, end) of a request, over all parts that they see.
MIDSPAN_INLINE Item whole_item(const Problem& problem, int64_t request, int64_t begin, int64_t end) {
  const int64_t first = problem.first_position(request);
  const int64_t seen_begin = problem.window_begin(first + begin), seen_end = first + end;
  Item item = {};
  item.request = static_cast<int32_t>(request);
  item.token_begin = static_cast<int32_t>(begin);
  item.token_end = static_cast<int32_t>(end);
  item.part_begin = static_cast<int32_t>(seen_begin / kPart);
  item.part_end = static_cast<int32_t>((seen_end + kPart - 1) / kPart);
  // keys are read once an item, and used once a row
  item.cost = (seen_end - seen_begin) * ((end - begin) * problem.group() + 2);
  return item;
}

struct Plan {
  int64_t items;  // after splitting
  int64_t whole_items;
  int64_t state_rows;
};

/// Fills whole items at `whole` and the items to run at problem.items; counts only when both are NULL.
MIDSPAN_INLINE Plan make_plan(Problem& problem, int64_t threads, Item* whole) {
  const int64_t height = problem.tokens_of_item(), kv_heads = problem.attention->kv_heads;
  int64_t total_cost = 0;
  for (int64_t request = 0; request < problem.requests; ++request) {
    for (int64_t begin = 0; begin < problem.tokens(request); begin += height) {
      const int64_t end = begin + height < problem.tokens(request) ? begin + height : problem.tokens(request);
      total_cost += whole_item(problem, request, begin, end).cost * kv_heads;
    }
  }
  const int64_t dear = threads == 1 ? INT64_MAX : total_cost / (threads * kItemsForEachThread);
  Plan plan = {};
  for (int64_t request = 0; request < problem.requests; ++request) {
    const int64_t parts = (problem.context_lengths[request] + kPart - 1) / kPart;
    for (int64_t begin = 0; begin < problem.tokens(request); begin += height) {
      const int64_t end = begin + height < problem.tokens(request) ? begin + height : problem.tokens(request);
      Item item = whole_item(problem, request, begin, end);
      const int64_t seen_parts = item.part_end - item.part_begin;
      const int64_t pieces = item.cost <= dear ? 1 : (item.cost + dear - 1) / (dear > 0 ? dear : 1);
      const int64_t parts_of_piece = pieces >= seen_parts ? 1 : (seen_parts + pieces - 1) / pieces;
      item.split = pieces > 1 && seen_parts > 1 ? 1 : 0;
      item.state_row = plan.state_rows;
      if (whole != nullptr) whole[plan.whole_items] = item;
      ++plan.whole_items;
      if (item.split == 0) {
        if (whole != nullptr) problem.items[plan.items] = item;
        ++plan.items;
        continue;
      }
      plan.state_rows += (end - begin) * problem.group() * kv_heads * parts;
      for (int64_t part = item.part_begin; part < item.part_end; part += parts_of_piece, ++plan.items) {
        if (whole == nullptr) continue;
        Item& piece = problem.items[plan.items] = item;
        piece.part_begin = static_cast<int32_t>(part);
        if (part + parts_of_piece < item.part_end) piece.part_end = static_cast<int32_t>(part + parts_of_piece);
        piece.cost = item.cost * (piece.part_end - part) / seen_parts;
      }
    }
  }
  return plan;
}

}  // namespace midspan::MIDSPAN_ISA

#endif

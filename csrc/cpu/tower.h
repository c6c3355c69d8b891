// The parameters of an MLP tower as products want them, and its items.
#pragma once

#include <cmath>

#include "../mlp_arguments.h"
#include "item_table.h"
#include "matrix.h"

namespace metarec_fast::cpu {

// The parameters that tasks start from, laid out for products, and where gradients of them stand in
// a record: of layer 1 those of the user part, then of the item part; then layer by layer.
template <typename scalar_t>
class Tower {
 public:
  struct Layer {
    int64_t in, out, in_stride, out_stride;
    scalar_t* weight = nullptr;      // [out, in_stride]
    scalar_t* transposed = nullptr;  // [in_stride, out_stride]
    scalar_t* bias = nullptr;        // [out_stride]
    int64_t weight_at = 0, bias_at = 0;
  };

  Tower(const TowerInputs& inputs, int64_t largest_support) {
    const scalar_t* from = inputs.parameters.const_data_ptr<scalar_t>();
    const int64_t out = inputs.widths[1];
    user = layer(inputs.Du(), out);
    pack(from, inputs.widths[0], user);
    item = layer(inputs.D(), out);
    pack(from + inputs.Du(), inputs.widths[0], item);
    from += out * inputs.widths[0];
    bias(from, item);
    from += out;
    if (is_large(largest_support)) {
      const int64_t end = record_size;  // its gradient is that of both parts
      whole = layer(inputs.widths[0], out);
      pack(inputs.parameters.const_data_ptr<scalar_t>(), whole.in, whole);
      whole.bias = item.bias;
      record_size = end;
    }
    for (size_t l = 2; l < inputs.widths.size(); ++l) {
      Layer next = layer(inputs.widths[l - 1], inputs.widths[l]);
      pack(from, next.in, next);
      bias(from + next.in * next.out, next);
      from += (next.in + 1) * next.out;
      deeper.push_back(next);
    }
  }

  // A record [record_size] as the gradient of the parameters.
  void unpack(const scalar_t* record, scalar_t* result) const {
    const auto columns = [&](const Layer& part, int64_t first, int64_t width) {
      for (int64_t o = 0; o < part.out; ++o)
        std::copy_n(record + part.weight_at + o * part.in_stride, part.in,
                    result + o * width + first);
    };
    const int64_t width = user.in + item.in;
    columns(user, 0, width);
    columns(item, user.in, width);
    result = std::copy_n(record + item.bias_at, item.out, result + item.out * width);
    for (const Layer& part : deeper) {
      columns(part, 0, part.in);
      result = std::copy_n(record + part.bias_at, part.out, result + part.out * part.in);
    }
  }

  // Whether a task with a support of `count` has weights of layer 1 of its own.
  bool is_large(int64_t count) const { return count > 2 * (user.in + item.in); }

  int64_t depth() const { return static_cast<int64_t>(deeper.size()) + 1; }  // L
  const Layer& operator[](int64_t l) const { return l == 1 ? item : deeper[l - 2]; }

  Layer user, item;           // the two parts of layer 1, whose bias is with the item's
  Layer whole{};              // layer 1 undivided, where there is a large task
  std::vector<Layer> deeper;  // 2 … L
  int64_t record_size = 0;

 private:
  static Layer layer(int64_t in, int64_t out) {
    return {in, out, std::max(padded<scalar_t>(in), kLanes<scalar_t>), padded<scalar_t>(out)};
  }

  int64_t place(int64_t count) {
    const int64_t begin = record_size;
    record_size += count;
    return begin;
  }

  void pack(const scalar_t* from, int64_t width, Layer& part) {
    part.weight_at = place(part.out * part.in_stride);
    part.weight = scratch_.take_zeros(part.out * part.in_stride);
    part.transposed = scratch_.take_zeros(part.in_stride * part.out_stride);
    for (int64_t o = 0; o < part.out; ++o)
      copy_in(from + o * width, part.in, part.weight + o * part.in_stride);
    transpose(part.weight, part.in_stride, part.out, part.in, part.transposed, part.out_stride);
  }

  void bias(const scalar_t* from, Layer& part) {
    part.bias_at = place(part.out_stride);
    part.bias = scratch_.take(part.out_stride);
    copy_in(from, part.out, part.bias);
  }

  Arena<scalar_t> scratch_;
};

template <typename scalar_t>
struct TowerSettings {
  int64_t steps;
  TowerRates<const scalar_t> inner_lr;
  Activation activation;
  bool first_order;
};

// Of a task, all candidates of its entries: rows and biases of their items.
template <typename scalar_t>
struct TowerEntries {
  int64_t count, rows;         // rows: count up to a multiple of kRowsAtOnce
  scalar_t* items;             // [rows, D]
  scalar_t* biases = nullptr;  // [count], if there are any

  TowerEntries(const ItemTable<scalar_t>& table, const scalar_t* item_bias,
               const EntryData<scalar_t>& entries, int64_t task, int64_t stride,
               Arena<scalar_t>& arena)
      : count(entries.size(task) * entries.candidates()),
        rows((count + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce) {
    items = arena.take(rows * stride);
    if (item_bias != nullptr) biases = arena.take(count);
    scalar_t* row = items;
    for (int64_t entry = entries.begin(task); entry < entries.begin(task + 1); ++entry)
      for (int64_t j = 0; j < entries.candidates(); ++j, row += stride) {
        const int64_t item = entries.candidate(entry, j);
        table.read(item, row);
        if (item_bias != nullptr) biases[(row - items) / stride] = item_bias[item];
      }
    std::fill(row, items + rows * stride, scalar_t{0});
  }
};

}  // namespace metarec_fast::cpu

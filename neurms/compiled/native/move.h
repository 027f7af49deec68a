// V <- momentum V + enter (g right) and W <- decay W - along (V right), with Nesterov's step of momentum V + enter (g
// right) in the place of V: the native twin of `_move_tile` in neurms/compiled/update.py, for every pass that moves a
// weight.

#pragma once

#include <cstdint>

namespace {

// A row of W. Null: `right_in` and `right_out` are 1; without a velocity, g itself moves W. With a decay of 0, W is
// not read.
struct Row {
  float enter, momentum, along, decay;
  const float *right_in, *right_out;
  bool nesterov;
};

template <bool kVelocity, bool kIn, bool kOut, bool kNesterov, bool kMeasured>
float move_as(const Row& row, float* w, const float* g, float* velocity, int64_t n) {
  const float enter = row.enter, momentum = row.momentum, along = row.along, decay = row.decay;
  const float *in = row.right_in, *out = row.right_out;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    float moved = kIn ? g[j] * in[j] : g[j];
    if (kVelocity) {
      const float entering = enter * moved;
      velocity[j] = momentum * velocity[j] + entering;
      moved = kNesterov ? momentum * velocity[j] + entering : velocity[j];
      if (kOut) moved *= out[j];
    }
    w[j] = (decay == 0.0f ? 0.0f : decay * w[j]) - along * moved;
    if (kMeasured) sum += moved * moved;
  }
  return sum;
}

template <bool kNesterov, bool kMeasured>
float move_with(const Row& row, float* w, const float* g, float* velocity, int64_t n) {
  if (row.right_in && row.right_out) return move_as<true, true, true, kNesterov, kMeasured>(row, w, g, velocity, n);
  if (row.right_in) return move_as<true, true, false, kNesterov, kMeasured>(row, w, g, velocity, n);
  if (row.right_out) return move_as<true, false, true, kNesterov, kMeasured>(row, w, g, velocity, n);
  return move_as<true, false, false, kNesterov, kMeasured>(row, w, g, velocity, n);
}

// Moves n elements of a row; if so asked, returns the sum of squares of what it moved by, but for `along`.
template <bool kMeasured>
float move(const Row& row, float* w, const float* g, float* velocity, int64_t n) {
  if (velocity && row.nesterov) return move_with<true, kMeasured>(row, w, g, velocity, n);
  if (velocity) return move_with<false, kMeasured>(row, w, g, velocity, n);
  if (row.right_in) return move_as<false, true, false, false, kMeasured>(row, w, g, velocity, n);
  return move_as<false, false, false, false, kMeasured>(row, w, g, velocity, n);
}

// What the updates of one call share, and the row that it makes with a unit's factor.
struct Rule {
  float momentum, fresh;
  bool scale_gradient, scale_velocity, nesterov;

  Row row(bool velocity, float left, const float* right, float rate, float decay) const {
    if (!velocity) return {0.0f, 0.0f, left * rate, decay, right, nullptr, false};
    return {scale_gradient ? fresh * left : fresh, momentum, scale_velocity ? left * rate : rate, decay,
            scale_gradient ? right : nullptr, scale_velocity ? right : nullptr, nesterov};
  }
};

}  // namespace

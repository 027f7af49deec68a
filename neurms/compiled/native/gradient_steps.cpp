// Variant P's step of many matrices and their biases in one call: sums, factors and moves, as Python would ask for
// them. What lies between costs a small network more than the passes themselves.

#include "common.h"

namespace {

int64_t total(int64_t count, const int64_t* sizes) {
  int64_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += sizes[k];
  return sum;
}

}  // namespace

extern "C" {

// `tensors` are eight lists of `count` each, one after the other: weights, their gradients and velocities, biases,
// theirs, and the roots q (m) and s (n, or n + 1 with a bias). Velocities may all be null pointers; so may what belongs
// to a bias. `rates` are four lists: the rates of weights, what is kept of those, and the same of biases. Sums are those
// of the gradients' squares, or, `of_averages`, of what moves the weights, and no factor is raised then. Returns 0 and
// changes nothing if the squares of a row add up to more than `greatest`, or to NaN.
int neurms_gradient_steps(int64_t count, float* const* tensors, const int64_t* m, const int64_t* n,
                          const int64_t* widths, const double* corrections, const float* rates, double beta,
                          double kappa, double damping, double mu, int nesterov, int of_averages, double greatest,
                          int threads) {
  float* const* const weights = tensors;
  float* const* const gradients = tensors + count;
  float* const* const velocities = tensors + 2 * count;
  float* const* const biases = tensors + 3 * count;
  float* const* const bias_gradients = tensors + 4 * count;
  float* const* const bias_velocities = tensors + 5 * count;
  float* const* const q = tensors + 6 * count;
  float* const* const s = tensors + 7 * count;

  // Squares added up by row and by column, of the bias behind those of the matrix.
  std::vector<double> sums(total(count, m) + total(count, widths));
  std::vector<double*> rows(count), columns(count), last(count);
  double* sum = sums.data();
  for (int64_t k = 0; k < count; ++k) {
    rows[k] = sum, columns[k] = sum + m[k], sum += m[k] + widths[k];
    last[k] = widths[k] > n[k] ? columns[k] + n[k] : nullptr;
  }
  // What moves a weight is the average that its gradient g makes of its velocity v, (1 - mu) g + mu v; or Nesterov's.
  const double fresh = 1.0 - mu;
  const double of_gradient = nesterov ? fresh * (1.0 + mu) : fresh, of_velocity = nesterov ? mu * mu : mu;
  float* const* const mixed = of_averages ? velocities : nullptr;
  float* const* const bias_mixed = of_averages ? bias_velocities : nullptr;
  neurms_square_sums(count, gradients, mixed, of_gradient, of_velocity, m, n, rows.data(), columns.data(), threads);
  neurms_column_squares(count, bias_gradients, bias_mixed, of_gradient, of_velocity, m, rows.data(), last.data());
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < m[k]; ++i)
      if (!(rows[k][i] <= greatest)) return 0;

  // Factors of rows, of columns, and of biases.
  std::vector<float> factors(2 * total(count, m) + total(count, widths));
  std::vector<float*> left(count), right(count);
  float* next = factors.data();
  for (int64_t k = 0; k < count; ++k) left[k] = next, right[k] = next + m[k], next += m[k] + widths[k];
  neurms_gradient_factors(count, rows.data(), columns.data(), q, s, m, widths, corrections, beta, kappa, damping,
                          of_averages, q, s, left.data(), right.data());

  std::vector<float*> w(weights, weights + count), v(velocities, velocities + count);
  std::vector<const float*> g(gradients, gradients + count), l(left.begin(), left.end()), r(right.begin(), right.end());
  std::vector<int64_t> by_rows(m, m + count), by_columns(n, n + count);
  std::vector<float> rate(rates, rates + count), decay(rates + count, rates + 2 * count);
  for (int64_t k = 0; k < count; ++k) {
    if (biases[k] == nullptr) continue;
    // A vector is one row, whose elements have factors of their own.
    float* const own = next;
    next += m[k];
    for (int64_t i = 0; i < m[k]; ++i) own[i] = left[k][i] * right[k][n[k]];
    w.push_back(biases[k]), g.push_back(bias_gradients[k]), v.push_back(bias_velocities[k]);
    l.push_back(nullptr), r.push_back(own);
    by_rows.push_back(1), by_columns.push_back(m[k]);
    rate.push_back(rates[2 * count + k]), decay.push_back(rates[3 * count + k]);
  }
  neurms_apply_updates(static_cast<int64_t>(w.size()), w.data(), g.data(), v.data(), by_rows.data(), by_columns.data(),
                       l.data(), r.data(), rate.data(), decay.data(), static_cast<float>(mu),
                       static_cast<float>(fresh), mu == 0, mu != 0, nesterov, nullptr, threads);
  return 1;
}

}  // extern "C"

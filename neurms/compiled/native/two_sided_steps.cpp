// RACS's step of many matrices in one call: fit, bound on growth and moves, as Python would ask for them.

#include "common.h"

namespace {

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

}  // namespace

extern "C" {

// `tensors` are five lists of `count` each, one after the other: weights, gradients, the averages q (m) and s (n), and
// the last norm. With `rounds` of power iteration; 0 is plain sums, less is one round from s. Returns 0 and changes
// nothing if an average or a norm would not be finite.
int neurms_two_sided_steps(int64_t count, float* const* tensors, const int64_t* m, const int64_t* n,
                           const int64_t* steps, const float* corrections, const double* rates, const float* decays,
                           double beta, int rounds, float tolerance, double gamma, int threads) {
  float* const* const weights = tensors;
  float* const* const gradients = tensors + count;
  float* const* const q = tensors + 2 * count;
  float* const* const s = tensors + 3 * count;
  float* const* const phis = tensors + 4 * count;
  int64_t length = 0;
  for (int64_t k = 0; k < count; ++k) length += m[k] + n[k];

  std::vector<float> averages(length), factors(length), fresh_norms(count), rate(count);
  std::vector<float*> new_q(count), new_s(count), left(count), right(count), velocities(count, nullptr);
  const std::vector<int64_t> turned(count, 0);
  std::vector<double> norms(count);
  for (int64_t k = 0, next = 0; k < count; next += m[k] + n[k], ++k) {
    new_q[k] = averages.data() + next, new_s[k] = new_q[k] + m[k];
    left[k] = factors.data() + next, right[k] = left[k] + m[k];
  }
  if (rounds > 0)
    neurms_two_sided_scales(count, gradients, m, n, turned.data(), rounds, tolerance, static_cast<float>(1.0 - beta),
                            corrections, q, s, new_q.data(), new_s.data(), left.data(), right.data(), norms.data(),
                            threads);
  else
    neurms_two_sided_once(count, gradients, m, n, turned.data(), corrections, beta, rounds != 0, q, s, new_q.data(),
                          new_s.data(), left.data(), right.data(), norms.data(), threads);
  for (int64_t k = 0; k < count; ++k) fresh_norms[k] = static_cast<float>(norms[k]);
  if (!all_finite(averages) || !all_finite(fresh_norms)) return 0;

  for (int64_t k = 0; k < count; ++k) {
    std::copy(new_q[k], new_q[k] + m[k], q[k]);
    std::copy(new_s[k], new_s[k] + n[k], s[k]);
    const double size = fresh_norms[k], last = *phis[k];
    const double eta = last == 0 || steps[k] == 1 ? 1.0 : gamma / std::max(size / last, gamma);
    *phis[k] = static_cast<float>(eta * size);
    rate[k] = static_cast<float>(static_cast<float>(eta) * rates[k]);
  }
  neurms_apply_updates(count, weights, gradients, velocities.data(), m, n, left.data(), right.data(), rate.data(),
                       decays, 0.0f, 1.0f, 1, 0, 0, nullptr, threads);
  return 1;
}

}  // extern "C"

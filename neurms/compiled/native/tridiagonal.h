// Eigenvalues of many small tridiagonal matrices at once, one in each lane, and their eigenvectors applied to a vector
// without being formed: the QL iteration turns the vector along, and its rotations, kept, turn it back.

#pragma once

#include "common.h"

namespace {

constexpr int kUnits = 16;               // matrices at once: enough to hide the iteration's chains of roots, divisions
constexpr int kSweeps = 60;              // QL iterations for one eigenvalue; two are usual
constexpr double kNegligible = 0x1p-40;  // of a matrix's largest entry

// One number for each unit, of each entry of a tridiagonal matrix or of a vector.
typedef double Units[kUnits];

// The rotations of a QL iteration, in the order in which they were made.
struct Rotations {
  struct Sweep {
    int last, top;  // it turned the planes (i, i + 1) for i from top - 1 down to last
  };
  std::vector<Sweep> sweeps;
  std::vector<double> pairs;  // cosines and sines, kUnits of each

  void clear() { sweeps.clear(), pairs.clear(); }

  double* next() {
    pairs.resize(pairs.size() + 2 * kUnits);
    return pairs.data() + pairs.size() - 2 * kUnits;
  }

  // z <- Z z, where T = Z diag(lambda) Z^T and the iteration made Z^T z of what it was given.
  void turn_back(Units* z) const {
    const double* pair = pairs.data() + pairs.size();
    for (size_t number = sweeps.size(); number-- > 0;)
      for (int i = sweeps[number].last; i < sweeps[number].top; ++i) {
        pair -= 2 * kUnits;
#pragma omp simd
        for (int u = 0; u < kUnits; ++u) {
          const double c = pair[u], s = pair[kUnits + u], low = z[i][u], high = z[i + 1][u];
          z[i][u] = c * low + s * high;
          z[i + 1][u] = c * high - s * low;
        }
      }
  }
};

// Eigenvalues of n x n tridiagonal matrices (diagonals d, subdiagonals e) in place of d, by the implicit QL iteration
// with every unit at the same eigenvalue; units that are through get rotations by nothing. With `rotations`, z becomes
// Z^T z. Returns whether all converged.
bool diagonalise(Units* d, Units* e, Units* z, int n, Rotations* rotations) {
  Units least, end, at_end, g, s, c, p;
  for (int u = 0; u < kUnits; ++u) least[u] = 0;
  for (int i = 0; i < n; ++i)
    for (int u = 0; u < kUnits; ++u)
      least[u] = std::max(least[u], std::max(std::abs(d[i][u]), i + 1 < n ? std::abs(e[i][u]) : 0.0));
  for (int u = 0; u < kUnits; ++u) least[u] *= kNegligible;
  for (int l = 0; l + 1 < n; ++l) {
    int sweep = 0;
    for (;; ++sweep) {
      // Where the block that begins at l ends: at the first subdiagonal entry that is as good as zero. (Here and below
      // everything is computed, then chosen from: a branch, even around a load, would not be vectorised.)
#pragma omp simd
      for (int u = 0; u < kUnits; ++u) end[u] = n - 1, at_end[u] = d[n - 1][u];
      for (int i = n - 2; i >= l; --i) {
        const double at = i;
#pragma omp simd
        for (int u = 0; u < kUnits; ++u) {
          const double here = d[i][u], before = at_end[u], later = end[u], size = std::abs(e[i][u]), none = least[u];
          end[u] = size <= none ? at : later;
          at_end[u] = size <= none ? here : before;
        }
      }
      int top = l;
      for (int u = 0; u < kUnits; ++u) top = std::max(top, static_cast<int>(end[u]));
      if (top == l) break;
      if (sweep == kSweeps) return false;
#pragma omp simd
      for (int u = 0; u < kUnits; ++u) {
        const double stored = e[l][u], below = end[u] > l ? stored : 1.0;
        const double half = (d[l + 1][u] - d[l][u]) / (2.0 * below);
        const double root = std::sqrt(half * half + 1.0);
        g[u] = at_end[u] - d[l][u] + below / (half + std::copysign(root, half));
        s[u] = c[u] = 1.0, p[u] = 0.0;
      }
      if (rotations) rotations->sweeps.push_back({l, top});
      for (int i = top - 1; i >= l; --i) {
        double* pair = rotations ? rotations->next() : nullptr;
        Units cosine, sine;
#pragma omp simd
        for (int u = 0; u < kUnits; ++u) {
          const double old_g = g[u], old_p = p[u], old_s = s[u], old_c = c[u];
          const double low = d[i][u], high = d[i + 1][u], between = e[i][u], beyond = e[i + 1][u];
          const double f = old_s * between, b = old_c * between;
          const double length = std::sqrt(f * f + old_g * old_g);
          const double inverse = 1.0 / (length + 1e-300);
          const double sn = f * inverse, ratio = old_g * inverse, cs = length > 0 ? ratio : 1.0;
          const double above = high - old_p;
          const double mixed = (low - above) * sn + 2.0 * cs * b;
          const double step = sn * mixed, moved = above + step, new_g = cs * mixed - b;
          const double kept = i + 1 < end[u] ? length : 0.0;
          const bool turns = i < end[u];
          d[i + 1][u] = turns ? moved : high;
          e[i + 1][u] = turns ? kept : beyond;
          g[u] = turns ? new_g : old_g;
          p[u] = turns ? step : old_p;
          s[u] = turns ? sn : old_s;
          c[u] = turns ? cs : old_c;
          cosine[u] = turns ? cs : 1.0;
          sine[u] = turns ? sn : 0.0;
        }
        if (!rotations) continue;
#pragma omp simd
        for (int u = 0; u < kUnits; ++u) {
          const double low = z[i][u], high = z[i + 1][u];
          z[i + 1][u] = sine[u] * low + cosine[u] * high;
          z[i][u] = cosine[u] * low - sine[u] * high;
          pair[u] = cosine[u], pair[kUnits + u] = sine[u];
        }
      }
#pragma omp simd
      for (int u = 0; u < kUnits; ++u) {
        const double low = d[l][u], between = e[l][u];
        const bool turned = end[u] > l;
        d[l][u] = turned ? low - p[u] : low;
        e[l][u] = turned ? g[u] : between;
      }
    }
  }
  return true;
}

}  // namespace

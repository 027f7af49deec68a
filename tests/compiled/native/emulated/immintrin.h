// The instructions of update_gemm.cpp in plain C++, to be found instead of the compiler's own header: what its
// engines compute, and which memory they touch, can be tested on a processor that has neither of them.
//
// Written from the operations in Intel's Software Developer's Manual, volume 2. What would fault there aborts here.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

// Before `syscall` has another meaning: the system grants the tiles that it does not know.
#include <sys/syscall.h>
#include <unistd.h>
#define syscall(...) 0L

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef uint16_t __mmask16;

namespace emulated {

template <typename Lane, typename Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(Lane);
  Lane lane[count] = {};
  Lanes() = default;
  explicit Lanes(const Vector& v) { std::memcpy(lane, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};

template <typename Vector>
Vector aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) std::abort();
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline uint32_t bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b;
}

inline float number(uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}

// Both instructions take denormal numbers for zeros.
inline float flushed(float x) { return (bits(x) & 0x7f800000u) ? x : number(bits(x) & 0x80000000u); }

inline uint16_t rounded(float x) {
  const uint32_t b = bits(flushed(x));
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(b >> 16 | 0x40);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float widened(uint32_t b) { return flushed(number(b << 16)); }

// One pair of products; the odd one first.
inline float plus_pair(float sum, uint32_t x, uint32_t y) {
  const float odd = flushed(sum + widened(x >> 16) * widened(y >> 16));
  return flushed(odd + widened(x & 0xffff) * widened(y & 0xffff));
}

struct Tiles {
  bool configured = false;
  uint32_t words[8][16][16];
  uint32_t (*of(int tile))[16] {
    if (!configured) std::abort();
    return words[tile];
  }
};

inline thread_local Tiles tiles;

}  // namespace emulated

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m256i _mm256_setzero_si256() { return __m256i{}; }
inline __m512 _mm512_load_ps(const void* p) { return emulated::aligned<__m512>(p); }
inline __m512i _mm512_load_si512(const void* p) { return emulated::aligned<__m512i>(p); }
inline void _mm512_store_ps(void* p, const __m512& v) {
  emulated::aligned<__m512>(p);
  std::memcpy(p, &v, sizeof v);
}
inline void _mm512_store_si512(void* p, const __m512i& v) {
  emulated::aligned<__m512i>(p);
  std::memcpy(p, &v, sizeof v);
}

template <typename Vector, typename Lane>
Vector emulated_masked(__mmask16 mask, const Lane* p) {
  emulated::Lanes<Lane, Vector> out;
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) out.lane[i] = p[i];
  return out.vector();
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) { return emulated_masked<__m512>(mask, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const uint16_t* p) { return emulated_masked<__m256i>(mask, p); }

inline __m512i _mm512_castsi256_si512(const __m256i& a) {
  __m512i v{};
  std::memcpy(&v, &a, sizeof a);
  return v;
}
inline __m512i _mm512_inserti64x4(const __m512i& a, const __m256i& b, int half) {
  __m512i v = a;
  std::memcpy(reinterpret_cast<char*>(&v) + half * sizeof b, &b, sizeof b);
  return v;
}
inline __m512i _mm512_set1_epi32(int x) {
  emulated::Lanes<int32_t, __m512i> out;
  for (int32_t& lane : out.lane) lane = x;
  return out.vector();
}
inline __m512i _mm512_permutexvar_epi16(const __m512i& order, const __m512i& a) {
  const emulated::Lanes<uint16_t, __m512i> from(a), by(order);
  emulated::Lanes<uint16_t, __m512i> out;
  for (int i = 0; i < 32; ++i) out.lane[i] = from.lane[by.lane[i] & 31];
  return out.vector();
}

// In each 128 bits the lanes of a and b in turn, from the lower or the upper half.
template <typename Lane>
__m512i emulated_unpack(const __m512i& a, const __m512i& b, bool upper) {
  const emulated::Lanes<Lane, __m512i> one(a), two(b);
  emulated::Lanes<Lane, __m512i> out;
  constexpr int kQuarter = 16 / sizeof(Lane);
  for (int i = 0; i < out.count; ++i) {
    const int from = i / kQuarter * kQuarter + i % kQuarter / 2 + (upper ? kQuarter / 2 : 0);
    out.lane[i] = i % 2 ? two.lane[from] : one.lane[from];
  }
  return out.vector();
}
inline __m512i _mm512_unpacklo_epi32(const __m512i& a, const __m512i& b) { return emulated_unpack<int32_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi32(const __m512i& a, const __m512i& b) { return emulated_unpack<int32_t>(a, b, true); }
inline __m512i _mm512_unpacklo_epi64(const __m512i& a, const __m512i& b) { return emulated_unpack<int64_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi64(const __m512i& a, const __m512i& b) { return emulated_unpack<int64_t>(a, b, true); }

inline __m512i _mm512_shuffle_i32x4(const __m512i& a, const __m512i& b, int which) {
  __m512i out{};
  for (int i = 0; i < 4; ++i) {
    const char* from = reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * (which >> 2 * i & 3);
    std::memcpy(reinterpret_cast<char*>(&out) + 16 * i, from, 16);
  }
  return out;
}

inline __m512bh _mm512_cvtne2ps_pbh(const __m512& upper, const __m512& lower) {
  __m512bh out{};
  for (int i = 0; i < 16; ++i) out[i] = emulated::rounded(lower[i]), out[16 + i] = emulated::rounded(upper[i]);
  return out;
}
inline __m512 _mm512_dpbf16_ps(const __m512& sums, const __m512bh& a, const __m512bh& b) {
  const emulated::Lanes<uint32_t, __m512bh> x(a), y(b);
  __m512 out{};
  for (int i = 0; i < 16; ++i) out[i] = emulated::plus_pair(sums[i], x.lane[i], y.lane[i]);
  return out;
}

inline __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  __m512 out{};
  for (int i = 0; i < 16; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
}

#ifndef _XMMINTRIN_H_INCLUDED  // by common.h, for what every x86-64 has
enum { _MM_HINT_T1 };
inline void _mm_prefetch(const char*, int) {}
#endif

inline void _tile_loadconfig(const void* layout) {
  const uint8_t* b = static_cast<const uint8_t*>(layout);
  bool whole = b[0] == 1;
  for (int tile = 0; tile < 8; ++tile) whole &= b[16 + 2 * tile] == 64 && b[17 + 2 * tile] == 0 && b[48 + tile] == 16;
  if (!whole) std::abort();
  emulated::tiles.configured = true;
}
inline void _tile_release() { emulated::tiles.configured = false; }
inline void _tile_zero(int tile) { std::memset(emulated::tiles.of(tile), 0, 1024); }
inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(emulated::tiles.of(tile)[i], static_cast<const char*>(base) + i * stride, 64);
}
inline void _tile_stored(int tile, void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(base) + i * stride, emulated::tiles.of(tile)[i], 64);
}
inline void _tile_dpbf16ps(int sums, int left, int right) {
  auto *c = emulated::tiles.of(sums), *a = emulated::tiles.of(left), *b = emulated::tiles.of(right);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j)
        c[i][j] = emulated::bits(emulated::plus_pair(emulated::number(c[i][j]), a[i][k], b[k][j]));
}

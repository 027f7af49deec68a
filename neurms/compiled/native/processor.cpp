// Which of toolchain.py's levels this processor, and the system on it, can run (the library of the lowest level is the
// one that is asked), and how it multiplies float32.

#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__GNUC__)
#include <cpuid.h>
#define NEURMS_WIDE 1
#endif

extern "C" {

// Its number, counted from 0. Levels are for g++: clang builds for the processor at hand alone.
int neurms_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v3")) return 0;
  if (!__builtin_cpu_supports("x86-64-v4")) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

// Whether vectors of 512 bits multiply float32 faster than MKL, torch's BLAS library: it keeps to 256 bits on
// processors that are not Intel's, and AMD's begin 512 bits in one cycle from Zen 5 on (family 26). Not in a library that
// is built for less, whose own products have no such vectors.
int neurms_wide_float32() {
#ifdef NEURMS_WIDE
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512f")) return 0;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
  return family >= 26;
#else
  return 0;
#endif
}

}  // extern "C"

// Which of toolchain.py's levels this processor, and the system on it, can run. The library of the lowest level is the
// one that is asked.

#include "kernels.h"

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

}  // extern "C"

// Numbers of float32 and of bfloat16, which is the upper half of a float32's bits.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits(float x) {
  uint32_t found;
  std::memcpy(&found, &x, sizeof x);
  return found;
}
inline uint32_t bits(uint16_t x) { return static_cast<uint32_t>(x) << 16; }
inline float value(float x) { return x; }
inline float value(uint16_t x) {
  const uint32_t wide = bits(x);
  float found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}

}  // namespace

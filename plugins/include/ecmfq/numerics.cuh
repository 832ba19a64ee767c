// numerics.cuh - every floating-point rule of the operator, in one place. tests/kernels/reference.py is the same in NumPy, and the
// two agree bit for bit because only correctly rounded fp32 operations in a fixed order are used.
#pragma once

#include "ecmfq/device.cuh"

namespace ecmfq {

// scale = max(absmax(row), kTiny) / 127. It keeps an all-zero row finite; no fp16 value but zero is as small.
constexpr float kTiny = 1e-30f;
constexpr int kQuantMax = 127;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

// The bits of |x|. As integers they order like the values, with infinity and then NaN on top: one integer maximum over a row finds
// its absmax and whether it is finite.
ECMFQ_DEVICE uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

// A row with a NaN or an infinity gets the scale NaN (and the integers 0), which makes every output of that row NaN and no other's.
ECMFQ_DEVICE float row_scale(uint32_t absmax_bits) {
  if (absmax_bits >= kInfinityBits) return bits_to_float(kNanBits);
  const float absmax = bits_to_float(absmax_bits);
  return div_rn(absmax > kTiny ? absmax : kTiny, static_cast<float>(kQuantMax));
}

// round-half-even(x / scale) in [-127, 127]; `finite` is the row's.
ECMFQ_DEVICE int32_t quantize_value(float x, float scale, bool finite) {
  if (!finite) return 0;
  const int32_t q = round_to_int(div_rn(x, scale));
  return q > kQuantMax ? kQuantMax : (q < -kQuantMax ? -kQuantMax : q);
}

// (float(accumulator) * activation scale) * channel scale, in this order.
ECMFQ_DEVICE float dequantize(int32_t accumulator, float act_scale, float channel_scale) {
  return mul_rn(mul_rn(int_to_float(accumulator), act_scale), channel_scale);
}

// exp(x) for x clamped to [-87, 88]; relative error below 2 ulp. Cephes' polynomial, without fused multiply-add, so that NumPy
// can repeat it exactly; library exp differs between CPU and GPU.
ECMFQ_DEVICE float exp_clamped(float x) {
  x = x > 88.0f ? 88.0f : x;  // comparisons are false for NaN, which passes through
  x = x < -87.0f ? -87.0f : x;
  if (!(x == x)) return x;
  const int32_t n = round_to_int(mul_rn(x, 1.44269504f));
  const float nf = int_to_float(n);
  float r = add_rn(x, mul_rn(nf, -0.693359375f));     // exact: the constant has 9 bits
  r = add_rn(r, mul_rn(nf, 2.12194440e-4f));          // ln 2 = 0.693359375 - 2.1219444e-4
  float p = 1.9875691500e-4f;
  p = add_rn(mul_rn(p, r), 1.3981999507e-3f);
  p = add_rn(mul_rn(p, r), 8.3334519073e-3f);
  p = add_rn(mul_rn(p, r), 4.1665795894e-2f);
  p = add_rn(mul_rn(p, r), 1.6666665459e-1f);
  p = add_rn(mul_rn(p, r), 5.0000001201e-1f);
  p = add_rn(add_rn(mul_rn(p, mul_rn(r, r)), r), 1.0f);
  return mul_rn(p, bits_to_float(static_cast<uint32_t>(n + 127) << 23));  // n in [-126, 127]
}

ECMFQ_DEVICE float silu(float x) { return div_rn(x, add_rn(1.0f, exp_clamped(-x))); }

// 16-bit floats as bits; one type each, so that overloads and templates can tell them apart.
struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

ECMFQ_DEVICE float to_float(float v) { return v; }
ECMFQ_DEVICE float to_float(Float16 v) { return half_to_float(v.bits); }
ECMFQ_DEVICE float to_float(BFloat16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

ECMFQ_DEVICE void from_float(float v, Float16& out) { out.bits = float_to_half(v); }
ECMFQ_DEVICE void from_float(float v, BFloat16& out) {
  const uint32_t bits = float_bits(v);
  if ((bits & 0x7fffffffu) > kInfinityBits) {
    out.bits = 0x7fc0;
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // half to even; overflow becomes infinity
}

}  // namespace ecmfq

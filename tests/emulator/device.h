// The CUDA and tl:: names that TileLang's generated kernels use, each by its definition in the PTX
// manual or in TileLang's templates. A kernel that uses another name does not compile: add it here.
#pragma once

#include <cmath>
#include <utility>

#include "runtime.h"

#define threadIdx emu::state.thread
#define blockIdx emu::state.block
inline void cudaGridDependencySynchronize() { emu::state.self->may_access = true; }
inline void cudaTriggerProgrammaticLaunchCompletion() {}
#define __syncthreads() emu::block_barrier(__LINE__)
#define __syncwarp() emu::warp_barrier(__LINE__)

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;

// Without the alignment that CUDA gives them: registers here are the compiler's, and accesses to
// memory are checked by Ref.
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint1 { uint x; };
struct uint2 { uint x, y; };
struct uint4 { uint x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint1 make_uint1(uint x) { return {x}; }
inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  // To nearest, ties to even; a NaN becomes the one that the hardware makes.
  explicit bfloat16_t(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  explicit bfloat16_t(double value) : bfloat16_t(float(value)) {}
  explicit bfloat16_t(int value) : bfloat16_t(float(value)) {}
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};
struct __nv_bfloat162 { bfloat16_t x, y; };
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
inline uint __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return uint(y.bits) << 16 | x.bits; }
inline uint __pack_half2(bfloat16_t x, bfloat16_t y) { return __pack_nv_bfloat162(x, y); }

// By the builtins behind <immintrin.h>, which is half of what a kernel's compilation reads.
inline uint16_t half_bits(float value) {
  typedef float Floats __attribute__((vector_size(16)));
  typedef short Halves __attribute__((vector_size(16)));
  return ((Halves)__builtin_ia32_vcvtps2ph(Floats{value}, 0))[0];
}
inline float float_of_half(uint16_t bits) {
  typedef short Halves __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps(Halves{short(bits)})[0];
}

struct half_t {
  uint16_t bits;
  half_t() = default;
  explicit half_t(float value) {
    bits = value != value ? 0x7fff : half_bits(value);
  }
  explicit half_t(double value) : half_t(float(value)) {}
  explicit half_t(int value) : half_t(float(value)) {}
  operator float() const { return float_of_half(bits); }
};
struct half2 { half_t x, y; };
inline float2 __half22float2(half2 v) { return {float(v.x), float(v.y)}; }
inline half2 __float22half2_rn(float2 v) { return {half_t(v.x), half_t(v.y)}; }
inline uint __pack_half2(half_t x, half_t y) { return uint(y.bits) << 16 | x.bits; }

// CUDA's max and min return the operand that is not NaN.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline float __uint_as_float(uint bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <typename T>
T __shfl_xor_sync(uint, T value, int mask, int width = 32, int line = __builtin_LINE()) {
  if (width != 32) emu::fail("a shuffle within %d lanes is not emulated", width);
  auto slots = emu::exchange(&value, sizeof value, line);
  memcpy(&value, slots[(emu::state.self->index % 32) ^ mask], sizeof value);
  return value;
}

// The function that `_backward` brings along.
inline int after_previous(int token) {
  cudaGridDependencySynchronize();
  return token;
}

// The functions that `_push` brings along.
inline void expect_bytes(emu::Mbarrier &full, uint32_t bytes) {
  full.bytes += bytes;
  full.arrive();
}
template <typename T>
void push_vector(emu::Address<T> to, const float *from, int rank, emu::Mbarrier &full) {
  emu::push_registers({to.buffer, to.at}, from, rank, 16, full);
}

// An address is no number here.
template <typename T> emu::Address<T> smem_ptr_to_uint(emu::Address<T> address) { return address; }
inline emu::Mbarrier &smem_ptr_to_uint(emu::Mbarrier *full) { return *full; }

namespace cute {

template <typename T>
void store_shared_remote(uint32_t value, emu::Address<T> to, emu::Mbarrier &full, uint32_t rank) {
  emu::push_registers({to.buffer, to.at}, &value, rank, sizeof value, full);
}

}  // namespace cute

namespace tl {

enum class DataType { kBFloat16, kTensorFloat32, kFloat32 };

// rcp.approx.ftz: its last bit differs from this.
inline float fast_rcp(float x) { return 1 / x; }
inline void fence_proxy_async() {}
inline void fence_barrier_init() {}
// The sibling without wgmma has left the products when it comes here.
template <int pending> void wait_wgmma() {}

// Registers are the compiler's here.
template <uint32_t count> void warpgroup_reg_alloc() {}
template <uint32_t count> void warpgroup_reg_dealloc() {}

// The one thread of the CTA that sets up mbarriers.
template <int threads> bool tl_shuffle_elect() {
  static_assert(threads == 0, "another election is not emulated yet");
  return emu::state.self->index == 0;
}
inline void cluster_sync(int line = __builtin_LINE()) { emu::cluster_barrier(line); }
template <typename T, typename U>
void tma_store_cluster(emu::Address<T> to, emu::Address<U> from, int rank, uint32_t bytes,
                       emu::Mbarrier &full) {
  emu::push({to.buffer, to.at}, {from.buffer, from.at}, rank, bytes, full);
}

struct SumOp { template <typename T> T operator()(T a, T b) { return a + b; } };
struct MaxOp { template <typename T> T operator()(T a, T b) { return ::max(a, b); } };
struct MinOp { template <typename T> T operator()(T a, T b) { return ::min(a, b); } };

template <typename T, typename Op>
T butterfly(T value, Op op, int from, int to, int line) {
  for (int mask = from; mask >= to; mask /= 2)
    value = op(value, __shfl_xor_sync(~0u, value, mask, 32, line));
  return value;
}
template <typename T> T warp_reduce_sum(T value, int line = __builtin_LINE()) {
  return butterfly(value, SumOp(), 16, 1, line);
}
template <typename T> T warp_reduce_max(T value, int line = __builtin_LINE()) {
  return butterfly(value, MaxOp(), 16, 1, line);
}
template <typename T> T warp_reduce_min(T value, int line = __builtin_LINE()) {
  return butterfly(value, MinOp(), 16, 1, line);
}

struct SyncThreadsBarrier {};
template <int> struct NamedBarrier {};

// Over `threads` neighbours, `scale` apart: within a warp only; wider ones go through memory.
template <typename Op, int threads, int scale, int offset = 0, typename Barrier = SyncThreadsBarrier>
struct AllReduce {
  static_assert(threads <= 32, "AllReduce across warps is not emulated yet");
  template <typename T> static T run(T value, int line = __builtin_LINE()) {
    return butterfly(value, Op(), threads / 2, scale, line);
  }
};

inline void __sync_thread_partial(int id, int count, int line = __builtin_LINE()) {
  emu::named_barrier(id, count, line);
}

template <int N, typename T, typename U>
void cp_async_gs_conditional(emu::Address<T> to, emu::Address<U> from, bool condition) {
  emu::start_copy({to.buffer, to.at}, {from.buffer, from.at}, N, condition ? N : 0);
}
template <int N, typename T, typename U>
void cp_async_gs(emu::Address<T> to, emu::Address<U> from) {
  cp_async_gs_conditional<N>(to, from, true);
}
inline void cp_async_commit() { emu::commit_copies(); }
template <int N> void cp_async_wait() { emu::wait_copies(N); }

// Lane 8 * i + r gives the address of row r of matrix i, 8 x 8 of 16 bits. Lane l holds of each
// matrix the elements 2 * (l % 4) and the next of row l / 4; transposed: of column l / 4.
template <int count, bool transposed, typename T>
void load_matrix(emu::Address<T> row, void *registers, int line) {
  const emu::Address<uint16_t> mine = emu::cast<uint16_t>(row);
  auto slots = emu::exchange(&mine, sizeof mine, line);
  const int lane = emu::state.self->index % 32;
  uint16_t *out = (uint16_t *)registers;
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < 2; ++k) {
      const int r = transposed ? 2 * (lane % 4) + k : lane / 4;
      const int c = transposed ? lane / 4 : 2 * (lane % 4) + k;
      emu::Address<uint16_t> from;
      memcpy(&from, slots[8 * i + r], sizeof from);
      if ((from.at - emu::state.cta->shared) % 16) emu::fail("ldmatrix row is not aligned to 16 bytes");
      out[2 * i + k] = from[c].load(true);
    }
}
template <bool transposed, typename T, typename... V>
void store_matrix(int line, emu::Address<T> row, V... values) {
  const emu::Address<uint16_t> mine = emu::cast<uint16_t>(row);
  auto slots = emu::exchange(&mine, sizeof mine, line);
  const int lane = emu::state.self->index % 32;
  const uint words[] = {uint(values)...};
  for (int i = 0; i < int(sizeof...(values)); ++i)
    for (int k = 0; k < 2; ++k) {
      const int r = transposed ? 2 * (lane % 4) + k : lane / 4;
      const int c = transposed ? lane / 4 : 2 * (lane % 4) + k;
      emu::Address<uint16_t> to;
      memcpy(&to, slots[8 * i + r], sizeof to);
      if ((to.at - emu::state.cta->shared) % 16) emu::fail("stmatrix row is not aligned to 16 bytes");
      to[c] = uint16_t(words[i] >> 16 * k);
    }
}
#define EMU_LOAD_MATRIX(name, count, transposed)                                      \
  template <typename T>                                                               \
  void name(emu::Address<T> row, void *registers, int line = __builtin_LINE()) {      \
    load_matrix<count, transposed>(row, registers, line);                             \
  }
EMU_LOAD_MATRIX(ptx_ldmatrix_x1, 1, false)
EMU_LOAD_MATRIX(ptx_ldmatrix_x2, 2, false)
EMU_LOAD_MATRIX(ptx_ldmatrix_x4, 4, false)
EMU_LOAD_MATRIX(ptx_ldmatrix_x1_trans, 1, true)
EMU_LOAD_MATRIX(ptx_ldmatrix_x2_trans, 2, true)
EMU_LOAD_MATRIX(ptx_ldmatrix_x4_trans, 4, true)
#define ptx_stmatrix_m8n8_x4(...) store_matrix<false>(__LINE__, __VA_ARGS__)
#define ptx_stmatrix_m8n8_x2(...) store_matrix<false>(__LINE__, __VA_ARGS__)
#define ptx_stmatrix_m8n8_x1(...) store_matrix<false>(__LINE__, __VA_ARGS__)
#define ptx_stmatrix_m8n8_x4_trans(...) store_matrix<true>(__LINE__, __VA_ARGS__)

// Element k of row or column `rc` of an operand that lies across the warp in the registers of
// mma.m16n8k16 (bfloat16) or mma.m16n8k8 (TF32); 4 registers a lane for A, 2 for B.
template <DataType type> float element(char (*slots)[64], int word, int rc, int k) {
  uint bits[6];
  if constexpr (type == DataType::kBFloat16) {
    memcpy(bits, slots[rc % 8 * 4 + k % 8 / 2], sizeof bits);
    bfloat16_t value;
    value.bits = uint16_t(bits[word] >> 16 * (k % 2));
    return value;
  } else {
    memcpy(bits, slots[rc % 8 * 4 + k % 4], sizeof bits);
    const uint tf32 = bits[word] & ~0x1fffu;
    float value;
    memcpy(&value, &tf32, 4);
    return value;
  }
}

// The exact sum of the products and C, rounded once to float32. Tensor cores truncate instead, some
// bits further down.
template <DataType A, DataType B, DataType C, int M, int N, int K, bool, bool>
void mma_sync(float *c, const uint *a, const uint *b, int line = __builtin_LINE()) {
  static_assert(A == B && C == DataType::kFloat32 && M == 16 && N == 8);
  static_assert(K == (A == DataType::kBFloat16 ? 16 : 8));
  const uint mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  auto slots = emu::exchange(mine, sizeof mine, line);
  const int lane = emu::state.self->index % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < K; ++k) {
      const int half = k / (K / 2);
      sum += double(element<A>(slots, i / 2 + 2 * half, row, k)) *
             double(element<A>(slots, 4 + half, column, k));
    }
    c[i] = float(sum);
  }
}

}  // namespace tl

// The PTX the kernels stand on, one function each. No header is included: NVRTC needs none.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Keeps a value of the whole loop in its register: the compiler would rather compute it in every round.
static __device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)); }
static __device__ __forceinline__ void keep(const u8*& x) { asm volatile("" : "+l"(x)); }

static __device__ __forceinline__ float half_to_float(u32 bits) {
  float x;
  asm("{.reg .b16 h, z; mov.b32 {h, z}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
  return x;
}

static __device__ __forceinline__ float high_half_to_float(u32 bits) {
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
  return x;
}

// (low, high) -> one register of two fp16.
static __device__ __forceinline__ u32 pack_half2(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

static __device__ __forceinline__ u32 half2_mul(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

static __device__ __forceinline__ u32 half2_add(u32 a, u32 b) {
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

static __device__ __forceinline__ u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

static __device__ __forceinline__ u32 low_twice(u32 x) {
  u32 twice;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(twice) : "r"(x));
  return twice;
}

static __device__ __forceinline__ u32 high_twice(u32 x) {
  u32 twice;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(twice) : "r"(x));
  return twice;
}

// a * (b.low, b.low) and a * (b.high, b.high): the broadcast is an operand modifier of HMUL2.
static __device__ __forceinline__ u32 half2_mul_low(u32 a, u32 b) {
  u32 product;
  asm("{.reg .b16 l, h; .reg .b32 w; mov.b32 {l, h}, %2; mov.b32 w, {l, l};"
      " mul.rn.f16x2 %0, %1, w;}" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

static __device__ __forceinline__ u32 half2_mul_high(u32 a, u32 b) {
  u32 product;
  asm("{.reg .b16 l, h; .reg .b32 w; mov.b32 {l, h}, %2; mov.b32 w, {h, h};"
      " mul.rn.f16x2 %0, %1, w;}" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Bytes of (b, a) by the nibbles of SELECTOR; bit 3 of a nibble takes the byte's sign, eight times.
template <u32 SELECTOR>
static __device__ __forceinline__ u32 permute_bytes(u32 a, u32 b) {
  u32 permuted;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(permuted) : "r"(a), "r"(b), "n"(SELECTOR));
  return permuted;
}

static __device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 permuted;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(permuted) : "r"(a), "r"(b), "r"(selector));
  return permuted;
}

// (a & b) | c in one instruction, which the compiler makes two of when it knows bits of c.
static __device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 joined;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(joined) : "r"(a), "r"(b), "r"(c));
  return joined;
}

// Bits of `a` outside of `mask`, complements of those of `b` inside.
static __device__ __forceinline__ u32 take_complement(u32 a, u32 b, u32 mask) {
  u32 taken;
  asm("lop3.b32 %0, %1, %2, %3, 0x72;" : "=r"(taken) : "r"(a), "r"(b), "r"(mask));
  return taken;
}

static __device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 8x8 b16 transpose across the warp: row g, columns 2t, 2t+1 -> column g, rows 2t, 2t+1.
static __device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

static __device__ __forceinline__ void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,
                                                   u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
      " {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void mma_16x8x8(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Streamed once: not kept in L1. Not through the read-only path, whose loads know no order.
static __device__ __forceinline__ uint4 load_stream16(const u8* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

static __device__ __forceinline__ uint2 load_stream8(const u8* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

static __device__ __forceinline__ u32 load_stream4(const u8* p) {
  u32 v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

static __device__ __forceinline__ u32 load_stream2(const u8* p) {
  u16 v;
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// Loads before it are issued before anything after it: left alone, the assembler issues them when registers
// are free, which is late.
static __device__ __forceinline__ void loads_first() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

static __device__ __forceinline__ void prefetch_line(const u8* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// No branch: loads are not moved across one, nor the wait for an address before it.
static __device__ __forceinline__ void prefetch_line_if(const u8* p, bool wanted) {
  asm volatile("{.reg .pred w; setp.ne.u32 w, %1, 0; @w prefetch.global.L2 [%0];}" ::"l"(p), "r"(u32(wanted)));
}

// Written by other blocks of this launch: must come from L2.
static __device__ __forceinline__ float4 load_l2_16(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

static __device__ __forceinline__ float2 load_l2_8(const float* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}

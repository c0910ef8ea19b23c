// From coordinates to stored codes, one block of 16 coordinates per thread, exactly as the CPU does it
// (sphkv_codebooks/encoder.py, vector_coder.py): every product, sum, root and quotient is rounded to
// float32 on its own, angles are compared with threshold directions, never computed.
//
// The threads of a vector are neighbouring lanes. What joins blocks (the rotation's larger strides, the
// norm, the pairwise sums of a gain) is symmetric in its two operands, so that after a butterfly of
// shuffles every lane holds the very bits of the recursion.

constexpr int N_BLOCKS = HEAD_DIM / 16;
constexpr float LARGEST_HALF = 65504.f;
constexpr float LARGEST_FLOAT = 3.4028234663852886e38f;
constexpr float DENSE_LIMIT = 65408.f;  // from here on bf16 rounds to 65536, which fp16 fragments do not hold

struct EncodeParams {
  const void* source[2];   // keys, values: rows of HEAD_DIM elements
  long long outer_stride[2], page_stride[2], row_stride[2];  // in elements
  u8* pages;
  const long long* offsets;  // of single rows: byte of each row's page, and the row inside
  const int* rows;
  int* refused;            // 1 as soon as some vector cannot be stored
  long long n_vectors;
  long long page_bytes;
  int pages_per_outer;
  int page_size;
  int type;                // 0 float32, 1 bfloat16, 2 float16
  u32 signs[8];            // of the Hadamard rotation: bit i set flips coordinate i
  float books[N_BOOK_FLOATS];
};

static __device__ __forceinline__ float shuffled(float x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

static __device__ __forceinline__ float radius_of(float first, float second) {
  return __fsqrt_rn(__fadd_rn(__fmul_rn(first, first), __fmul_rn(second, second)));
}

// H diag(signs) x / sqrt(d): strides 1, 2, 4, 8 inside the thread, 16 and up across lanes.
static __device__ __forceinline__ void rotate(float (&x)[16], int block, const EncodeParams& p) {
#if HADAMARD
  const u32 signs = p.signs[block / 2] >> (16 * (block % 2));
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = __uint_as_float(__float_as_uint(x[i]) ^ ((signs >> i) << 31));
#pragma unroll
  for (int stride = 1; stride < 16; stride *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (!(i & stride)) {
        const float upper = x[i], lower = x[i + stride];
        x[i] = __fadd_rn(upper, lower);
        x[i + stride] = __fsub_rn(upper, lower);
      }
#pragma unroll
  for (int distance = 1; distance < N_BLOCKS; distance *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float other = shuffled(x[i], distance);
      x[i] = block & distance ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = __fmul_rn(x[i], HADAMARD_SCALE);
#endif
}

// second / first >= tan(threshold), by cross products; books hold cos and sin of N thresholds.
template <int N>
static __device__ __forceinline__ u32 count_passed(float first, float second, const float* cosine,
                                                   const float* sine) {
  u32 count = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) count += __fmul_rn(second, cosine[i]) >= __fmul_rn(first, sine[i]) ? 1 : 0;
  return count;
}

template <class F>
static __device__ __forceinline__ u32 circle_code(float first, float second, const EncodeParams& p) {
  const bool odd = int(__float_as_uint(first) ^ __float_as_uint(second)) < 0;
  const float across = fabsf(odd ? second : first), along = fabsf(odd ? first : second);
  const int quadrant = (odd ? 1 : 0) + (int(__float_as_uint(second)) < 0 ? 2 : 0);
  if constexpr (F::EVEN_QUADRANTS) {
    // The first threshold of a quadrant is its start, which every pair in it has passed.
    return quadrant * (F::CELLS_1 / 4) + count_passed<F::WIDTH_1 - 1>(across, along, p.books + F::COS_1 + 1, p.books + F::SIN_1 + 1);
  } else {
    int code = int(p.books[F::BEFORE_1 + quadrant]);
    const float* cosine = p.books + F::COS_1 + quadrant * F::WIDTH_1;
    code += count_passed<F::WIDTH_1>(across, along, cosine, cosine + (F::SIN_1 - F::COS_1));
    return u32(code + F::CELLS_1) % F::CELLS_1;
  }
}

// Stored form of a block; `radius` is what the layout packs, `norm` fp16 bits.
struct BlockCodes {
  u32 c1[8], c2[4], c3[2], c4[1];
  u32 radius, norm;
};

// fp16, saturating; bits.
static __device__ __forceinline__ u32 half_bits(float x) {
  return pack_half2(fminf(fmaxf(x, -LARGEST_HALF), LARGEST_HALF), 0.f) & 0xffffu;
}

// 5 exponent and 6 mantissa bits, to nearest, halves up, saturating: the top 11 bits of an fp16.
static __device__ __forceinline__ u32 minifloat_bits(float x) {
  const u32 normal = ((__float_as_uint(x) + (1u << 16)) >> 17) - ((127u - 15u) << 6);
  const u32 subnormal = u32(__fadd_rz(__fmul_rn(x, 1048576.f), 0.5f));
  return min(x < 6.103515625e-05f ? subnormal : normal, 31u * 64u - 1u);
}

// The number to store instead of a norm (or radius): met best by its multiple of the decoded vector.
template <int GAIN>
static __device__ __forceinline__ float folded_gain(float norm, float along, float power) {
  if constexpr (GAIN == 0) return norm;
  const float corrected = GAIN == 1 ? __fdiv_rn(along, power) : __fdiv_rn(__fmul_rn(norm, norm), along);
  return along > 0.f ? corrected : 0.f;
}

// False where a vector cannot be stored.
template <class F>
static __device__ __forceinline__ bool encode_block(BlockCodes& codes, const float (&x)[16],
                                                    const float* tables, const EncodeParams& p) {
  float r1[8], r2[4], r3[2], dot[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    codes.c1[i] = circle_code<F>(x[2 * i], x[2 * i + 1], p);
    r1[i] = radius_of(x[2 * i], x[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes.c2[i] = count_passed<F::CELLS_2 - 1>(r1[2 * i], r1[2 * i + 1], p.books + F::COS_2, p.books + F::SIN_2);
    r2[i] = radius_of(r1[2 * i], r1[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    codes.c3[i] = count_passed<F::CELLS_3 - 1>(r2[2 * i], r2[2 * i + 1], p.books + F::COS_3, p.books + F::SIN_3);
    r3[i] = radius_of(r2[2 * i], r2[2 * i + 1]);
  }
  codes.c4[0] = count_passed<F::CELLS_4 - 1>(r3[0], r3[1], p.books + F::COS_4, p.books + F::SIN_4);
  const float radius = radius_of(r3[0], r3[1]);
  float norm = radius;
#pragma unroll
  for (int distance = 1; distance < N_BLOCKS; distance *= 2) norm = radius_of(norm, shuffled(norm, distance));

  float along = 0.f;
  if constexpr (F::GAIN != 0) {  // <x, decode of the codes at radius 1>
    const auto turned = [&](float left, float right, int book, u32 code, int cells) {
      return __fadd_rn(__fmul_rn(tables[book + code], left), __fmul_rn(tables[book + cells + code], right));
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) dot[i] = turned(x[2 * i], x[2 * i + 1], F::CENTROIDS_1, codes.c1[i], F::CELLS_1);
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[i] = turned(dot[2 * i], dot[2 * i + 1], F::CENTROIDS_2, codes.c2[i], F::CELLS_2);
#pragma unroll
    for (int i = 0; i < 2; ++i) dot[i] = turned(dot[2 * i], dot[2 * i + 1], F::CENTROIDS_3, codes.c3[i], F::CELLS_3);
    along = turned(dot[0], dot[1], F::CENTROIDS_4, codes.c4[0], F::CELLS_4);
  }
  float kept;
  codes.norm = 0;
  if constexpr (F::RADIUS_CELLS != 0) {
    codes.radius = 0;
#pragma unroll
    for (int i = 0; i < F::RADIUS_CELLS - 1; ++i)
      codes.radius += radius >= __fmul_rn(norm, p.books[F::RADIUS_THRESHOLDS + i]) ? 1 : 0;
    float power = 1.f;
    if constexpr (F::GAIN != 0) {
      const float relative = tables[F::RADII + codes.radius];
      along = __fmul_rn(relative, along);
      power = __fmul_rn(relative, relative);
#pragma unroll
      for (int distance = 1; distance < N_BLOCKS; distance *= 2) {
        along = __fadd_rn(along, shuffled(along, distance));
        power = __fadd_rn(power, shuffled(power, distance));
      }
    }
    kept = folded_gain<F::GAIN>(norm, along, power);
    codes.norm = half_bits(kept);
  } else {
    kept = folded_gain<F::GAIN>(radius, along, 1.f);
    codes.radius = F::IS_MINIFLOAT ? minifloat_bits(kept) : half_bits(kept);
  }
  return norm <= LARGEST_FLOAT && kept <= (F::IS_MINIFLOAT ? 65024.f : LARGEST_HALF);
}

// The smallest fp16 scale with 127 scale >= max |x|, then the nearest multiples of it, ties to even:
// residuals are exact, so the codes are those of the float64 quotient.
static __device__ __forceinline__ bool encode_int8(u32 (&words)[4], u32& scale_bits, const float (&x)[16]) {
  float largest = 0.f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
    finite = finite && fabsf(x[i]) <= LARGEST_FLOAT;
  }
#pragma unroll
  for (int distance = 1; distance < N_BLOCKS; distance *= 2) largest = fmaxf(largest, shuffled(largest, distance));
  u32 bits = pack_half2(largest * (1.f / 127.f), 0.f) & 0xffffu;
  if (__fmul_rn(half_to_float(bits), 127.f) < largest) ++bits;
  else if (bits && __fmul_rn(half_to_float(bits - 1), 127.f) >= largest) --bits;
  scale_bits = bits;
  const float scale = half_to_float(bits), half = 0.5f * scale;
  const float inverse = bits ? __fdiv_rn(1.f, scale) : 0.f;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float v = x[4 * w + i];
      int q = __float2int_rn(v * inverse);
      const float rest = __fmaf_rn(-float(q), scale, v);
      if (rest > half || (rest == half && (q & 1))) ++q;
      else if (rest < -half || (rest == -half && (q & 1))) --q;
      q = min(max(q, -127), 127);
      words[w] |= (u32(q) & 0xffu) << (8 * i);
    }
  }
  return finite && bits < 0x7c00u;
}

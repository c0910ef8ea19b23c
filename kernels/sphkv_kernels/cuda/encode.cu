// Launch of the encoder: rotation, recursion, quantisation and packing of keys (blockIdx.y 0) and values
// (1) in one pass. A thread reads its 16 coordinates once. Whole pages go through shared memory, unit by
// unit, so that what is written is whole lines; single rows are written word by word.

static __device__ __forceinline__ void load_coordinates(float (&x)[16], const void* source,
                                                        long long element, int type) {
  u32 words[16];
  const uint4* lines = type == 0 ? reinterpret_cast<const uint4*>(static_cast<const u32*>(source) + element)
                                 : reinterpret_cast<const uint4*>(static_cast<const u16*>(source) + element);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 v = load_stream16(reinterpret_cast<const u8*>(lines + i));
    words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
  }
  if (type == 0) {
#pragma unroll
    for (int i = 2; i < 4; ++i) {
      const uint4 v = load_stream16(reinterpret_cast<const u8*>(lines + i));
      words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = __uint_as_float(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[2 * i] = type == 1 ? __uint_as_float(words[i] << 16) : half_to_float(words[i]);
      x[2 * i + 1] = type == 1 ? __uint_as_float(words[i] & 0xffff0000u) : half_to_float(words[i] >> 16);
    }
  }
}

// Where the word of (token, block) lies in a plane of WIDTH bytes per word (LAYOUT.md).
template <bool VALUE, int WIDTH>
static __device__ __forceinline__ int word_offset(int token, int block) {
  constexpr int LANE_BYTES = N_BLOCKS / 2 * WIDTH, CHUNK = LANE_BYTES < 16 ? LANE_BYTES : 16;
  int lane, slot;
  if (!VALUE) {
    lane = 4 * (token % 8) + block % 4;
    slot = 2 * (block / 4) + token / 8;
  } else {
    const int t = token % 8 / 2;
    if (HEAD_DIM == 64) {
      lane = 4 * (4 * (token / 8) + block) + t;
      slot = token % 2;
    } else {
      lane = 4 * (block % 8) + t;
      slot = N_BLOCKS / 4 * (token / 8) + 2 * (block / 8) + token % 2;
    }
  }
  const int b = slot * WIDTH;
  return b / CHUNK * (32 * CHUNK) + lane * CHUNK + b % CHUNK;
}

template <int WIDTH>
static __device__ __forceinline__ void store_word(u8* target, u32 word) {
  if constexpr (WIDTH == 4) *reinterpret_cast<u32*>(target) = word;
  if constexpr (WIDTH == 2) *reinterpret_cast<u16*>(target) = u16(word);
  if constexpr (WIDTH == 1) *target = u8(word);
}

// One block into its unit, in shared or global memory.
template <class F, bool VALUE>
static __device__ __forceinline__ bool store_block(u8* unit, const float (&x)[16], int token, int block,
                                                   bool live, const float* tables, const EncodeParams& p) {
  u8* norms = unit + F::UNIT_BYTES - 32;
  u16* norm = reinterpret_cast<u16*>(norms + 2 * (2 * (token % 8) + token / 8));
  bool fits = true;
  if constexpr (F::KIND == DENSE) {
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
      fits = fits && fabsf(x[2 * i]) < DENSE_LIMIT && fabsf(x[2 * i + 1]) < DENSE_LIMIT;
    }
    uint4* target = reinterpret_cast<uint4*>(unit + 32 * (token * N_BLOCKS + block));
    if (live) {
      target[0] = make_uint4(words[0], words[1], words[2], words[3]);
      target[1] = make_uint4(words[4], words[5], words[6], words[7]);
    }
  } else if constexpr (F::KIND == INT8) {
    u32 words[4], scale;
    fits = encode_int8(words, scale, x);
    if (live) {
      *reinterpret_cast<uint4*>(unit + 16 * (token * N_BLOCKS + block)) = make_uint4(words[0], words[1], words[2], words[3]);
      if (block == 0) *norm = u16(scale);
    }
  } else {
    BlockCodes codes;
    fits = encode_block<F>(codes, x, tables, p);
    u32 words[3];
    F::pack(words, codes);
    if (live) {
      store_word<F::WIDTH_A>(unit + word_offset<VALUE, F::WIDTH_A>(token, block), words[0]);
      if constexpr (F::WIDTH_B != 0)
        store_word<F::WIDTH_B>(unit + 16 * N_BLOCKS * F::WIDTH_A + word_offset<VALUE, F::WIDTH_B>(token, block), words[1]);
      if constexpr (F::WIDTH_C != 0)
        store_word<F::WIDTH_C>(unit + 16 * N_BLOCKS * (F::WIDTH_A + F::WIDTH_B) + word_offset<VALUE, F::WIDTH_C>(token, block), words[2]);
      if (F::RADIUS_CELLS != 0 && block == 0) *norm = u16(codes.norm);
    }
  }
  return fits;
}

template <class F, bool VALUE>
static __device__ __forceinline__ void encode_all(const EncodeParams& p, u8* staged, const float* tables) {
  const long long vector = ((long long)blockIdx.x * N_THREADS + threadIdx.x) / N_BLOCKS;
  const bool live = vector < p.n_vectors;
  const long long v = live ? vector : p.n_vectors - 1;
  const int block = threadIdx.x % N_BLOCKS;
  const long long region = VALUE ? (long long)KeyFormat::UNIT_BYTES * (p.page_size / 16) : 0;
  float x[16];
#if ROWS
  load_coordinates(x, p.source[VALUE], v * p.row_stride[VALUE] + 16 * block, p.type);
  rotate(x, block, p);
  const int row = p.rows[v];
  u8* unit = p.pages + p.offsets[v] + region + row / 16 * F::UNIT_BYTES;
  const bool fits = store_block<F, VALUE>(unit, x, row % 16, block, live, tables, p);
#else
  const int shift = p.page_size == 16 ? 4 : p.page_size == 32 ? 5 : 6;
  const long long page = v >> shift;
  const int row = int(v) & (p.page_size - 1);
  const long long outer = page / p.pages_per_outer, inner = page - outer * p.pages_per_outer;
  load_coordinates(x, p.source[VALUE],
                   outer * p.outer_stride[VALUE] + inner * p.page_stride[VALUE] + row * p.row_stride[VALUE] + 16 * block,
                   p.type);
  rotate(x, block, p);
  // A unit of 16 tokens is HEAD_DIM threads.
  const int in_unit = threadIdx.x % HEAD_DIM;
  u8* mine = staged + threadIdx.x / HEAD_DIM * F::UNIT_BYTES;
  const bool fits = store_block<F, VALUE>(mine, x, row % 16, block, true, tables, p);
  __syncthreads();
  uint4* target = reinterpret_cast<uint4*>(p.pages + page * p.page_bytes + region + row / 16 * F::UNIT_BYTES);
  if (live)
    for (int i = in_unit; i < F::UNIT_BYTES / 16; i += HEAD_DIM) target[i] = reinterpret_cast<const uint4*>(mine)[i];
#endif
  if (!fits && live) *p.refused = 1;
}

extern "C" __global__ void __launch_bounds__(N_THREADS) encode(const __grid_constant__ EncodeParams p) {
  __shared__ __align__(16) u8 staged[ROWS ? 16 : N_THREADS / HEAD_DIM * LARGEST_UNIT];
  __shared__ float tables[HAS_GAIN ? N_BOOK_FLOATS : 1];
#if HAS_GAIN
  for (int i = threadIdx.x; i < N_BOOK_FLOATS; i += N_THREADS) tables[i] = p.books[i];
  __syncthreads();
#endif
  if (blockIdx.y == 0) encode_all<KeyFormat, false>(p, staged, tables);
  else encode_all<ValueFormat, true>(p, staged, tables);
}

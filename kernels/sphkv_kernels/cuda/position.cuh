// What centring before RoPE adds to a logit (position_term.py), four pairs per matrix product:
//
//   term(t) = sum_j a_j cos(f_j t) + b_j sin(f_j t)
//
// A operand: lane (g, t) holds (cos, sin) of pair t of a group for tokens g and g + 8 of a unit. B
// operand: (a, b) of pair t and head g. Phases are t * f / 2 pi in 64-bit fixed point, which wraps by
// itself: position 10^6 is as exact as position 1. Features and coefficients are split into an fp16
// and the fp16 of what it rounded away, so that a coefficient of 10^3 errs by 10^-3 and not by a
// quarter.
//
//   cos a = (hi + lo)(A + B) ~ [hi | lo] . [A; A] + hi . B       (lo . B is below 2^-24)
//
// Where the tokens of a tile follow one another, t = t_0 + i, the features are those of i, made once a
// row, and the coefficients are turned to t_0: one cosine and sine a tile instead of one a token.
//
//   a cos f(t_0 + i) + b sin f(t_0 + i) = a' cos f i + b' sin f i,   (a', b') = (a, b) turned by f t_0

struct PositionFragment {
  float a, b;       // of head g, in the units of the scaled scores
  u32 turns, fine;  // f / 2 pi as a 64-bit fraction
};

// Two groups side by side hide each other's steps; more would take registers from the loop.
constexpr int POSITION_UNROLL = 2;

#if POSITION_GROUPS
// Of every group of pairs, 512 bytes each: the fragments of the query tiles, then the A operands of
// the tokens 0 to 15 of a run, then of 16 to 31, (hi g, hi g + 8, lo g, lo g + 8).
// Without POSITION_RUNS, for which these left no room, every token makes its features.
constexpr int RUN_OPERANDS = 512 * GROUP_TILES, POSITION_STRIDE = RUN_OPERANDS + POSITION_RUNS * 2 * 512;

static __device__ __forceinline__ uint4* position_place(int group, int offset, int lane) {
  return reinterpret_cast<uint4*>(shared_memory + POSITION_OFFSET + group * POSITION_STRIDE + offset) + lane;
}

// What lies at `address` after POSITION_OFFSET; the caller keeps the address, so that what is read of
// one row is not taken for the next.
template <int OFFSET>
static __device__ __forceinline__ uint4 position_words(u32 address) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address), "n"(SHARED_BASE + POSITION_OFFSET + OFFSET));
  return v;
}

static __device__ __forceinline__ PositionFragment position_fragment(u32 address, int n) {
  const uint4 v = n == 0 ? position_words<0>(address) : position_words<512>(address);
  return {__uint_as_float(v.x), __uint_as_float(v.y), v.z, v.w};
}

static __device__ __forceinline__ u32 rounded_away(float x, float y, u32 packed) {
  return pack_half2(x - half_to_float(packed), y - high_half_to_float(packed));
}

static __device__ __forceinline__ void turn_of(float& c, float& s, u32 position,
                                               const PositionFragment& fragment) {
  const u32 phase = position * fragment.turns + __umulhi(position, fragment.fine);
  const float angle = float(int(phase)) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
}

// (cos, sin) of one token: `high` is fp16, `low` what it rounded away.
static __device__ __forceinline__ void position_features(u32& high, u32& low, u32 position,
                                                         const PositionFragment& fragment) {
  float c, s;
  turn_of(c, s, position, fragment);
  high = pack_half2(c, s);
  low = rounded_away(c, s, high);
}

// The fragments of a row into shared memory; the caller synchronises the block.
static __device__ __forceinline__ void store_position_fragments(const Params& p, int row) {
  const float factor = SOFTCAP || LOGITS ? 1.f : p.scale_log2;
  for (int i = threadIdx.x; i < POSITION_GROUPS * GROUP_TILES * 32; i += N_THREADS) {
    const int lane = i % 32, n = (i / 32) % GROUP_TILES, group = i / (32 * GROUP_TILES);
    const int pair = 4 * group + lane % 4, head = 8 * n + lane / 4;
    PositionFragment fragment = {0.f, 0.f, 0, 0};
    if (pair < p.n_position_pairs) {
      const double turns = double(p.position_frequencies[(row % p.n_kv_heads) * p.n_position_pairs + pair])
                           * 0.15915494309189533577;
      const u64 fraction = u64((turns - floor(turns)) * 18446744073709551616.0);
      fragment.turns = u32(fraction >> 32);
      fragment.fine = u32(fraction);
      if (head < p.group_size) {
        const float* source = p.position_coefficients
                              + (u64(row) * p.group_size + head) * 2 * p.n_position_pairs + pair;
        fragment.a = source[0] * factor;
        fragment.b = source[p.n_position_pairs] * factor;
      }
    }
    *position_place(group, 512 * n, lane) = make_uint4(
        __float_as_uint(fragment.a), __float_as_uint(fragment.b), fragment.turns, fragment.fine);
    if (POSITION_RUNS && n == 0) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        uint4 x;
        position_features(x.x, x.z, 16 * u + lane / 4, fragment);
        position_features(x.y, x.w, 16 * u + lane / 4 + 8, fragment);
        *position_place(group, RUN_OPERANDS + 512 * u, lane) = x;
      }
    }
  }
}

static __device__ __forceinline__ void add_term(float (&term)[4], const uint4& x, u32 high, u32 low) {
  mma_16x8x16(term, x.x, x.y, x.z, x.w, high, high);
  mma_16x8x8(term, x.x, x.y, low);
}

// Terms of tokens g and g + 8 (`position`) of every unit for query heads 2t, 2t + 1.
template <int UNITS>
static __device__ __forceinline__ void position_terms(float (&term)[UNITS][GROUP_TILES][4],
                                                      const u32 (&position)[UNITS][2], const Lane& lane) {
  static_assert(UNITS <= 2, "features of runs are those of two units");
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) term[u][n][j] = 0.f;
  u32 address = 16 * lane.index;
  keep(address);
#if POSITION_RUNS
  const u32 first = __shfl_sync(0xffffffffu, position[0][0], 0);
  bool follows = true;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int r = 0; r < 2; ++r) follows = follows && position[u][r] == first + 16 * u + 8 * r + lane.g;
  if (__all_sync(0xffffffffu, follows)) {
#pragma unroll POSITION_UNROLL
    for (int group = 0; group < POSITION_GROUPS; ++group, address += POSITION_STRIDE) {
      uint4 x[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        x[u] = u == 0 ? position_words<RUN_OPERANDS>(address) : position_words<RUN_OPERANDS + 512>(address);
      float c, s;
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n) {
        const PositionFragment fragment = position_fragment(address, n);
        if (n == 0) turn_of(c, s, first, fragment);
        const float a = fragment.a * c + fragment.b * s, b = fragment.b * c - fragment.a * s;
        const u32 high = pack_half2(a, b), low = rounded_away(a, b, high);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) add_term(term[u][n], x[u], high, low);
      }
    }
  } else
#endif
  {
#pragma unroll POSITION_UNROLL
    for (int group = 0; group < POSITION_GROUPS; ++group, address += POSITION_STRIDE) {
      uint4 x[UNITS];
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n) {
        const PositionFragment fragment = position_fragment(address, n);
        const u32 high = pack_half2(fragment.a, fragment.b);
        const u32 low = rounded_away(fragment.a, fragment.b, high);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
          if (n == 0) {
            position_features(x[u].x, x[u].z, position[u][0], fragment);
            position_features(x[u].y, x[u].w, position[u][1], fragment);
          }
          add_term(term[u][n], x[u], high, low);
        }
      }
    }
  }
}
#endif

#if POSITION_GROUPS || WINDOW
static __device__ __forceinline__ u32 load_position(const u8* source) {
  return POSITION_BYTES == 2 ? load_stream2(source) : load_stream4(source);
}

static __device__ __forceinline__ const u8* place_of_position(const Params& p, int entry, int token) {
  return p.positions + ((u64(u32(entry)) << (4 + p.page_units_log2)) + u32(token)) * POSITION_BYTES;
}

static __device__ __forceinline__ u32 page_position(const Params& p, int entry, int token) {
  return load_position(place_of_position(p, entry, token));
}

// Of tokens g and g + 8 after `first`, whose positions lie at `source`.
static __device__ __forceinline__ void load_positions(u32 (&position)[2], const u8* source, int first) {
  position[0] = load_position(source + first * POSITION_BYTES);
  position[1] = load_position(source + (first + 8) * POSITION_BYTES);
}
#endif

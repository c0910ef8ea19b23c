// What centring before RoPE adds to a logit (position_term.py), four pairs per matrix product:
//
//   term(t) = sum_j a_j cos(f_j t) + b_j sin(f_j t)
//
// Lane (g, t) makes (cos, sin) of pair t of a group for tokens g and g + 8: rows of A as they stand.
// Phases are t * f / 2 pi in 64-bit fixed point, which wraps by itself: position 10^6 is as exact as
// position 1, and no table is read. Features and coefficients are split into an fp16 and the fp16 of
// what it rounded away, so that a coefficient of 10^3 errs by 10^-3 and not by a quarter.
//
//   cos a = (hi + lo)(A + B) ~ [hi | lo] . [A; A] + hi . B       (lo . B is below 2^-24)

struct PositionFragment {
  u32 high, low;    // (a, b) of head g: fp16, and the rest
  u32 turns, fine;  // f / 2 pi as a 64-bit fraction
};

// Two groups side by side hide each other's steps; more would take registers from the loop.
constexpr int POSITION_UNROLL = 2;

#if POSITION_GROUPS
static __device__ __forceinline__ PositionFragment* position_fragments() {
  return reinterpret_cast<PositionFragment*>(shared_memory + POSITION_OFFSET);
}

static __device__ __forceinline__ u32 rounded_away(float x, float y, u32 packed) {
  return pack_half2(x - half_to_float(packed), y - high_half_to_float(packed));
}

// The fragments of a row into shared memory; the caller synchronises the block.
static __device__ __forceinline__ void store_position_fragments(const Params& p, int row) {
  const float factor = SOFTCAP || LOGITS ? 1.f : p.scale_log2;
  for (int i = threadIdx.x; i < POSITION_GROUPS * GROUP_TILES * 32; i += N_THREADS) {
    const int lane = i % 32, n = (i / 32) % GROUP_TILES, pair = 4 * (i / (32 * GROUP_TILES)) + lane % 4;
    const int head = 8 * n + lane / 4;
    PositionFragment fragment = {0, 0, 0, 0};
    if (pair < p.n_position_pairs) {
      const double turns = double(p.position_frequencies[(row % p.n_kv_heads) * p.n_position_pairs + pair])
                           * 0.15915494309189533577;
      const u64 fraction = u64((turns - floor(turns)) * 18446744073709551616.0);
      fragment.turns = u32(fraction >> 32);
      fragment.fine = u32(fraction);
      if (head < p.group_size) {
        const float* source = p.position_coefficients
                              + (u64(row) * p.group_size + head) * 2 * p.n_position_pairs + pair;
        const float a = source[0] * factor, b = source[p.n_position_pairs] * factor;
        fragment.high = pack_half2(a, b);
        fragment.low = rounded_away(a, b, fragment.high);
      }
    }
    position_fragments()[i] = fragment;
  }
}

// (cos, sin) of one token: `high` is fp16, `low` what it rounded away.
static __device__ __forceinline__ void position_features(u32& high, u32& low, u32 position,
                                                         const PositionFragment& fragment) {
  const u32 phase = position * fragment.turns + __umulhi(position, fragment.fine);
  const float angle = float(int(phase)) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  float c, s;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
  high = pack_half2(c, s);
  low = rounded_away(c, s, high);
}

// Terms of tokens g and g + 8 (`position`) for query heads 2t, 2t + 1.
static __device__ __forceinline__ void position_terms(float (&term)[GROUP_TILES][4],
                                                      const u32 (&position)[2], const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) term[n][j] = 0.f;
#pragma unroll POSITION_UNROLL
  for (int group = 0; group < POSITION_GROUPS; ++group) {
    u32 high[2], low[2];
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n) {
      const PositionFragment fragment =
          position_fragments()[(group * GROUP_TILES + n) * 32 + lane.index];
      if (n == 0) {
        position_features(high[0], low[0], position[0], fragment);
        position_features(high[1], low[1], position[1], fragment);
      }
      mma_16x8x16(term[n], high[0], high[1], low[0], low[1], fragment.high, fragment.high);
      mma_16x8x8(term[n], high[0], high[1], fragment.low);
    }
  }
}
#endif

#if POSITION_GROUPS || WINDOW
static __device__ __forceinline__ u32 page_position(const Params& p, int entry, int token) {
  const u8* source = p.positions + ((u64(entry) << (4 + p.page_units_log2)) + token) * POSITION_BYTES;
  return POSITION_BYTES == 2 ? load_stream2(source) : load_stream4(source);
}

static __device__ __forceinline__ void load_positions(u32 (&position)[2], const Params& p, int entry,
                                                      int first_token, const Lane& lane) {
  position[0] = page_position(p, entry, first_token + int(lane.g));
  position[1] = page_position(p, entry, first_token + int(lane.g) + 8);
}
#endif

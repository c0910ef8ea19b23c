// Streaming softmax over tiles of scores and the running output, all in registers.
//
//   y = log2(e) softmax_scale logit,   p = 2^(y - m),   l = sum p,   O = sum p v
//
// m is a lazy maximum: it moves only when some y exceeds it by more than HEADROOM, so that most tiles
// need no reduction across lanes. Lane (g, t) holds scores of tokens g and g + 8 for query heads 2t and
// 2t + 1, and after the transpose probabilities of head g.

constexpr float HEADROOM = 8.0f;        // p <= 2^8
constexpr float VALUE_HEADROOM = 128.f;  // scaled value norm, so that p * norm < 2^15 in fp16
constexpr float NO_MAX = -1e30f;
constexpr int COLUMNS = HEAD_DIM == 256 ? 2 : 1;      // blocks of one token that a lane owns in V
constexpr int OUTPUT_SETS = HEAD_DIM == 64 ? 2 : COLUMNS;
constexpr int QUERY_REGISTERS = HEAD_DIM / 8;

// Query tables (score_tables.cuh): sums per block, one with both heads in a register or one a head.
constexpr int N_SUMS = TABLE_HEADS == 2 && !TABLE_SUMS ? 2 : 1;

struct State {
  u32 q[GROUP_TILES][QUERY_REGISTERS];     // Q^T fragments: coordinates of this lane's K blocks, head g
  float o[GROUP_TILES][OUTPUT_SETS][8][4]; // O: heads g; pair i of blocks 2t, 2t + 1 (LAYOUT.md)
  float m[GROUP_TILES][2], l[GROUP_TILES][2];
#if TABLE_HEADS
  u32 pick[N_SUMS];                        // columns of B that add up sums: 2^k at the heads' columns
#endif
  float value_scale;                       // power of two that keeps p * norm inside fp16; 0: not chosen yet
};

static __device__ __forceinline__ void reset(State& state) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
#pragma unroll
    for (int c = 0; c < OUTPUT_SETS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) state.o[n][c][i][j] = 0.f;
    state.m[n][0] = state.m[n][1] = NO_MAX;
    state.l[n][0] = state.l[n][1] = 0.f;
  }
  state.value_scale = 0.f;
}

// Scores and probabilities of `UNITS` units of 16 tokens.
template <int UNITS>
struct Tile {
  float s[UNITS][GROUP_TILES][4];     // logits; then probabilities (times norm)
  float key_factor[UNITS][2];         // per token: norm * factor (1 without a norm)
  float value_factor[UNITS][2];
  u32 transposed[UNITS][GROUP_TILES][2];  // p of head g, tokens 8 j + 2t, 8 j + 2t + 1
#if POSITION_GROUPS
  float term[UNITS][GROUP_TILES][4];  // position terms, in the units of the scaled scores
#endif
};

static __device__ __forceinline__ void clear_scores(float (&s)[GROUP_TILES][4]) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = 0.f;
}

// The four k-steps of a block: rows are tokens g and g + 8. A product sums over k in any order, so lane t's
// columns of K need not be coordinates 2t, 2t + 1 of the 16: they are two neighbours of its own block
// 4 b + t, whose codes no other lane reads, and Q^T was loaded in that order (`load_query`).
static __device__ __forceinline__ void score_block(float (&s)[GROUP_TILES][4], const State& state,
                                                   int block, const u32 (&low)[8],
                                                   const u32 (&high)[8]) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
#pragma unroll
    for (int step = 0; step < 4; ++step)
      mma_16x8x16(s[n], low[2 * step], high[2 * step], low[2 * step + 1], high[2 * step + 1],
                  state.q[n][8 * block + 2 * step],
                  state.q[n][8 * block + 2 * step + 1]);
  }
}

#if SOFTCAP
static __device__ __forceinline__ float capped(float y, const Params& p) {
  // y = log2(e) s: cap * tanh(s / cap) in the same units; tanh x = 1 - 2 / (1 + e^2x).
  const float e = exp2_approx(y * p.softcap_inverse);
  return p.softcap_log2 * (1.f - __fdividef(2.f, 1.f + e));
}
#endif

template <int UNITS>
static __device__ __forceinline__ void raise_max(State& state, const Tile<UNITS>& tile, const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = state.m[n][h];
#pragma unroll
      for (int u = 0; u < UNITS; ++u) top = fmaxf(top, fmaxf(tile.s[u][n][h], tile.s[u][n][2 + h]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
      alpha[h] = exp2_approx(state.m[n][h] - top);
      state.m[n][h] = top;
      state.l[n][h] *= alpha[h];
    }
    // The maxima belong to heads 2t, 2t + 1; the output rows to head g.
    const u32 source = lane.g >> 1;
    const float even = __shfl_sync(0xffffffffu, alpha[0], source);
    const float odd = __shfl_sync(0xffffffffu, alpha[1], source);
    const float factor = lane.g & 1 ? odd : even;
#pragma unroll
    for (int c = 0; c < OUTPUT_SETS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) state.o[n][c][i][j] *= factor;
  }
}

// Moves the power of two in front of the value norms when one of them would leave fp16.
template <int UNITS>
static __device__ __forceinline__ void fit_values(State& state, Tile<UNITS>& tile) {
  float top = 0.f;
#pragma unroll
  for (int u = 0; u < UNITS; ++u) top = fmaxf(top, fmaxf(tile.value_factor[u][0], tile.value_factor[u][1]));
#pragma unroll
  for (int x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
  // 2^k with top * 2^k in [32, 64): exact, since only the exponent is touched.
  const int exponent = int((__float_as_uint(fmaxf(top, 1e-30f)) >> 23) & 255) - 127;
  const float scale = __uint_as_float(u32(127 + 5 - exponent) << 23);
  const float change = state.value_scale > 0.f ? scale / state.value_scale : 0.f;
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int c = 0; c < OUTPUT_SETS; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) state.o[n][c][i][j] *= change;
  state.value_scale = scale;
}

// Products -> logits times log2 e: key norms, softmax scale, offset, position term, soft-cap.
template <int UNITS, bool KEY_NORM>
static __device__ __forceinline__ void scale_scores(Tile<UNITS>& tile, const Params& p,
                                                    const float (&offset)[GROUP_TILES][2]) {
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#if POSITION_GROUPS
        const float term = tile.term[u][n][j];
#else
        const float term = 0.f;
#endif
#if SOFTCAP
        const float logit = KEY_NORM ? tile.s[u][n][j] * tile.key_factor[u][j / 2] : tile.s[u][n][j];
        tile.s[u][n][j] = capped((logit + offset[n][j % 2] + term) * p.scale_log2, p);
#else
        tile.s[u][n][j] *= KEY_NORM ? tile.key_factor[u][j / 2] : p.scale_log2;
        if (POSITION_GROUPS) tile.s[u][n][j] += term;
#endif
      }
}

// Tokens that take no part; whatever their rows held is gone afterwards.
template <int UNITS>
static __device__ __forceinline__ void drop_dead(Tile<UNITS>& tile, const bool (&alive)[UNITS][2]) {
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (alive[u][r]) continue;
      tile.value_factor[u][r] = 0.f;
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n)
        tile.s[u][n][2 * r] = tile.s[u][n][2 * r + 1] = -__int_as_float(0x7f800000);
    }
}

// Scaled scores -> probabilities, transposed for the second product.
template <int UNITS, bool VALUE_NORM>
static __device__ __forceinline__ void weigh(State& state, Tile<UNITS>& tile, const Lane& lane) {
  float excess = -1.f;
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(tile.s[0][n][h], tile.s[0][n][2 + h]);
#pragma unroll
      for (int u = 1; u < UNITS; ++u) top = fmaxf(top, fmaxf(tile.s[u][n][h], tile.s[u][n][2 + h]));
      excess = fmaxf(excess, top - state.m[n][h]);
    }
  bool unfit = false;
  // In a mixed cache every tier shares O, so tiers without a norm follow its scale too.
  if constexpr (VALUE_NORM || ANY_VALUE_NORM) {
    float top = 0.f;
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int r = 0; r < 2; ++r) top = fmaxf(top, tile.value_factor[u][r]);
    unfit = state.value_scale == 0.f || top * state.value_scale > VALUE_HEADROOM;
  }
  if (__any_sync(0xffffffffu, excess > HEADROOM || unfit)) {  // rare: one vote for both
    raise_max<UNITS>(state, tile, lane);
    if (__any_sync(0xffffffffu, unfit)) fit_values<UNITS>(state, tile);
  }
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n) {
      float w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float probability = exp2_approx(tile.s[u][n][j] - state.m[n][j % 2]);
        state.l[n][j % 2] += probability;
        w[j] = probability;
      }
      if (VALUE_NORM || ANY_VALUE_NORM) {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] *= tile.value_factor[u][j / 2] * state.value_scale;
      }
      tile.transposed[u][n][0] = transpose_8x8(pack_half2(w[0], w[1]));
      tile.transposed[u][n][1] = transpose_8x8(pack_half2(w[2], w[3]));
    }
}

// O += P V for eight tokens. k runs over (token, component): a row of P holds (p, 0) for the even
// coordinate of a pair and (0, p) for the odd one, so that a fragment register, which is one pair of
// coordinates of one token, is an operand as it stands.
static __device__ __forceinline__ void accumulate(float (&o)[8][4], u32 p, const u32 (&even)[8],
                                                  const u32 (&odd)[8]) {
  const u32 a0 = p & 0xffffu, a1 = p << 16, a2 = p >> 16, a3 = p & 0xffff0000u;
#pragma unroll
  for (int i = 0; i < 8; ++i) mma_16x8x16(o[i], a0, a1, a2, a3, even[i], odd[i]);
}

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
// POSITION_RUNS: the tokens of every page follow one another, t = t_0 + i, and shared memory has room for
// the features of i. They are made once a row, and the coefficients are turned to t_0, a tile ahead of their use: one cosine and
// sine a tile instead of one a token.
//
//   a cos f(t_0 + i) + b sin f(t_0 + i) = a' cos f i + b' sin f i,   (a', b') = (a, b) turned by f t_0

#if POSITION_GROUPS
// Groups go two at a time, a step: they hide each other's chains of dependent instructions.
constexpr int DUO = POSITION_GROUPS < 2 ? 1 : 2, POSITION_STEPS = POSITION_GROUPS / DUO;
static_assert(POSITION_STEPS * DUO == POSITION_GROUPS, "groups come in powers of two");

// A step in shared memory: the coefficients of every query tile, 8 bytes a lane and group (in runs a and
// b, else both as fp16, then what was rounded away); f / 2 pi of the four pairs, a 64-bit fraction a
// group; in runs the A operands of tokens 0 to 15, then of 16 to 31, (hi g, hi g + 8, lo g, lo g + 8).
constexpr int FREQUENCIES = 256 * DUO * GROUP_TILES, OPERANDS = FREQUENCIES + 32 * DUO;
constexpr int POSITION_STRIDE = OPERANDS + POSITION_RUNS * 2 * 512 * DUO;

// What lies at `address` (lane_address) after POSITION_OFFSET.
template <int OFFSET>
static __device__ __forceinline__ uint4 position_words(u32 address) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address), "n"(SHARED_BASE + POSITION_OFFSET + OFFSET));
  return v;
}

// Two words of every group of a step.
struct StepWords { uint2 of[DUO]; };
template <int OFFSET>
static __device__ __forceinline__ StepWords step_words(u32 address) {
  StepWords words;
  if constexpr (DUO == 2) {
    const uint4 v = position_words<OFFSET>(address);
    words.of[0] = make_uint2(v.x, v.y);
    words.of[1] = make_uint2(v.z, v.w);
  } else {
    asm("ld.shared.v2.u32 {%0,%1}, [%2+%3];"
        : "=r"(words.of[0].x), "=r"(words.of[0].y)
        : "r"(address), "n"(SHARED_BASE + POSITION_OFFSET + OFFSET));
  }
  return words;
}

// A lane's own words within a step, anew for every use: loads from a known address are moved out of the
// loop, where they take registers, and past the next row's stores.
static __device__ __forceinline__ u32 lane_address(u32 n_bytes, u32 place, int step) {
  u32 address = n_bytes * place + step * POSITION_STRIDE;
  keep(address);
  return address;
}

// Of query tile n: in runs a and b, else both as fp16 and what was rounded away.
static __device__ __forceinline__ StepWords coefficient_words(const Lane& lane, int step, int n) {
  const u32 address = lane_address(8 * DUO, lane.index, step);
  return n == 0 ? step_words<0>(address) : step_words<256 * DUO>(address);
}

static __device__ __forceinline__ StepWords frequency_words(const Lane& lane, int step) {
  return step_words<FREQUENCIES>(lane_address(8 * DUO, lane.t, step));
}

static __device__ __forceinline__ u32 rounded_away(float x, float y, u32 packed) {
  return pack_half2(x - half_to_float(packed), y - high_half_to_float(packed));
}

// frequency: (high, low) words of the fraction.
static __device__ __forceinline__ void turn_of(float& c, float& s, u32 position, uint2 frequency) {
  const u32 phase = position * frequency.x + __umulhi(position, frequency.y);
  const float angle = float(int(phase)) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
}

// (cos, sin) of one token: `high` is fp16, `low` what it rounded away.
static __device__ __forceinline__ void position_features(u32& high, u32& low, u32 position, uint2 frequency) {
  float c, s;
  turn_of(c, s, position, frequency);
  high = pack_half2(c, s);
  low = rounded_away(c, s, high);
}

// What the term needs of a row, into shared memory; the caller synchronises the block.
static __device__ __forceinline__ void store_position_fragments(const Params& p, int row) {
  const float factor = SOFTCAP || LOGITS ? 1.f : p.scale_log2;
  for (int i = threadIdx.x; i < POSITION_GROUPS * GROUP_TILES * 32; i += N_THREADS) {
    const int lane = i % 32, n = (i / 32) % GROUP_TILES, group = i / (32 * GROUP_TILES);
    const int pair = 4 * group + lane % 4, head = 8 * n + lane / 4;
    float a = 0.f, b = 0.f;
    uint2 frequency = make_uint2(0, 0);
    if (pair < p.n_position_pairs) {
      const double turns = double(p.position_frequencies[(row % p.n_kv_heads) * p.n_position_pairs + pair])
                           * 0.15915494309189533577;
      const u64 fraction = u64((turns - floor(turns)) * 18446744073709551616.0);
      frequency = make_uint2(u32(fraction >> 32), u32(fraction));
      if (head < p.group_size) {
        const float* source = p.position_coefficients
                              + (u64(row) * p.group_size + head) * 2 * p.n_position_pairs + pair;
        a = source[0] * factor;
        b = source[p.n_position_pairs] * factor;
      }
    }
    u8* step = shared_memory + POSITION_OFFSET + group / DUO * POSITION_STRIDE;
    const int place = group % DUO;
    const u32 high = pack_half2(a, b);
    reinterpret_cast<uint2*>(step + 256 * DUO * n)[DUO * lane + place] =
        POSITION_RUNS ? make_uint2(__float_as_uint(a), __float_as_uint(b))
                      : make_uint2(high, rounded_away(a, b, high));
    if (n == 0 && lane < 4) reinterpret_cast<uint2*>(step + FREQUENCIES)[DUO * lane + place] = frequency;
    if (POSITION_RUNS && n == 0) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        uint4 x;
        position_features(x.x, x.z, 16 * u + lane / 4, frequency);
        position_features(x.y, x.w, 16 * u + lane / 4 + 8, frequency);
        reinterpret_cast<uint4*>(step + OPERANDS + 512 * (2 * place + u))[lane] = x;
      }
    }
  }
}

// B operands of a step.
struct StepCoefficients { u32 high[GROUP_TILES][DUO], low[GROUP_TILES][DUO]; };

// term += features of tokens g, g + 8 times coefficients, for heads 2t, 2t + 1.
static __device__ __forceinline__ void add_terms(float (&term)[GROUP_TILES][4], const uint4 (&x)[DUO],
                                                 const StepCoefficients& by) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
#pragma unroll
    for (int i = 0; i < DUO; ++i) mma_16x8x16(term[n], x[i].x, x[i].y, x[i].z, x[i].w, by.high[n][i], by.high[n][i]);
    if constexpr (DUO == 2) mma_16x8x16(term[n], x[0].x, x[0].y, x[1].x, x[1].y, by.low[n][0], by.low[n][1]);
    else mma_16x8x8(term[n], x[0].x, x[0].y, by.low[n][0]);
  }
}

template <int UNITS>
static __device__ __forceinline__ void clear_terms(float (&term)[UNITS][GROUP_TILES][4]) {
#pragma unroll
  for (int u = 0; u < UNITS; ++u) clear_scores(term[u]);
}

#if POSITION_RUNS
// The coefficients of a step turned to position `first`.
static __device__ __forceinline__ StepCoefficients turned_to(u32 first, const Lane& lane, int step) {
  StepCoefficients turned;
  const StepWords frequencies = frequency_words(lane, step);
  float c[DUO], s[DUO];
#pragma unroll
  for (int i = 0; i < DUO; ++i) turn_of(c[i], s[i], first, frequencies.of[i]);
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
    const StepWords words = coefficient_words(lane, step, n);
#pragma unroll
    for (int i = 0; i < DUO; ++i) {
      const float a = __uint_as_float(words.of[i].x), b = __uint_as_float(words.of[i].y);
      const float turned_a = a * c[i] + b * s[i], turned_b = b * c[i] - a * s[i];
      turned.high[n][i] = pack_half2(turned_a, turned_b);
      turned.low[n][i] = rounded_away(turned_a, turned_b, turned.high[n][i]);
    }
  }
  return turned;
}

// Terms of the tokens after `first`, the coefficients of the first step turned already. Units that do
// not follow one another (small pages) have a first token each, and are turned to here.
template <int UNITS>
static __device__ __forceinline__ void run_terms(float (&term)[UNITS][GROUP_TILES][4], const u32 (&first)[UNITS],
                                                 const StepCoefficients& ahead, const Lane& lane) {
  static_assert(UNITS <= 2, "features of runs are those of two units");
  clear_terms<UNITS>(term);
#pragma unroll 1
  for (int step = 0; step < POSITION_STEPS; ++step) {
    StepCoefficients turned = ahead;
    if (step > 0) turned = turned_to(first[0], lane, step);
    const u32 address = lane_address(16, lane.index, step);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const bool follows = !SMALL_PAGES && u == 1;
      if (SMALL_PAGES && u == 1) turned = turned_to(first[u], lane, step);
      uint4 x[DUO];
      x[0] = follows ? position_words<OPERANDS + 512>(address) : position_words<OPERANDS>(address);
      if (DUO == 2) x[DUO - 1] = follows ? position_words<OPERANDS + 512 * 3>(address) : position_words<OPERANDS + 512 * 2>(address);
      add_terms(term[u], x, turned);
    }
  }
}
#else
// Terms of tokens g and g + 8 (`position`) of every unit.
template <int UNITS>
static __device__ __forceinline__ void gap_terms(float (&term)[UNITS][GROUP_TILES][4],
                                                 const u32 (&position)[UNITS][2], const Lane& lane) {
  clear_terms<UNITS>(term);
#pragma unroll 1
  for (int step = 0; step < POSITION_STEPS; ++step) {
    const StepWords frequencies = frequency_words(lane, step);
    StepCoefficients by;
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n) {
      const StepWords words = coefficient_words(lane, step, n);
#pragma unroll
      for (int i = 0; i < DUO; ++i) {
        by.high[n][i] = words.of[i].x;
        by.low[n][i] = words.of[i].y;
      }
    }
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      uint4 x[DUO];
#pragma unroll
      for (int i = 0; i < DUO; ++i) {
        position_features(x[i].x, x[i].z, position[u][0], frequencies.of[i]);
        position_features(x[i].y, x[i].w, position[u][1], frequencies.of[i]);
      }
      add_terms(term[u], x, by);
    }
  }
}
#endif
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

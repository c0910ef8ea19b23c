// What centring before RoPE adds to a logit (position_term.py), by matrix products over groups of four pairs:
//
//   term(t) = sum_j a_j cos(f_j t) + b_j sin(f_j t)
//
// A operand: lane (g, t) holds (cos, sin) of pair t of a group for tokens g and g + 8 of a unit. B
// operand: (a, b) of pair t and head g. Phases are t * f / 2 pi in 64-bit fixed point, which wraps by
// itself: position 10^6 is as exact as position 1. Features and coefficients are split into an fp16
// and the fp16 of what it rounded away, so that a coefficient of 10^3 errs by 10^-3 and not by a
// quarter.
//
//   cos a = (hi + lo)(A + B) ~ hi A + lo A + hi B       (lo B is below 2^-24)
//
// POSITION_RUNS: the tokens of every page follow one another, t = t_0 + i, and shared memory has room for
// the features of i. They are made once a row, and the coefficients are turned to t_0, a tile ahead of their
// use: one cosine and sine a tile instead of one a token.
//
//   a cos f(t_0 + i) + b sin f(t_0 + i) = a' cos f i + b' sin f i,   (a', b') = (a, b) turned by f t_0
//
// Else a token's phase is that of its page's lowest position and that of its offset from there, of OFFSET_BYTES
// (0: tokens that follow one another without room for their features). Where no page spans more than 4095
// positions (NEAR_OFFSETS), offsets meet 32 bits of the frequency alone: 2^-33 turns a position, 2^-21 in all.

#if POSITION_GROUPS
// Groups go two at a time, a step: they hide each other's chains of dependent instructions.
constexpr int DUO = POSITION_GROUPS < 2 ? 1 : 2, POSITION_STEPS = POSITION_GROUPS / DUO;
static_assert(POSITION_STEPS * DUO == POSITION_GROUPS, "groups come in powers of two");

// A step in shared memory: the coefficients of every query tile, 8 bytes a lane and group (in runs a and b of
// every group, else B operands: the fp16 pairs of all groups, then what was rounded away); f / 2 pi of the four
// pairs, a 64-bit fraction a group, its low half signed where there are gaps; in runs the A operands of tokens
// 0 to 15, then of 16 to 31, (hi g, hi g + 8, lo g, lo g + 8).
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
struct StepWords { u32 of[2 * DUO]; };
template <int OFFSET>
static __device__ __forceinline__ StepWords step_words(u32 address) {
  StepWords words;
  if constexpr (DUO == 2) {
    const uint4 v = position_words<OFFSET>(address);
    words = {{v.x, v.y, v.z, v.w}};
  } else {
    asm("ld.shared.v2.u32 {%0,%1}, [%2+%3];"
        : "=r"(words.of[0]), "=r"(words.of[1])
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

// Of query tile n: in runs (a, b) of every group, else B operands.
static __device__ __forceinline__ StepWords coefficient_words(const Lane& lane, int step, int n) {
  const u32 address = lane_address(8 * DUO, lane.index, step);
  return n == 0 ? step_words<0>(address) : step_words<256 * DUO>(address);
}

struct StepFrequencies { uint2 of[DUO]; };
static __device__ __forceinline__ StepFrequencies frequencies_of(const Lane& lane, int step) {
  const StepWords words = step_words<FREQUENCIES>(lane_address(8 * DUO, lane.t, step));
  StepFrequencies f;
#pragma unroll
  for (int i = 0; i < DUO; ++i) f.of[i] = make_uint2(words.of[2 * i], words.of[2 * i + 1]);
  return f;
}

static __device__ __forceinline__ u32 rounded_away(float x, float y, u32 packed) {
  return pack_half2(x - half_to_float(packed), y - high_half_to_float(packed));
}

// 2^32 to a turn. position: below 2^31. The low half is signed for the sake of near offsets, which meet the
// high half alone; runs could have that form as well, but are slower with the schedule that it gets.
static __device__ __forceinline__ u32 phase_of(u32 position, uint2 frequency) {
#if POSITION_RUNS
  return position * frequency.x + __umulhi(position, frequency.y);
#else
  return position * frequency.x + u32(__mulhi(int(position), int(frequency.y)));
#endif
}

static __device__ __forceinline__ void turn_of(float& c, float& s, u32 phase) {
  const float angle = float(int(phase)) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
}

// (cos, sin) of one token: `high` is fp16, `low` what it rounded away.
static __device__ __forceinline__ void position_features(u32& high, u32& low, u32 phase) {
  float c, s;
  turn_of(c, s, phase);
  high = pack_half2(c, s);
  low = rounded_away(c, s, high);
}

// A operands of a step: tokens g and g + 8 of every group.
struct StepFeatures { u32 high[2 * DUO], low[2 * DUO]; };

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
      frequency = make_uint2(u32(fraction >> 32) + (POSITION_RUNS ? 0 : u32(fraction) >> 31), u32(fraction));
      if (head < p.group_size) {
        const float* source = p.position_coefficients
                              + (u64(row) * p.group_size + head) * 2 * p.n_position_pairs + pair;
        a = source[0] * factor;
        b = source[p.n_position_pairs] * factor;
      }
    }
    u8* step = shared_memory + POSITION_OFFSET + group / DUO * POSITION_STRIDE;
    const int place = group % DUO;
#if POSITION_RUNS
    reinterpret_cast<uint2*>(step + 256 * DUO * n)[DUO * lane + place] =
        make_uint2(__float_as_uint(a), __float_as_uint(b));
#else
    u32* words = reinterpret_cast<u32*>(step + 256 * DUO * n) + 2 * DUO * lane;
    words[place] = pack_half2(a, b);
    words[DUO + place] = rounded_away(a, b, words[place]);
#endif
    if (n == 0 && lane < 4) reinterpret_cast<uint2*>(step + FREQUENCIES)[DUO * lane + place] = frequency;
    if (POSITION_RUNS && n == 0) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        uint4 x;
        position_features(x.x, x.z, phase_of(16 * u + lane / 4, frequency));
        position_features(x.y, x.w, phase_of(16 * u + lane / 4 + 8, frequency));
        reinterpret_cast<uint4*>(step + OPERANDS + 512 * (2 * place + u))[lane] = x;
      }
    }
  }
}

// B operands of a step.
struct StepCoefficients { u32 high[GROUP_TILES][DUO], low[GROUP_TILES][DUO]; };

// term += features of tokens g, g + 8 times coefficients, for heads 2t, 2t + 1.
static __device__ __forceinline__ void add_terms(float (&term)[GROUP_TILES][4], const StepFeatures& x,
                                                 const StepCoefficients& by) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
    auto add = [&](const u32 (&features)[2 * DUO], const u32 (&coefficients)[DUO]) {
      if constexpr (DUO == 2)
        mma_16x8x16(term[n], features[0], features[1], features[2], features[3], coefficients[0], coefficients[1]);
      else mma_16x8x8(term[n], features[0], features[1], coefficients[0]);
    };
    if constexpr (DUO == 2 && !POSITION_RUNS) {  // no operand has to be moved
      add(x.high, by.high[n]);
      add(x.low, by.high[n]);
    } else {  // nor is a group waited for by the other
#pragma unroll
      for (int i = 0; i < DUO; ++i)
        mma_16x8x16(term[n], x.high[2 * i], x.high[2 * i + 1], x.low[2 * i], x.low[2 * i + 1],
                    by.high[n][i], by.high[n][i]);
    }
    add(x.high, by.low[n]);
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
  const StepFrequencies frequencies = frequencies_of(lane, step);
  float c[DUO], s[DUO];
#pragma unroll
  for (int i = 0; i < DUO; ++i) turn_of(c[i], s[i], phase_of(first, frequencies.of[i]));
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
    const StepWords words = coefficient_words(lane, step, n);
#pragma unroll
    for (int i = 0; i < DUO; ++i) {
      const float a = __uint_as_float(words.of[2 * i]), b = __uint_as_float(words.of[2 * i + 1]);
      const float turned_a = a * c[i] + b * s[i], turned_b = b * c[i] - a * s[i];
      turned.high[n][i] = pack_half2(turned_a, turned_b);
      turned.low[n][i] = rounded_away(turned_a, turned_b, turned.high[n][i]);
    }
  }
  return turned;
}

// A operands of unit UNIT of a run.
template <int UNIT>
static __device__ __forceinline__ StepFeatures run_features(u32 address) {
  StepFeatures x;
#pragma unroll
  for (int i = 0; i < DUO; ++i) {
    const uint4 v = i == 0 ? position_words<OPERANDS + 512 * UNIT>(address)
                           : position_words<OPERANDS + 512 * (UNIT + 2)>(address);
    x.high[2 * i] = v.x;
    x.high[2 * i + 1] = v.y;
    x.low[2 * i] = v.z;
    x.low[2 * i + 1] = v.w;
  }
  return x;
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
      add_terms(term[u], follows ? run_features<1>(address) : run_features<0>(address), turned);
    }
  }
}
#else
// How far tokens g and g + 8 of a unit lie after their page's lowest position.
struct UnitOffsets {
#if OFFSET_BYTES == 2
  u32 both;
  __device__ __forceinline__ void arrived() { keep(both); }  // not taken apart any earlier
  __device__ __forceinline__ u32 of(int h) const { return h ? both >> 16 : both & 0xffff; }
  static __device__ __forceinline__ UnitOffsets load(const u8* place) { return {load_stream4(place)}; }
  static __device__ __forceinline__ UnitOffsets follow(u32 first) { return {first | (first + 8) << 16}; }
#elif OFFSET_BYTES == 4
  uint2 both;
  __device__ __forceinline__ void arrived() {
    keep(both.x);
    keep(both.y);
  }
  __device__ __forceinline__ u32 of(int h) const { return h ? both.y : both.x; }
  static __device__ __forceinline__ UnitOffsets load(const u8* place) { return {load_stream8(place)}; }
  static __device__ __forceinline__ UnitOffsets follow(u32 first) { return {make_uint2(first, first + 8)}; }
#else
  u32 first;
  __device__ __forceinline__ void arrived() {}
  __device__ __forceinline__ u32 of(int h) const { return first + 8 * h; }
  static __device__ __forceinline__ UnitOffsets load(const u8*) { return {0}; }
  static __device__ __forceinline__ UnitOffsets follow(u32 first) { return {first}; }
#endif
};

// Where a lane finds those of a unit: in the order of norms (LAYOUT.md), so that one load has both.
static __device__ __forceinline__ const u8* place_of_offsets(const Params& p, int first_page, const Lane& lane) {
  return p.position_offsets + ((u64(first_page) << (4 + p.page_units_log2)) + 2 * lane.g) * OFFSET_BYTES;
}

// What a step needs of its row. Where there is one alone, and registers for it, it stays there over a segment.
constexpr bool GAP_STEP_MAY_STAY = POSITION_STEPS == 1 && GROUP_TILES == 1 && HEAD_DIM == 128;
struct GapStep {
  StepFrequencies frequencies;
  StepCoefficients by;

  static __device__ __forceinline__ GapStep load(const Lane& lane, int step) {
    GapStep s;
    s.frequencies = frequencies_of(lane, step);
#pragma unroll
    for (int n = 0; n < GROUP_TILES; ++n) {
      const StepWords words = coefficient_words(lane, step, n);
#pragma unroll
      for (int i = 0; i < DUO; ++i) {
        s.by.high[n][i] = words.of[i];
        s.by.low[n][i] = words.of[DUO + i];
      }
    }
    return s;
  }

  __device__ __forceinline__ GapStep kept() const {
    GapStep s = *this;
#pragma unroll
    for (int i = 0; i < DUO; ++i) {
      keep(s.frequencies.of[i].x);
      keep(s.frequencies.of[i].y);
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n) {
        keep(s.by.high[n][i]);
        keep(s.by.low[n][i]);
      }
    }
    return s;
  }
};

// Terms of tokens g and g + 8 of every unit, after position `first` of its page; `only`: the step that
// stays.
template <int UNITS, bool STAYS>
static __device__ __forceinline__ void gap_terms(float (&term)[UNITS][GROUP_TILES][4], u32 (&first)[UNITS],
                                                 UnitOffsets (&offsets)[UNITS], const Lane& lane, const GapStep& only) {
  clear_terms<UNITS>(term);
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    offsets[u].arrived();
    if (SMALL_PAGES || u == 0) keep(first[u]);
  }
#pragma unroll 1
  for (int step = 0; step < POSITION_STEPS; ++step) {
    const GapStep now = STAYS ? only : GapStep::load(lane, step);
    u32 page[DUO];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      StepFeatures x;
#pragma unroll
      for (int i = 0; i < DUO; ++i) {
        const uint2 frequency = now.frequencies.of[i];
        if (SMALL_PAGES || u == 0) page[i] = phase_of(first[u], frequency);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const u32 offset = offsets[u].of(h);
          const u32 phase = page[i] + (NEAR_OFFSETS ? offset * frequency.x : phase_of(offset, frequency));
          position_features(x.high[2 * i + h], x.low[2 * i + h], phase);
        }
      }
      add_terms(term[u], x, now.by);
    }
  }
}
#endif
#endif

#if WINDOW
static __device__ __forceinline__ u32 page_position(const Params& p, int entry, int token) {
  const u8* place = p.positions + ((u64(u32(entry)) << (4 + p.page_units_log2)) + u32(token)) * POSITION_BYTES;
  return POSITION_BYTES == 2 ? load_stream2(place) : load_stream4(place);
}
#endif

// Scores by lookups into tables made from the query, for groups of one and two heads: the recursion
// runs on q, so that no key coordinate exists even in a register.
//
//   q.khat = sum over blocks of r sum_i w_i x_i(c_i),   x_i(c) = q_2i cos c + q_2i+1 sin c
//
// A table row is one byte of level-1 codes (with level 2 in 3/2/2/2), its columns the quads of the
// query: block, half of the block (h) and quad of the half (e). Entries are fp16 times 2^-k, k such that no
// partial sum can overflow; 2^k comes back in the matrix product that adds up the blocks of a token.
//
//   byte of a row = 64 x + 32 h + 8 t + 4 y, two columns e      block 4 j + t of lane (g, t)
//
// Lanes of a warp are at different tokens but the same step, so they would meet in the four banks of
// their t. They take the steps in different orders instead: lane bit g0 turns j, g1 turns h, and g2
// picks one of two copies (y); for two heads y is the head and an entry is 8 bytes. At head_dim 64,
// which has no j, x is a copy too. All 32 words of a row are in use at once: no lane waits.

constexpr int QUERY_TABLE_ROWS = 256;

// What a lane adds to a byte of codes: low byte of the address for step (j, h), and where PRMT finds it.
struct ScoreLane {
  u32 column[2];     // j: bytes 0 and 1 are the columns of h = 0 and 1, both below 128
  u32 select[2][2];  // h, e: byte of the codes
  u32 half[2];       // h: byte of the upper word, whichever half of the block this lane takes first
  u32 swapped;       // g1
};

static __device__ __forceinline__ ScoreLane score_lane(const Lane& lane) {
  const u32 g0 = lane.g & 1, g1 = (lane.g >> 1) & 1, g2 = TABLE_HEADS == 1 || TABLE_SUMS ? lane.g >> 2 : 0;
  ScoreLane s;
#pragma unroll
  for (u32 j = 0; j < 2; ++j) {
    const u32 column = 64 * (j ^ g0) + 8 * lane.t + 4 * g2;
    s.column[j] = (column + 32 * g1) | (column + 32 * (1 - g1)) << 8;
  }
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    // Bytes 2 and 3 repeat the sign of the column's byte: zero.
#pragma unroll
    for (u32 e = 0; e < 2; ++e) s.select[h][e] = (0xcc04u + 0x1101u * h) | (2 * (h ^ g1) + e) << 4;
    s.half[h] = 0x7604u | (h ^ g1) << 4;
  }
  s.swapped = g1;
  keep(s.column[0]);
  keep(s.column[1]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    keep(s.select[h][0]);
    keep(s.select[h][1]);
    keep(s.half[h]);
  }
  return s;
}

// Words of a plane with this lane's first block first: two words (tokens g and g + 8) per j.
template <int WIDTH>
struct OrderedPlane {
  Plane<WIDTH> plane;
  __device__ __forceinline__ OrderedPlane(const Plane<WIDTH>& loaded, const Lane& lane) : plane(loaded) {
    const bool turn = HEAD_DIM == 128 && lane.g & 1;
    u32(&r)[Plane<WIDTH>::N_REGISTERS] = plane.r;
    if constexpr (HEAD_DIM == 128 && WIDTH == 4) {
      const u32 a = r[0], b = r[1], c = r[2], d = r[3];
      r[0] = turn ? c : a; r[1] = turn ? d : b; r[2] = turn ? a : c; r[3] = turn ? b : d;
    } else if constexpr (HEAD_DIM == 128 && WIDTH == 2) {
      const u32 a = r[0], b = r[1];
      r[0] = turn ? b : a; r[1] = turn ? a : b;
    } else if constexpr (HEAD_DIM == 128) {
      r[0] = __funnelshift_l(r[0], r[0], turn ? 16 : 0);
    }
  }
};


// The four quads of a block for this lane, in its order: `x[k]` holds (first, second pair) of a head, or
// with TABLE_SUMS both heads' sums of the quad.
struct Quads { u32 x[4][N_SUMS]; };

static __device__ __forceinline__ Quads find_quads(u32 codes, int j, const ScoreLane& s) {
  Quads quads;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const u32 row = permute_bytes(codes, s.column[j], s.select[h][e]);
      u32(&x)[N_SUMS] = quads.x[2 * h + e];
      if constexpr (N_SUMS == 2) {
        if (e == 0) { const uint2 v = table_entry<QUERY_TABLE_OFFSET>(row); x[0] = v.x; x[1] = v.y; }
        else { const uint2 v = table_entry<QUERY_TABLE_OTHER_SIDE>(row); x[0] = v.x; x[1] = v.y; }
      } else {
        x[0] = e == 0 ? table_word<QUERY_TABLE_OFFSET>(row) : table_word<QUERY_TABLE_OTHER_SIDE>(row);
      }
    }
  return quads;
}

// sum_k w_k x_k; weights of the two pairs of a quad in one register.
static __device__ __forceinline__ u32 weighted(const Quads& q, int head, u32 w0, u32 w1, u32 w2, u32 w3) {
  u32 sum = half2_mul(q.x[0][head], w0);
  sum = half2_fma(q.x[1][head], w1, sum);
  sum = half2_fma(q.x[2][head], w2, sum);
  return half2_fma(q.x[3][head], w3, sum);
}

// One scheme per key format of formats.cuh: the same bytes (Raw), partial sums instead of registers.
template <int UPPER>
struct PairHalfScores {
  using Format = PairHalf<0, UPPER>;
  static constexpr bool NORM = Format::NORM;
  static constexpr int UNIT_BYTES = Format::UNIT_BYTES;
  using Raw = typename Format::Raw;
  struct Words {
    OrderedPlane<4> codes, upper;
    __device__ __forceinline__ Words(const Raw& raw, const Lane& lane) : codes(raw.codes, lane), upper(raw.upper, lane) {}
  };
  static __device__ __forceinline__ void sums(u32 (&sum)[N_SUMS], const Words& words, int j, int r,
                                              const Lane& lane, const ScoreLane& s, uint2) {
    const u32 upper = words.upper.plane.r[2 * j + r];
    const uint2 first = table_entry<UPPER>(permute_bytes(upper, lane.table, s.half[0]));
    const uint2 second = table_entry<UPPER>(permute_bytes(upper, lane.table, s.half[1]));
    const Quads quads = find_quads(words.codes.plane.r[2 * j + r], j, s);
#pragma unroll
    for (int n = 0; n < N_SUMS; ++n)
      sum[n] = half2_mul_high(weighted(quads, n, first.x, first.y, second.x, second.y), upper);
  }
};

template <int UPPER>
struct PairSwapScores {
  using Format = PairSwap<0, UPPER>;
  static constexpr bool NORM = Format::NORM;
  static constexpr int UNIT_BYTES = Format::UNIT_BYTES;
  using Raw = typename Format::Raw;
  struct Words {
    OrderedPlane<4> codes;
    OrderedPlane<2> upper;
    __device__ __forceinline__ Words(const Raw& raw, const Lane& lane) : codes(raw.codes, lane), upper(raw.upper, lane) {}
  };
  static __device__ __forceinline__ void sums(u32 (&sum)[N_SUMS], const Words& words, int j, int r,
                                              const Lane& lane, const ScoreLane& s, uint2 radii) {
    const u32 upper = words.upper.plane.r[j];
    const u32 mirrored = take_complement(upper, upper << 8, 0xc000c000u);
    const u32 bytes = r ? mirrored >> 16 : mirrored;
    const uint2 first = table_entry<UPPER>(permute_bytes(bytes, lane.table, s.half[0]));
    const uint2 second = table_entry<UPPER>(permute_bytes(bytes, lane.table, s.half[1]));
    const u32 twice = (upper >> 13) & 0x00060006u;
    const u32 radius = permute_bytes(radii.x, radii.y, (r ? twice >> 16 : twice) * 0x1111u + 0x1010u);
    const Quads quads = find_quads(words.codes.plane.r[2 * j + r], j, s);
#pragma unroll
    for (int n = 0; n < N_SUMS; ++n)
      sum[n] = half2_mul(weighted(quads, n, first.x, first.y, second.x, second.y), radius);
  }
};

template <int UPPER, int TOP>
struct PairNineFloatScores {
  using Format = PairNineFloat<0, UPPER, TOP>;
  static constexpr bool NORM = Format::NORM;
  static constexpr int UNIT_BYTES = Format::UNIT_BYTES;
  using Raw = typename Format::Raw;
  using Words = typename PairHalfScores<0>::Words;
  static __device__ __forceinline__ void sums(u32 (&sum)[N_SUMS], const Words& words, int j, int r,
                                              const Lane& lane, const ScoreLane& s, uint2) {
    const u32 upper = words.upper.plane.r[2 * j + r];
    const u32 radius = __funnelshift_l(upper, upper, 10) & 0x7ff0u;
    const uint2 first = lookup_nine<UPPER>(upper >> (9 * s.swapped), lane);
    const uint2 second = lookup_nine<UPPER>(upper >> (9 - 9 * s.swapped), lane);
    // (cos, sin) of level 4 in .x, (sin, cos) in .y: copies 8 to 15 hold them the other way around.
    const u32 top = half2_mul_low(lookup_bits<TOP>(upper << 3, 0x700u, lane).x, radius);
    const Quads quads = find_quads(words.codes.plane.r[2 * j + r], j, s);
#pragma unroll
    for (int n = 0; n < N_SUMS; ++n) {
      const u32 a = half2_fma(quads.x[1][n], first.y, half2_mul(quads.x[0][n], first.x));
      const u32 b = half2_fma(quads.x[3][n], second.y, half2_mul(quads.x[2][n], second.x));
      sum[n] = half2_fma(b, high_twice(top), half2_mul_low(a, top));
    }
  }
};

template <int UPPER>
struct QuadScores {
  using Format = Quad<0, UPPER>;
  static constexpr bool NORM = Format::NORM;
  static constexpr int UNIT_BYTES = Format::UNIT_BYTES;
  using Raw = typename Format::Raw;
  struct Words {
    OrderedPlane<4> codes;
    OrderedPlane<1> upper;
    __device__ __forceinline__ Words(const Raw& raw, const Lane& lane) : codes(raw.codes, lane), upper(raw.upper, lane) {}
  };
  static __device__ __forceinline__ void sums(u32 (&sum)[N_SUMS], const Words& words, int j, int r,
                                              const Lane& lane, const ScoreLane& s, uint2) {
    // Copies 8 to 15 of the weights hold the second half first, as their lanes take them.
    const uint2 w = r + 2 * j == 0 ? lookup_byte<UPPER, 0>(words.upper.plane.r[0], lane)
                  : r + 2 * j == 1 ? lookup_byte<UPPER, 1>(words.upper.plane.r[0], lane)
                  : r + 2 * j == 2 ? lookup_byte<UPPER, 2>(words.upper.plane.r[0], lane)
                                   : lookup_byte<UPPER, 3>(words.upper.plane.r[0], lane);
    const Quads quads = find_quads(words.codes.plane.r[2 * j + r], j, s);
    sum[0] = weighted(quads, 0, low_twice(w.x), high_twice(w.x), low_twice(w.y), high_twice(w.y));
  }
};

template <class K> constexpr bool BY_TABLE = false;
template <int U> constexpr bool BY_TABLE<PairHalfScores<U>> = true;
template <int U> constexpr bool BY_TABLE<PairSwapScores<U>> = true;
template <int U, int T> constexpr bool BY_TABLE<PairNineFloatScores<U, T>> = true;
template <int U> constexpr bool BY_TABLE<QuadScores<U>> = true;

// Scores of a unit: the matrix product adds up the blocks of a token, which lie in four lanes.
template <class K>
static __device__ __forceinline__ void score_unit_by_table(float (&s)[4], const typename K::Raw& raw,
                                                           const State& state, const Lane& lane,
                                                           const ScoreLane& score, uint2 radii) {
  const typename K::Words words(raw, lane);
  u32 sum[HEAD_DIM / 64][2][N_SUMS];
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 64; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) K::sums(sum[j][r], words, j, r, lane, score, radii);
#pragma unroll
  for (int n = 0; n < N_SUMS; ++n)
#if HEAD_DIM == 128
    mma_16x8x16(s, sum[0][0][n], sum[0][1][n], sum[1][0][n], sum[1][1][n], state.pick[n], state.pick[n]);
#else
    mma_16x8x8(s, sum[0][0][n], sum[0][1][n], state.pick[n]);
#endif
}

// Fragments of the query in shared memory: the table is made of them, and what scores by fragments
// (rows, other codes) fetches them, so that they take no registers beside the table.
struct SharedQuery {
  u32 q[QUERY_REGISTERS][32];
  u32 scale[8];                  // 2^-k of every head, twice in fp16
  uint2 book[QUERY_TABLE_ROWS];  // factors of a quad by its byte: of coordinates (0, 2), then (1, 3)
};

constexpr int BOOK_ROWS_PER_THREAD = (QUERY_TABLE_ROWS + N_THREADS - 1) / N_THREADS;
struct BookRows { uint2 row[BOOK_ROWS_PER_THREAD]; };

static __device__ __forceinline__ SharedQuery* shared_query() {
  return reinterpret_cast<SharedQuery*>(shared_memory + SHARED_QUERY_OFFSET);
}

static __device__ __forceinline__ BookRows load_book(const Params& p) {
  BookRows book;
#pragma unroll
  for (int k = 0; k < BOOK_ROWS_PER_THREAD; ++k) {
    const int row = threadIdx.x + k * N_THREADS;
    if (row < QUERY_TABLE_ROWS) book.row[k] = __ldg(p.tables + BOOK_ROW + row);
  }
  return book;
}

static __device__ __forceinline__ void store_book(const BookRows& book) {
#pragma unroll
  for (int k = 0; k < BOOK_ROWS_PER_THREAD; ++k) {
    const int row = threadIdx.x + k * N_THREADS;
    const u32 a = book.row[k].x, b = book.row[k].y;
    if (row < QUERY_TABLE_ROWS)
      shared_query()->book[row] = make_uint2(permute_bytes<0x5410>(a, b), permute_bytes<0x7632>(a, b));
  }
}

static __device__ __forceinline__ void fetch_query(State& state, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < QUERY_REGISTERS; ++i) state.q[0][i] = shared_query()->q[i][lane.index];
}

// (2^k, 2^k) in fp16, -15 <= k <= 15.
static __device__ __forceinline__ u32 half_twice(int k) {
  return (k < -14 ? 0x200u : u32(k + 15) << 10) * 0x10001u;
}

static __device__ __forceinline__ void share_query(State& state, const Lane& lane, u32 warp) {
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < QUERY_REGISTERS; ++i) {
    top = max(top, max(state.q[0][i] & 0x7fffu, (state.q[0][i] >> 16) & 0x7fffu));
    if (warp == 0) shared_query()->q[i][lane.index] = state.q[0][i];
  }
  top = max(top, __shfl_xor_sync(0xffffffffu, top, 1));
  top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
  // |q_i| < 2^(exponent + 1), so 16 of them have a norm below 2^(exponent + 3): partial sums stay below 1/2.
  const int k = min(max(int(top >> 10) - 15 + 4, -14), 15);
  const u32 factor = half_twice(k);
  if (warp == 0 && lane.t == 0) shared_query()->scale[lane.g] = half_twice(-k);
#if TABLE_HEADS == 2 && TABLE_SUMS
  state.pick[0] = lane.g == 0 ? factor & 0xffffu : lane.g == 1 ? factor << 16 : 0u;
#else
#pragma unroll
  for (int n = 0; n < N_SUMS; ++n) state.pick[n] = int(lane.g) == n ? factor : 0u;
#endif
}

// All threads; the caller synchronises the block before and after. A thread fills one word of many rows.
static __device__ __forceinline__ void fill_query_table(const Params& p) {
  constexpr int STEP = N_THREADS / 64;
  const int word = threadIdx.x % 64, first = threadIdx.x / 64;
  const int e = word >> 5, x = (word >> 4) & 1, h = (word >> 3) & 1, t = (word >> 1) & 3, y = word & 1;
  const int pair = 8 * (HEAD_DIM == 128 ? x : 0) + 4 * h + 2 * e;
  constexpr int HEADS_IN_WORD = TABLE_HEADS == 2 && TABLE_SUMS ? 2 : 1;
  u32 even[HEADS_IN_WORD], odd[HEADS_IN_WORD];  // coordinates 0, 2 and 1, 3 of the quad
#pragma unroll
  for (int n = 0; n < HEADS_IN_WORD; ++n) {
    const int head = N_SUMS == 2 ? y : n;
    const u32 a = shared_query()->q[pair][4 * head + t], b = shared_query()->q[pair + 1][4 * head + t];
    even[n] = half2_mul(permute_bytes<0x5410>(a, b), shared_query()->scale[head]);
    odd[n] = half2_mul(permute_bytes<0x7632>(a, b), shared_query()->scale[head]);
  }
  if (first >= STEP) return;
  u8* column = shared_memory + (e ? QUERY_TABLE_OTHER_SIDE : QUERY_TABLE_OFFSET) + word % 32 * 4;
#pragma unroll 8
  for (int row = first; row < QUERY_TABLE_ROWS; row += STEP) {
    const uint2 book = shared_query()->book[row];
    u32 part[HEADS_IN_WORD];
#pragma unroll
    for (int n = 0; n < HEADS_IN_WORD; ++n) part[n] = half2_fma(odd[n], book.y, half2_mul(even[n], book.x));
    u32 entry = part[0];
    if constexpr (HEADS_IN_WORD == 2)
      entry = half2_add(permute_bytes<0x5410>(part[0], part[1]), permute_bytes<0x7632>(part[0], part[1]));
    *reinterpret_cast<u32*>(column + row * 256) = entry;
  }
}

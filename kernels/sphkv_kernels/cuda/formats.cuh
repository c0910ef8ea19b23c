// From the words of a block to the eight fragment registers that hold it (LAYOUT.md).
//
//   register i = r w_i (cos c_i, sin c_i),   w_i = product of the cosines and sines above pair i
//
// A register is what mma.m16n8k16 takes as two neighbouring k: one level-1 angle. Every lookup is one
// 8-byte shared-memory load, which serves half a warp at a time; a byte permute builds the address
// (row * 256 + copy * 8). Of every table row there are REPLICAS copies across the banks. With 16 the lanes
// of a half never meet, whatever their codes. With 8, 4 or 2, where shared memory is short (variant.py),
// 2, 4 or 8 of them share two banks and wait for each other, unless they read the same row.

constexpr int N_BLOCKS = HEAD_DIM / 16;
constexpr int LANE_BLOCKS = N_BLOCKS / 2;  // blocks of a unit that a lane owns, in K and in V alike

// The warp's constants that every decode needs.
struct Lane {
  u32 index, g, t;
  u32 table;  // byte offset of this lane's replica inside a table row
  u32 twice;  // the same in both halves
};

static __device__ __forceinline__ Lane lane_of_thread() {
  const u32 index = threadIdx.x % 32;
  u32 table = (index % REPLICAS) * 8;
  keep(table);
  return {index, index / 4, index % 4, table, table * 0x10001u};
}

extern __shared__ __align__(128) u8 shared_memory[];

// SHARED_BASE is the window address of shared_memory (the kernel traps if it is not): as part of an
// immediate it costs nothing, as a register it would cost an addition per lookup.
template <int OFFSET>
static __device__ __forceinline__ uint2 table_entry(u32 address) {
  uint2 v;
  asm("ld.shared.v2.u32 {%0,%1}, [%2+%3];"
      : "=r"(v.x), "=r"(v.y) : "r"(address), "n"(SHARED_BASE + OFFSET));
  return v;
}

template <int OFFSET>
static __device__ __forceinline__ u32 table_word(u32 address) {
  u32 v;
  asm("ld.shared.u32 %0, [%1+%2];" : "=r"(v) : "r"(address), "n"(SHARED_BASE + OFFSET));
  return v;
}

// Row = byte BYTE of `word`.
template <int OFFSET, int BYTE>
static __device__ __forceinline__ uint2 lookup_byte(u32 word, const Lane& lane) {
  return table_entry<OFFSET>(__byte_perm(word, lane.table, 0x7604 | (BYTE << 4)));
}

// Row = the bits of `shifted` under `mask`, already at bit 8.
template <int OFFSET>
static __device__ __forceinline__ uint2 lookup_bits(u32 shifted, u32 mask, const Lane& lane) {
  return table_entry<OFFSET>(and_or(shifted, mask, lane.table));
}

// Row = nine bits of `shifted`, already at bit 8. SPLIT_ROWS: of more than 256 rows those from 256 on lie beside
// the others, in the next column, where the device has no room below them.
template <int OFFSET>
static __device__ __forceinline__ uint2 lookup_nine(u32 shifted, const Lane& lane) {
#if SPLIT_ROWS
  constexpr u32 COLUMN = 8 * REPLICAS;
  const u32 column = shifted >> (COLUMN == 128 ? 9 : COLUMN == 64 ? 10 : COLUMN == 32 ? 11 : 12);
  return table_entry<OFFSET>(and_or(shifted, 0xff00u, lane.table) | (column & COLUMN));
#else
  return lookup_bits<OFFSET>(shifted, 0x1ff00u, lane);
#endif
}

// The words of one plane that a lane owns in a unit, as registers. WIDTH: bytes per word.
template <int WIDTH>
struct Plane {
  static constexpr int LANE_BYTES = LANE_BLOCKS * WIDTH;
  static constexpr int BYTES = 32 * LANE_BYTES;
  static constexpr int N_REGISTERS = LANE_BYTES < 4 ? 1 : LANE_BYTES / 4;
  u32 r[N_REGISTERS];

  // Where a lane's bytes of the plane at `plane` begin.
  static __device__ __forceinline__ const u8* of_lane(const u8* plane, const Lane& lane) {
    return plane + lane.index * (LANE_BYTES < 16 ? LANE_BYTES : 16);
  }

  __device__ __forceinline__ void load(const u8* source) {
    if constexpr (LANE_BYTES >= 16) {
#pragma unroll
      for (int i = 0; i < LANE_BYTES / 16; ++i) {
        const uint4 v = load_stream16(source + i * 512);
        r[4 * i] = v.x; r[4 * i + 1] = v.y; r[4 * i + 2] = v.z; r[4 * i + 3] = v.w;
      }
    } else if constexpr (LANE_BYTES == 8) {
      const uint2 v = load_stream8(source);
      r[0] = v.x; r[1] = v.y;
    } else if constexpr (LANE_BYTES == 4) {
      r[0] = load_stream4(source);
    } else {
      r[0] = load_stream2(source);
    }
  }

  // Dead rows may hold anything, NaN radii included: their words become zero.
  __device__ __forceinline__ void clear(int slot) {
    if constexpr (WIDTH == 4) r[slot] = 0;
    if constexpr (WIDTH == 2) r[slot / 2] &= slot % 2 ? 0x0000ffffu : 0xffff0000u;
    if constexpr (WIDTH == 1) r[slot / 4] &= ~(0xffu << (8 * (slot % 4)));
  }
};

struct Norms {
  u32 pair;  // fp16 of tokens g and g + 8
  static __device__ __forceinline__ const u8* of_lane(const u8* norms, const Lane& lane) {
    return norms + 4 * lane.g;
  }
  __device__ __forceinline__ void load(const u8* source) { pair = load_stream4(source); }
};

template <class A, class B> constexpr bool SAME = false;
template <class A> constexpr bool SAME<A, A> = true;

// Where a lane's bytes of a format's planes lie in a unit at the start of the pool. Kept in registers:
// a load is then one multiplication and addition away from its page's place.
template <int N>
struct Sources {
  const u8* plane[N];
  __device__ __forceinline__ Sources kept() const {
    Sources s = *this;
#pragma unroll
    for (int i = 0; i < N; ++i) keep(s.plane[i]);
    return s;
  }
};

// Registers f[0..7] from four pair entries (cos, sin, cos, sin) and two weight entries.
static __device__ __forceinline__ void weigh_pairs(u32 (&f)[8], const uint2 (&pair)[4], u32 w01,
                                                   u32 w23, u32 w45, u32 w67) {
  f[0] = half2_mul_low(pair[0].x, w01);
  f[1] = half2_mul_high(pair[0].y, w01);
  f[2] = half2_mul_low(pair[1].x, w23);
  f[3] = half2_mul_high(pair[1].y, w23);
  f[4] = half2_mul_low(pair[2].x, w45);
  f[5] = half2_mul_high(pair[2].y, w45);
  f[6] = half2_mul_low(pair[3].x, w67);
  f[7] = half2_mul_high(pair[3].y, w67);
}

template <int PAIRS>
static __device__ __forceinline__ void lookup_word(uint2 (&pair)[4], u32 word, const Lane& lane) {
  pair[0] = lookup_byte<PAIRS, 0>(word, lane);
  pair[1] = lookup_byte<PAIRS, 1>(word, lane);
  pair[2] = lookup_byte<PAIRS, 2>(word, lane);
  pair[3] = lookup_byte<PAIRS, 3>(word, lane);
}

// 4/2/2/2, fp16 radius: a byte is (two level-1 codes) or (level 2, 2, 3, 4) of half a block.
template <int PAIRS, int UPPER>
struct PairHalf {
  static constexpr bool NORM = false;
  static constexpr int UNIT_BYTES = 2 * Plane<4>::BYTES;
  struct Raw {
    Plane<4> codes, upper;
    Norms norms;  // never loaded; without it instructions of some kernels come in another order
    using From = Sources<1>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      codes.load(from.plane[0] + offset);
      upper.load(from.plane[0] + offset + Plane<4>::BYTES);
    }
    __device__ __forceinline__ void load_norms(const From&, u64) {}
    __device__ __forceinline__ void clear(int slot) { codes.clear(slot); upper.clear(slot); }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 upper = raw.upper.r[slot];
    const uint2 left = lookup_byte<UPPER, 0>(upper, lane);
    const uint2 right = lookup_byte<UPPER, 1>(upper, lane);
    uint2 pair[4];
    lookup_word<PAIRS>(pair, raw.codes.r[slot], lane);
    weigh_pairs(f, pair, half2_mul_high(left.x, upper), half2_mul_high(left.y, upper),
                half2_mul_high(right.x, upper), half2_mul_high(right.y, upper));
  }
};

// 4/2/2/2, 2-bit radius: as above with the radius code in place of the mirrored level 4, which is
// moved over from the left byte; four fp16 radii live in two registers.
template <int PAIRS, int UPPER>
struct PairSwap {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = Plane<4>::BYTES + Plane<2>::BYTES + 32;
  struct Raw {
    Plane<4> codes;
    Plane<2> upper;
    Norms norms;
    using From = Sources<3>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane),
               Plane<2>::of_lane(pool + Plane<4>::BYTES, lane),
               Norms::of_lane(pool + Plane<4>::BYTES + Plane<2>::BYTES, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      codes.load(from.plane[0] + offset);
      upper.load(from.plane[1] + offset);
    }
    __device__ __forceinline__ void load_norms(const From& from, u64 offset) { norms.load(from.plane[2] + offset); }
    __device__ __forceinline__ void clear(int slot) { codes.clear(slot); upper.clear(slot); }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2 radii) {
    const u32 upper = raw.upper.r[slot / 2];
    const u32 mirrored = take_complement(upper, upper << 8, 0xc000c000u);
    const u32 twice = (upper >> 13) & 0x00060006u;  // 2 * radius code of both blocks
    const u32 selector = (slot % 2 ? twice >> 16 : twice) * 0x1111u + 0x1010u;
    const u32 radius = __byte_perm(radii.x, radii.y, selector);
    const uint2 left = slot % 2 ? lookup_byte<UPPER, 2>(upper, lane) : lookup_byte<UPPER, 0>(upper, lane);
    const uint2 right =
        slot % 2 ? lookup_byte<UPPER, 3>(mirrored, lane) : lookup_byte<UPPER, 1>(mirrored, lane);
    uint2 pair[4];
    lookup_word<PAIRS>(pair, raw.codes.r[slot], lane);
    weigh_pairs(f, pair, half2_mul(left.x, radius), half2_mul(left.y, radius),
                half2_mul(right.x, radius), half2_mul(right.y, radius));
  }
};

// The same words, where shared memory has room for 1024 rows: ten bits (the byte of PairSwap, radius
// code) find weights that hold the radius. Bit 7 of the address is the code's low bit, bit 16 its high
// one: a row of 256 bytes holds both columns, and no address is longer than a byte permute.
template <int PAIRS, int WEIGHTS>
struct PairWide {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = PairSwap<0, 0>::UNIT_BYTES;
  using Raw = typename PairSwap<0, 0>::Raw;
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 upper = raw.upper.r[slot / 2];
    const u32 mirrored = take_complement(upper, upper << 8, 0xc000c000u);
    const u32 radius = and_or(upper >> 7, 0x01800180u, lane.twice);  // bytes: low bit and lane, high bit
    const uint2 left = table_entry<WEIGHTS>(slot % 2 ? permute_bytes<0xf726>(upper, radius)
                                                     : permute_bytes<0xd504>(upper, radius));
    const uint2 right = table_entry<WEIGHTS>(slot % 2 ? permute_bytes<0xf736>(mirrored, radius)
                                                      : permute_bytes<0xd514>(mirrored, radius));
    uint2 pair[4];
    lookup_word<PAIRS>(pair, raw.codes.r[slot], lane);
    weigh_pairs(f, pair, left.x, left.y, right.x, right.y);
  }
};

// 4/3/3/3, 3-bit radius: nine bits (level 2, 2, 3) a half, six bits (level 4, radius) a block.
template <int PAIRS, int UPPER, int TOP>
struct PairNine {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = Plane<4>::BYTES + Plane<2>::BYTES + Plane<1>::BYTES + 32;
  struct Raw {
    Plane<4> codes;
    Plane<2> low;
    Plane<1> high;
    Norms norms;
    using From = Sources<4>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane),
               Plane<2>::of_lane(pool + Plane<4>::BYTES, lane),
               Plane<1>::of_lane(pool + Plane<4>::BYTES + Plane<2>::BYTES, lane),
               Norms::of_lane(pool + Plane<4>::BYTES + Plane<2>::BYTES + Plane<1>::BYTES, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      codes.load(from.plane[0] + offset);
      low.load(from.plane[1] + offset);
      high.load(from.plane[2] + offset);
    }
    __device__ __forceinline__ void load_norms(const From& from, u64 offset) { norms.load(from.plane[3] + offset); }
    __device__ __forceinline__ void clear(int slot) {
      codes.clear(slot); low.clear(slot); high.clear(slot);
    }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    // Bytes: low 16 bits from `low`, the third from `high`; the fourth is masked away below.
    const u32 upper = __byte_perm(raw.low.r[slot / 2], raw.high.r[slot / 4],
                                  (slot % 2 ? 0x0032u : 0x0010u) | ((4u + slot % 4) << 8));
    const uint2 left = lookup_nine<UPPER>(upper << 8, lane);
    const uint2 right = lookup_nine<UPPER>(upper >> 1, lane);
    const u32 top = lookup_bits<TOP>(upper >> 10, 0x3f00u, lane).x;
    uint2 pair[4];
    lookup_word<PAIRS>(pair, raw.codes.r[slot], lane);
    weigh_pairs(f, pair, half2_mul_low(left.x, top), half2_mul_low(left.y, top),
                half2_mul_high(right.x, top), half2_mul_high(right.y, top));
  }
};

// 4/3/3/3, minifloat radius: its 11 bits rotate into the place of an fp16 without sign.
template <int PAIRS, int UPPER, int TOP>
struct PairNineFloat {
  static constexpr bool NORM = false;
  static constexpr int UNIT_BYTES = 2 * Plane<4>::BYTES;
  using Raw = typename PairHalf<0, 0>::Raw;
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 upper = raw.upper.r[slot];
    const u32 radius = __funnelshift_l(upper, upper, 10) & 0x7ff0u;
    const uint2 left = lookup_nine<UPPER>(upper, lane);
    const uint2 right = lookup_nine<UPPER>(upper >> 9, lane);
    const u32 top = half2_mul_low(lookup_bits<TOP>(upper << 3, 0x700u, lane).x, radius);
    uint2 pair[4];
    lookup_word<PAIRS>(pair, raw.codes.r[slot], lane);
    weigh_pairs(f, pair, half2_mul_low(left.x, top), half2_mul_low(left.y, top),
                half2_mul_high(right.x, top), half2_mul_high(right.y, top));
  }
};

// 5/3/3/3, 3-bit radius: a byte is (level-1 code, one code above); an entry holds both.
template <int SECOND, int THIRD, int FOURTH, int RADIUS>
struct Single {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = 2 * Plane<4>::BYTES + 32;
  struct Raw {
    Plane<4> low, high;
    Norms norms;
    using From = Sources<2>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane), Norms::of_lane(pool + 2 * Plane<4>::BYTES, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      low.load(from.plane[0] + offset);
      high.load(from.plane[0] + offset + Plane<4>::BYTES);
    }
    __device__ __forceinline__ void load_norms(const From& from, u64 offset) { norms.load(from.plane[1] + offset); }
    __device__ __forceinline__ void clear(int slot) { low.clear(slot); high.clear(slot); }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 high = raw.high.r[slot];
    uint2 second[4];
    lookup_word<SECOND>(second, raw.low.r[slot], lane);
    const uint2 e4 = lookup_byte<THIRD, 0>(high, lane);
    const uint2 e5 = lookup_byte<THIRD, 1>(high, lane);
    const uint2 e6 = lookup_byte<FOURTH, 2>(high, lane);
    const uint2 e7 = lookup_byte<RADIUS, 3>(high, lane);
    const u32 top = half2_mul(e6.y, e7.y);
    const u32 w0 = half2_mul_low(e4.y, top);
    const u32 w1 = half2_mul_high(e5.y, top);
    const uint2 pair[4] = {{second[0].x, second[1].x}, {second[2].x, second[3].x},
                           {e4.x, e5.x}, {e6.x, e7.x}};
    weigh_pairs(f, pair, half2_mul_low(second[0].y, w0), half2_mul_high(second[1].y, w0),
                half2_mul_low(second[2].y, w1), half2_mul_high(second[3].y, w1));
  }
};

template <class T> constexpr bool SINGLE = false;
template <int SECOND, int THIRD, int FOURTH, int RADIUS>
constexpr bool SINGLE<Single<SECOND, THIRD, FOURTH, RADIUS>> = true;

// Four coordinates from one byte, each quad weighted once.
static __device__ __forceinline__ void weigh_quads(u32 (&f)[8], const uint2 (&quad)[4], uint2 w) {
  f[0] = half2_mul_low(quad[0].x, w.x);
  f[1] = half2_mul_low(quad[0].y, w.x);
  f[2] = half2_mul_high(quad[1].x, w.x);
  f[3] = half2_mul_high(quad[1].y, w.x);
  f[4] = half2_mul_low(quad[2].x, w.y);
  f[5] = half2_mul_low(quad[2].y, w.y);
  f[6] = half2_mul_high(quad[3].x, w.y);
  f[7] = half2_mul_high(quad[3].y, w.y);
}

// 3/2/2/2, 2-bit radius: a byte is (two level-1 codes, their level 2) or everything above.
template <int QUADS, int UPPER>
struct Quad {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = Plane<4>::BYTES + Plane<1>::BYTES + 32;
  struct Raw {
    Plane<4> codes;
    Plane<1> upper;
    Norms norms;
    using From = Sources<3>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane),
               Plane<1>::of_lane(pool + Plane<4>::BYTES, lane),
               Norms::of_lane(pool + Plane<4>::BYTES + Plane<1>::BYTES, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      codes.load(from.plane[0] + offset);
      upper.load(from.plane[1] + offset);
    }
    __device__ __forceinline__ void load_norms(const From& from, u64 offset) { norms.load(from.plane[2] + offset); }
    __device__ __forceinline__ void clear(int slot) { codes.clear(slot); upper.clear(slot); }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 upper = raw.upper.r[slot / 4];
    const uint2 w = table_entry<UPPER>(__byte_perm(upper, lane.table, 0x7604 | ((slot % 4) << 4)));
    uint2 quad[4];
    lookup_word<QUADS>(quad, raw.codes.r[slot], lane);
    weigh_quads(f, quad, w);
  }
};

// 3/1/1/1, 1-bit radius: as above, the four upper bits being the top bits of the four bytes.
template <int QUADS, int UPPER>
struct QuadSpread {
  static constexpr bool NORM = true;
  static constexpr int UNIT_BYTES = Plane<4>::BYTES + 32;
  struct Raw {
    Plane<4> codes;
    Norms norms;
    using From = Sources<2>;
    static __device__ __forceinline__ From sources(const u8* pool, const Lane& lane) {
      return {{Plane<4>::of_lane(pool, lane), Norms::of_lane(pool + Plane<4>::BYTES, lane)}};
    }
    __device__ __forceinline__ void load(const From& from, u64 offset) {
      codes.load(from.plane[0] + offset);
    }
    __device__ __forceinline__ void load_norms(const From& from, u64 offset) { norms.load(from.plane[1] + offset); }
    __device__ __forceinline__ void clear(int slot) { codes.clear(slot); }
  };
  static __device__ __forceinline__ void decode(u32 (&f)[8], const Raw& raw, int slot,
                                                const Lane& lane, uint2) {
    const u32 word = raw.codes.r[slot];
    // Bits 7, 15, 23, 31 land on bits 0..3 of the high product; its other bytes are not used.
    const u32 nibble = __umulhi(word & 0x80808080u, 0x02040810u);
    const uint2 w = lookup_byte<UPPER, 0>(nibble, lane);
    uint2 quad[4];
    lookup_word<QUADS>(quad, word, lane);
    weigh_quads(f, quad, w);
  }
};

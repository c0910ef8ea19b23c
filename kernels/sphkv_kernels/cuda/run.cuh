// The two loops over pages: spherical tiers, whose keys (not their values) are loaded into registers a tile
// ahead, and row-major tiers, whose rows are loaded in the step that uses them.

constexpr int TILE_UNITS = 2;  // units of 16 tokens that a warp decodes at a time

// A query as it is stored: a float32 pair in two words, a bf16 or fp16 pair in the first.
struct Query { u32 word[GROUP_TILES][QUERY_REGISTERS][2]; };

static __device__ __forceinline__ void load_query(Query& query, const Params& p, int row,
                                                  const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n) {
    const int in_group = min(n * 8 + int(lane.g), p.group_size - 1);
    const u64 head = u64(row) * p.group_size + in_group;
#pragma unroll
    for (int b = 0; b < N_BLOCKS / 4; ++b) {
      const u64 pair = head * (HEAD_DIM / 2) + 8 * (4 * b + lane.t);
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        u32(&word)[QUERY_REGISTERS][2] = query.word[n];
        if (p.query_type == 0) {
          const uint4* source = reinterpret_cast<const uint4*>(p.query) + (pair + i) / 2;
          const uint4 x = source[0], y = source[1];
          word[8 * b + i][0] = x.x; word[8 * b + i][1] = x.y;
          word[8 * b + i + 1][0] = x.z; word[8 * b + i + 1][1] = x.w;
          word[8 * b + i + 2][0] = y.x; word[8 * b + i + 2][1] = y.y;
          word[8 * b + i + 3][0] = y.z; word[8 * b + i + 3][1] = y.w;
        } else {
          const uint4 x = reinterpret_cast<const uint4*>(p.query)[(pair + i) / 4];
          word[8 * b + i][0] = x.x; word[8 * b + i + 1][0] = x.y;
          word[8 * b + i + 2][0] = x.z; word[8 * b + i + 3][0] = x.w;
        }
      }
    }
  }
}

// To fp16 fragments; heads beyond the group are zero.
static __device__ __forceinline__ void convert_query(State& state, const Query& query, const Params& p,
                                                     const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int i = 0; i < QUERY_REGISTERS; ++i) {
      const u32 x = query.word[n][i][0], y = query.word[n][i][1];
      u32 packed = x;
      if (p.query_type == 0) packed = pack_half2(__uint_as_float(x), __uint_as_float(y));
      if (p.query_type == 1)
        packed = pack_half2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
      state.q[n][i] = n * 8 + int(lane.g) < p.group_size ? packed : 0u;
    }
}

static __device__ __forceinline__ void load_offset(float (&offset)[GROUP_TILES][2], const Params& p,
                                                   int row, const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int in_group = n * 8 + 2 * int(lane.t) + h;
      offset[n][h] = (SOFTCAP || LOGITS) && p.offset && in_group < p.group_size
                         ? p.offset[u64(row) * p.group_size + in_group] : 0.f;
    }
}

// Which of the tokens g, g + 8 of a unit take part. `entry` < 0: a unit of the tail.
static __device__ __forceinline__ void find_alive(bool (&alive)[2], int live, const Params& p, int row,
                                                  int entry, int first_token, const Lane& lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = int(lane.g) + 8 * r;
    alive[r] = token < live;
#if WINDOW
    if (alive[r]) {
      const int sequence = row / p.n_kv_heads;
      const int position = entry < 0 ? p.tail_positions[sequence] + first_token + token
                                     : int(page_position(p, entry, first_token + token));
      alive[r] = p.query_positions[sequence] - position < p.window;
    }
#endif
  }
}

#if LOGITS
// Writes q.khat + offset of one unit; dead rows -inf.
static __device__ __forceinline__ void write_logits(const float (&s)[GROUP_TILES][4],
                                                    const float (&factor)[2], const float* term,
                                                    const bool (&alive)[2],
                                                    float* rows, int stride, int limit,
                                                    const float (&offset)[GROUP_TILES][2],
                                                    const Params& p, const Lane& lane) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int head = n * 8 + 2 * int(lane.t) + j % 2, token = int(lane.g) + 8 * (j / 2);
      if (head < p.group_size && token < limit)
        rows[u64(head) * stride + token] =
            alive[j / 2] ? s[n][j] * factor[j / 2] + offset[n][j % 2] + (POSITION_GROUPS ? term[4 * n + j] : 0.f)
                         : -__int_as_float(0x7f800000);
    }
}
#endif

// Scores of a unit by fragments: every key coordinate meets the query in a register.
template <class K>
static __device__ __forceinline__ void score_unit(float (&s)[GROUP_TILES][4], const typename K::Raw& raw,
                                                  const State& state, const Lane& lane, uint2 radii) {
#pragma unroll
  for (int b = 0; b < N_BLOCKS / 4; ++b) {
    u32 low[8], high[8];
    K::decode(low, raw, 2 * b, lane, radii);
    K::decode(high, raw, 2 * b + 1, lane, radii);
    score_block(s, state, b, low, high);
  }
}

// Pages of one spherical tier. A tile is TILE_UNITS units of 16 tokens; the warps of the block take
// tiles in turn. Keys of the next tile are asked for after the softmax of this one (`weigh`), among its
// values; in logit mode after its logits are written.
template <class K, class V>
static __device__ __forceinline__ void run_spherical(State& state, const Segment& segment,
                                                     const Params& p, const Lane& lane, u32 warp,
                                                     uint2 key_radii, uint2 value_radii,
                                                     const float (&offset)[GROUP_TILES][2]) {
  static_assert(K::UNIT_BYTES % 16 == 0 && V::UNIT_BYTES % 16 == 0, "units start at 16 bytes");
  const int shift = p.page_units_log2, mask = (1 << shift) - 1;
  const int n_units = segment.n_pages << shift, n_tiles = (n_units + TILE_UNITS - 1) / TILE_UNITS;
  const u8* records = reinterpret_cast<const u8*>(p.records + segment.first_page);
  const u32 value_region = u32(K::UNIT_BYTES / 16) << shift;
  // scale_log2 is applied with the key norm: one multiplication per token instead of per score.
  const float key_norm_factor = SOFTCAP || LOGITS ? 1.f : p.scale_log2;

  // What is known of a tile before its bytes are there. Units of a tile share a page, one after the
  // other, except in pages of 16 tokens.
  constexpr int TILE_PAGES = SMALL_PAGES ? TILE_UNITS : 1;
  struct Place { u32 key[TILE_PAGES], value[TILE_PAGES]; int live[TILE_PAGES]; };
  struct Records { uint2 of[TILE_PAGES]; };
  auto place_of = [&](int tile, const Records& found) {
    Place place;
#pragma unroll
    for (int u = 0; u < TILE_PAGES; ++u) {
      const int unit = TILE_UNITS * tile + u, inside = unit & mask;
      place.key[u] = found.of[u].x + u32(inside) * (K::UNIT_BYTES / 16);
      place.value[u] = found.of[u].x + value_region + u32(inside) * (V::UNIT_BYTES / 16);
      place.live[u] = !SMALL_PAGES || unit < n_units ? int(found.of[u].y) - 16 * inside : 0;
    }
    return place;
  };
  auto live_of = [](const Place& place, int u) {
    return SMALL_PAGES ? place.live[SMALL_PAGES ? u : 0] : place.live[0] - 16 * u;
  };
  auto unit_of = [&](int tile, int u) {  // of the last tile, the page that is there
    const int unit = TILE_UNITS * tile + u;
    return u32(SMALL_PAGES ? min(unit, n_units - 1) : unit);
  };
  auto records_of = [&](int tile) {
    Records found;
#pragma unroll
    for (int u = 0; u < TILE_PAGES; ++u)
      found.of[u] = __ldg(reinterpret_cast<const uint2*>(records) + (unit_of(tile, u) >> shift));
    return found;
  };
  using KeyFrom = typename K::Raw::From;
  using ValueFrom = typename V::Raw::From;
  const KeyFrom key_from = K::Raw::sources(p.pool, lane).kept();
  ValueFrom value_from;
  if constexpr (SAME<typename K::Raw, typename V::Raw>) value_from = key_from;
  else value_from = V::Raw::sources(p.pool, lane).kept();
  auto key_place = [](const Place& place, int u) {
    return u64(place.key[SMALL_PAGES ? u : 0]) * 16 + (SMALL_PAGES ? 0 : u * K::UNIT_BYTES);
  };
  auto value_place = [](const Place& place, int u) {
    return u64(place.value[SMALL_PAGES ? u : 0]) * 16 + (SMALL_PAGES ? 0 : u * V::UNIT_BYTES);
  };
  typename K::Raw key[TILE_UNITS];
  typename V::Raw value[TILE_UNITS];
  // With the keys come the norms of the values: asked for with the values, they were given a scoreboard
  // that lookups of keys wait for.
  auto load_keys = [&](const Place& place) {
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u) {
      key[u].load(key_from, key_place(place, u));
      key[u].load_norms(key_from, key_place(place, u));
#if !LOGITS
      value[u].load_norms(value_from, value_place(place, u));
#endif
    }
  };
  // Into L2 as soon as this tile's keys are there: lane 8 j + i brings line i of key unit 0, 1, value unit 0, 1.
  // Only 8 lines of each: what a unit has beyond them (at head_dim 256, where it has 9 to 17, and the norms of
  // 5/3/3/3 at 128) comes with its first load.
  static_assert(TILE_UNITS == 2, "32 lanes are 8 lines of two units of keys and values");
  const u32 line = lane.index & 7, second = (lane.index >> 3) & 1;
  const bool of_key = lane.index < 16;
  const bool prefetches = int(line) * 128 < (of_key ? K::UNIT_BYTES : V::UNIT_BYTES);
  const u32 step = (of_key ? K::UNIT_BYTES : V::UNIT_BYTES) / 16;
  const u8* prefetched = p.pool + line * 128 + u64(of_key ? 0 : value_region) * 16 + (SMALL_PAGES ? 0 : second * step * 16);
  keep(prefetched);
  auto prefetch = [&](int tile, const Records& found, bool wanted) {
    const u32 inside = SMALL_PAGES ? 0 : TILE_UNITS * tile & mask;
    const u32 page = SMALL_PAGES && second ? found.of[TILE_PAGES - 1].x : found.of[0].x;
    prefetch_line_if(prefetched + u64(page + inside * step) * 16, wanted && prefetches);
  };

#if POSITION_GROUPS
  u32 first[TILE_UNITS];
  auto first_of = [&](int tile, int u) {
    return p.first_positions + segment.first_page + (unit_of(tile, u) >> shift);
  };
#if POSITION_RUNS
  // The position of every page comes with the next records.
  struct Firsts { int of[TILE_PAGES]; };
  auto firsts_of = [&](int tile) {
    Firsts found;
#pragma unroll
    for (int u = 0; u < TILE_PAGES; ++u) found.of[u] = __ldg(first_of(tile, u));
    return found;
  };
  auto find_positions = [&](int tile, const Firsts& found) {
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u)
      first[u] = u32(found.of[SMALL_PAGES ? u : 0]) + 16 * ((TILE_UNITS * tile + u) & mask);
  };
  StepCoefficients turned;
#else
  UnitOffsets offsets[TILE_UNITS];
  const u8* offsets_from = place_of_offsets(p, segment.first_page, lane);
  if (OFFSET_BYTES) keep(offsets_from);
  auto find_positions = [&](int tile) {  // they arrive with the keys
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u) {
      if (SMALL_PAGES || u == 0)  // else both units have the same
        first[u] = load_stream4(reinterpret_cast<const u8*>(first_of(tile, u)));
      const u32 unit = SMALL_PAGES ? unit_of(tile, u) : TILE_UNITS * tile;
      const u8* place = offsets_from + u64(unit) * (16 * OFFSET_BYTES) + (SMALL_PAGES ? 0 : u * 16 * OFFSET_BYTES);
      offsets[u] = OFFSET_BYTES ? UnitOffsets::load(place)
                                : UnitOffsets::follow(16 * ((TILE_UNITS * tile + u) & mask) + lane.g);
    }
  };
#endif
#endif

  int tile = int(warp);
  if (tile >= n_tiles) return;
#if TABLE_HEADS
  const ScoreLane score = score_lane(lane);
  if constexpr (!BY_TABLE<K>) fetch_query(state, lane);
#endif
  Place place = place_of(tile, records_of(tile));
#if POSITION_RUNS
  find_positions(tile, firsts_of(tile));
#elif POSITION_GROUPS
  find_positions(tile);
  // 5/3/3/3 has no registers left for it.
  constexpr bool STAYS = GAP_STEP_MAY_STAY && !SINGLE<K> && !SINGLE<V>;
  const GapStep only = STAYS ? GapStep::load(lane, 0).kept() : GapStep();
#endif
  load_keys(place);
  int next = tile + N_WARPS;
  Records ahead = records_of(min(next, n_tiles - 1));
#if POSITION_RUNS
  Firsts firsts_ahead = firsts_of(min(next, n_tiles - 1));
  turned = turned_to(first[0], lane, 0);
#endif

  while (true) {
    const bool more = next < n_tiles;
    // Waits for the record, which came with the keys: before the values are asked for, so that nothing
    // that waits for either waits for them.
    prefetch(next, ahead, more);
    auto load_next = [&] {
      if (more) {
        place = place_of(next, ahead);
        load_keys(place);
        ahead = records_of(min(next + N_WARPS, n_tiles - 1));
#if POSITION_RUNS
        find_positions(next, firsts_ahead);
        firsts_ahead = firsts_of(min(next + N_WARPS, n_tiles - 1));
#elif POSITION_GROUPS
        find_positions(next);
#endif
      }
#if POSITION_RUNS
      turned = turned_to(first[0], lane, 0);  // among the values, whose work hides it
#endif
    };
#if !LOGITS
    // The values of this tile arrive while its keys are decoded; the keys of the next tile, asked for
    // once the first values are in use, while the other values are. Never both at a time: the
    // assembler gives all loads of the loop one scoreboard, so waiting for one is waiting for all.
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u) value[u].load(value_from, value_place(place, u));
    loads_first();
#endif
    Tile<TILE_UNITS> scores;
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u) {
      clear_scores(scores.s[u]);
#if TABLE_HEADS
      if constexpr (BY_TABLE<K>) score_unit_by_table<K>(scores.s[u][0], key[u], state, lane, score, key_radii);
      else
#endif
      score_unit<K>(scores.s[u], key[u], state, lane, key_radii);
      if constexpr (K::NORM) {
        scores.key_factor[u][0] = half_to_float(key[u].norms.pair) * key_norm_factor;
        scores.key_factor[u][1] = high_half_to_float(key[u].norms.pair) * key_norm_factor;
      } else {
        scores.key_factor[u][0] = scores.key_factor[u][1] = 1.f;
      }
    }
#if POSITION_RUNS
    run_terms<TILE_UNITS>(scores.term, first, turned, lane);
#elif POSITION_GROUPS
    gap_terms<TILE_UNITS, STAYS>(scores.term, first, offsets, lane, only);
#endif
#if !LOGITS
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u)
      if constexpr (V::NORM) {
        scores.value_factor[u][0] = half_to_float(value[u].norms.pair);
        scores.value_factor[u][1] = high_half_to_float(value[u].norms.pair);
      } else {
        scores.value_factor[u][0] = scores.value_factor[u][1] = 1.f;
      }
    scale_scores<TILE_UNITS, K::NORM>(scores, p, offset);
#endif
    const Place here = place;
    bool partial = WINDOW || LOGITS;
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u) partial = partial || live_of(here, u) < 16;
    if (partial) {
      bool alive[TILE_UNITS][2];
#pragma unroll
      for (int u = 0; u < TILE_UNITS; ++u) {
        const int unit = min(TILE_UNITS * tile + u, n_units - 1), inside = unit & mask;
        const int entry = WINDOW || LOGITS ? p.entries[segment.first_page + (unit >> shift)] : 0;
        find_alive(alive[u], live_of(here, u), p, segment.row, entry, 16 * inside, lane);
#if LOGITS
        if (TILE_UNITS * tile + u < n_units) {
          const int page_size = 16 << shift;
#if POSITION_GROUPS
          const float* term = scores.term[u][0];
#else
          const float* term = nullptr;
#endif
          write_logits(scores.s[u], scores.key_factor[u], term, alive[u],
                       p.logits + u64(entry) * p.group_size * page_size + 16 * inside, page_size, 16,
                       offset, p, lane);
        }
#else
#pragma unroll
        for (int slot = 0; slot < LANE_BLOCKS; ++slot) {
          const int eight = HEAD_DIM == 64 ? int(lane.g) / 4 : slot / (2 * COLUMNS);
          if (8 * eight + 2 * int(lane.t) + slot % 2 >= live_of(here, u)) value[u].clear(slot);
        }
#endif
      }
#if !LOGITS
      drop_dead<TILE_UNITS>(scores, alive);
#endif
    }
#if !LOGITS
    // The first values are decoded before the softmax, whose long chain of dependent steps would
    // leave the lookups idle (and whose vote keeps the loads of the next keys behind them).
    u32 even[8], odd[8];
    V::decode(even, value[0], 0, lane, value_radii);
    V::decode(odd, value[0], 1, lane, value_radii);
    weigh<TILE_UNITS, V::NORM>(state, scores, lane);
    load_next();
    constexpr int STEPS = LANE_BLOCKS / 2;
#pragma unroll
    for (int u = 0; u < TILE_UNITS; ++u)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        if (u + step > 0) {
          V::decode(even, value[u], 2 * step, lane, value_radii);
          V::decode(odd, value[u], 2 * step + 1, lane, value_radii);
        }
#pragma unroll
        for (int n = 0; n < GROUP_TILES; ++n) {
          if constexpr (HEAD_DIM == 64) {
            accumulate(state.o[n][0], scores.transposed[u][n][0], even, odd);
            accumulate(state.o[n][1], scores.transposed[u][n][1], even, odd);
          } else {
            accumulate(state.o[n][step % COLUMNS], scores.transposed[u][n][step / COLUMNS], even, odd);
          }
        }
      }
#else
    load_next();
#endif
    if (!more) break;
    tile = next;
    next += N_WARPS;
  }
}

// Sixteen coordinates of one row: loaded, and as fragment registers. Nothing is read of a dead row.
struct DenseRow {
  static constexpr bool NORM = false;
  static constexpr int BLOCK_BYTES = 32, ROW_BYTES = N_BLOCKS * BLOCK_BYTES, UNIT_BYTES = 16 * ROW_BYTES;
  struct Raw { uint4 x, y; };
  static __device__ __forceinline__ Raw load(const u8* block, bool live) {
    const uint4 zero = {0, 0, 0, 0};
    if (!live) return {zero, zero};
    return {load_stream16(block), load_stream16(block + 16)};
  }
  static __device__ __forceinline__ void convert(u32 (&f)[8], const Raw& raw) {
    const u32 words[8] = {raw.x.x, raw.x.y, raw.x.z, raw.x.w, raw.y.x, raw.y.y, raw.y.z, raw.y.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      f[i] = pack_half2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
  }
};

struct Int8Row {
  static constexpr bool NORM = true;
  static constexpr int BLOCK_BYTES = 16, ROW_BYTES = N_BLOCKS * BLOCK_BYTES, UNIT_BYTES = 16 * ROW_BYTES + 32;
  struct Raw { uint4 x; };
  static __device__ __forceinline__ Raw load(const u8* block, bool live) {
    const uint4 zero = {0, 0, 0, 0};
    return {live ? load_stream16(block) : zero};
  }
  static __device__ __forceinline__ void convert(u32 (&f)[8], const Raw& raw) {
    const u32 words[4] = {raw.x.x, raw.x.y, raw.x.z, raw.x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // 0x6400 + u is the fp16 number 1024 + u; u = code + 128.
      const u32 biased = words[i] ^ 0x80808080u;
      f[2 * i] = half2_add(__byte_perm(biased, 0x64646464u, 0x4140), 0xe480e480u);
      f[2 * i + 1] = half2_add(__byte_perm(biased, 0x64646464u, 0x4342), 0xe480e480u);
    }
  }
};

// One unit of row-major tokens at `key`, `value`. first_position: of the unit where its tokens follow one
// another, as those of the tail do; else of its page, and place_of_offsets says the rest.
template <class F>
static __device__ __forceinline__ void run_rows(State& state, const u8* key, const u8* value, int live,
                                                int row, int entry, int first_token,
                                                u32 first_position, const u8* offsets_from,
                                                const Params& p, const Lane& lane,
                                                float* logit_rows, int logit_stride,
                                                int logit_limit,
                                                const float (&offset)[GROUP_TILES][2]) {
  // Keys and values are asked for together where registers allow: a unit waits for memory once.
  constexpr int KEY_STEPS = N_BLOCKS / 4, EIGHTS = HEAD_DIM == 64 ? 1 : 2;
  typename F::Raw keys[KEY_STEPS][2];
  u32 key_norms = 0;
  const u8* key_block = key + lane.g * F::ROW_BYTES + lane.t * F::BLOCK_BYTES;
#pragma unroll
  for (int b = 0; b < KEY_STEPS; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      keys[b][h] = F::load(key_block + 8 * h * F::ROW_BYTES + 4 * b * F::BLOCK_BYTES, int(lane.g) + 8 * h < live);
  if constexpr (F::NORM) key_norms = load_stream4(key + 16 * F::ROW_BYTES + 4 * lane.g);
#if !LOGITS
  typename F::Raw values[EIGHTS][COLUMNS][2];
  constexpr bool TOGETHER = sizeof(values) <= 128;
  u32 value_norms = 0;
  if constexpr (F::NORM) value_norms = load_stream4(value + 16 * F::ROW_BYTES + 4 * lane.g);
  const int first_row = 2 * int(lane.t) + (HEAD_DIM == 64 ? 8 * (int(lane.g) / 4) : 0);
  const u8* value_block = value + first_row * F::ROW_BYTES + (HEAD_DIM == 64 ? lane.g % 4 : lane.g) * F::BLOCK_BYTES;
  auto load_values = [&] {
#pragma unroll
    for (int eight = 0; eight < EIGHTS; ++eight)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          values[eight][c][odd] = F::load(value_block + (8 * eight + odd) * F::ROW_BYTES + 8 * c * F::BLOCK_BYTES,
                                          first_row + 8 * eight + odd < live);
  };
  if (TOGETHER) load_values();
#endif
  Tile<1> scores;
  clear_scores(scores.s[0]);
#pragma unroll
  for (int b = 0; b < KEY_STEPS; ++b) {
    u32 low[8], high[8];
    F::convert(low, keys[b][0]);
    F::convert(high, keys[b][1]);
    score_block(scores.s[0], state, b, low, high);
  }
  scores.key_factor[0][0] = scores.key_factor[0][1] = 1.f;
  if constexpr (F::NORM) {
    const float factor = SOFTCAP || LOGITS ? 1.f : p.scale_log2;
    scores.key_factor[0][0] = half_to_float(key_norms) * factor;
    scores.key_factor[0][1] = high_half_to_float(key_norms) * factor;
  }
  bool alive[1][2];
  find_alive(alive[0], live, p, row, entry, first_token, lane);
  const float* term = nullptr;
#if POSITION_GROUPS
  u32 first[1] = {first_position};
#if POSITION_RUNS
  run_terms<1>(scores.term, first, turned_to(first_position, lane, 0), lane);
#else
  UnitOffsets offsets[1] = {UnitOffsets::follow(lane.g)};
  if (OFFSET_BYTES && offsets_from) offsets[0] = UnitOffsets::load(offsets_from);
  gap_terms<1, false>(scores.term, first, offsets, lane, GapStep());
#endif
  term = scores.term[0][0];
#endif
#if LOGITS
  write_logits(scores.s[0], scores.key_factor[0], term, alive[0], logit_rows, logit_stride, logit_limit,
               offset, p, lane);
#else
  scores.value_factor[0][0] = scores.value_factor[0][1] = 1.f;
  if constexpr (F::NORM) {
    scores.value_factor[0][0] = half_to_float(value_norms);
    scores.value_factor[0][1] = high_half_to_float(value_norms);
  }
  scale_scores<1, F::NORM>(scores, p, offset);
  drop_dead<1>(scores, alive);
  weigh<1, F::NORM>(state, scores, lane);
  if (!TOGETHER) load_values();
#pragma unroll
  for (int eight = 0; eight < EIGHTS; ++eight)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      u32 even[8], odd[8];
      F::convert(even, values[eight][c][0]);
      F::convert(odd, values[eight][c][1]);
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n) {
        if constexpr (HEAD_DIM == 64) {
          accumulate(state.o[n][0], scores.transposed[0][n][0], even, odd);
          accumulate(state.o[n][1], scores.transposed[0][n][1], even, odd);
        } else {
          accumulate(state.o[n][c], scores.transposed[0][n][eight], even, odd);
        }
      }
    }
#endif
}

template <class F>
static __device__ __forceinline__ void run_row_pages(State& state, const Segment& segment,
                                                     const Params& p, const Lane& lane, u32 warp,
                                                     const float (&offset)[GROUP_TILES][2]) {
  const int shift = p.page_units_log2, mask = (1 << shift) - 1;
  const int n_units = segment.n_pages << shift;
#if TABLE_HEADS
  fetch_query(state, lane);
#endif
  if (int(warp) >= n_units) return;
  // Where the next unit lies comes with this one.
  auto record_of = [&](int unit) { return __ldg(p.records + segment.first_page + (min(unit, n_units - 1) >> shift)); };
  uint2 ahead = record_of(int(warp));
#pragma unroll 1
  for (int unit = int(warp); unit < n_units; unit += N_WARPS) {
    const uint2 record = ahead;
    ahead = record_of(unit + N_WARPS);
    const int page = segment.first_page + (unit >> shift), inside = unit & mask;
    const int live = int(record.y) - 16 * inside;
    if (live <= 0 && !LOGITS) continue;
    const u8* key = p.pool + u64(record.x) * 16 + inside * F::UNIT_BYTES;
    const int entry = WINDOW || LOGITS ? p.entries[page] : 0, page_size = 16 << shift;
    float* rows = LOGITS ? p.logits + u64(entry) * p.group_size * page_size + 16 * inside : nullptr;
    u32 first_position = 0;
    const u8* offsets_from = nullptr;
#if POSITION_GROUPS
    first_position = u32(p.first_positions[page]) + (OFFSET_BYTES ? 0 : 16 * inside);
#if OFFSET_BYTES
    offsets_from = place_of_offsets(p, page, lane) + inside * 16 * OFFSET_BYTES;
#endif
#endif
    run_rows<F>(state, key, key + (F::UNIT_BYTES << shift), live, segment.row, entry, 16 * inside,
                first_position, offsets_from, p, lane, rows, page_size, 16, offset);
  }
}

static __device__ __forceinline__ void run_tail(State& state, const Segment& segment, const Params& p,
                                                const Lane& lane, u32 warp,
                                                const float (&offset)[GROUP_TILES][2]) {
  // Counts change between steps without a plan: never beyond what is there.
  const int n_tokens = min(p.tail_tokens[segment.row / p.n_kv_heads], p.tail_capacity);
  const int n_units = ((LOGITS ? p.tail_capacity : n_tokens) + 15) / 16;
#if TABLE_HEADS
  fetch_query(state, lane);
#endif
#pragma unroll 1
  for (int unit = int(warp); unit < n_units; unit += N_WARPS) {
    const u64 first = u64(segment.row) * p.tail_capacity + 16 * unit;
    float* rows = LOGITS ? p.tail_logits + u64(segment.row) * p.group_size * p.tail_capacity + 16 * unit
                         : nullptr;
    const u32 first_position =
        POSITION_GROUPS ? u32(p.tail_positions[segment.row / p.n_kv_heads]) + 16 * unit : 0;
    run_rows<DenseRow>(state, p.tail_keys + first * DenseRow::ROW_BYTES,
                       p.tail_values + first * DenseRow::ROW_BYTES, n_tokens - 16 * unit, segment.row,
                       -1, 16 * unit, first_position, nullptr, p, lane, rows, p.tail_capacity,
                       p.tail_capacity - 16 * unit, offset);
  }
}

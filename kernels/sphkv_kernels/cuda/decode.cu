// One launch of a decode step: a block works through its segments; the blocks of a row meet in global
// memory and the last one to arrive merges (order of parts, not of arrival: results repeat bit for bit).

struct Totals { float m, l; };

#if !LOGITS
static_assert(FRAGMENTS == GROUP_TILES * COLUMNS * 8 * 32, "float4 of one warp's O");
constexpr int HEADS = 8 * GROUP_TILES;
constexpr int OWNED = (FRAGMENTS + N_THREADS - 1) / N_THREADS;

// Head and first output coordinate of fragment float4 number `f`: components (block b, b + 1; even, odd).
static __device__ __forceinline__ void write_output(const Params& p, int row, int f, float4 o, float inverse) {
  const int lane = f % 32, i = (f / 32) % 8, c = (f / 256) % COLUMNS, n = f / (256 * COLUMNS);
  const int g = lane / 4, t = lane % 4, head = 8 * n + g;
  if (head >= p.group_size || 2 * t >= N_BLOCKS) return;
  const int n_q_heads = p.n_kv_heads * p.group_size;
  float* out = p.output + (u64(row / p.n_kv_heads) * n_q_heads + (row % p.n_kv_heads) * p.group_size + head) * HEAD_DIM;
  const int block = 8 * c + 2 * t;
  *reinterpret_cast<float2*>(out + 16 * block + 2 * i) = make_float2(o.x * inverse, o.z * inverse);
  *reinterpret_cast<float2*>(out + 16 * (block + 1) + 2 * i) = make_float2(o.y * inverse, o.w * inverse);
}

static __device__ __forceinline__ void write_log_sum_exp(const Params& p, int row, int head, float m, float l) {
  if (head >= p.group_size) return;
  const u64 q_head = u64(row) * p.group_size + head;
  float value = l > 0.f ? (m + log2f(l)) * 0.69314718055994531f : -__int_as_float(0x7f800000);
  // Without a soft-cap an offset common to all tokens of a head only shifts the log-sum-exp.
  if (!SOFTCAP && p.offset) value += p.offset[q_head] * (p.scale_log2 * 0.69314718055994531f);
  p.log_sum_exp[q_head] = value;
}

static __device__ __forceinline__ bool fragment_is_used(const Params& p, int f) {
  return f < FRAGMENTS && 8 * (f / (256 * COLUMNS)) + (f % 32) / 4 < p.group_size;
}

// Sum of the warps' states: (m, l) per head in `totals`, O in `o` (this thread's fragment float4s).
static __device__ __forceinline__ void reduce_block(State& state, const Lane& lane, u32 warp,
                                                    float4 (&o)[OWNED], Totals* warp_totals,
                                                    Totals* totals, float4* buffers) {
#pragma unroll
  for (int n = 0; n < GROUP_TILES; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float l = state.l[n][h];
      l += __shfl_xor_sync(0xffffffffu, l, 4);
      l += __shfl_xor_sync(0xffffffffu, l, 8);
      l += __shfl_xor_sync(0xffffffffu, l, 16);
      if (lane.g == 0) warp_totals[warp * HEADS + 8 * n + 2 * lane.t + h] = {state.m[n][h], l};
    }
  __syncthreads();
  auto top_of = [&](int head) {
    float m = NO_MAX;
#pragma unroll
    for (int w = 0; w < N_WARPS; ++w) m = fmaxf(m, warp_totals[w * HEADS + head].m);
    return m;
  };
  if (threadIdx.x < HEADS) {  // read after the next barrier
    const float m = top_of(threadIdx.x);
    float l = 0.f;
#pragma unroll
    for (int w = 0; w < N_WARPS; ++w) {
      const Totals part = warp_totals[w * HEADS + threadIdx.x];
      l += part.l * exp2_approx(part.m - m);
    }
    totals[threadIdx.x] = {m, l};
  }
  const float unscale = state.value_scale > 0.f ? 1.f / state.value_scale : 1.f;
#pragma unroll
  for (int k = 0; k < OWNED; ++k) o[k] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int first = 0; first < N_WARPS; first += N_BUFFERS) {
    if (int(warp) >= first && int(warp) < first + N_BUFFERS) {
      float4* buffer = buffers + (warp - first) * FRAGMENTS;
#pragma unroll
      for (int n = 0; n < GROUP_TILES; ++n) {
        const int head = 8 * n + int(lane.g);
        float factor = exp2_approx(warp_totals[warp * HEADS + head].m - top_of(head));
        if (ANY_VALUE_NORM) factor *= unscale;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float4 x;
            if constexpr (HEAD_DIM == 64) {
              // Set 0 is valid in lanes t < 2 (tokens 0..7), set 1 in t >= 2 (tokens 8..15).
              float own[4];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                own[j] = (lane.t < 2 ? state.o[n][0][i][j] : state.o[n][1][i][j]) * factor;
                own[j] += __shfl_xor_sync(0xffffffffu, own[j], 2);
              }
              x = make_float4(own[0], own[1], own[2], own[3]);
            } else {
              x = make_float4(state.o[n][c][i][0] * factor, state.o[n][c][i][1] * factor,
                              state.o[n][c][i][2] * factor, state.o[n][c][i][3] * factor);
            }
            buffer[((n * COLUMNS + c) * 8 + i) * 32 + lane.index] = x;
          }
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWNED; ++k) {
      const int f = threadIdx.x + k * N_THREADS;
      if (f < FRAGMENTS) {
#pragma unroll
        for (int b = 0; b < N_BUFFERS; ++b)
          if (first + b < N_WARPS) {
            const float4 x = buffers[b * FRAGMENTS + f];
            o[k].x += x.x; o[k].y += x.y; o[k].z += x.z; o[k].w += x.w;
          }
      }
    }
    __syncthreads();
  }
}

struct Sum { float m, l; float4 o; };

// Adds n more sums, weighted by their maxima, in their order.
template <int N>
static __device__ __forceinline__ void add_sums(Sum& sum, const Sum (&more)[N]) {
  float top = sum.m;
#pragma unroll
  for (int n = 0; n < N; ++n) top = fmaxf(top, more[n].m);
  const float change = exp2_approx(sum.m - top);
  sum = {top, sum.l * change, make_float4(sum.o.x * change, sum.o.y * change, sum.o.z * change, sum.o.w * change)};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float w = exp2_approx(more[n].m - top);
    sum.l += w * more[n].l;
    sum.o.x += w * more[n].o.x; sum.o.y += w * more[n].o.y; sum.o.z += w * more[n].o.z; sum.o.w += w * more[n].o.w;
  }
}

// Weighted sum of all parts of a row. Threads that would be idle (few heads, few coordinates) take a
// share of the parts, as many as `scratch` has room for; parts and shares are added in their order.
static __device__ __forceinline__ void merge_parts(const Params& p, const Segment& segment, Sum* scratch) {
  constexpr int AT_ONCE = 8, LANES_OF_HEAD = N_BLOCKS < 8 ? N_BLOCKS / 2 : 4;
  const Sum nothing = {NO_MAX, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
  constexpr int ROOM = N_BUFFERS * FRAGMENTS * sizeof(float4) / sizeof(Sum);
  const int n_used = COLUMNS * 8 * LANES_OF_HEAD * p.group_size;
  const int n_shares = max((ROOM < N_THREADS ? ROOM : N_THREADS) / n_used, 1);
  const int share = int(threadIdx.x) / n_used, of_share = (segment.n_parts + n_shares - 1) / n_shares;
#pragma unroll 1
  for (int first_used = 0; first_used < n_used; first_used += N_THREADS) {
    const int used = first_used + int(threadIdx.x) - share * n_used;
    const bool takes_part = used < n_used && share < n_shares;
    const int t = used % LANES_OF_HEAD, head = used / LANES_OF_HEAD % p.group_size, i = used / LANES_OF_HEAD / p.group_size;
    const int f = (head / 8 * COLUMNS * 8 + i) * 32 + head % 8 * 4 + t;  // i: of 8 and of columns
    const float4* outputs = p.partial_output + u64(segment.part_base) * FRAGMENTS + f;
    const float* states = p.partial_state + (u64(segment.part_base) * HEADS + head) * 2;
    const int end = takes_part ? min(segment.n_parts, (share + 1) * of_share) : 0;
    Sum sum = nothing;
#pragma unroll 1
    for (int part = share * of_share; part < end; part += AT_ONCE) {
      Sum found[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        found[n] = nothing;
        if (part + n < end) {
          const float2 state = load_l2_8(states + u64(part + n) * HEADS * 2);
          found[n] = {state.x, state.y, load_l2_16(outputs + u64(part + n) * FRAGMENTS)};
        }
      }
      add_sums(sum, found);
    }
    if (n_shares > 1) {  // then all are used at once
      if (ROOM >= N_THREADS || takes_part) scratch[threadIdx.x] = sum;
      __syncthreads();
      for (int other = 1; other < n_shares && share == 0; ++other) {
        const Sum more[1] = {scratch[other * n_used + used]};
        add_sums(sum, more);
      }
    }
    if (!takes_part || share > 0) continue;
    write_output(p, segment.row, f, sum.o, sum.l > 0.f ? 1.f / sum.l : 0.f);
    if (t == 0 && i == 0) write_log_sum_exp(p, segment.row, head, sum.m, sum.l);
  }
}

static __device__ __forceinline__ void emit(State& state, const Params& p, const Segment& segment,
                                            const Lane& lane, u32 warp) {
  u8* scratch = shared_memory + SCRATCH_OFFSET;
  Totals* warp_totals = reinterpret_cast<Totals*>(shared_memory + TOTALS_OFFSET);
  Totals* totals = warp_totals + N_WARPS * HEADS;
  int* is_last = reinterpret_cast<int*>(totals + HEADS);
  float4 o[OWNED];
  reduce_block(state, lane, warp, o, warp_totals, totals, reinterpret_cast<float4*>(scratch));
  if (segment.n_parts == 1) {
#pragma unroll
    for (int k = 0; k < OWNED; ++k) {
      const int f = threadIdx.x + k * N_THREADS;
      if (fragment_is_used(p, f)) {
        const float l = totals[8 * (f / (256 * COLUMNS)) + (f % 32) / 4].l;
        write_output(p, segment.row, f, o[k], l > 0.f ? 1.f / l : 0.f);
      }
    }
    if (threadIdx.x < HEADS)
      write_log_sum_exp(p, segment.row, threadIdx.x, totals[threadIdx.x].m, totals[threadIdx.x].l);
    __syncthreads();  // the scratch is free for the next segment
    return;
  }
  const u64 part = u64(segment.part_base + segment.part);
#pragma unroll
  for (int k = 0; k < OWNED; ++k) {
    const int f = threadIdx.x + k * N_THREADS;
    if (fragment_is_used(p, f)) p.partial_output[part * FRAGMENTS + f] = o[k];
  }
  if (threadIdx.x < HEADS) {
    p.partial_state[(part * HEADS + threadIdx.x) * 2] = totals[threadIdx.x].m;
    p.partial_state[(part * HEADS + threadIdx.x) * 2 + 1] = totals[threadIdx.x].l;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the barriers before and after extend it to the block
    const int before = atomicAdd(p.arrivals + segment.row, 1);
    __threadfence();
    *is_last = before == segment.n_parts - 1;
    if (*is_last) p.arrivals[segment.row] = 0;  // ready for the next launch
  }
  __syncthreads();
  if (*is_last) merge_parts(p, segment, reinterpret_cast<Sum*>(scratch));
  __syncthreads();
}
#endif

// How many steps the warps of a block take in turn over a segment: units of rows, tiles of a code.
static __device__ __forceinline__ int steps_of(const Segment& segment, const Params& p) {
  const int n_units = segment.n_pages << p.page_units_log2;
  return is_row_tier(segment.tier) ? n_units : (n_units + TILE_UNITS - 1) / TILE_UNITS;
}

// Into L2, before anything waits for it: what this warp reads in its first step of a segment, or, of a
// page that several warps begin with, 4 KB of it each; and its record. `pages`: where the segment's
// first pages lie. Not more: what is asked for first comes first.
static __device__ __forceinline__ void prefetch_first_step(const Params& p, int tier, int first_page, int n_pages,
                                                           const u32* pages, u32 warp, const Lane& lane) {
  const int units = is_row_tier(tier) ? 1 : TILE_UNITS;
  const int unit = units * int(warp), page = unit >> p.page_units_log2, known = min(n_pages, FIRST_PAGES);
  if (page >= known) return;
  // A tile of pages of 16 tokens has two.
  const bool two = SMALL_PAGES && units > 1;
  const u32 place = pages[two ? min(page + int(lane.index) / 16, known - 1) : page];
  const u32 inside = unit & ((1 << p.page_units_log2) - 1);
  const u32 line = two ? lane.index % 16 : lane.index + 32 * inside / units;
  prefetch_line(p.pool + u64(place) * 16 + line * 128);
  if (lane.index == 0) prefetch_line(reinterpret_cast<const u8*>(p.records + first_page + page));
#if POSITION_GROUPS
  if (lane.index == 1) prefetch_line(reinterpret_cast<const u8*>(p.first_positions + first_page + page));
#if OFFSET_BYTES
  if (lane.index == 2) prefetch_line(place_of_offsets(p, first_page, lane) + u64(unit) * 16 * OFFSET_BYTES);
#endif
#endif
}

extern "C" __global__ void __launch_bounds__(N_THREADS, 1) KERNEL_NAME(const __grid_constant__ Params p) {
  u32 base;
  asm("mov.u32 %0, shared_memory;" : "=r"(base));
  if (base != SHARED_BASE) __trap();
  const u32 warp = threadIdx.x / 32;
  const Lane lane = lane_of_thread();
  // Tables, the block's first segment, its query and what each warp reads first are under way together:
  // what waits here is a third of a short decode.
#if TABLE_SETS
  prefetch_tables(p);  // the block's segment says which of them, and comes as late as they do
#else
  const TableRows rows = load_tables(p);
#endif
#if TABLE_HEADS
  const BookRows book = load_book(p);
#endif
  const int4* head = reinterpret_cast<const int4*>(p.heads + blockIdx.x * HEAD_INTS);
  const int4 a = __ldg(head), b = __ldg(head + 1), rest = __ldg(head + 2);
  Segment segment = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  prefetch_first_step(p, segment.tier, segment.first_page, segment.n_pages,
                      reinterpret_cast<const u32*>(head + 3), warp, lane);
  Query query;
  load_query(query, p, segment.row, lane);
#if TABLE_SETS
  bring_tables<4>(p, 0u, segment.tier, rest.z);
#else
  store_tables(rows);
#endif
#if TABLE_HEADS
  store_book(book);
#endif
  State state;
  float offset[GROUP_TILES][2];
  reset(state);
  convert_query(state, query, p, lane);
  load_offset(offset, p, segment.row, lane);
#if TABLE_HEADS
  share_query(state, lane, warp);
  __syncthreads();
  fill_query_table(p);
#endif
#if POSITION_GROUPS
  store_position_fragments(p, segment.row);
#endif
#if LISTED_SEGMENTS
  // Many segments follow in a mixed cache: each would begin with a detour to memory.
  constexpr int SEGMENT_WORDS = SEGMENT_INTS / 4;
  int4* listed = reinterpret_cast<int4*>(shared_memory + SEGMENTS_OFFSET);
  for (int i = threadIdx.x; i < SEGMENT_WORDS * min(rest.y - rest.x, LISTED_SEGMENTS); i += N_THREADS)
    listed[i] = __ldg(reinterpret_cast<const int4*>(p.segments + rest.x * SEGMENT_INTS) + i);
  int turn = 0;  // which warp takes a segment's first step: the one after the last of the segment before
#endif
  __syncthreads();
  int next = rest.x;
#pragma unroll 1
  while (true) {
#if TABLE_SETS
    const u32 present = *present_sets();
    if (segment.tier >= 0 && !(present & bit_of(segment.tier))) {
      __syncthreads();  // no warp reads what is overwritten any more
      bring_tables<1>(p, present, segment.tier, -1);
      __syncthreads();
    }
#endif
#if LISTED_SEGMENTS
    const int then_turn = segment.flags & LAST ? 0 : (turn + steps_of(segment, p)) % N_WARPS;
    // The next segment begins to come while this one is worked on.
    if (next < rest.y && next - rest.x < LISTED_SEGMENTS) {
      const int4* then = listed + SEGMENT_WORDS * (next - rest.x);
      prefetch_first_step(p, then->y, then->z, then->w, reinterpret_cast<const u32*>(then + 2),
                          (warp + N_WARPS - then_turn) % N_WARPS, lane);
    }
    run_tier(state, segment, p, lane, (warp + N_WARPS - turn) % N_WARPS, offset);
    turn = then_turn;
#else
    run_tier(state, segment, p, lane, warp, offset);
#endif
    if ((segment.flags & TAIL) && p.tail_keys) run_tail(state, segment, p, lane, warp, offset);
#if !LOGITS
    if (segment.flags & LAST) emit(state, p, segment, lane, warp);
#endif
    if (next >= rest.y) break;
    const int4* words = reinterpret_cast<const int4*>(p.segments + next * SEGMENT_INTS);
#if LISTED_SEGMENTS
    const int place = next - rest.x;
    const int4 c = place < LISTED_SEGMENTS ? listed[SEGMENT_WORDS * place] : __ldg(words);
    const int4 e = place < LISTED_SEGMENTS ? listed[SEGMENT_WORDS * place + 1] : __ldg(words + 1);
#else
    const int4 c = __ldg(words), e = __ldg(words + 1);
#endif
    segment = {c.x, c.y, c.z, c.w, e.x, e.y, e.z, e.w};
    ++next;
    if (segment.flags & FIRST) {
      Query later;
      reset(state);
      load_query(later, p, segment.row, lane);
      convert_query(state, later, p, lane);
      load_offset(offset, p, segment.row, lane);
#if POSITION_GROUPS || TABLE_HEADS
      __syncthreads();  // in logit mode, warps may still be in the row before
#endif
#if TABLE_HEADS
      share_query(state, lane, warp);
      __syncthreads();
      fill_query_table(p);
#endif
#if POSITION_GROUPS
      store_position_fragments(p, segment.row);
#endif
#if POSITION_GROUPS || TABLE_HEADS
      __syncthreads();
#endif
    }
  }
}

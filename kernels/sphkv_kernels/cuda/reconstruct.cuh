// The detour that angle-domain attention avoids, as a baseline: codes -> dense bf16 keys and values in
// global memory. One warp takes a unit of 16 tokens; every block is 32 contiguous bytes of a row.

static __device__ __forceinline__ void store_block(u16* row, int block, const u32 (&f)[8], float factor) {
  u32 words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = half_to_float(f[i]) * factor, y = half_to_float(f[i] >> 16) * factor;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(y), "f"(x));
  }
  uint4* target = reinterpret_cast<uint4*>(row + 16 * block);
  target[0] = make_uint4(words[0], words[1], words[2], words[3]);
  target[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

template <class F, bool VALUE>
static __device__ __forceinline__ void write_unit(const u8* unit, u16* rows, int live, const Lane& lane,
                                                  uint2 radii) {
  typename F::Raw raw;
  raw.load(F::Raw::sources(unit, lane), 0);
  raw.load_norms(F::Raw::sources(unit, lane), 0);
#pragma unroll
  for (int slot = 0; slot < LANE_BLOCKS; ++slot) {
    int token = lane.g + 8 * (slot % 2), block = 4 * (slot / 2) + lane.t;
    if (VALUE) {
      const int eight = HEAD_DIM == 64 ? lane.g / 4 : slot / (2 * COLUMNS);
      token = 8 * eight + 2 * lane.t + slot % 2;
      block = HEAD_DIM == 64 ? lane.g % 4 : lane.g + 8 * ((slot / 2) % COLUMNS);
    }
    float factor = 1.f;
    if (F::NORM) {
      const u32 pair = __shfl_sync(0xffffffffu, raw.norms.pair, 4 * (token % 8));
      factor *= half_to_float(token < 8 ? pair : pair >> 16);
    }
    u32 f[8];
    F::decode(f, raw, slot, lane, radii);
    if (token < live) store_block(rows + token * HEAD_DIM, block, f, factor);
  }
}

// Keys go to p.logits, values to p.tail_logits, which this kernel takes as (n_entries, page_size, HEAD_DIM) bf16:
// a page has the place of its entry in the page table. Dead rows are not written.
template <class K, class V>
static __device__ __forceinline__ void reconstruct_pages(const Params& p, const Segment& segment,
                                                         const Lane& lane, u32 warp, uint2 key_radii,
                                                         uint2 value_radii) {
  const int shift = p.page_units_log2, mask = (1 << shift) - 1;
  for (int unit = warp; unit < segment.n_pages << shift; unit += N_WARPS) {
    const int page = segment.first_page + (unit >> shift), inside = unit & mask;
    const uint2 record = __ldg(p.records + page);
    const int live = int(record.y) - 16 * inside;
    const u8* key = p.pool + u64(record.x) * 16 + inside * K::UNIT_BYTES;
    const u8* value = p.pool + u64(record.x) * 16 + (K::UNIT_BYTES << shift) + inside * V::UNIT_BYTES;
    const u64 row = (u64(p.entries[page]) << (4 + shift)) + 16 * inside;
    write_unit<K, false>(key, reinterpret_cast<u16*>(p.logits) + row * HEAD_DIM, live, lane, key_radii);
    write_unit<V, true>(value, reinterpret_cast<u16*>(p.tail_logits) + row * HEAD_DIM, live, lane, value_radii);
  }
}
